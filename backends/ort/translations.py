"""Ops that torch.onnx has no translation of, in those of ONNX."""

from collections.abc import Callable
from typing import Any

import torch

from attnopt.ops import linear_recurrence


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a translation for each op that is registered in this process."""
    from attnopt.backends.ort.recurrence import linear_recurrence as scan

    grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        linear_recurrence: scan,
        torch.ops.aten.sort.stable: _sort_stable,
        torch.ops.aten.remainder.Scalar: _remainder,
        torch.ops.aten.group_norm.default: _group_norm,
    }
    return found if grouped is None else {**found, grouped.default: _grouped_mm}


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:  # noqa: A002  # the op's own names
    """Multiply the rows of each expert by its matrix: rows are sorted, `offs` are their ends."""
    from onnxscript import opset18

    op: Any = opset18
    ends = op.Cast(offs, to=7)  # int64
    start = op.Constant(value_ints=[0])
    parts: list[Any] = []
    for expert in range(int(weight.shape[0])):
        end = op.Slice(ends, [expert], [expert + 1])
        rows = op.Slice(input, start, end, [0])
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=expert), axis=0)))
        start = end
    return op.Concat(*parts, axis=0)


def _sort_stable(
    self: Any, stable: bool = True, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    """Sort by TopK of everything, which puts the lower index first where values are equal."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
    values, indices = op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _remainder(self: Any, other: Any) -> Any:
    """Divide by a number, which may be a size, and return the rest, of the divisor's sign."""
    from onnxscript import ir, opset18

    op: Any = opset18
    if not isinstance(other, ir.Value):
        other = op.Constant(value=ir.tensor(other, dtype=self.dtype))
    other = op.CastLike(other, self)
    if self.dtype.is_floating_point():
        return op.Sub(self, op.Mul(op.Floor(op.Div(self, other)), other))
    return op.Mod(self, other)


def _group_norm(
    self: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Norm groups as instances: ONNX Runtime takes GroupNormalization apart on a CPU."""
    import numpy as np
    from onnxscript import ir, opset18

    op: Any = opset18
    kind = self.dtype.numpy()
    ones, zeros = (
        op.Constant(value=ir.tensor(np.full(num_groups, x, kind), dtype=self.dtype)) for x in (1, 0)
    )
    groups = op.Reshape(self, op.Constant(value_ints=[0, num_groups, -1]))
    found = op.InstanceNormalization(groups, ones, zeros, epsilon=eps)
    found = op.Reshape(found, op.Shape(self))
    along = op.Constant(value_ints=[-1, *[1] * (len(self.shape) - 2)])
    if weight is not None:
        found = op.Mul(found, op.Reshape(weight, along))
    return found if bias is None else op.Add(found, op.Reshape(bias, along))
