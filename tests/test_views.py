"""Captured graphs read what views lead back to, and compute no padding that nobody reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from attnopt.frontend.cleanup import clean, functional

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch.export


@dataclass(frozen=True)
class Cleaned:
    """A function captured with an axis that may vary, and the ops of its graph."""

    function: Callable[..., Tensor]
    module: nn.Module
    graph: fx.Graph

    @property
    def ops(self) -> list[Any]:
        return [n.target for n in self.graph.nodes if n.op == "call_function"]

    def computes(self, x: Tensor) -> None:
        torch.testing.assert_close(self.module(x), self.function(x), rtol=1e-12, atol=1e-12)


def cleaned(function: Callable[..., Tensor], given: Tensor, axis: int = 1) -> Cleaned:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    shapes = ({axis: torch.export.Dim.AUTO},)
    exported = functional(torch.export.export(Module(), (given,), dynamic_shapes=shapes))
    clean(exported.graph_module)
    return Cleaned(function, exported.module(check_guards=False), exported.graph)


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scaled_in_place(x: Tensor) -> Tensor:
    """Shift rows as relative positions do, and scale a part of them where it lies."""
    batch, tokens, width = x.shape
    x = x * 1.0
    rows = x.reshape(batch, width, tokens)[:, 1:].reshape(batch, tokens, width - 1)
    part = rows[..., :2]
    part *= 2.0
    return part.exp()


def test_a_part_that_was_written_is_read_at_once() -> None:
    found = cleaned(scaled_in_place, drawn(2, 5, 4))
    assert not {aten.slice_scatter.default, aten.copy.default} & set(found.ops)
    assert found.ops.count(aten.slice.Tensor) == 2
    found.computes(drawn(2, 9, 4))


def rest_in_place(x: Tensor) -> Tensor:
    x = x * 1.0
    x[..., :3] *= 2.0
    return x


def other_part(x: Tensor) -> Tensor:
    x = x * 1.0
    x[..., :3] *= 2.0
    return x[..., 1:]


@pytest.mark.parametrize("function", [rest_in_place, other_part])
def test_what_is_read_beside_the_part_stays(function: Callable[..., Tensor]) -> None:
    found = cleaned(function, drawn(2, 5, 4))
    assert aten.slice_scatter.default in found.ops
    found.computes(drawn(2, 9, 4))


def there_and_back(x: Tensor) -> Tensor:
    return x.exp().reshape(x.shape[0], -1).reshape(x.shape).sin()


def cast_away(x: Tensor) -> Tensor:
    """A shape is that of another value, whose numbers are wider."""
    return x.float().reshape(-1).reshape(x.shape).double()


def test_a_shape_and_back_is_no_change() -> None:
    found = cleaned(there_and_back, drawn(2, 5, 4))
    assert aten.reshape.default not in found.ops
    assert aten.view.default not in found.ops
    found.computes(drawn(2, 9, 4))
    cleaned(cast_away, drawn(2, 5, 4)).computes(drawn(2, 9, 4))


# ------------------------------------------------------------------------------------ convolutions


def causal(state: int = 4, tail: int | None = None, head: int = 0) -> Callable[..., Tensor]:
    """Return a convolution over a state of so many tokens, and new ones."""
    before, weight = drawn(2, 6, state), drawn(6, 1, 4)

    def run(x: Tensor) -> Tensor:
        whole = torch.cat([before, x], -1)
        found = nn.functional.conv1d(whole, weight, padding=3, groups=6)
        found = nn.functional.silu(found[..., : whole.shape[-1] - head])
        return found[..., -x.shape[-1] - (tail or 0) :]

    return run


@pytest.mark.parametrize(("state", "slices"), [(3, 0), (4, 1), (7, 1)])
def test_a_convolution_computes_what_is_read(state: int, slices: int) -> None:
    function = causal(state)
    found = cleaned(function, drawn(2, 6, 5), axis=2)
    (conv,) = found.graph.find_nodes(op="call_function", target=aten.conv1d.default)
    assert conv.args[4] == [0]
    assert found.ops.count(aten.slice.Tensor) == slices
    found.computes(drawn(2, 6, 9))
    found.computes(drawn(2, 6, 1))


@pytest.mark.parametrize("function", [causal(2), causal(4, tail=2), causal(4, head=1)])
def test_a_padding_that_is_read_stays(function: Callable[..., Tensor]) -> None:
    found = cleaned(function, drawn(2, 6, 5), axis=2)
    (conv,) = found.graph.find_nodes(op="call_function", target=aten.conv1d.default)
    assert conv.args[4] == [3]
    found.computes(drawn(2, 6, 9))


# ------------------------------------------------------------------------------------------- parts


def in_thirds(x: Tensor) -> Tensor:
    one, two, three = torch.cat([x, 2 * x, 3 * x], 1).chunk(3, 1)
    four, five = torch.cat([one, two], 1).split(x.shape[1], 1)
    return four * five + three


def test_parts_of_the_size_of_an_input_are_counted() -> None:
    found = cleaned(in_thirds, drawn(2, 5, 4))
    assert found.ops.count(aten.split_with_sizes.default) == 2
    assert not {aten.chunk.default, aten.split.Tensor} & set(found.ops)
    found.computes(drawn(2, 9, 4))
