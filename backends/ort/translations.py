"""Ops that torch.onnx has no translation of, in those of ONNX."""

from collections.abc import Callable
from typing import Any

import torch

from attnopt.ops import linear_recurrence, selective_scan


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a translation for each op that is registered in this process."""
    from attnopt.backends.ort import recurrence

    grouped = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        linear_recurrence: recurrence.linear_recurrence,
        selective_scan: recurrence.selective_scan,
        torch.ops.aten.sort.stable: _sort_stable,
        torch.ops.aten.remainder.Scalar: _remainder,
        torch.ops.aten.floor_divide.default: _floor_divide,
        torch.ops.aten.histc.default: _histc,
        torch.ops.aten.softplus.default: _softplus,
        torch.ops.aten.split_with_sizes.default: _split_with_sizes,
        torch.ops.aten.group_norm.default: _group_norm,
    }
    return found if grouped is None else {**found, grouped.default: _grouped_mm}


def _grouped_mm(input: Any, weight: Any, offs: Any) -> Any:  # noqa: A002  # the op's own names
    """Multiply the rows of each expert by its matrix: rows are sorted, `offs` are their ends."""
    from onnxscript import opset18

    op: Any = opset18
    experts = int(weight.shape[0])
    rows = _split(op, input, op.Cast(_counts(op, offs), to=7), 0, experts)  # int64
    parts = [
        op.MatMul(part, op.Gather(weight, op.Constant(value_int=expert), axis=0))
        for expert, part in enumerate(rows)
    ]
    return op.Concat(*parts, axis=0)


def _split_with_sizes(self: Any, split_sizes: Any, dim: int = 0) -> Any:
    """Split into parts whose sizes may be inputs'."""
    from onnxscript import ir, opset18

    op: Any = opset18
    if not any(isinstance(x, ir.Value) for x in split_sizes):
        sizes = op.Constant(value_ints=list(split_sizes))
        return _split(op, self, sizes, dim, len(split_sizes))
    last = op.Constant(value_ints=[-1])
    found = [
        op.Reshape(x, last) if isinstance(x, ir.Value) else op.Constant(value_ints=[x])
        for x in split_sizes
    ]
    return _split(op, self, op.Concat(*found, axis=0), dim, len(found))


def _split(op: Any, x: Any, sizes: Any, axis: int, count: int) -> list[Any]:
    found = op.Split(x, sizes, axis=axis, num_outputs=count)
    parts = list(found) if isinstance(found, (list, tuple)) else [found]
    # The exporter asks for the number of results, which the op does not take beside their sizes.
    del parts[0].producer().attributes["num_outputs"]
    return parts


def _counts(op: Any, ends: Any) -> Any:
    """Return how many rows each expert has, of which `ends` are the running sums."""
    sums = ends.producer()
    if sums is not None and sums.op_type == "Cast":
        sums = sums.inputs[0].producer()
    if sums is not None and sums.op_type == "CumSum":
        return sums.inputs[0]
    zero = op.CastLike(op.Constant(value_ints=[0]), ends)
    return op.Sub(ends, op.Concat(zero, op.Slice(ends, [0], [-1], [0]), axis=0))


def _histc(self: Any, bins: int = 100, min: float = 0, max: float = 0) -> Any:  # noqa: A002
    """Count whole numbers, each of which has a bin of its own; others as torch.onnx does."""
    from onnxscript import opset18
    from onnxscript.function_libs.torch_lib.ops.core import aten_histc

    op: Any = opset18
    cast = self.producer()
    whole = cast is not None and cast.op_type == "Cast" and cast.inputs[0].dtype.is_integer()
    if not whole or (min, max) != (0, bins - 1):
        return aten_histc(self, bins, min, max)
    numbers = op.Reshape(cast.inputs[0], op.Constant(value_ints=[-1, 1]))
    every = op.CastLike(op.Constant(value_ints=list(range(bins))), numbers)
    found = op.Cast(op.Equal(numbers, every), to=self.dtype)
    return op.ReduceSum(found, op.Constant(value_ints=[0]), keepdims=0)


def _softplus(self: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """Return log(1 + exp(x)): float32 has no other number than x above the threshold."""
    from onnxscript import ir, opset18
    from onnxscript.function_libs.torch_lib.ops.nn import aten_softplus

    op: Any = opset18
    same = beta == 1 and threshold >= 20 and self.dtype == ir.DataType.FLOAT
    return op.Softplus(self) if same else aten_softplus(self, beta, threshold)


def _sort_stable(
    self: Any, stable: bool = True, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    """Sort by TopK of everything, which puts the lower index first where values are equal."""
    from onnxscript import opset18

    op: Any = opset18
    # The end of the last size has no number below zero.
    after = {"end": dim + 1} if dim != -1 else {}
    size = op.Shape(self, start=dim, **after)
    values, indices = op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)
    return values, indices


def _floor_divide(self: Any, other: Any) -> Any:
    """Divide, and round down."""
    from onnxscript import ir, opset18

    op: Any = opset18
    if not isinstance(other, ir.Value):
        other = op.Constant(value=ir.tensor(other, dtype=self.dtype))
    if self.dtype.is_floating_point():
        return op.Floor(op.Div(self, other))
    # Mod has the sign of the divisor: what is left divides without a rest.
    return op.Div(op.Sub(self, op.Mod(self, other)), other)


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
    rest = list(self.shape)[1:]
    known = all(isinstance(size, int) for size in rest)
    found = op.Reshape(found, op.Constant(value_ints=[0, *rest]) if known else op.Shape(self))
    along = op.Constant(value_ints=[-1, *[1] * (len(self.shape) - 2)])
    if weight is not None:
        found = op.Mul(found, op.Reshape(weight, along))
    return found if bias is None else op.Add(found, op.Reshape(bias, along))
