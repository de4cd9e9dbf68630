"""Complex numbers of a graph as pairs of real ones: ONNX Runtime computes with real numbers only.

    view_as_real(view_as_complex(x) * polar(r, a))
    -> stack(x0 r cos(a) - x1 r sin(a), x0 r sin(a) + x1 r cos(a))

A graph with a complex op that has no row here stays as it is: torch.onnx serves some of those.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from attnopt.nouns import No

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """The real and the imaginary part of a complex value: nodes of a graph, or numbers."""

    real: Any
    imaginary: Any


@dataclass(frozen=True)
class Emit:
    """Puts ops into a graph; `target` is the op that is being replaced."""

    graph: fx.Graph
    target: Any

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an op on nodes."""
        return self.graph.call_function(target, args, kwargs)


def split_complex(graph_module: fx.GraphModule) -> int | No:
    """Compute with pairs of real tensors, in place; return how many ops were complex."""
    graph = graph_module.graph
    found = [n for n in graph.nodes if any(map(_is_complex, (n, *n.all_input_nodes)))]
    for node in found:
        if node.op != "get_attr" and node.target not in _RULES:
            return No(f"{node.target} of complex numbers has no form in real ones", node.name)
    pairs: dict[fx.Node, Pair] = {}
    for node in found:
        with graph.inserting_before(node):
            made = _made(graph_module, node, pairs)
        if isinstance(made, Pair):
            pairs[node] = made
        else:
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
    for node in reversed(found):
        graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return len([n for n in found if n.op != "get_attr"])


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(x, Tensor) and x.is_complex() for x in values)


def _made(graph_module: fx.GraphModule, node: fx.Node, pairs: dict[fx.Node, Pair]) -> Any:
    """Return the parts of a complex node, or the node that takes the place of a real one."""
    if node.op == "get_attr":
        return _stored(graph_module, node)

    def parts(x: Any) -> Any:
        return Pair(x.real, x.imag) if isinstance(x, complex) else pairs.get(x, x)

    args: Any = map_aggregate(node.args, parts)
    kwargs: Any = map_aggregate(node.kwargs, parts)
    return _RULES[node.target](Emit(graph_module.graph, node.target), *args, **kwargs)


def _stored(graph_module: fx.GraphModule, node: fx.Node) -> Pair:
    """Keep the parts of a complex constant beside it."""
    owner, _, last = str(node.target).rpartition(".")
    whole = getattr(graph_module.get_submodule(owner), last).detach()
    names: list[str] = []
    for part, tensor in (("real", whole.real), ("imaginary", whole.imag)):
        names.append(f"{node.target}_{part}".replace(".", "_"))
        graph_module.register_buffer(names[-1], tensor.contiguous())
    return Pair(*(graph_module.graph.get_attr(name) for name in names))


# ---------------------------------------------------------------------------------------- rules


def _of_parts(emit: Emit, x: Any) -> Pair:
    return Pair(*(emit(aten.select.int, x, -1, part) for part in (0, 1)))


def _as_parts(emit: Emit, x: Pair) -> fx.Node:
    return emit(aten.stack.default, [x.real, x.imaginary], -1)


def _pair(emit: Emit, real: Any, imaginary: Any) -> Pair:
    return Pair(real, imaginary)


def _polar(emit: Emit, length: Any, angle: Any) -> Pair:
    sides = (emit(op.default, angle) for op in (aten.cos, aten.sin))
    return Pair(*(emit(aten.mul.Tensor, length, side) for side in sides))


def _exp(emit: Emit, x: Pair) -> Pair:
    return _polar(emit, emit(aten.exp.default, x.real), x.imaginary)


def _each(emit: Emit, *args: Any, **kwargs: Any) -> Pair:
    """Do the same to both parts: what moves elements, or is linear in its one complex operand."""
    # A part's elements need not lie as those of the whole.
    target = aten.reshape.default if emit.target is aten.view.default else emit.target
    real = map_aggregate((args, kwargs), lambda x: x.real if isinstance(x, Pair) else x)
    imaginary = map_aggregate((args, kwargs), lambda x: x.imaginary if isinstance(x, Pair) else x)
    return Pair(*(emit(target, *given, **named) for given, named in (real, imaginary)))


