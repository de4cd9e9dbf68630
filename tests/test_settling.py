"""Graphs keep the values of what follows from none of their inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attnopt
from attnopt import lowering
from attnopt.backends import dynamo
from attnopt.settling import LARGEST, settle

aten = torch.ops.aten


def table_of(tokens: int) -> Tensor:
    """Number the distances of tokens, as relative positions do, and one beside them."""
    place = torch.arange(tokens)
    distance = place[:, None] - place[None, :]
    near = distance.abs().clamp(max=3)
    sided = torch.where(distance > 0, near + 4, near)
    edge = (place[:, None] == 0) | (place[None, :] == 0)
    number = torch.where(edge, 8, sided).mul(7).add(1)
    return torch.nn.functional.pad(number, (0, 0, 1, 0)).flatten()


def traced(function: Callable[..., Any], *given: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*given)


def settled(function: Callable[..., Any], *given: Tensor) -> fx.GraphModule:
    made = traced(function, *given)
    settle(made)
    torch.testing.assert_close(made(*given), function(*given), rtol=0, atol=0)
    return made


def targets(module: fx.GraphModule) -> list[Any]:
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def test_indices_are_computed_once_and_held_once() -> None:
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    made = settled(lambda x, y: (x[table_of(6)], y[table_of(6)]), x, y)
    assert targets(made) == [aten.index.Tensor] * 2
    (held,) = made.buffers()
    assert torch.equal(held, table_of(6))


def test_indices_that_a_few_ops_make_stay() -> None:
    def shifted(x: Tensor) -> Tensor:
        place = torch.arange(5)
        return x[(place[:, None] - place[None, :] + 4).long()]

    made = settled(shifted, torch.randn(9, 3))
    assert aten.arange.default in targets(made)
    assert not list(made.buffers())


def test_a_mask_that_a_few_ops_make_stays() -> None:
    def causal(x: Tensor) -> Tensor:
        place = torch.arange(5)
        return torch.where(place[:, None] >= place[None, :], x, -1.0)

    made = settled(causal, torch.randn(5, 5))
    assert aten.arange.default in targets(made)
    assert not list(made.buffers())


def test_what_is_repeated_is_held_before_it_is() -> None:
    def repeated(x: Tensor) -> Tensor:
        waves = torch.arange(4.0)
        for _ in range(12):
            waves = (waves + 1).sin()
        return x + waves[None, :].expand(1000, 4)

    made = settled(repeated, torch.randn(1000, 4))
    assert [x.numel() for x in made.buffers()] == [4]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[None, 2:], lambda x: x.reshape(-1)])
def test_what_is_returned_is_made_anew(view: Callable[[Tensor], Tensor]) -> None:
    """A caller writes to what it was given, which the next call must not see."""

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        table = table_of(6)
        return x[table], view(table)

    made = settled(counted, torch.randn(64, 3))
    given = torch.randn(64, 3)
    made(given)[1].zero_()
    torch.testing.assert_close(made(given), counted(given))


def test_what_is_returned_and_repeated_is_made_anew() -> None:
    def repeated(x: Tensor) -> tuple[Tensor, Tensor]:
        waves = torch.arange(4.0)
        for _ in range(12):
            waves = (waves + 1).sin()
        return x + waves[None, :].expand(10, 4), waves

    made = settled(repeated, torch.randn(10, 4))
    given = torch.randn(10, 4)
    made(given)[1].zero_()
    torch.testing.assert_close(made(given), repeated(given))


def test_what_inputs_decide_is_computed() -> None:
    def counted(x: Tensor, mask: Tensor) -> Tensor:
        return x[mask.cumsum(0).sub(1).clamp(min=0).add(1).mul(2).remainder(7)]

    made = settled(counted, torch.randn(8, 2), torch.ones(5, dtype=torch.long))
    assert not list(made.buffers())


@pytest.mark.parametrize("kind", ["random", "large"])
def test_what_is_drawn_or_large_is_not_held(kind: str) -> None:
    count = 6 if kind == "random" else LARGEST + 1

    def made_of_nothing(x: Tensor) -> Tensor:
        place = torch.randint(0, 4, (count,)) if kind == "random" else torch.arange(count)
        for _ in range(8):
            place = place.add(1)
        return x[place.remainder(4)]

    made = traced(made_of_nothing, torch.randn(4))
    settle(made)
    assert not list(made.buffers())


def test_sizes_that_vary_leave_a_table_as_it_is() -> None:
    made = make_fx(lambda x: x[table_of(x.shape[0])], tracing_mode="symbolic", pre_dispatch=True)(
        torch.randn(64)
    )
    settle(made)
    assert not list(made.buffers())


def test_values_of_inference_are_used_in_training() -> None:
    x = torch.randn(64, 3)
    made = traced(lambda x: x[table_of(6)], x)
    with torch.inference_mode():
        settle(made)
    x.requires_grad_()
    made(x).sum().backward()
    want = torch.bincount(table_of(6), minlength=64).float()
    assert x.grad is not None
    assert torch.equal(x.grad, want[:, None].expand(64, 3))


class Biased(nn.Module):
    """Attention under a table of relative positions, which is numbered in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.table = nn.Embedding(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        bias = self.table(table_of(6)[:36].view(6, 6)).permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) * 8**-0.5 + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Halved(Biased):
    """The same, times a tensor of one number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(0.5)


def test_a_compiled_graph_holds_its_table_and_makes_its_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[fx.GraphModule] = []

    def inner(graph_module: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        given.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(dynamo, "lookup_backend", lambda name: inner)
    torch.manual_seed(0)
    model, x = Halved(), torch.randn(2, 6, 16)
    with torch.no_grad():
        got = torch.compile(model, backend="attnopt", dynamic=False)(x)
        torch.testing.assert_close(got, model(x))
    attnopt.compile_report(reset=True)
    (module,) = given
    assert aten.arange.default not in targets(module)
    assert aten.full.default in targets(module)
    (held,) = module.buffers()
    assert torch.equal(held, table_of(6)[:36].view(6, 6))


@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_model_learns_its_table(trains: bool) -> None:
    torch.manual_seed(0)
    model, x = Biased(), torch.randn(2, 6, 16)
    want = model(x)
    compiled = torch.compile(
        model, backend="attnopt", dynamic=False, options={"inner": "aot_eager"}
    )
    attnopt.compile_report(reset=True)
    with torch.set_grad_enabled(trains):
        got = compiled(x)
    assert len(attnopt.compile_report(reset=True).rewritten) == 1
    torch.testing.assert_close(got, want)
    if trains:
        slopes = torch.autograd.grad(want.square().sum(), model.table.weight)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), model.table.weight), slopes
        )


def test_a_lowered_model_holds_its_table_and_takes_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[Tensor] = []

    def watched(graph_module: fx.GraphModule, known: dict[str, Tensor]) -> None:
        settle(graph_module, known)
        held.extend(graph_module.buffers())

    monkeypatch.setattr(lowering, "settle", watched)
    torch.manual_seed(0)
    model, x = Biased().eval(), torch.randn(2, 6, 16)
    lowered = attnopt.lower(attnopt.capture(model, (x,)), "eager")
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x))
        assert [x.shape for x in held] == [(6, 6)]
        for module in (model, lowered):
            module.get_parameter("table.weight").mul_(2.0)
        torch.testing.assert_close(lowered(x), model(x))
    assert set(lowered.state_dict()) == set(model.state_dict())
    lowered, model = lowered.double(), model.double()
    with torch.no_grad():
        torch.testing.assert_close(lowered(x.double()), model(x.double()))
