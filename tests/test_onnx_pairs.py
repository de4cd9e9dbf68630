"""Complex numbers of a graph as pairs of real ones, before ONNX is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from attnopt.backends.ort.pairs import split_complex
from attnopt.nouns import No


class Calls(nn.Module):
    """A function of two real tensors (2, 5, 6) and a complex constant (5, 3)."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.polar(torch.ones(5, 3), torch.rand(5, 3)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y, self.table)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def turned(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding as the first Llama has it."""
    return torch.view_as_real(as_complex(x) * table[None]).flatten(-2)


def made_of_angles(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[1]), 1 / (3 ** torch.arange(3.0)))
    turn = torch.polar(torch.ones_like(angles), angles) * 1.5
    return torch.view_as_real(as_complex(x) * turn.unsqueeze(0))


def exponential(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(torch.exp(x * 1j)[..., :3] / as_complex(y))


def sums(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    both = torch.cat([as_complex(x) + 2.0, as_complex(y) - table, y.to(x.dtype)[..., :3] + table])
    return torch.view_as_real((both - y[:1, :, :3]) / (1 + 2j))


def measures(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    whole = as_complex(x).transpose(1, 2) @ torch.complex(y, -x)
    return torch.cat([whole.abs(), whole.angle(), whole.conj().imag, whole.sum(1, True).real], 1)


def parted(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    first, second = as_complex(x).split([2, 3], dim=1)
    return torch.view_as_real(torch.stack([first[:, :1], -second[:, 1:2]]).expand(2, 2, 1, 3))


def sine(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(as_complex(x).sin() * table)


def captured(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> fx.GraphModule:
    given = (torch.ones(2, 5, 6), torch.ones(2, 5, 6))
    graph_module = torch.export.export(Calls(function), given).module()
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


def values(graph_module: fx.GraphModule, *given: Tensor) -> list[Tensor]:
    """Return everything that a graph computes."""
    seen: list[Tensor] = []

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            made = super().run_node(n)
            seen.extend(x for x in (made if isinstance(made, list | tuple) else [made]))
            return made

    Watched(graph_module).run(*given)
    return [x for x in seen if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    "function",
    [turned, made_of_angles, exponential, sums, measures, parted],
    ids=lambda f: f.__name__,
)
def test_a_graph_computes_the_same_with_real_numbers(function: Callable[..., Tensor]):
    torch.manual_seed(0)
    given = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    graph_module = captured(function)
    want = graph_module(*given)
    assert split_complex(graph_module)
    torch.testing.assert_close(graph_module(*given), want, rtol=1e-5, atol=1e-6)
    assert not any(x.is_complex() for x in values(graph_module, *given))


def test_a_graph_with_an_op_that_has_no_rule_stays_as_it_is():
    given = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    graph_module = captured(sine)
    before, want = graph_module.code, graph_module(*given)
    refusal = split_complex(graph_module)
    assert isinstance(refusal, No)
    assert "aten.sin.default of complex numbers" in str(refusal)
    assert graph_module.code == before
    assert torch.equal(graph_module(*given), want)


def test_a_graph_of_real_numbers_has_nothing_to_split():
    assert split_complex(captured(lambda x, y, table: x * y)) == 0
