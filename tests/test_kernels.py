"""Soft caps and sinks: which kernel takes them, its gradients, and the compiled graph."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from attnopt.ops import attention_reference, capped
from attnopt.ops.kernels import Scoring, kernel, way
from attnopt.ops.sdpa import attend
from tests.conformance import draw

CAPPED, SHARED = {"softcap": 2.0}, {"sinks": draw(4, seed=5)}
SCORES = {"sinks": SHARED, "soft cap": CAPPED, "both": CAPPED | SHARED}


def operands(queries=70, keys=70):
    return (
        draw(2, 4, queries, 8, seed=1),
        draw(2, 2, keys, 8, seed=2),
        draw(2, 2, keys, 6, seed=3),
    )


def slopes(call, given):
    found = call(*given)
    return found, torch.autograd.grad((found * draw(*found.shape, seed=4)).sum(), given)


def test_each_way_says_why():
    q = torch.zeros(1, 4, 3, 8)
    for scoring, name in (
        (Scoring(), "kernel"),
        (Scoring(sinks=torch.zeros(4)), "shared"),
        (Scoring(softcap=1.0), "blocks"),
        (Scoring(softcap=1.0, sinks=torch.zeros(4)), "blocks"),
    ):
        chosen = way(q, None, scoring)
        assert (chosen.name, bool(chosen.why)) == (name, True)
    learned = torch.zeros(3, 3, requires_grad=True)
    assert way(q, learned, Scoring(sinks=torch.zeros(4))).name == "blocks"
    assert way(q.to("meta"), None, Scoring(sinks=torch.zeros(4))).name == "blocks"


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_everything(scores, causal):
    given = [x.requires_grad_() for x in operands()]
    options = {n: x for n, x in scores.items() if n != "sinks"}
    if "sinks" in scores:
        given.append(scores["sinks"].clone().requires_grad_())

    def by(call):
        def called(*x):
            named = {"sinks": x[3]} if len(x) > 3 else {}
            return call(*x[:3], causal=causal, **options, **named)

        return called

    wanted = slopes(by(lambda *x, **o: attention_reference(*x, **o)[0]), given)
    found = slopes(by(attend), given)
    torch.testing.assert_close(found[0], wanted[0])
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_learned_bias_beside_sinks_has_a_gradient():
    given = (*operands(), draw(1, 4, 70, 70, seed=6).requires_grad_())

    def by(call):
        return lambda q, k, v, bias: call(q, k, v, bias=bias, causal=True, **SHARED)

    given = [x.requires_grad_() for x in given]
    wanted = slopes(by(lambda *x, **o: attention_reference(*x, **o)[0]), given)
    found = slopes(by(attend), given)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_are_computed_a_few_queries_at_a_time(monkeypatch, causal):
    sizes = []

    def counted(q, k, *rest):
        sizes.append((q.shape[2], k.shape[2]))
        return block(q, k, *rest)

    block = capped._block
    monkeypatch.setattr(capped, "_block", counted)
    monkeypatch.setattr(capped, "_SCORES", 2 * 4 * 70 * 16)
    given = [x.requires_grad_() for x in operands()]
    found = slopes(lambda *x: capped.by_blocks(*x, None, None, 2.0, None, causal), given)
    wanted = slopes(lambda *x: attention_reference(*x, softcap=2.0, causal=causal)[0], given)
    torch.testing.assert_close(found[0], wanted[0])
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs)
    blocks = ((16, 16), (16, 32), (16, 48), (16, 64), (6, 70))
    assert sizes[:5] == [(count, last if causal else 70) for count, last in blocks]
    # The gradient computes each of them again.
    assert len(sizes) == 10


def test_queries_that_see_nothing_give_zeros_beside_sinks():
    q, k, v = operands()
    mask = torch.zeros(70, 70).double()
    mask[3] = -torch.inf
    for scoring in (Scoring(**SHARED), Scoring(**CAPPED), Scoring(**CAPPED, **SHARED)):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        found = kernel(*given, mask, scoring)
        assert (found[:, :, 3] == 0).all()
        assert (found[:, :, 4] != 0).all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), given))


@pytest.mark.slow
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_a_compiled_graph_gives_the_same(scores):
    """A compiler takes seconds."""
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, causal=True, window=20, **scores), dynamic=True
    )
    for queries in (70, 1, 33):
        q, k, v = operands(queries)
        wanted = attention_reference(q, k, v, causal=True, window=20, **scores)[0]
        torch.testing.assert_close(compiled(q, k, v), wanted)
    given = [x.requires_grad_() for x in operands()]
    wanted = slopes(lambda *x: attention_reference(*x, causal=True, window=20, **scores)[0], given)
    found = slopes(compiled, given)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{"window": 8}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize(("tokens", "called"), [(16, False), (300, True)])
def test_a_compiled_graph_holds_few_scores_and_calls_a_loop_for_many(
    tokens: int, called: bool, options: dict[str, Any]
):
    names: list[str] = []

    def recording(graph: Any, _: Any) -> Any:
        names.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, tokens, 8) for _ in range(3))
    backend = aot_autograd(fw_compiler=recording)
    run = torch.compile(lambda *x: attend(*x, None, causal=True, **options), backend=backend)
    want = attention_reference(q, k, v, causal=True, **options)[0]
    torch.testing.assert_close(run(q, k, v), want, rtol=1e-4, atol=1e-5)
    assert any("attnopt" in name for name in names) is called
