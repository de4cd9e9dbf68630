"""Routed attention: the fast copies against the definition, which masks; gates; one op for all."""

import itertools

import pytest
import torch
from conformance import KINDS, TOLERANCE, Problem, defined, draw, padding

from attnopt.ops import packed, routed_attention
from attnopt.ops.options import Options
from attnopt.ops.packed import attend_routed, routed_attention_fast, way

CAUSAL = KINDS[1]
IMPLEMENTATIONS = {
    "op": routed_attention,
    "op by op": lambda *args, **options: attend_routed(*args, memo={}, **options),
    "as one op": attend_routed,
}
each = pytest.mark.parametrize("call", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.fixture(params=["as chosen", "packed"])
def chosen(request, monkeypatch):
    """Let small problems take the way of large ones, too, in small tiles."""
    if request.param == "packed":
        for name in ("_SMALL", "_SMALL_STEP", "_PREFIX"):
            monkeypatch.setattr(packed, name, 0)
        monkeypatch.setattr(packed, "_TILE", 16)


def gates_of(problem, share=0.5, seed=3):
    """Draw gates, with a head that nobody uses and one that everybody does."""
    sizes = (problem.batch, problem.heads, problem.queries)
    on = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < share
    on[:, 0] = False
    on[:, -1] = True
    return (on * (1 + draw(*sizes, seed=seed).abs())).to(problem.dtype)


def problems():
    for dtype, (queries, keys) in itertools.product(TOLERANCE, ((1, 1), (63, 63), (1, 63))):
        yield Problem(dtype=dtype, queries=queries, keys=keys, kind=CAUSAL, kv_heads=2)
    for kind, (queries, keys) in itertools.product(KINDS, ((63, 63), (13, 63))):
        yield Problem(kind=kind, queries=queries, keys=keys, kv_heads=2)
        shown = {"padding": padding(2, keys)}
        yield Problem(kind=kind, queries=queries, keys=keys, options=shown)
        mean = {"mean_if_blind": True, **shown}
        yield Problem(kind=kind, queries=queries, keys=keys, options=mean)
        bias = {"bias": draw(1, 4, queries, keys, seed=9), **shown}
        yield Problem(kind=kind, queries=queries, keys=keys, options=bias)
    yield Problem(queries=63, keys=7, kind=CAUSAL)
    yield Problem(kv_heads=2, options={"k_map": [0, 1, 0, 1], "v_map": [1, 1, 0, 1]})
    yield Problem(heads=6, kv_heads=2, v_heads=3, kind=CAUSAL)
    yield Problem(queries=63, keys=63, v_width=5, kind=CAUSAL)
    yield Problem(options={"softcap": 3.0, "scale": 0.4}, kind=CAUSAL)
    yield Problem(options={"sinks": draw(4, seed=5)}, kind=KINDS[3], queries=5, keys=9)
    yield Problem(options={"mask": draw(2, 1, 63, 63, seed=4) > 0}, queries=63, keys=63)
    yield Problem(options={"bias": draw(7, 7, seed=4)})


@each
def test_it_computes_what_is_defined(call, chosen):
    wrong = []
    for problem in problems():
        tensors, gates = problem.tensors(), gates_of(problem)
        found = call(*tensors, gates, **problem.all_options)
        wanted = defined(*tensors, problem.kind.rule, problem.all_options)
        wanted = wanted * gates.double().unsqueeze(-1)
        assert found.dtype == problem.dtype
        error = float((found.double() - wanted).abs().max() / tensors[2].double().abs().max())
        if not error <= 4 * TOLERANCE[problem.dtype]:
            wrong.append((error, problem))
    assert not wrong


@each
@pytest.mark.parametrize("kind", [KINDS[0], CAUSAL, KINDS[3]], ids=str)
def test_its_gradients_are_those_of_the_reference(call, kind, chosen):
    problem = Problem(
        kind=kind, queries=40, keys=40, kv_heads=2, options={"padding": padding(2, 40)}
    )
    gradients = []
    for one in (routed_attention, call):
        inputs = [t.requires_grad_() for t in (*problem.tensors(), gates_of(problem))]
        out = one(*inputs, **problem.all_options)
        (out * draw(*out.shape, seed=7)).sum().backward()
        gradients.append([t.grad for t in inputs])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@each
def test_what_is_off_is_not_read(call, chosen):
    """A key head without rows may hold anything; so may queries that are off."""
    problem = Problem(queries=63, keys=63, kind=CAUSAL, kv_heads=2)
    (q, k, v), gates = problem.tensors(), gates_of(problem)
    gates[:, :2] = 0
    wanted = routed_attention(q, k, v, gates, causal=True)
    for x in (k, v):
        x[:, 0] = torch.nan
    q = q.masked_fill(gates.unsqueeze(-1) == 0, torch.nan)
    found = call(q, k, v, gates, causal=True)
    assert not found[:, :2].any()
    torch.testing.assert_close(found, wanted)


@each
def test_all_heads_at_one_are_the_canonical_attention(call, chosen):
    problem = Problem(queries=63, keys=63, kind=CAUSAL)
    q, k, v = problem.tensors()
    found = call(q, k, v, torch.ones(1, 1, 1, dtype=q.dtype), causal=True)
    torch.testing.assert_close(found, defined(q, k, v, CAUSAL.rule, {}))


@each
def test_nobody_on_is_zeros(call, chosen):
    q, k, v = Problem(queries=63, keys=63).tensors()
    assert not call(q, k, v, torch.zeros(2, 4, 63), causal=True).any()


def test_the_way_is_chosen_by_what_is_there(monkeypatch):
    def chosen(share=0.5, **given):
        problem = Problem(**{"queries": 63, "keys": 63, "kind": CAUSAL, **given})
        q, k, _ = problem.tensors()
        return way(q, k, gates_of(problem, share), Options.read(problem.all_options))

    assert "one call" in chosen().why
    monkeypatch.setattr(packed, "_SMALL", 0)
    assert chosen().name == "packed"
    assert chosen(options={"sinks": draw(4)}).name == "dense"
    assert chosen(share=1.0, heads=8, kv_heads=8).name == "dense"
    assert "one call" in chosen(queries=1).why
    monkeypatch.setattr(packed, "_SMALL_STEP", 0)
    assert chosen(queries=1).name == "packed"


def test_half_of_the_heads_are_half_of_the_pairs(monkeypatch):
    """What kernels are given is counted: rows that are off are in no call."""
    pairs = []
    own = packed.kernel

    def counted(q, k, *rest):
        pairs.append(q.shape[2] * k.shape[2])
        return own(q, k, *rest)

    monkeypatch.setattr(packed, "kernel", counted)
    problem = Problem(queries=400, keys=400, heads=8, kv_heads=4, batch=1)
    q, k, v = problem.tensors()
    on = torch.rand(1, 8, 400).argsort(1).argsort(1) < 4
    attend_routed(q, k, v, on.double(), memo={})
    assert sum(pairs) == 4 * 400 * 400


def test_a_compiled_graph_has_the_loops_in_one_op():
    problem = Problem(dtype=torch.float32, queries=80, keys=80, kind=CAUSAL)

    def attended(q, k, v, gates):
        return attend_routed(q * 2, k, v, gates, causal=True)

    compiled = torch.compile(attended, backend="aot_eager", dynamic=True, fullgraph=True)
    inputs = (*problem.tensors(), gates_of(problem))
    gradients = []
    for call in (attended, compiled):
        learned = [t.clone().requires_grad_() for t in inputs]
        found = call(*learned)
        found.square().sum().backward()
        gradients.append([found, *(t.grad for t in learned)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_ops_pass_the_checks_of_the_library():
    problem = Problem(dtype=torch.float32, queries=20, keys=20)
    given = [t.requires_grad_() for t in (*problem.tensors(), gates_of(problem))]
    torch.library.opcheck(routed_attention, tuple(given), {"causal": True})
    arguments = packed.SEALED.arguments(*given, causal=True)
    torch.library.opcheck(routed_attention_fast, tuple(arguments))
