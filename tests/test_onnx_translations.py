"""Ops with a translation of ours give in ONNX Runtime what torch gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

import onnx
import onnxruntime as ort

from attnopt.backends.ort.translations import table

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:# The axis name"
)
aten = torch.ops.aten


def counted(ids: Tensor) -> Tensor:
    return torch.histc(ids.float(), bins=5, min=0, max=4)


def ids(tokens: int) -> Tensor:
    return torch.randint(0, 5, (tokens,), generator=torch.Generator().manual_seed(tokens))


def around(tokens: int) -> Tensor:
    return torch.linspace(-40, 40, tokens * 3).reshape(tokens, 3)


def whole(tokens: int) -> Tensor:
    return torch.arange(-tokens, tokens).reshape(tokens, 2)


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], Tensor], list[str] | None]] = {
    "whole numbers counted": (
        counted, ids, ["Reshape", "Equal", "Cast", "ReduceSum"],
    ),
    "numbers counted": (
        lambda x: torch.histc(x.flatten(), bins=7, min=-30.0, max=30.0), around, None,
    ),
    "softplus": (torch.nn.functional.softplus, around, ["Softplus"]),
    "softplus, steeper": (lambda x: torch.nn.functional.softplus(x, beta=3), around, None),
    "whole numbers divided": (lambda x: x // 3, whole, ["Mod", "Sub", "Div"]),
    "whole numbers divided by less than zero": (lambda x: x // -3, whole, None),
    "numbers divided": (lambda x: torch.floor_divide(x, 2.5), around, None),
    "sorted": (lambda x: torch.sort(x, stable=True)[1], ids, None),
    "sorted, first axis": (
        lambda x: torch.sort(x, dim=0, stable=True, descending=True)[1], whole, None,
    ),
    "groups normed": (
        lambda x: torch.nn.functional.group_norm(torch.stack([x, x.cos(), x.sin()], -1), 3),
        around,
        ["Cos", "Sin", "Unsqueeze", "Unsqueeze", "Unsqueeze", "Concat", "Reshape",
         "InstanceNormalization", "Reshape"],
    ),
    "groups normed, any size": (
        lambda x: torch.nn.functional.group_norm(x.reshape(1, 3, -1), 3), around, None,
    ),
    "split": (lambda x: torch.split(x, [1, 2], dim=1)[1] * 1.0, around, None),
    "split by a size": (
        lambda x: aten.split_with_sizes(torch.cat([x, -x]), [x.shape[0]] * 2)[1], around, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_translation_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    function, make, kinds = CASES[name]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Module().eval(), (make(6),), path, dynamo=True, opset_version=23, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("length")},), input_names=["x"],
        custom_translation_table=table(),
    )  # fmt: skip
    if kinds is not None:
        assert [n.op_type for n in onnx.load(path).graph.node] == kinds
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for tokens in (6, 9):
        given = make(tokens)
        (found,) = session.run(None, {"x": given.numpy()})
        want = function(given)
        assert torch.from_numpy(found).dtype is want.dtype
        torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-6, atol=1e-6)


def test_the_experts_of_a_mixture_get_their_rows(tmp_path: Path) -> None:
    """Also an expert without rows, and with ends that are no sums of counts in the graph."""
    import transformers.integrations.moe

    grouped: Any = torch.ops.transformers.grouped_mm_fallback

    class Module(torch.nn.Module):
        def forward(self, rows: Tensor, weight: Tensor, given: Tensor, ends: Tensor) -> Any:
            counts = torch.histc(given.float(), bins=3, min=0, max=2)
            sums = counts.to(torch.int32).cumsum(0, dtype=torch.int32)
            return grouped(rows, weight, sums), grouped(rows, weight, ends)

    def drawn(tokens: int) -> tuple[Tensor, ...]:
        chosen = torch.tensor([0] * 2 + [2] * (tokens - 2))
        ends = torch.tensor([1, 4, tokens], dtype=torch.int32)
        return torch.randn(tokens, 4), torch.randn(3, 4, 5), chosen, ends

    assert transformers.integrations.moe is not None
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    axis = {0: torch.export.Dim("length")}
    names = ["rows", "weight", "given", "ends"]
    torch.onnx.export(
        Module().eval(), drawn(6), path, dynamo=True, opset_version=23, verbose=False,
        dynamic_shapes=(axis, None, axis, None), input_names=names,
        custom_translation_table=table(),
    )  # fmt: skip
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = drawn(9)
    found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
    for got, want in zip(found, Module()(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)
