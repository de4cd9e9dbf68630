"""Products of several tensors at once are read as products of two."""

import pytest
import torch
from test_capture_zoo import error_of
from torch import Tensor, nn

import attnopt

HEADS, WIDTH = 3, 4


class Einsum(nn.Module):
    """Attention whose last product takes weights, values and the output projection."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.out = nn.Parameter(torch.rand(HEADS, WIDTH, 5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return torch.einsum(self.equation, weights, v, self.out)


@pytest.mark.parametrize("equation", ["bhts,bhsd,hdc->btc", "bhts, bhsd, hdc -> cbt"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_attention_in_a_product_of_three_tensors_is_found_and_rewritten(
    equation: str, dynamic: bool
):
    torch.manual_seed(0)
    model = Einsum(equation).eval()
    q, k, v = torch.rand(3, 2, HEADS, 7, WIDTH)
    program = attnopt.capture(model, (q, k, v), dynamic=dynamic)
    assert [(s.heads, s.head_dim) for s in program.sites] == [(HEADS, WIDTH)]
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    with torch.no_grad():
        assert error_of(exact(q, k, v), model(q, k, v)) < 1e-5


def test_the_backend_of_dynamo_finds_it_too():
    torch.manual_seed(0)
    model = Einsum("bhts,bhsd,hdc->btc").eval()
    q, k, v = torch.rand(3, 2, HEADS, 7, WIDTH)
    torch.compiler.reset()
    attnopt.compile_report(reset=True)
    with torch.no_grad():
        made = torch.compile(model, backend="attnopt", options={"inner": "aot_eager"})(q, k, v)
        assert error_of(made, model(q, k, v)) < 1e-5
    assert len(attnopt.compile_report().rewritten) == 1
