"""Run slices of a captured graph on real values, at any sizes.

Sizes never need the tensor they were read from: each is an expression over the graph's free
symbols, so a mask can be evaluated for ten thousand positions without running the model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.finder.ops import UNKNOWN, hint, value
from attnopt.program import Program

Sizes = Mapping[sympy.Symbol, int]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_COMPLEX_LOW = (torch.complex64, torch.complex32)


def is_size(node: fx.Node) -> bool:
    """Tell whether a node holds a size or another number instead of a tensor."""
    return isinstance(value(node), (*_SYMBOLIC, int, float, bool))


def at_sizes(x: Any, sizes: Sizes) -> Any:
    """Evaluate a symbolic number at the given sizes."""
    if not isinstance(x, _SYMBOLIC):
        return x
    found = _substituted(x.node.expr, sizes)
    if isinstance(x, torch.SymBool):
        return bool(found)
    return int(found) if isinstance(x, torch.SymInt) else float(found)


def _substituted(e: Any, sizes: Sizes) -> Any:
    """Evaluate an expression: sums and products of symbols, which most are, by hand."""
    if isinstance(e, int | float):
        return e
    if e.is_symbol:
        return sizes[e]
    if e.is_Integer:
        return int(e)
    if e.is_Add:
        return sum(_substituted(a, sizes) for a in e.args)
    if e.is_Mul and all(not a.is_Rational or a.is_Integer for a in e.args):
        total = 1
        for a in e.args:
            total = total * _substituted(a, sizes)
        return total
    if type(e).__name__ == "FloorDiv":
        top, bottom = (_substituted(a, sizes) for a in e.args)
        return top // bottom
    return e.subs(dict(sizes))


@dataclass(frozen=True)
class Shapes:
    """The free symbols of a graph, where each is read, and its size at capture."""

    program: Program

    @cached_property
    def sources(self) -> dict[sympy.Symbol, tuple[fx.Node, int]]:
        """Map each symbol to the placeholder and axis that it is the size of (axis -1: itself)."""
        found: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                break
            example = value(node)
            if isinstance(example, torch.SymInt) and example.node.expr.is_symbol:
                found.setdefault(example.node.expr, (node, -1))
            if isinstance(example, Tensor):
                for axis, size in enumerate(example.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                        found.setdefault(size.node.expr, (node, axis))
        return found

    @cached_property
    def captured(self) -> dict[sympy.Symbol, int]:
        """Map each symbol to its size at capture; those that data decide to one that varies."""
        sizes: dict[sympy.Symbol, int] = dict.fromkeys(self._decided_by_data(), UNKNOWN)
        for symbol, (node, axis) in self.sources.items():
            example = value(node)
            sizes[symbol] = hint(example if axis < 0 else example.shape[axis])
        return sizes

    def _decided_by_data(self) -> set[sympy.Symbol]:
        """List the symbols that stand in shapes and are no input's size."""
        found: set[sympy.Symbol] = set()
        for node in self.program.graph.nodes:
            for size in getattr(value(node), "shape", ()):
                found |= size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
        return found - self.sources.keys()

    def shape(self, node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a node's tensor at the given sizes."""
        return tuple(at_sizes(s, sizes) for s in value(node).shape)


def ancestors(targets: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """List what the values of the targets depend on, in order of execution, targets included.

    Sizes end the walk: they are known without running anything. So do the nodes in `stop`.
    """
    ends = set(stop)
    seen: set[fx.Node] = set()
    todo = list(targets)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in ends and not is_size(node):
            todo.extend(node.all_input_nodes)
    return sorted(seen)


def leaves(targets: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """List the placeholders (and `stop` nodes) whose values the targets depend on."""
    ends = set(stop)
    found = ancestors(targets, ends)
    return [n for n in found if n in ends or (n.op == "placeholder" and not is_size(n))]


def evaluate(
    targets: list[fx.Node],
    leaf: Callable[[fx.Node], Tensor],
    *,
    sizes: Sizes,
    stop: Iterable[fx.Node] = (),
    double: bool = False,
) -> list[Any]:
    """Return the values of the targets, with `leaf` giving those of placeholders and `stop` nodes.

    With `double`, all floating arithmetic (casts to a lower precision too) is done in float64.
    """
    ends = set(stop)
    order = ancestors(targets, ends)
    last_use = {n: user for user in order if user not in ends for n in user.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    wanted = set(targets)

    def read(node: fx.Node) -> Any:
        return at_sizes(value(node), sizes) if is_size(node) else values[node]

    for node in order:
        if is_size(node):
            continue
        if node in ends or node.op == "placeholder":
            found = leaf(node)
            values[node] = _doubled(found) if double else found
        else:
            values[node] = run_node(node, read, double=double)
            for used in node.all_input_nodes:
                if last_use.get(used) is node and used not in wanted:
                    values.pop(used, None)
    return [read(t) for t in targets]


def run_node(node: fx.Node, read: Callable[[fx.Node], Any], *, double: bool = False) -> Any:
    """Run one node, reading its inputs through `read`."""
    args = fx.map_arg(node.args, read)
    kwargs = fx.map_arg(node.kwargs, read)
    if double:
        args, kwargs = _double_arguments(args), _double_arguments(kwargs)
    assert callable(node.target), node.format_node()
    return node.target(*args, **kwargs)


def _doubled(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_complex():
        return x.to(torch.complex128)
    return x.double() if x.is_floating_point() else x


def _double_arguments(args: Any) -> Any:
    """Turn every low-precision dtype among arguments into float64."""

    def turn(x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return torch.float64 if x in _LOW else torch.complex128 if x in _COMPLEX_LOW else x
        if isinstance(x, tuple | list):
            return type(x)(turn(y) for y in x)
        return x

    if isinstance(args, dict):
        return {name: turn(x) for name, x in args.items()}
    return tuple(turn(x) for x in args)
