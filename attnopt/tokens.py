"""How one axis of tokens runs through the ops of a graph that treat every token alike.

For such an op a permutation of the tokens of its inputs permutes those of its result, and does
nothing else. What reads a grid (convolutions, pooling, slices of tokens) is no such op.
"""

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import is_size
from attnopt.finder.ops import JOINING, TRANSPARENT, args, argument, kind, rank, value
from attnopt.finder.provenance import CONSTANT, ELEMENTWISE
from attnopt.ops import attention, neighborhood_attention

Inputs = dict[fx.Node, int]
"""The inputs of a node that carry the tokens, each with the axis that they lie along."""

_MORE = "erf hardsigmoid selu celu sign eq ne lt le gt ge logical_and logical_or".split()
_ALIKE = (ELEMENTWISE | TRANSPARENT | frozenset(_MORE)) - {
    *("prelu", "native_dropout", "type_as", "wrap_with_autocast", "normalize"),
}
_RESHAPING = frozenset("view reshape _unsafe_view flatten unflatten squeeze unsqueeze".split())
_SWAPPING = frozenset("transpose swapaxes swapdims mT adjoint".split())
_REDUCING = frozenset("mean sum amax amin var linalg_vector_norm".split())
_SPLITTING = frozenset("split split_with_sizes chunk unsafe_split unsafe_chunk".split())
_LAYER_NORMS = frozenset("layer_norm rms_norm".split())
_MASKS = ("bias", "mask", "padding")
_PLACES = (*_MASKS, "causal", "window", "right", "prefix", "chunk", "first")


def inputs_along(node: fx.Node, axis: int) -> Inputs | None:
    """Return the inputs that carry the tokens along an axis of a node; None where it mixes them."""
    rule = _rule(node)
    return None if rule is None else rule(node, axis)


