"""The projections of a site: which parameter rows make q, k and v, which columns read o."""

import heapq
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.evaluate import at_sizes, is_size
from attnopt.finder.layout import place
from attnopt.finder.match import Match, Operand
from attnopt.finder.numbering import canonical_numbers, moved_axes
from attnopt.finder.ops import JOINING, LAYOUT, NORMS, TRANSPARENT, args, kind, rank, shape, value
from attnopt.finder.provenance import ELEMENTWISE, Root, View, run_layout, weight_of
from attnopt.nouns import Projection

Rows = tuple[tuple[int, ...], ...]
Numbers = Tensor | tuple[Tensor, ...]

_MOST_SUMMANDS = 8


def projections(view: View, match: Match) -> dict[str, Projection]:
    """Find the parameter rows that make q, k and v of each head, and the columns that read o."""
    found: dict[str, Projection] = {}
    for name, operand, order in (
        ("q", match.q, "BHTD"),
        ("k", match.k, "BHSD"),
        ("v", match.v, "BHSE"),
    ):
        projection = _projection(view, operand, order)
        if projection is not None:
            found[name] = projection
    output = _output_projection(view, match)
    if output is not None:
        found["o"] = output
    return found


def _projection(view: View, operand: Operand, order: str) -> Projection | None:
    """Read which rows of which parameter make each head and channel of an operand."""
    channels: list[tuple[int, ...]] = []
    roots: set[fx.Node] = set()
    both = [
        canonical_numbers(view.provenance.numbers(operand.node, second=s), operand.layout, order)
        for s in (False, True)
    ]
    for head in range(both[0].shape[1]):
        row: list[int] = []
        # The last row of keys is new even where a cache comes first.
        numbers = [x[0, head, -1] for x in both]
        root = _learned_root(view, numbers[0])
        if root is None:
            return None
        roots.add(root.node)
        inside = [_in_root(root, n) for n in numbers]
        row = (
            inside[0] if len(set(inside[0])) == len(inside[0]) else sorted({*inside[0], *inside[1]})
        )
        channels.append(tuple(row))
    if len(roots) != 1:
        return None
    root = _learned_root(view, both[0][0, 0, -1])
    assert root is not None
    return parameter_rows(view, root, tuple(channels))


def _learned_root(view: View, numbers: Tensor) -> Root | None:
    for number in numbers.tolist():
        if number < 0:
            continue
        root = view.provenance.root_of(int(number))
        if root.contraction is not None and number < root.end:
            return root
    return None


def _in_root(root: Root, numbers: Tensor) -> list[int]:
    """Return the channels of the elements that belong to a root, in order."""
    mine = numbers[(numbers >= root.base) & (numbers < root.end)]
    return [int(c) for c in root.place(mine)[1]]


def parameter_rows(view: View, root: Root, channels: Rows) -> Projection | None:
    """Turn output channels of a learned contraction into indices along its parameter's axis."""
    contraction = root.contraction
    assert contraction is not None
    weight = weight_of(contraction, view.origins)
    if weight is None:
        return None
    labels = contraction.labels(weight)
    kept = [i for i, x in enumerate(labels) if x in contraction.out_labels]
    return indexed(view, Weight(contraction, weight, kept), channels)


@dataclass(frozen=True)
class Weight:
    """A learned operand of a contraction, and the axes of it that count heads and channels."""

    contraction: Contraction
    node: fx.Node
    axes: list[int]


def indexed(view: View, of: Weight, channels: Rows) -> Projection | None:
    """Follow a weight's axes back to the parameter, through transposes and views."""
    contraction, weight, kept = of.contraction, of.node, of.axes
    direct = _direct_axis(weight, kept[0]) if len(kept) == 1 else None
    if direct is not None:
        source, axis = direct
        binding = view.program.bindings[source.name]
        if binding.kind != "parameter":
            return None
        return _named(view, contraction, binding.name, axis, channels)
    numbers = view.provenance.numbers(weight)
    moved = numbers.movedim(kept, list(range(len(kept))))
    line = moved.reshape(-1, *moved.shape[len(kept) :]).flatten(1)[:, 0]
    root = view.provenance.root_of(int(line[0]))
    if root.node.op != "placeholder":
        return None
    binding = view.program.bindings[root.node.name]
    if binding.kind != "parameter":
        return None
    moving = moved_axes(root, line)
    if len(moving) > 1:
        # Heads and channels are axes of their own: the rows are counted over both.
        return _named(view, contraction, binding.name, 0, channels)
    axis = min(moving, default=0)
    index = root.index(line, axis)
    rows = tuple(tuple(int(index[c]) for c in row) for row in channels)
    return _named(view, contraction, binding.name, axis, rows)


