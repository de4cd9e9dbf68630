"""Every implementation of the canonical attention does what its definition says."""

import itertools

import pytest
import torch
from conformance import (
    IMPLEMENTATIONS,
    KINDS,
    LENGTHS,
    TOLERANCE,
    Implementation,
    Problem,
    draw,
    error,
    padding,
    problems,
)

each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)


@each
def test_it_computes_what_is_defined(implementation: Implementation):
    wrong = []
    for problem in problems():
        if problem.dtype not in implementation.dtypes:
            continue
        found = error(implementation, problem)
        if not found <= TOLERANCE[problem.dtype]:
            wrong.append((found, problem))
    assert not wrong


@each
@pytest.mark.parametrize("length", LENGTHS)
def test_it_takes_odd_lengths(implementation: Implementation, length: int):
    for kind in KINDS[:2]:
        problem = Problem(queries=length, keys=length, kind=kind, batch=1, dtype=torch.float32)
        assert error(implementation, problem) <= TOLERANCE[torch.float32]


@each
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_gradients_are_those_of_the_reference(implementation: Implementation, kind):
    problem = Problem(kind=kind, queries=9, keys=9, kv_heads=2, options={"padding": padding(2, 9)})
    gradients = []
    for each_one in (IMPLEMENTATIONS[0], implementation):
        inputs = [t.requires_grad_() for t in problem.tensors()]
        out = each_one.call(*inputs, **problem.all_options)
        (out * draw(*out.shape, seed=7)).sum().backward()
        gradients.append([t.grad for t in inputs])
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@each
@pytest.mark.parametrize("queries", [1, 7, 400])
def test_rows_that_see_nothing_are_zero_with_finite_gradients(implementation, queries):
    problem = Problem(queries=queries, keys=max(queries, 7), kind=KINDS[1])
    shown = torch.ones(2, 1, 1, problem.keys, dtype=torch.bool)
    shown[0] = False
    inputs = [t.requires_grad_() for t in problem.tensors()]
    out = implementation.call(*inputs, padding=shown, causal=True)
    out.sum().backward()
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()
    assert all(t.grad.isfinite().all() for t in inputs)


@each
def test_memory_that_holds_nan_does_not_leak_into_the_result(implementation):
    """Freed memory is what a kernel allocates next; keys that nobody sees may be large."""
    problem = Problem(queries=63, keys=63, kind=KINDS[1], dtype=torch.float32)
    poison = [torch.full((2, 4, 63, 63), torch.nan) for _ in range(4)]
    del poison
    q, k, v = problem.tensors()
    shown = padding(2, 63)
    hidden = ~shown.expand(2, 4, 1, 63).transpose(-1, -2)
    loud = implementation.call(q, k.masked_fill(hidden, 1e4), v, padding=shown, causal=True)
    quiet = implementation.call(q, k.masked_fill(hidden, 0.0), v, padding=shown, causal=True)
    assert loud.isfinite().all()
    torch.testing.assert_close(loud, quiet)


@each
def test_sinks_scale_the_output_by_their_share(implementation):
    q, k, v = Problem(kind=KINDS[1]).tensors()
    without = implementation.call(q, k, v, causal=True)
    far = implementation.call(q, k, v, causal=True, sinks=torch.full((4,), -1e9).double())
    torch.testing.assert_close(far, without)
    much = implementation.call(q, k, v, causal=True, sinks=torch.full((4,), 50.0).double())
    assert much.abs().max() < 1e-6


@each
def test_what_lies_in_memory_another_way_gives_the_same(implementation):
    problem = Problem(queries=63, keys=63, kind=KINDS[1], kv_heads=2)
    q, k, v = problem.tensors()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for options in ({"causal": True}, {"window": 9}, {"padding": padding(2, 63)}):
        want = implementation.call(q, k, v, **options)
        torch.testing.assert_close(implementation.call(*strided, **options), want)


@pytest.mark.slow
@each
def test_long_sequences(implementation: Implementation):
    """Thousands of keys take a while in float64."""
    for kind, (queries, keys) in itertools.product(KINDS, ((1, 8192), (4096, 4096), (300, 8192))):
        problem = Problem(
            batch=1, heads=1, kv_heads=1, queries=queries, keys=keys, kind=kind, dtype=torch.float32
        )
        assert error(implementation, problem) <= TOLERANCE[torch.float32]