def output_along(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return the axis of a node that the tokens along an axis of one of its inputs come to."""
    for candidate in range(_rank(node)):
        if (inputs_along(node, candidate) or {}).get(source) == axis:
            return candidate
    return None


def is_list(node: fx.Node) -> bool:
    """Tell whether a node holds several tensors, as a split does."""
    return isinstance(value(node), tuple | list)


def forgets_order(node: fx.Node, source: fx.Node, axis: int, leading: int) -> bool:
    """Tell whether a node gives the same in whatever order the tokens of a source are.

    The first `leading` tokens stay where they are.
    """
    name = kind(node)
    if not isinstance(value(node), Tensor | tuple | list) or name in CONSTANT:
        return node.op != "output"
    if name in _REDUCING and args(node)[0] is source:
        dims = _reduced(node)
        return dims is not None and axis in dims
    if name in ("select", "slice", "narrow") and args(node)[0] is source:
        return _dim(node) == axis and _within(node, leading)
    return False


def reads_as_keys(node: fx.Node, source: fx.Node, axes: Inputs) -> bool:
    """Tell whether a node attends to tokens whose order is the same for keys and values."""
    if node.target is not attention or any(node.kwargs.get(n) for n in _PLACES):
        return False
    q, k, v = args(node)[:3]
    return source in (k, v) and source is not q and axes.get(k) == axes.get(v) == 2


def _rule(node: fx.Node) -> "Callable[[fx.Node, int], Inputs | None] | None":
    if node.op != "call_function":
        return None
    if node.target in (attention, neighborhood_attention):
        return _attended
    name = kind(node)
    if name in _ALIKE:
        return _alike
    return _RULES.get(name)


def _alike(node: fx.Node, axis: int) -> Inputs | None:
    """Read an op that works element by element, its inputs broadcast from the right."""
    found: Inputs = {}
    for x in node.all_input_nodes:
        if is_size(x):
            continue
        if not isinstance(value(x), Tensor):
            return None
        own = axis - (_rank(node) - rank(x))
        if own < 0 or _is(_shape(x)[own], 1):
            continue
        if not _is(_shape(x)[own], _shape(node)[axis]):
            return None
        found[x] = own
    return found


def _linear(node: fx.Node, axis: int) -> Inputs | None:
    x = args(node)[0]
    return {x: axis} if axis < rank(x) - 1 else None


def _matmul(node: fx.Node, axis: int) -> Inputs | None:
    x, weight = args(node)[:2]
    if rank(weight) != 2 or rank(x) != _rank(node) or x is weight:
        return None
    return {x: axis} if axis < rank(x) - 1 else None


def _normed(node: fx.Node, axis: int) -> Inputs | None:
    x, over = args(node)[:2]
    return {x: axis} if axis < rank(x) - len(over) else None


def _normed_by_group(node: fx.Node, axis: int) -> Inputs | None:
    return {args(node)[0]: axis} if axis >= 2 else None


def _transposed(node: fx.Node, axis: int) -> Inputs | None:
    x = args(node)[0]
    a, b = (*args(node)[1:], -1, -2)[:2]
    first, second = a % rank(x), b % rank(x)
    return {x: {first: second, second: first}.get(axis, axis)}


def _permuted(node: fx.Node, axis: int) -> Inputs | None:
    x, order = args(node)[:2]
    return {x: order[axis] % rank(x)}


def _reshaped(node: fx.Node, axis: int) -> Inputs | None:
    """Find the axis of the same size with as much before it."""
    x = args(node)[0]
    mine, theirs = _shape(node), _shape(x)
    for own, size in enumerate(theirs):
        if _is(size, mine[axis]) and _is(math.prod(theirs[:own]), math.prod(mine[:axis])):
            return {x: own}
    return None


def _selected(node: fx.Node, axis: int) -> Inputs | None:
    x = args(node)[0]
    return {x: axis if axis < _dim(node) else axis + 1}


def _cut(node: fx.Node, axis: int) -> Inputs | None:
    x = args(node)[0]
    whole = _is(_shape(x)[axis], _shape(node)[axis]) and argument(node, 4, "step", 1) == 1
    return {x: axis} if axis != _dim(node) or whole else None


def _split(node: fx.Node, axis: int) -> Inputs | None:
    given = argument(node, 2, "dim", 0)
    x = args(node)[0]
    return {x: axis} if given % rank(x) != axis else None


def _unbound(node: fx.Node, axis: int) -> Inputs | None:
    x = args(node)[0]
    dim = argument(node, 1, "dim", 0) % rank(x)
    return {x: axis if axis < dim else axis + 1}


def _item(node: fx.Node, axis: int) -> Inputs | None:
    """Read one tensor of a split; the split must be one that the tokens run through."""
    source = args(node)[0]
    return {source: axis} if is_list(source) and inputs_along(source, axis) else None


def _joined(node: fx.Node, axis: int) -> Inputs | None:
    parts = args(node)[0]
    dim = argument(node, 1, "dim", 0) % _rank(node)
    if kind(node) not in ("cat", "concat", "concatenate", "stack") or dim == axis:
        return None
    stacks = kind(node) == "stack"
    return dict.fromkeys(parts, axis - 1 if stacks and axis > dim else axis)


def _reducing(node: fx.Node, axis: int) -> Inputs | None:
    dims = _reduced(node)
    if dims is None:
        return None
    x = args(node)[0]
    if rank(x) == _rank(node):
        return {x: axis} if axis not in dims else None
    return {x: [i for i in range(rank(x)) if i not in dims][axis]}


def _attended(node: fx.Node, axis: int) -> Inputs | None:
    """Read attention whose queries are tokens; its keys are others, or the same tokens."""
    q, k, v = args(node)[:3]
    if axis != 2 or any(node.kwargs.get(n) is not None for n in _MASKS):
        return None
    if node.target is neighborhood_attention:
        return {q: 2, k: 2, v: 2}
    if any(node.kwargs.get(n) for n in _PLACES):
        return None
    others = not _is(_shape(k)[2], _shape(q)[2])
    return {q: 2} if others else {q: 2, k: 2, v: 2}


_RULES: dict[str, Callable[[fx.Node, int], Inputs | None]] = {
    **dict.fromkeys(_RESHAPING, _reshaped),
    **dict.fromkeys(_SWAPPING, _transposed),
    **dict.fromkeys(_REDUCING, _reducing),
    **dict.fromkeys(_SPLITTING, _split),
    **dict.fromkeys(_LAYER_NORMS, _normed),
    **dict.fromkeys(JOINING, _joined),
    "linear": _linear,
    "matmul": _matmul,
    "group_norm": _normed_by_group,
    "permute": _permuted,
    "expand": _alike,
    "select": _selected,
    "slice": _cut,
    "narrow": _cut,
    "unbind": _unbound,
    "getitem": _item,
}


def _dim(node: fx.Node) -> int:
    return int(argument(node, 1, "dim", 0)) % rank(args(node)[0])


def _reduced(node: fx.Node) -> set[int] | None:
    """Return the axes that a mean or sum is taken over; None where they cannot be read."""
    given = argument(node, 2 if kind(node) == "linalg_vector_norm" else 1, "dim")
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, list | tuple) or not dims:
        return None
    return {d % rank(args(node)[0]) for d in dims}


def _within(node: fx.Node, leading: int) -> bool:
    """Tell whether a slice or a selection reads leading tokens only."""
    first = argument(node, 2, "start", 0) if kind(node) != "select" else args(node)[2]
    if not isinstance(first, int | None) or (first or 0) < 0:
        return False
    if kind(node) == "select":
        return (first or 0) < leading
    last = argument(node, 3, "end")
    stop = (first or 0) + last if kind(node) == "narrow" and isinstance(last, int) else last
    return isinstance(stop, int) and 0 <= stop <= leading


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node, or of the first of its tensors."""
    found = value(node)
    return tuple((found[0] if is_list(node) else found).shape)


def _rank(node: fx.Node) -> int:
    found = value(node)
    if not isinstance(found, Tensor | tuple | list) or (is_list(node) and not found):
        return 0
    return len(_shape(node))


def _is(a: Any, b: Any) -> bool:
    """Tell whether two sizes are equal at every size of the inputs; no guard is set."""
    left, right = (x.node.expr if isinstance(x, torch.SymInt) else sympy.Integer(x) for x in (a, b))
    return bool(sympy.expand(left - right) == 0)