def _named(
    view: View, contraction: Contraction, parameter: str, axis: int, rows: Rows
) -> Projection:
    bias = contraction.addend
    return Projection(
        parameter=parameter,
        axis=axis,
        rows=rows,
        layout=_layout_name(contraction),
        bias=_parameter_name(view, bias) if bias is not None else None,
    )


def _direct_axis(weight: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Follow an axis of a weight back to its parameter through mere transposes."""
    node = weight
    while node.op != "placeholder":
        name = kind(node)
        if name == "t":
            axis = rank(node) - 1 - axis
        elif name == "transpose":
            a, b = (x % rank(node) for x in args(node)[1:3])
            axis = b if axis == a else a if axis == b else axis
        elif name == "permute":
            axis = args(node)[1][axis] % rank(node)
        elif name not in TRANSPARENT:
            return None
        node = args(node)[0]
    return node, axis


def _layout_name(c: Contraction) -> Literal["linear", "conv1d", "conv", "einsum"]:
    name = kind(c.node)
    if name == "linear":
        return "linear"
    return "conv" if name.startswith("conv") else "einsum" if name == "einsum" else "conv1d"


def _parameter_name(view: View, node: fx.Node) -> str | None:
    while node.op != "placeholder":
        if kind(node) not in TRANSPARENT | LAYOUT:
            return None
        node = args(node)[0]
    binding = view.program.bindings[node.name]
    return binding.name if binding.kind == "parameter" else None


def _output_projection(view: View, match: Match) -> Projection | None:
    """Follow the result to the parameter that reads it, pushing head and channel numbers along.

    Where heads are added up (differential attention), several numbers arrive at one place.
    """
    heads, width = match.heads, match.v.layout.size("E")
    sizes = shape(match.result)
    numbers = place(match.result_layout, "H", sizes) * width + place(
        match.result_layout, "E", sizes
    )
    held: dict[fx.Node, list[Numbers]] = {match.result: [numbers]}
    todo = sorted(match.result.users)
    while todo and len(held) < 60:
        user = heapq.heappop(todo)
        if user in held or is_size(user):
            continue
        contraction = read_contraction(user)
        if contraction is not None:
            for node in (contraction.lhs, contraction.rhs):
                found = columns(view, contraction, node, held.get(node, []), heads, width)
                if found is not None:
                    return found
            continue
        held[user] = [
            moved
            for node in user.all_input_nodes
            for x in held.get(node, ())
            if (moved := pushed(view, user, node, x)) is not None
        ][:_MOST_SUMMANDS]
        if held[user]:
            for later in user.users:
                heapq.heappush(todo, later)
    return None


def pushed(view: View, user: fx.Node, node: fx.Node, held: Numbers) -> Numbers | None:
    """Return the numbers of what an op makes of numbered elements; None where it is unknown."""
    name = kind(user)
    if name in TRANSPARENT:
        return held
    if name in LAYOUT | JOINING:
        return _moved(view, user, node, held)
    if name in NORMS | ELEMENTWISE and isinstance(held, Tensor):
        example = value(user)
        same = isinstance(example, Tensor) and shape(user) == tuple(held.shape)
        return held if same else None
    return None


def _moved(view: View, user: fx.Node, node: fx.Node, held: Numbers) -> Numbers | None:
    """Run an index map on numbers; what joins them from elsewhere has the number -1."""
    if kind(user) in LAYOUT and any(n is not node and not is_size(n) for n in user.all_input_nodes):
        return None

    def read(n: fx.Node) -> Any:
        if n is node:
            return held
        return at_sizes(value(n), view.shapes.captured) if is_size(n) else torch.full(shape(n), -1)

    try:
        moved = run_layout(user, fx.map_arg(user.args, read), fx.map_arg(user.kwargs, read))
    except RuntimeError:
        return None
    return tuple(moved) if isinstance(moved, list | tuple) else moved


def columns(
    view: View, c: Contraction, node: fx.Node, held: list[Numbers], heads: int, width: int
) -> Projection | None:
    """Find which index along the summed axes of a weight meets each head and channel held."""
    weight = weight_of(c, view.origins)
    if weight is None or node is weight or not held:
        return None
    labels = c.labels(node)
    summed = [i for i, x in enumerate(labels) if x in c.summed]
    if not summed or len(summed) != len(c.summed):
        return None
    at: dict[int, int] = {}
    for numbers in held:
        assert isinstance(numbers, Tensor)
        moved = numbers.movedim(summed, list(range(len(summed))))
        line = moved.flatten(0, len(summed) - 1).flatten(1).amax(1)
        for i, number in enumerate(line.tolist()):
            if number >= 0 and at.setdefault(number, i) != i:
                return None
    if len(at) != heads * width:
        return None
    channels = tuple(tuple(at[h * width + e] for e in range(width)) for h in range(heads))
    kept = [c.labels(weight).index(labels[i]) for i in summed]
    return indexed(view, Weight(c, weight, kept), channels)