def _joined(emit: Emit, parts: list[Any], *dim: Any) -> Pair:
    return _each(emit, [_whole(emit, x) for x in parts], *dim)


def _whole(emit: Emit, x: Any) -> Pair:
    """Give a real tensor an imaginary part."""
    return x if isinstance(x, Pair) else Pair(x, emit(aten.zeros_like.default, x))


def _sum(emit: Emit, x: Any, y: Any, **alpha: Any) -> Pair:
    if not isinstance(y, fx.Node | Pair):
        return Pair(emit(emit.target, x.real, y, **alpha), x.imaginary)
    return _each(emit, _whole(emit, x), _whole(emit, y), **alpha)


def _product(emit: Emit, x: Any, y: Any) -> Pair:
    """Multiply, by whatever op is linear in both operands."""
    if not isinstance(x, Pair) or not isinstance(y, Pair):
        return _each(emit, x, y)
    straight = (emit(emit.target, a, b) for a, b in ((x.real, y.real), (x.imaginary, y.imaginary)))
    crossed = (emit(emit.target, a, b) for a, b in ((x.real, y.imaginary), (x.imaginary, y.real)))
    return Pair(emit(aten.sub.Tensor, *straight), emit(aten.add.Tensor, *crossed))


def _quotient(emit: Emit, x: Any, y: Any) -> Pair:
    if not isinstance(y, Pair):
        return _each(emit, x, y)
    times = Emit(emit.graph, aten.mul.Tensor)
    if not isinstance(y.real, fx.Node):
        inverse = 1 / complex(y.real, y.imaginary)
        return _product(times, x, Pair(inverse.real, inverse.imag))
    whole = _product(times, x, _conjugate(emit, y))
    return _each(emit, whole, _square(emit, y))


def _conjugate(emit: Emit, x: Pair) -> Pair:
    return Pair(x.real, emit(aten.neg.default, x.imaginary))


def _square(emit: Emit, x: Pair) -> fx.Node:
    squares = (emit(aten.mul.Tensor, part, part) for part in (x.real, x.imaginary))
    return emit(aten.add.Tensor, *squares)


def _length(emit: Emit, x: Pair) -> fx.Node:
    return emit(aten.sqrt.default, _square(emit, x))


def _angle(emit: Emit, x: Pair) -> fx.Node:
    return emit(aten.atan2.default, x.imaginary, x.real)


def _same(emit: Emit, x: Pair) -> Pair:
    return x


def _real(emit: Emit, x: Pair) -> fx.Node:
    return emit(aten.alias.default, x.real)


def _imaginary(emit: Emit, x: Pair) -> fx.Node:
    return emit(aten.alias.default, x.imaginary)


_RULES: Final[dict[Any, Callable[..., Any]]] = {
    aten.view_as_complex.default: _of_parts,
    aten.view_as_real.default: _as_parts,
    aten.complex.default: _pair,
    aten.polar.default: _polar,
    aten.exp.default: _exp,
    aten.real.default: _real,
    aten.imag.default: _imaginary,
    aten.abs.default: _length,
    aten.angle.default: _angle,
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.div.Tensor: _quotient,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    **dict.fromkeys((aten.mul.Tensor, aten.matmul.default, aten.bmm.default), _product),
    **dict.fromkeys(
        (aten._conj.default, aten.conj.default, aten.conj_physical.default), _conjugate
    ),
    **dict.fromkeys((aten.resolve_conj.default, aten.resolve_neg.default), _same),
    **dict.fromkeys(
        (
            operator.getitem,
            aten.alias.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.detach.default,
            aten.expand.default,
            aten.flatten.using_ints,
            aten.index.Tensor,
            aten.index_select.default,
            aten.mean.dim,
            aten.neg.default,
            aten.permute.default,
            aten.repeat.default,
            aten.reshape.default,
            aten.select.int,
            aten.slice.Tensor,
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.squeeze.dim,
            aten.sum.dim_IntList,
            aten.transpose.int,
            aten.unbind.int,
            aten.unflatten.int,
            aten.unsqueeze.default,
            aten.view.default,
        ),
        _each,
    ),
}
"""What becomes of each op whose result or operand is complex."""
