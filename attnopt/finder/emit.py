"""Write canonical tensors into a graph: split, permute and merge axes as a layout says."""

import contextlib
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import Shapes
from attnopt.finder.layout import Layout
from attnopt.finder.ops import value
from attnopt.frontend.cleanup import SIZE_OPERATIONS
from attnopt.ops import attention

aten = torch.ops.aten
Size = int | fx.Node


class Writer:
    """Insert nodes into a graph before a given node, with example values kept up to date."""

    def __init__(
        self,
        graph: fx.Graph,
        shapes: Shapes,
        before: fx.Node,
        mapping: Mapping[fx.Node, fx.Node],
        shared: dict[Any, fx.Node] | None = None,
    ) -> None:
        self.graph = graph
        self.shapes = shapes
        self.before = before
        self.mapping = mapping
        self._sizes: dict[Any, fx.Node] = {}
        self._origin = before
        self._shared: dict[Any, fx.Node] = {} if shared is None else shared
        self.made: fx.Node | None = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert one call and compute its example value."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self._annotate(node)
        with fake_mode_of((*node.all_input_nodes,)):
            node.meta["val"] = target(
                *fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value)
            )
        return node

    def attention(self, q: fx.Node, k: fx.Node, v: fx.Node, options: dict[str, Any]) -> fx.Node:
        """Insert the canonical op, whose result is known without running its reference."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(attention, (q, k, v), options)
        self._annotate(node)
        with fake_mode_of((v,)):
            node.meta["val"] = value(v).new_empty((*value(q).shape[:3], value(v).shape[-1]))
        self.made = node
        return node

    def _annotate(self, node: fx.Node) -> None:
        for key in ("nn_module_stack", "stack_trace"):
            if key in self._origin.meta:
                node.meta[key] = self._origin.meta[key]

    def shared(self, key: Any, write: Callable[["Writer"], fx.Node]) -> fx.Node:
        """Insert what every site that asks with this key shares, at the start of the graph."""
        if key not in self._shared:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            self._shared[key] = write(Writer(self.graph, self.shapes, first, self.mapping))
        return self._shared[key]

    def size(self, size: Any) -> Size:
        """Return a size as an integer, or as a node computed from the sizes of the inputs."""
        if isinstance(size, int):
            return size
        made = self._expression(size.node.expr)
        assert not isinstance(made, float)
        return made

    def _expression(self, e: Any) -> Size | float:
        if e.is_Integer:
            return int(e)
        if e.is_Float:
            return float(e)
        if e not in self._sizes:
            self._sizes[e] = self._build(e)
        return self._sizes[e]

    def _build(self, e: Any) -> fx.Node:
        if e.is_symbol:
            node, axis = self.shapes.sources[e]
            source = self.mapping[node]
            return source if axis < 0 else self.call(aten.sym_size.int, source, axis)
        if isinstance(e, sympy.Pow) and e.exp.is_Integer and e.exp > 0:
            return self._fold(operator.mul, [self._expression(e.base)] * int(e.exp))
        parts = [self._expression(a) for a in e.args]
        target = SIZE_OPERATIONS.get(type(e).__name__)
        if target is None:
            raise NotImplementedError(f"size expression {e}")
        return self._fold(target, parts) if len(parts) > 1 else self.call(target, *parts)

    def _fold(self, op: Any, parts: Sequence[Size | float]) -> fx.Node:
        total = parts[0]
        for part in parts[1:]:
            total = self.call(op, total, part)
        assert isinstance(total, fx.Node)
        return total

    def reshape(self, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """Insert a reshape to symbolic or plain sizes, unless it changes nothing."""
        if tuple(value(node).shape) == tuple(sizes):
            return node
        return self.call(aten.reshape.default, node, [self.size(s) for s in sizes])

    def permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        """Insert a permutation of axes, unless it changes nothing."""
        if list(order) == list(range(len(order))):
            return node
        return self.call(aten.permute.default, node, list(order))


@contextlib.contextmanager
def fake_mode_of(nodes: tuple[fx.Node, ...]) -> Generator[None]:
    """Compute under the fake mode of the first tensor among the nodes."""
    modes = (getattr(value(n), "fake_mode", None) for n in nodes)
    mode = next((m for m in modes if m is not None), None)
    with mode if mode is not None else contextlib.nullcontext():
        yield


def insert_call(before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """Insert one call before a node, as a part of what that node does."""
    with before.graph.inserting_before(before), fake_mode_of((before,)):
        made = before.graph.call_function(target, args)
        made.meta = {**before.meta, "val": target(*fx.map_arg(args, value))}
    return made


def split_axes(writer: Writer, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout]:
    """Give every factor an axis of its own."""
    sizes: list[Any] = []
    axes: list[tuple[Any, ...]] = []
    for size, factors in zip(value(node).shape, layout.axes, strict=True):
        if len(factors) <= 1:
            sizes.append(size)
            axes.append(factors)
            continue
        known = _symbolic_factors(size, [f.role for f in factors], [f.size for f in factors])
        sizes.extend(known)
        axes.extend((f,) for f in factors)
    return writer.reshape(node, sizes), Layout(tuple(axes))


def _symbolic_factors(size: Any, roles: list[str], hints: list[int]) -> list[Any]:
    """Split a size among its factors: those of batch, queries and keys may vary."""
    varying = [i for i, r in enumerate(roles) if r in "BTS"]
    if isinstance(size, int) or not varying:
        return list(hints)
    # The slowest varying factor takes what the fixed ones leave.
    chosen = varying[0]
    fixed = 1
    for i, h in enumerate(hints):
        fixed *= h if i != chosen else 1
    return [size // fixed if i == chosen else h for i, h in enumerate(hints)]


def to_canonical(writer: Writer, node: fx.Node, layout: Layout, order: str) -> fx.Node:
    """Bring a tensor to the axes of `order`; roles that it lacks become axes of size 1.

    Where a role spreads over several axes and the tensor broadcasts along some, it is expanded.
    """
    if layout.is_plain(order):
        return node
    node, split = split_axes(writer, node, layout)
    sources = {
        role: sorted(
            (i for i, a in enumerate(split.axes) if a and a[0].role == role),
            key=lambda i: -split.axes[i][0].stride,
        )
        for role in order
    }
    used = [i for role in order for i in sources[role]]
    unused = [i for i in range(len(split.axes)) if i not in used]
    shape = value(node).shape
    permuted = writer.permute(node, [*unused, *used])
    sizes: list[Any] = []
    for role in order:
        total: Any = 1
        for i in sources[role]:
            total = total * shape[i]
        sizes.append(total)
    return writer.reshape(permuted, sizes)


def from_canonical(
    writer: Writer, node: fx.Node, layout: Layout, order: str, sizes: Sequence[Any]
) -> fx.Node:
    """Bring a tensor with the axes of `order` to a layout whose axes have the given sizes."""
    pieces: list[tuple[Any, Any]] = []
    for size, factors in zip(sizes, layout.axes, strict=True):
        if len(factors) <= 1:
            pieces.extend((f, size) for f in factors)
        else:
            parts = _symbolic_factors(size, [f.role for f in factors], [f.size for f in factors])
            pieces.extend(zip(factors, parts, strict=True))
    ranked = sorted(pieces, key=lambda p: (order.index(p[0].role), -p[0].stride))
    spread = writer.reshape(node, [size for _, size in ranked])
    position = {p[0]: i for i, p in enumerate(ranked)}
    back = writer.permute(spread, [position[f] for f, _ in pieces])
    return writer.reshape(back, list(sizes))


def example(node: fx.Node) -> Tensor:
    """Return the example tensor of a node."""
    found = value(node)
    assert isinstance(found, Tensor)
    return found
