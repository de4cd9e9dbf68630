"""Resizes of grids to the size that they have, such as tables of positions at their own size."""

from typing import Any, Final

import torch
from torch import fx
from torch._ops import OpOverloadPacket

from attnopt.graphs import schema_of

aten = torch.ops.aten

_INTERPOLATING: Final[tuple[OpOverloadPacket[Any, Any], ...]] = (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d, aten.upsample_linear1d, aten.upsample_bilinear2d,
    aten.upsample_trilinear3d, aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
)  # fmt: skip
_NAMED_SIZES: Final = frozenset({"self", "input", "output_size", "align_corners"})
_SIZED: Final = frozenset(x for op in _INTERPOLATING for x in (op.default, op.vec))


def resize_what_changes(graph_module: fx.GraphModule) -> None:
    """Copy grids that are resized to the size that they have, in place: each weight is 0 or 1.

    A copy, and not the grid itself: what is returned may be written to by whoever called.
    """
    for node in graph_module.graph.nodes:
        if node.target in _SIZED and _is_idle(node):
            node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}


def _is_idle(node: fx.Node) -> bool:
    """Tell whether a resize names the size that its grid has, and no factor beside it."""
    source: Any = node.args[0]
    target: Any = node.target
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if not all(isinstance(x, int) for x in (*before, *after)) or before != after:
        return False
    given = zip(schema_of(target).arguments, node.args, strict=False)
    named = {**{a.name: x for a, x in given}, **node.kwargs}
    return all(x is None for name, x in named.items() if name not in _NAMED_SIZES)
