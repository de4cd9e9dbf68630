"""Every implementation of attention by a plan does what its definition says."""

import pytest
import torch
from block_conformance import (
    CAUSAL,
    IMPLEMENTATIONS,
    NEAR,
    NONE,
    TOLERANCE,
    Problem,
    error,
    problems,
)
from conformance import draw, padding

from attnopt.ops import attention, attention_reference, block_attention, blockwise, gathering
from attnopt.ops.blocks import grid_of, listed
from attnopt.ops.options import Options
from attnopt.ops.sdpa import attend
from attnopt.ops.tilewise import Tilewise

each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


@pytest.fixture(params=["as chosen", "gathered"])
def chosen(request, monkeypatch):
    """Let small problems take the way of large ones, too."""
    if request.param == "gathered":
        monkeypatch.setattr(blockwise, "_SMALL", 0)
        monkeypatch.setattr(gathering, "_GATHERED", 2**10)


@each
def test_it_computes_what_is_defined(implementation, chosen):
    wrong = []
    for problem in problems():
        found = error(implementation, problem)
        if not found <= TOLERANCE[problem.dtype]:
            wrong.append((found, problem))
    assert not wrong


@each
@pytest.mark.parametrize("kind", [NONE, CAUSAL, NEAR], ids=str)
def test_its_gradients_are_those_of_the_reference(implementation, kind, chosen):
    shown = {"padding": padding(2, 61), "mean_if_blind": True}
    problem = Problem(kind=kind, density=0.3, options=shown)
    gradients = []
    for each_one in (IMPLEMENTATIONS[0], implementation):
        inputs = [t.requires_grad_() for t in problem.tensors()]
        lists, options = problem.call()
        out = each_one.call(*inputs, *lists, **options)
        (out * draw(*out.shape, seed=7)).sum().backward()
        gradients.append([t.grad for t in inputs])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@each
def test_biases_and_sinks_learn(implementation):
    problem = Problem(queries=16, keys=16)
    lists, options = problem.call()
    gradients = []
    for call in (IMPLEMENTATIONS[0].call, implementation.call):
        learned = {"bias": draw(1, 4, 16, 16, seed=5), "sinks": draw(4, seed=6)}
        learned = {name: x.requires_grad_() for name, x in learned.items()}
        call(*problem.tensors(), *lists, **options, **learned).square().sum().backward()
        gradients.append([x.grad for x in learned.values()])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@each
@pytest.mark.parametrize(("queries", "keys"), [(1, 61), (15, 61), (40, 40)])
def test_few_tokens_do_not_read_the_plan(implementation, queries, keys):
    q, k, v = Problem(queries=queries, keys=keys).tensors()
    lists, options = Problem(queries=queries, keys=keys, density=0.0).call()
    found = implementation.call(q, k, v, *lists, **options, least_tokens=50)
    torch.testing.assert_close(found, attention_reference(q, k, v, causal=True)[0])


@pytest.mark.parametrize("memo", [{}, None])
def test_what_visits_everything_is_dense_bit_for_bit(memo):
    q, k, v = Problem(dtype=torch.float32).tensors()
    whole = attend(q, k, v, memo={}, causal=True)
    for density, least in ((1.0, 0), (0.0, 4096)):
        lists, options = Problem(density=density).call()
        made = blockwise.attend_blocks(q, k, v, *lists, **options, least_tokens=least, memo=memo)
        assert torch.equal(made, whole)


def test_the_way_is_chosen_by_what_is_there(monkeypatch):
    def chosen(**given):
        problem = Problem(**given)
        q, k, _ = problem.tensors()
        masked, whole = problem.grids()
        options = Options.read({**problem.kind.options, **problem.options})
        plan = Tilewise.of(q, k, masked, whole, *problem.tiles, options)
        return blockwise.way(plan, options)

    assert chosen(density=1.0).name == "dense"
    assert chosen().name == "masked"
    assert "one call" in chosen().why
    monkeypatch.setattr(blockwise, "_SMALL", 0)
    assert chosen().name == "gathered"
    assert "of the tiles" in chosen().why
    assert chosen(options={"sinks": draw(4)}).name == "masked"
    assert chosen(options={"bias": draw(61, 61)}).name == "masked"
    assert chosen(density=1.0, options={"padding": padding(2, 61)}).name == "dense"


def test_rows_that_visit_alike_make_one_call(monkeypatch):
    calls = []
    own = gathering.attend
    monkeypatch.setattr(blockwise, "_SMALL", 0)
    monkeypatch.setattr(gathering, "attend", lambda *a, **o: calls.append(o) or own(*a, **o))
    problem = Problem(heads=(8, 4, 4), plan_heads=4, queries=128, keys=128)
    window = torch.ones(4, 4).tril().triu(-1).bool().expand(1, 4, 4, 4)
    q, k, v = problem.tensors()
    blockwise.attend_blocks(q, k, v, *listed(window), q_tile=32, k_tile=32, causal=True, memo={})
    assert len(calls) == 2
    assert sorted(c["mask"].shape[-1] for c in calls) == [32, 64]
    assert all(c["mask"].shape[0] == 1 and c["padding"] is None for c in calls)


def test_a_compiled_graph_has_the_loops_in_one_op():
    problem = Problem(dtype=torch.float32, queries=80, keys=80)
    lists, options = problem.call()

    def attended(q, k, v, *lists):
        return blockwise.attend_blocks(q * 2, k, v, *lists, **options)

    compiled = torch.compile(attended, backend="aot_eager", dynamic=True, fullgraph=True)
    inputs = problem.tensors()
    want = attended(*inputs, *lists)
    torch.testing.assert_close(compiled(*inputs, *lists), want)
    learned = [t.clone().requires_grad_() for t in inputs]
    compiled(*learned, *lists).sum().backward()
    again = [t.clone().requires_grad_() for t in inputs]
    attended(*again, *lists).sum().backward()
    for a, b in zip(learned, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_op_passes_the_checks_of_the_library():
    from attnopt.ops import opaque

    problem = Problem(dtype=torch.float32, queries=20, keys=20)
    lists, options = problem.call()
    given = [*(t.requires_grad_() for t in problem.tensors()), *lists]
    arguments = opaque.SEALED.arguments(*given, **options)
    torch.library.opcheck(opaque.block_attention_fast, tuple(arguments))


def test_a_list_is_read_back():
    grid = torch.rand(2, 3, 5, 7) < 0.5
    assert torch.equal(grid_of(*listed(grid), 7), grid)


def test_the_op_of_a_whole_plan_is_the_canonical_op():
    q, k, v = Problem().tensors()
    lists, options = Problem(density=1.0).call()
    torch.testing.assert_close(
        block_attention(q, k, v, *lists, **options), attention(q, k, v, causal=True)
    )
