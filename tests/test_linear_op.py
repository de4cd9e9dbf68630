"""Linear attention: chunks and steps give what the definition says."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from attnopt.ops import (
    attention_reference,
    linear_attention,
    linear_attention_reference,
    linear_attention_step,
    linear_attention_step_reference,
)
from attnopt.ops.chunks import attend_linear, attend_linear_step
from attnopt.ops.features import FEATURES, features, width


@dataclass(frozen=True)
class Problem:
    """A call: T queries at the end of S keys, of H heads that share Hk."""

    queries: int
    keys: int
    window: int = 0
    heads: tuple[int, int] = (4, 2)
    feature: str = "hedgehog"
    decays: bool = False
    padded: int = 0
    causal: bool = True

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """Return queries, keys, values, maps, gate and decay."""
        g = torch.Generator().manual_seed(self.queries + self.keys)
        heads, groups = self.heads
        sizes = [(2, heads, self.queries, 8), (2, groups, self.keys, 8), (2, groups, self.keys, 6)]
        q, k, v = (torch.randn(s, generator=g, dtype=torch.float64) for s in sizes)
        maps = [torch.randn(heads, 8, 5, generator=g, dtype=torch.float64) for _ in range(2)]
        gate = torch.rand(heads, generator=g, dtype=torch.float64) if self.window else None
        decay = 0.7 + 0.3 * torch.rand(heads, generator=g, dtype=torch.float64)
        found = [q, k, v, *maps, gate, decay if self.decays else None]
        return [None if x is None else x.to(dtype) for x in found]

    @property
    def settings(self) -> dict[str, Any]:
        """Return what is given by name."""
        found: dict[str, Any] = {"feature": self.feature, "window": self.window}
        found["causal"] = self.causal
        if self.padded:
            seen = torch.ones(2, 1, 1, self.keys, dtype=torch.bool)
            seen[1, ..., : self.padded] = False
            found["padding"] = seen
        return found


SIZES = [(1, 1), (7, 7), (63, 63), (130, 130), (1, 77), (70, 201), (5, 300)]
PROBLEMS = [
    *(Problem(t, s, w) for t, s in SIZES for w in (0, 5, 64, 100)),
    *(Problem(130, 150, w, decays=True, padded=40) for w in (0, 5, 100)),
    *(Problem(130, 130, 3, feature=name) for name in FEATURES if name != "identity"),
    Problem(63, 63, 9, heads=(4, 4), padded=63),
    Problem(63, 100, causal=False, padded=10),
    Problem(65, 65, feature="relu"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_chunks_give_what_the_definition_gives(problem: Problem) -> None:
    want = linear_attention_reference(*problem.tensors(torch.float64), **problem.settings)
    found = attend_linear(*problem.tensors(), **problem.settings)
    assert torch.allclose(found.double(), want, atol=2e-5, rtol=1e-5)
    assert torch.isfinite(want).all()


@pytest.mark.parametrize("problem", [Problem(70, 90, 5, decays=True, padded=9), Problem(9, 9)])
def test_gradients_are_those_of_the_definition(problem: Problem) -> None:
    tensors = problem.tensors(torch.float64)
    want, found = (
        _gradients(f, tensors, problem) for f in (linear_attention_reference, attend_linear)
    )
    for a, b in zip(want, found, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def _gradients(call: Any, tensors: list[Tensor | None], problem: Problem) -> list[Tensor]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    out = call(*leaves, **problem.settings)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), [x for x in leaves if x is not None]))


def test_the_definition_has_the_gradient_of_what_it_computes() -> None:
    problem = Problem(6, 8, 3, decays=True, padded=2)
    leaves = [None if x is None else x.requires_grad_() for x in problem.tensors(torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: linear_attention_reference(*x, **problem.settings), leaves
    )


CUTS = [(0, 40, 41, 42, 90), (0, 1, 2, 3, 90), (0, 90), (0, 3, 4, 5, 6, 7, 8, 9, 90)]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("window", [0, 4, 64])
@pytest.mark.parametrize("step", [linear_attention_step_reference, attend_linear_step])
@pytest.mark.parametrize("decays", [False, True])
def test_step_by_step_is_all_at_once(cuts: Any, window: int, step: Any, decays: bool) -> None:
    problem = Problem(90, 90, window, decays=decays, padded=7)
    want = linear_attention_reference(*problem.tensors(torch.float64), **problem.settings)
    q, k, v, *own = problem.tensors()
    settings = problem.settings
    padding = settings.pop("padding")
    del settings["causal"]
    rings = [torch.zeros(2, 2, window, 8), torch.zeros(2, 2, window, 6)]
    state = torch.zeros(2, 4, width(5, "hedgehog"), 7)
    found = []
    for start, stop in pairwise(cuts):
        now = (x[:, :, start:stop] for x in (q, k, v))
        seen = padding[..., :stop]
        out, *rings, state = step(*now, *own, *rings, state, start, padding=seen, **settings)
        found.append(out)
    # A row that sees nothing yet is padding, which gives zeros either way.
    assert torch.allclose(torch.cat(found, dim=2).double(), want, atol=2e-5)
    assert state.dtype == torch.float32


@pytest.mark.parametrize("call", [linear_attention_reference, attend_linear])
def test_a_window_over_everything_is_softmax_attention(call: Any) -> None:
    problem = Problem(40, 40, 40)
    q, k, v, *own = problem.tensors()
    want = attention_reference(q, k, v, causal=True)[0]
    assert torch.allclose(call(q, k, v, *own, **problem.settings), want, atol=1e-5)


@pytest.mark.parametrize("call", [linear_attention_reference, attend_linear])
def test_padding_on_the_left_changes_nothing(call: Any) -> None:
    problem = Problem(90, 90, 8, decays=True, padded=50)
    q, k, v, *own = problem.tensors()
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[1, :, :50] = 1e4
    found = call(q, *poisoned, *own, **problem.settings)[1:, :, 50:]
    rest = {n: x for n, x in problem.settings.items() if n != "padding"}
    want = call(*(x[1:, :, 50:] for x in (q, k, v)), *own, **rest)
    assert torch.allclose(found, want, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    problem = Problem(20, 20, 4, padded=20)
    for call in (linear_attention_reference, attend_linear):
        assert not call(*problem.tensors(), **problem.settings)[1].any()


def test_without_a_normaliser_it_is_a_decayed_recurrence() -> None:
    problem = Problem(30, 30, feature="identity", decays=True, heads=(2, 2))
    q, k, v, *_, decay = problem.tensors(torch.float64)
    state, want = torch.zeros(2, 2, 8, 6, dtype=torch.float64), []
    for t in range(30):
        state = decay.view(-1, 1, 1) * state + k[:, :, t].unsqueeze(3) * v[:, :, t].unsqueeze(2)
        want.append((q[:, :, t].unsqueeze(2) @ state).squeeze(2))
    settings = {"feature": "identity", "causal": True, "normalize": False}
    found = linear_attention_reference(q, k, v, None, None, None, decay, **settings)
    assert torch.allclose(found, torch.stack(want, dim=2))
    assert torch.allclose(attend_linear(q, k, v, None, None, None, decay, **settings), found)


def test_the_softmax_of_features_is_taken_on_both_sides() -> None:
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = features(x, torch.eye(4).repeat(2, 1, 1), "hedgehog")
    assert torch.allclose(found.sum(-1), torch.full((1, 2, 3), 2.0))
    assert torch.allclose(found[..., :4], x.softmax(-1))
    assert torch.allclose(found[..., 4:], (-x).softmax(-1))


def test_what_cannot_be_is_told() -> None:
    q, k, v, *own = Problem(5, 5, 2).tensors()
    with pytest.raises(ValueError, match="causal=True"):
        linear_attention_reference(q, k, v, *own, window=2)
    with pytest.raises(ValueError, match="hedgehog, elu"):
        linear_attention_reference(q, k, v, *own, feature="elephant", causal=True)


@pytest.mark.parametrize("problem", [Problem(7, 9, 3, padded=2), Problem(7, 9, causal=False)])
def test_the_op_is_registered_as_torch_wants_it(problem: Problem) -> None:
    opcheck(linear_attention, tuple(problem.tensors()), problem.settings)


def test_the_step_is_registered_as_torch_wants_it() -> None:
    rings = [torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 6), torch.zeros(2, 4, 10, 7)]
    given = (*Problem(5, 5, 3).tensors(), *rings, 2)
    opcheck(linear_attention_step, given, {"window": 3})


@pytest.mark.slow
def test_a_compiled_call_of_any_length_gives_the_same() -> None:
    call = torch.compile(attend_linear, backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (70, 131):
        problem = Problem(length, length, 5, padded=3)
        want = attend_linear(*problem.tensors(), **problem.settings)
        assert torch.allclose(call(*problem.tensors(), **problem.settings), want, atol=1e-5)
