"""Which axes of an input without a customary layout count tokens: those that a softmax runs over.

Queries, keys and values given directly, dense masks and biases: their axes look alike, so the
source is traced once with all of them dynamic. The sizes that a softmax reduces are the keys'.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from attnopt.frontend.calls import Example
from attnopt.frontend.exporting import FIRST, Trace, trace
from attnopt.frontend.inputs import is_fixed_by_name
from attnopt.nouns import No

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_aten = torch.ops.aten
_ATTENTION = frozenset({_aten.scaled_dot_product_attention.default})
_REDUCTIONS = frozenset(
    {
        _aten.softmax.int,
        _aten._softmax.default,
        _aten._safe_softmax.default,
        _aten.log_softmax.int,
        _aten.logsumexp.default,
        _aten.amax.default,
        _aten.max.dim,
    }
)
_SUMS = frozenset({_aten.sum.dim_IntList})
_EXPONENTIALS = frozenset({_aten.exp.default, _aten.exp2.default})

Axes = Mapping[str, tuple[int, ...]]


def with_lengths(source: nn.Module, example: Example, axes: Axes) -> dict[str, tuple[int, ...]]:
    """Return the dynamic axes with those of raw attention inputs among them."""
    unknown = {n for n, t in example.tensors.items() if _is_unknown(example, n, t)}
    if not unknown or any(map(_looks_around, source.modules())):
        return dict(axes)
    traced = _all_dynamic(source, example, axes, unknown)
    if isinstance(traced, No):
        return dict(axes)
    keys = set(_reduced(traced.graph_module.graph))
    places = {
        axis
        for name in unknown
        for axis, size in enumerate(traced.shapes[name][:-1])
        if size in keys and len(traced.shapes[name]) > 3
    }
    found = {n: _token_axes(traced.shapes[n], keys, places) for n in unknown}
    return {**axes, **{n: tuple(sorted({*axes[n], *a})) for n, a in found.items()}}


def _looks_around(module: nn.Module) -> bool:
    """Tell whether a module mixes neighbours, as image models do; 1 x 1 only projects."""
    return isinstance(module, _CONVOLUTIONS) and any(size > 1 for size in module.kernel_size)


def _is_unknown(example: Example, name: str, tensor: Tensor) -> bool:
    if is_fixed_by_name(name):
        return False
    if tensor.dim() > 3:
        return True
    square = tensor.is_floating_point() if tensor.dim() == 2 else tensor.dtype is torch.bool
    return example.config is None and tensor.dim() > 1 and square


def _all_dynamic(source: nn.Module, example: Example, axes: Axes, unknown: set[str]) -> Trace | No:
    every = {n: tuple(range(example.tensors[n].dim())) for n in unknown}
    result: Trace | No = No("there is nothing to trace")
    for shorten in (0, 1):
        dynamic = {**axes, **{n: a[: len(a) - shorten] for n, a in every.items()}}
        result = trace(source, example.call, example.tensors, dynamic, (FIRST,))
        if not isinstance(result, No):
            return result
    return result


def _reduced(graph: fx.Graph) -> Iterator[Any]:
    """Yield the sizes that a softmax runs over, sinks left out, as inputs name them."""
    for node in graph.nodes:
        if node.target in _ATTENTION:
            yield _size(node.args[1], -2)
        elif node.target in _REDUCTIONS or _sums_exponentials(node):
            yield _size(node.args[0], _dimension(node))


def _sums_exponentials(node: fx.Node) -> bool:
    return node.target in _SUMS and node.all_input_nodes[0].target in _EXPONENTIALS


def _dimension(node: fx.Node) -> int:
    dimension: Any = node.args[1] if len(node.args) > 1 else -1
    return int(dimension[0]) if isinstance(dimension, list | tuple) else int(dimension)


def _size(node: Any, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    if not isinstance(size, torch.SymInt):
        return size
    symbols = [a for a in sympy.Add.make_args(size.node.expr) if not a.is_Integer]
    return str(symbols[0]) if len(symbols) == 1 else str(size.node.expr)


def _token_axes(shape: tuple[Any, ...], keys: set[Any], places: set[int]) -> tuple[int, ...]:
    """Return the token axes of an input, and its first other axis, which counts rows."""
    rank = len(shape)
    if shape[-1] in keys:
        found = {rank - 1, rank - 2}
    else:
        found = {a for a in range(rank - 1) if shape[a] in keys or (rank > 3 and a in places)}
    rows = [a for a in range(rank) if a not in found][:1] if found and rank > 2 else []
    return tuple(a for a in (*found, *rows) if isinstance(shape[a], str))
