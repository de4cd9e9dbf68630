"""Permute tokens once where a model begins and once where it ends, not around every attention.

A neighbourhood attention with a `tile` takes its tokens in the order of tiles. Between two of them
everything that treats tokens alike can do so in that order, too. So the region of such nodes around
the attentions is found, tokens are permuted where they enter it and brought back where they leave,
and its borders move to where the fewest of these are needed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from attnopt.finder.emit import fake_mode_of
from attnopt.finder.evaluate import is_size
from attnopt.finder.ops import args, value
from attnopt.ops import neighborhood_attention, tile_tokens
from attnopt.tokens import (
    Inputs,
    forgets_order,
    inputs_along,
    is_list,
    output_along,
    reads_as_keys,
)

_TOKENS = 2  # the axis of tokens of queries, keys, values and the result


@dataclass(frozen=True)
class Order:
    """An order of tokens: a grid cut into tiles, behind leading tokens."""

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    leading: int

    @classmethod
    def of(cls, node: fx.Node) -> "Order | None":
        """Return the order that a neighbourhood attention takes its tokens in, if not by rows."""
        if node.target is not neighborhood_attention or not node.kwargs.get("tile"):
            return None
        grid, tile, leading = (node.kwargs.get(n) for n in ("grid", "tile", "leading"))
        return cls(tuple(grid), tuple(tile), int(leading or 0))  # type: ignore[arg-type]

    def is_of(self, node: fx.Node) -> bool:
        """Tell whether a node brings tokens to this order, or back from it."""
        given = node.args[2:]
        return node.target is tile_tokens and given == (
            list(self.grid), list(self.tile), self.leading,
        )  # fmt: skip


def permutations(graph: fx.Graph) -> int:
    """Count the permutations of tokens in a graph."""
    return len(graph.find_nodes(op="call_function", target=tile_tokens))


def lay_out(node: fx.Node, tile: tuple[int, ...]) -> None:
    """Let a neighbourhood attention take its tokens tile by tile, permuted right before it."""
    node.kwargs = {**node.kwargs, "tile": list(tile)}
    order = Order.of(node)
    assert order is not None
    operands = args(node)[:3]
    made = {x: _inserted(node.prepend, x, _TOKENS, order) for x in dict.fromkeys(operands)}
    node.args = tuple(made[x] for x in operands)
    back = _inserted(node.append, node, _TOKENS, order, inverse=True)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def hoist(graph: fx.Graph) -> None:
    """Move the permutations around neighbourhood attentions to where the fewest are needed."""
    nodes = graph.find_nodes(op="call_function", target=neighborhood_attention)
    found = [(node, Order.of(node)) for node in nodes]
    taken: set[fx.Node] = set()
    for order in dict.fromkeys(o for _, o in found if o is not None):
        for node in [n for n in graph.nodes if order.is_of(n)]:
            node.replace_all_uses_with(args(node)[0])
            graph.erase_node(node)
        region = _Region(order, [n for n, own in found if own == order], taken)
        region.grow()
        region.shrink(list(graph.nodes))
        region.permute(list(graph.nodes))
        taken |= region.axes.keys()


@dataclass
class _Region:
    """The nodes whose tokens are in an order of tiles, each with the axis of its tokens."""

    order: Order
    roots: list[fx.Node]
    taken: set[fx.Node]
    axes: Inputs = field(default_factory=dict)
    inputs: dict[fx.Node, Inputs] = field(default_factory=dict)

    def grow(self) -> None:
        """Take in all nodes around the attentions that treat tokens alike."""
        todo = [(node, _TOKENS) for node in self.roots]
        while todo:
            node, axis = todo.pop()
            if node in self.axes or node in self.taken:
                continue
            through = inputs_along(node, axis)
            if through is None or Order.of(node) not in (None, self.order):
                continue
            self.axes[node], self.inputs[node] = axis, through
            todo.extend(self._around(node))

    def _around(self, node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
        """Yield the inputs and users of a node with the axes that its tokens have there."""
        axis = self.axes[node]
        yield from self.inputs[node].items()
        for user in node.users:
            if not is_size(user) and user.op == "call_function":
                found = output_along(user, node, axis)
                if found is not None:
                    yield user, found

    def shrink(self, nodes: list[fx.Node]) -> None:
        """Leave out nodes at the borders while that takes no permutation more."""
        kept = set(self.roots)
        cost = self.cost()
        for entering in (True, False):
            for node in nodes if entering else reversed(nodes):
                if node not in self.axes or node in kept or not self._at_border(node, entering):
                    continue
                axis = self.axes.pop(node)
                left = self.cost()
                # Tokens that enter later, or leave later, cost the same and are fewer nodes moved.
                if left is None or cost is None or left > cost or (left == cost and not entering):
                    self.axes[node] = axis
                else:
                    cost = left

    def _at_border(self, node: fx.Node, entering: bool) -> bool:
        near = node.all_input_nodes if entering else list(node.users)
        return not any(n in self.axes for n in near)

    def cost(self) -> int | None:
        """Count the permutations that this region takes; None where one of them cannot be made."""
        entering, leaving = self._entering(), self._leaving()
        if any(is_list(n) for n, _ in entering) or any(is_list(n) for n in leaving):
            return None
        return len(entering) + len(leaving)

    def _entering(self) -> dict[tuple[fx.Node, int], list[fx.Node]]:
        """Return what has to be permuted, and along which axis, with the nodes that read it."""
        found: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node in self.axes:
            for source, along in self.inputs[node].items():
                if self.axes.get(source) != along:
                    found.setdefault((source, along), []).append(node)
        return found

    def _leaving(self) -> dict[fx.Node, list[fx.Node]]:
        """Return what has to be brought back, with the nodes that read it."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.axes:
            users = [user for user in node.users if self._needs_rows(user, node)]
            if users:
                found[node] = users
        return found

    def _needs_rows(self, user: fx.Node, node: fx.Node) -> bool:
        """Tell whether a user reads the tokens of a node in the order of rows."""
        if is_size(user):
            return False
        if user in self.axes:
            # What it takes along another axis is permuted anew.
            return self.inputs[user].get(node) != self.axes[node]
        if reads_as_keys(user, node, self.axes):
            return False
        return not forgets_order(user, node, self.axes[node], self.order.leading)

    def permute(self, nodes: list[fx.Node]) -> None:
        """Insert the permutations at the borders."""
        entering, leaving = self._entering(), self._leaving()
        rows: dict[fx.Node, fx.Node] = {}
        for node, users in leaving.items():
            rows[node] = _inserted(node.append, node, self.axes[node], self.order, inverse=True)
            for user in users:
                user.replace_input_with(node, rows[node])
        first = next(n for n in nodes if n.op != "placeholder")
        for (source, axis), users in entering.items():
            source = rows.get(source, source)
            at = first.prepend if source.op == "placeholder" else source.append
            made = _inserted(at, source, axis, self.order)
            for user in users:
                user.replace_input_with(source, made)


def _inserted(
    at: Callable[[fx.Node], None],
    source: fx.Node,
    axis: int,
    order: Order,
    *,
    inverse: bool = False,
) -> fx.Node:
    """Insert a permutation of the tokens of a node along an axis."""
    given = (source, axis, list(order.grid), list(order.tile), order.leading)
    node = source.graph.create_node(
        "call_function", tile_tokens, given, {"inverse": True} if inverse else {}
    )
    at(node)
    node.meta = {k: x for k, x in source.meta.items() if k in ("nn_module_stack", "stack_trace")}
    example: Tensor = value(source)
    with fake_mode_of((source,)), torch.no_grad():
        node.meta["val"] = example.new_empty(example.shape)
    return node
