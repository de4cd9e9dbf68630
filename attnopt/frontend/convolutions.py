"""Causal convolutions over a state and what follows it: only outputs that are read are computed.

    conv(cat(state, x), padding on both sides)[as many as go in] -> activation -> [the last ones]
    -> conv(cat(state, x), no padding) -> activation -> [the last ones]

Padding on the left is for the first tokens of a state, and none of those is among the last; padding
on the right is cut off at once.
"""

import sys
from typing import Any, Final

import torch
from torch import fx

from attnopt.frontend.views import part_of

aten = torch.ops.aten
_ELEMENTWISE: Final = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.to.dtype,
    }
)
_DEFAULTS: Final[tuple[Any, ...]] = (None, None, None, [1], [0], [1], 1)


def compute_what_is_read(graph_module: fx.GraphModule) -> None:
    """Drop padding of which nothing is read, in place; the graph must be functional."""
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.conv1d.default):
        _narrow(node)


def _narrow(node: fx.Node) -> None:
    given: tuple[Any, ...] = node.args
    x, weight, bias, stride, padding, dilation, groups = given + _DEFAULTS[len(given) :]
    if node.kwargs or isinstance(padding, str) or [*stride] != [1]:
        return
    reach = (_sizes(weight)[-1] - 1) * dilation[0]
    first = _only_user(node)
    if not reach or [*padding] != [reach] or not _is_head(first, _sizes(x)[-1]):
        return
    chain = [node]
    following: Any = _only_user(first)
    while following is not None and following.target in _ELEMENTWISE:
        chain.append(following)
        following = _only_user(following)
    if following is None or not _is_tail(following):
        return
    ahead = _number(_sizes(x)[-1] - _sizes(following)[-1])
    if ahead is None or ahead < reach:
        return
    node.args = (x, weight, bias, stride, [0], dilation, groups)
    first.replace_all_uses_with(node)
    for changed in chain:
        value = changed.meta["val"]
        changed.meta["val"] = value.new_empty((*value.shape[:-1], _sizes(x)[-1] - reach))
    if ahead == reach:
        following.replace_all_uses_with(chain[-1])
    else:
        following.args = (chain[-1], following.args[1], ahead - reach, sys.maxsize)


def _only_user(node: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _sizes(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_head(node: Any, length: Any) -> bool:
    """Tell whether a slice of the last axis has the first `length` ones."""
    found = _slice(node)
    return found is not None and not found[0] and bool(_number(_sizes(node)[-1] - length) == 0)


def _is_tail(node: Any) -> bool:
    """Tell whether a slice of the last axis has all to the end."""
    found = _slice(node)
    return found is not None and isinstance(found[1], int) and found[1] == sys.maxsize


def _slice(node: Any) -> tuple[Any, Any] | None:
    """Return start and end of a slice of the last axis without steps."""
    if node is None or node.target is not aten.slice.Tensor:
        return None
    axis, start, end, step = part_of(node.args[1:])
    return (start, end) if axis in (-1, node.meta["val"].dim() - 1) and step == 1 else None


def _number(size: Any) -> int | None:
    """Return a size that is the same whatever others are."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else None
