"""Change what a graph computes with: fewer heads, narrower heads, fewer neurons.

Works on the exact form of a program, where every attention is one canonical op. Every element of a
tensor has a number that says which head and channel it is of (`finder.provenance`); what stays is
said by number, and along the way from the projections and states to where heads or neurons are
read, every node keeps what its elements say. Sizes follow from that, and nothing goes by name.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.calibrating import inputs_of
from attnopt.finder import find_sites
from attnopt.finder.contraction import read_contraction
from attnopt.finder.emit import fake_mode_of
from attnopt.finder.evaluate import is_size
from attnopt.finder.finding import Findings
from attnopt.finder.layout import Layout
from attnopt.finder.match import Match
from attnopt.finder.mlps import made_of
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import (
    JOINING,
    LAYOUT,
    NORMS,
    TRANSPARENT,
    args,
    argument,
    kind,
    shape,
    value,
)
from attnopt.finder.provenance import ELEMENTWISE, View
from attnopt.finder.scores import is_canonical
from attnopt.frontend.skeletons import cache_slots
from attnopt.graphs import copied, drop_unused
from attnopt.hoisting import hoist
from attnopt.nouns import Mlp, No, Site
from attnopt.program import Program, State
from attnopt.weights import described

_SIZED = frozenset("view _unsafe_view reshape expand".split())
_PICKING = frozenset("select index_select roll flip unfold index gather unbind".split())
_SPLITTING = frozenset("split split_with_sizes chunk unsafe_split unsafe_chunk".split())
_PAIRING = frozenset({"view_as_complex", "view_as_real"})
_KNOWN = TRANSPARENT | NORMS | ELEMENTWISE | JOINING | LAYOUT | _PAIRING

aten = torch.ops.aten


@dataclass(frozen=True)
class Kept:
    """Which channels of which heads stay: a mask (heads, channels) each for q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, site: Site) -> "Kept":
        """Return masks that keep all of a site."""
        return cls(
            torch.ones(site.heads, site.head_dim, dtype=torch.bool),
            torch.ones(site.kv_heads, site.head_dim, dtype=torch.bool),
            torch.ones(site.kv_heads, site.v_head_dim, dtype=torch.bool),
        )


@dataclass
class GraphEdit:
    """A copy of a program's graph that changes step by step; the program stays as it is.

    `statistics` is what calibration saw of the program, for passes that choose by it.
    """

    program: Program
    findings: Findings
    graph: fx.Graph
    mapping: dict[fx.Node, fx.Node]
    statistics: Any = None
    states: dict[str, State] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, statistics: Any = None) -> "GraphEdit":
        """Start with an exact copy."""
        graph, mapping = copied(program.graph)
        return cls(program, find_sites(program), graph, mapping, statistics)

    @property
    def view(self) -> View:
        """What the finder knows of the program before the edit."""
        return self.findings.view

    def match_of(self, site: Site) -> Match | No:
        """Return the one canonical op of a site."""
        (first, *others) = self.findings.groups[self.findings.sites.index(site)]
        if others or not isinstance(first, Match) or not is_canonical(first.anchor):
            return No("not in its exact form, which every other rewrite starts from", site.name)
        return first

    def reshape_weights(self, changed: Mapping[str, Tensor]) -> None:
        """Give the placeholders of parameters the shapes of their new values."""
        for node in self.program.placeholders:
            name = self.program.bindings[node.name].name
            if name not in changed:
                continue
            new = described(changed, name).shape
            if new != shape(node):
                copied = self.mapping[node]
                with fake_mode_of((node,)):
                    copied.meta["val"] = value(node).new_empty(new)

    def finish(self, changed: Mapping[str, Tensor], *, note: str) -> Program:
        """Return the program with the edited graph, new weights and new states."""
        hoist(self.graph)
        drop_unused(self.graph)
        self.graph.lint()
        module = fx.GraphModule(self.program.graph_module, self.graph)
        result = self.program.with_graph(module, note=note).with_weights(changed)
        if not self.states:
            return result
        return result.with_states(tuple(self.states.get(s.name, s) for s in result.states))


# ------------------------------------------------------------------------------------------- sites


def narrow(
    edit: GraphEdit,
    site: Site,
    kept: Kept,
    *,
    k_map: Iterable[int] | None = None,
    v_map: Iterable[int] | None = None,
) -> No | None:
    """Leave of a site what is kept: heads, or channels of all its heads.

    `k_map` and `v_map` say which key and value head each query head reads afterwards, where that is
    not what it read before.
    """
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    output = _output_input(edit, site)
    if isinstance(output, No):
        return output
    heads = kept.q.any(1)
    if not _is_product(kept):
        return No("heads cannot keep unlike channels", site.name)
    written = torch.zeros(site.heads, site.v_head_dim, dtype=torch.bool)
    written[heads] = kept.v[kept.v.any(1)][0]
    selection = _Selection(edit.view)
    selection.mark(match.q.node, match.q.layout, "BHTD", kept.q)
    selection.mark(match.k.node, match.k.layout, "BHSD", kept.k)
    selection.mark(match.v.node, match.v.layout, "BHSE", kept.v)
    selection.mark(match.result, match.result_layout, "BHTE", written)
    ends = [(match.q.node, ()), (match.k.node, ()), (match.v.node, ()), (output, (match.result,))]
    line = [n for end, stops in ends for n in selection.line(end, stops) if n is not match.result]
    line = _ordered(edit, line)
    last = site.projections["o"].parameter
    refusal = _narrow_all(edit, selection, line, {match.anchor}, last)
    if refusal is not None:
        return No(refusal.why, f"{site.name} ({refusal.where})")
    _narrow_call(edit, match, kept, k_map, v_map)
    return None


def _is_product(kept: Kept) -> bool:
    """Whether the heads that stay keep the same channels."""
    rows = [m[m.any(1)] for m in (kept.q, kept.k, kept.v)]
    same = all(len(r) and bool((r == r[0]).all()) for r in rows)
    return same and bool(rows[0][0].sum() == rows[1][0].sum())


def _output_input(edit: GraphEdit, site: Site) -> fx.Node | No:
    """Return what the output projection of a site reads."""
    if "o" not in site.projections:
        return No("the o projection could not be mapped to columns of a parameter", site.name)
    name = site.projections["o"].parameter
    found = inputs_of(edit.program, [name]).get(name)
    return found or No(f"{name} is not multiplied with the result", site.name)


def _narrow_call(
    edit: GraphEdit,
    match: Match,
    kept: Kept,
    k_map: Iterable[int] | None,
    v_map: Iterable[int] | None,
) -> None:
    """Bring the canonical op and its side operands to the heads that stay."""
    node = edit.mapping[match.anchor]
    heads = kept.q.any(1)
    options = dict(node.kwargs)
    if options.get("scale") is None:
        options["scale"] = kept.q.shape[1] ** -0.5
    for name, given, mask in (("k_map", k_map, kept.k), ("v_map", v_map, kept.v)):
        stay = mask.any(1)
        read = list(given) if given is not None else _map_after(options.get(name), heads, stay)
        count = int(stay.sum())
        plain = [h * count // len(read) for h in range(len(read))]
        options[name] = read
        if read == plain and len(read) % count == 0:
            del options[name]
    if not heads.all():
        for name in ("bias", "mask", "sinks"):
            side = options.get(name)
            if isinstance(side, fx.Node):
                options[name] = _selected(edit, node, side, 0 if name == "sinks" else 1, heads)
    node.kwargs = options
    q, v = (value(edit.mapping[o.node]) for o in (match.q, match.v))
    with fake_mode_of((node,)):
        node.meta["val"] = value(node).new_empty((*q.shape[:3], v.shape[-1]))


def _map_after(before: Any, heads: Tensor, stay: Tensor) -> list[int]:
    """Return which head each query head that stays reads, in the numbers of those that stay."""
    count = len(heads)
    old = list(before) if before is not None else [h * len(stay) // count for h in range(count)]
    number = (stay.cumsum(0) - 1).tolist()
    return [number[old[h]] for h in range(count) if heads[h]]


def _selected(edit: GraphEdit, before: fx.Node, side: fx.Node, axis: int, stay: Tensor) -> fx.Node:
    """Insert the choice of some heads of a side operand; a size of 1 serves them all."""
    example = value(side)
    if example.dim() <= axis or example.shape[axis] == 1:
        return side
    parts: list[fx.Node] = []
    with edit.graph.inserting_before(before), fake_mode_of((side,)):
        for start, stop in _runs(stay):
            part = edit.graph.call_function(aten.slice.Tensor, (side, axis, start, stop))
            part.meta = {**side.meta, "val": aten.slice.Tensor(example, axis, start, stop)}
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        joined = edit.graph.call_function(aten.cat.default, (parts, axis))
        joined.meta = {**side.meta, "val": aten.cat.default([value(p) for p in parts], axis)}
    return joined


def _runs(stay: Tensor) -> list[tuple[int, int]]:
    """Return the stretches of what stays, as starts and ends."""
    kept = [i for i, s in enumerate(stay.tolist()) if s]
    starts = [i for i in kept if i - 1 not in kept]
    stops = [i + 1 for i in kept if i + 1 not in kept]
    return list(zip(starts, stops, strict=True))


# -------------------------------------------------------------------------------------------- MLPs


def narrow_mlp(edit: GraphEdit, mlp: Mlp, stay: Tensor) -> No | None:
    """Leave some neurons of an MLP."""
    output = inputs_of(edit.program, [mlp.down.parameter])[mlp.down.parameter]
    made = made_of(edit.view, output, len(shape(output)) - 1)
    if made is None:
        return No("its neurons are no longer found", mlp.name)
    selection = _Selection(edit.view)
    for root, rows in made.items():
        selection.mark_channels(root, rows, stay)
    line = _ordered(edit, selection.line(output, ()))
    refusal = _narrow_all(edit, selection, line, set(), mlp.down.parameter)
    return None if refusal is None else No(refusal.why, f"{mlp.name} ({refusal.where})")


# --------------------------------------------------------------------------------------- selection


class _Selection:
    """Which elements stay, by the numbers that the finder gives them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._known = torch.zeros(0, dtype=torch.bool)
        self._stays = torch.zeros(0, dtype=torch.bool)

    def mark(self, node: fx.Node, layout: Layout, order: str, kept: Tensor) -> None:
        """Say what stays of an operand, (heads, channels) of its axes 1 and 3."""
        for second in (False, True):
            numbers = self.view.provenance.numbers(node, second=second)
            canonical = canonical_numbers(numbers, layout, order)
            stays = kept[None, :, None, :].expand(canonical.shape)
            self._note(canonical.flatten(), stays.flatten())

    def mark_channels(self, root: Any, rows: tuple[tuple[int, ...], ...], stay: Tensor) -> None:
        """Say which channels of a root stay: those of the neurons that do."""
        numbers = torch.arange(root.base, root.end)
        width = 1 + max(c for row in rows for c in row)
        stays = torch.ones(max(width, int(root.place(numbers)[1].max()) + 1), dtype=torch.bool)
        known = torch.zeros_like(stays)
        for row, kept in zip(rows, stay.tolist(), strict=True):
            for channel in row:
                stays[channel], known[channel] = kept, True
        channels = root.place(numbers)[1]
        of = known[channels]
        self._note(numbers[of], stays[channels][of])

    def _note(self, numbers: Tensor, stays: Tensor) -> None:
        real = numbers >= 0
        numbers, stays = numbers[real], stays[real]
        if not len(numbers):
            return
        more = int(numbers.max()) + 1 - len(self._known)
        if more > 0:
            self._known = torch.cat([self._known, self._known.new_zeros(more)])
            self._stays = torch.cat([self._stays, self._stays.new_ones(more)])
        self._known[numbers] = True
        self._stays[numbers] = stays

    def at(self, node: fx.Node) -> list[tuple[Tensor, Tensor]]:
        """Return, for each tensor of a node, which elements come from somewhere and which stay."""
        return [self._looked_up(n) for n in self.view.provenance.all_numbers(node)]

    def _looked_up(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        marked = self._marked(numbers)
        index = numbers.clamp(0, max(len(self._known) - 1, 0))
        return numbers >= 0, torch.where(marked, self._stays[index], True)

    def _marked(self, numbers: Tensor) -> Tensor:
        inside = (numbers >= 0) & (numbers < len(self._known))
        return inside & self._known[numbers.clamp(0, max(len(self._known) - 1, 0))]

    def knows(self, node: fx.Node) -> bool:
        """Tell whether a node carries something that was marked."""
        return any(bool(self._marked(n).any()) for n in self.view.provenance.all_numbers(node))

    def line(self, end: fx.Node, stops: Iterable[fx.Node]) -> list[fx.Node]:
        """List the nodes that carry marked elements to `end`, from their roots."""
        roots = {r.node for r in self.view.provenance.roots} | set(stops)
        found: dict[fx.Node, None] = {}
        todo = [end]
        while todo:
            node = todo.pop()
            if node in found or not self.knows(node):
                continue
            found[node] = None
            if node not in roots:
                todo.extend(n for n in node.all_input_nodes if not is_size(n) and _is_tensors(n))
                roots |= {r.node for r in self.view.provenance.roots}
        return list(found)

    def keeps(self, node: fx.Node) -> list[list[Tensor]] | No:
        """Return, for each tensor of a node and each axis, which indices stay."""
        found: list[list[Tensor]] = []
        for known, stays in self.at(node):
            axes: list[Tensor] = []
            for axis in range(stays.dim()):
                others = [a for a in range(stays.dim()) if a != axis]
                some = (known & stays).any(dim=others) if others else known & stays
                none = ~(known.any(dim=others) if others else known)
                axes.append(some | none)
            if not _explains(axes, known, stays):
                return No("what stays does not lie along axes of its own", node.name)
            found.append(axes)
        return found


def _product(axes: list[Tensor]) -> Tensor:
    whole = torch.ones([len(a) for a in axes], dtype=torch.bool)
    for i, along in enumerate(axes):
        whole &= along.view([-1 if j == i else 1 for j in range(len(axes))])
    return whole


def _explains(axes: list[Tensor], known: Tensor, stays: Tensor) -> bool:
    """Whether the axes say of every known element whether it stays."""
    return bool((_product(axes) == stays)[known].all())


def _is_tensors(node: fx.Node) -> bool:
    found = value(node)
    return isinstance(found, Tensor) or (
        isinstance(found, tuple | list) and any(isinstance(x, Tensor) for x in found)
    )


def _ordered(edit: GraphEdit, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    wanted = set(nodes)
    return [n for n in edit.program.graph.nodes if n in wanted]


def _alone(edit: GraphEdit, line: set[fx.Node], readers: set[fx.Node], last: str) -> No | None:
    """Say what else reads the nodes of a line, beside `readers` and the weight called `last`."""
    outputs = _cached_outputs(edit.program)
    end = inputs_of(edit.program, [last])[last]
    for node in sorted(line):
        for user in node.users:
            if user in readers or is_size(user) or (node is end and read_contraction(user)):
                continue
            if user.op == "output" and _gives_only(user, node, outputs):
                continue
            if kind(user) in _SHAPE_READERS:
                continue
            return No(f"{user.name} reads what would change", node.name)
    return None


_SHAPE_READERS = frozenset("sym_size size numel dim zeros_like ones_like empty_like".split())


def _cached_outputs(program: Program) -> set[int]:
    """Return the outputs that are states, or layers of a cache that another part takes."""
    made = program.form.made_of
    if isinstance(made, tuple):
        return {int(key) for key in cache_slots(made[1].skeleton)}
    return {s.output for s in program.states}


def _gives_only(output: fx.Node, node: fx.Node, places: set[int]) -> bool:
    (values,) = output.args
    assert isinstance(values, list | tuple)
    return all(i in places for i, given in enumerate(values) if given is node)


# ------------------------------------------------------------------------------------------- nodes


def _narrow_all(
    edit: GraphEdit, selection: _Selection, line: list[fx.Node], readers: set[fx.Node], last: str
) -> No | None:
    """Narrow the nodes of a line; nothing is changed where one of them cannot be.

    `readers` may read them, and so may the product with the weight called `last`.
    """
    keeps: dict[fx.Node, list[list[Tensor]]] = {}
    for node in line:
        kept = selection.keeps(node)
        if isinstance(kept, No):
            return kept
        keeps[node] = kept
    keeps |= _attached(edit, keeps)
    inside = set(keeps)
    changed = {n for n, found in keeps.items() if not all(bool(a.all()) for x in found for a in x)}
    for refusal in (
        _alone(edit, changed, inside | readers, last),
        *(_refusal(node, keeps, inside) for node in line),
    ):
        if refusal is not None:
            return refusal
    for node in keeps:
        _narrow_node(edit, node, keeps)
    return None


def _attached(
    edit: GraphEdit, keeps: Mapping[fx.Node, list[list[Tensor]]]
) -> dict[fx.Node, list[list[Tensor]]]:
    """Find what is computed of each head alone, such as the size that a norm divides by."""
    found: dict[fx.Node, list[list[Tensor]]] = {}
    for node in edit.program.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in keeps or n in found]
        if node in keeps or len(sources) != 1 or not isinstance(value(node), Tensor):
            continue
        (axes, *others) = keeps.get(sources[0]) or found[sources[0]]
        if others or all(bool(a.all()) for a in axes):
            continue
        if kind(node) in ELEMENTWISE | TRANSPARENT and shape(node) == shape(sources[0]):
            found[node] = [axes]
        elif kind(node) in _REDUCING:
            left = _reduced(node, axes)
            if left is not None:
                found[node] = [left]
        elif kind(node) == "slice" and 0 in shape(node):
            # A rotation of all channels leaves an empty rest.
            found[node] = [[a[:0] if n == 0 else a for a, n in zip(axes, shape(node), strict=True)]]
    return found


_REDUCING = frozenset("mean sum amax amin var linalg_vector_norm norm".split())


def _reduced(node: fx.Node, axes: list[Tensor]) -> list[Tensor] | None:
    """Return what stays along the axes of a mean or sum over axes that stay whole."""
    place = 2 if kind(node) in ("linalg_vector_norm", "norm") else 1
    given = argument(node, place, "dim")
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, list | tuple):
        return None
    over = {d % len(axes) for d in dims}
    if not all(bool(axes[d].all()) for d in over):
        return None
    if len(shape(node)) == len(axes):
        one = torch.ones(1, dtype=torch.bool)
        return [one if i in over else a for i, a in enumerate(axes)]
    return [a for i, a in enumerate(axes) if i not in over]


def _refusal(
    node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]], inside: set[fx.Node]
) -> No | None:
    """Say why a node cannot do with fewer elements."""
    name = kind(node)
    mine = keeps[node]
    sources = [n for n in node.all_input_nodes if n in inside]
    if node.op == "placeholder" or not sources:
        return None
    if name not in _KNOWN:
        return No(f"{name} is not known to treat heads alike", node.name)
    if name in NORMS and not all(bool(axes[-1].all()) for axes in mine):
        return No(f"{name} takes all of them together", node.name)
    if name in _PICKING:
        axis = _dim(node, 0 if name == "unbind" else 1) if name != "index" else None
        before = keeps[sources[0]][0]
        if axis is None or not bool(before[axis].all()):
            return No(f"{name} picks by number", node.name)
    if name in _SPLITTING or name in ("slice", "narrow"):
        return None
    if name in ELEMENTWISE:
        for other in node.all_input_nodes:
            if other in inside or not isinstance(value(other), Tensor):
                continue
            for axis, along in enumerate(mine[0]):
                aligned = axis - (len(mine[0]) - value(other).dim())
                if not along.all() and aligned >= 0 and shape(other)[aligned] != 1:
                    return No(f"{other.name} has a value for each of them", node.name)
    return None


def _dim(node: fx.Node, position: int) -> int:
    """Read the axis that an op works along."""
    source = args(node)[0]
    axes = value(source).dim()
    given = node.kwargs.get("dim", args(node)[position] if len(args(node)) > position else 0)
    return int(given) % axes if isinstance(given, int) else 0


def _narrow_node(
    edit: GraphEdit, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]
) -> None:
    """Change the sizes of a node, in its arguments and in its example value."""
    mine = keeps[node]
    near = [mine, *(keeps[n] for n in node.all_input_nodes if n in keeps)]
    if all(bool(along.all()) for found in near for axes in found for along in axes):
        return
    new = edit.mapping[node]
    change = _ARGUMENTS.get(kind(node))
    if change is not None:
        change(new, node, keeps)
    if node.op == "placeholder":
        _narrow_state(edit, node, mine[0])
    example = value(new)
    one = isinstance(example, Tensor)
    shapes = [_smaller(x, a) for x, a in zip([example] if one else example, mine, strict=True)]
    with fake_mode_of((node,)):
        made = [x.new_empty(s) for x, s in zip([example] if one else example, shapes, strict=True)]
    new.meta["val"] = made[0] if one else type(example)(made)


def _smaller(example: Tensor, axes: list[Tensor]) -> list[Any]:
    """Return the sizes of what stays."""
    sizes: list[Any] = list(example.shape)
    for axis, along in enumerate(axes):
        if not along.all():
            sizes[axis] = _fewer(sizes[axis], along)
    return sizes


def _fewer(size: Any, along: Tensor) -> Any:
    """Return the size of what stays along an axis, in which heads may be counted with the batch."""
    share = Fraction(int(along.sum()), len(along))
    return size // share.denominator * share.numerator


def _sizes(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Write the new sizes of a view."""
    if not isinstance(new.args[1], list | tuple):
        return
    written = [
        size if along.all() or size == -1 else _rewritten(new, size, along)
        for size, along in zip(new.args[1], keeps[node][0], strict=True)
    ]
    new.args = (new.args[0], written, *new.args[2:])


def _rewritten(new: fx.Node, size: Any, along: Tensor) -> Any:
    """Return a written size of what stays, a number or a node that computes it."""
    if not isinstance(size, fx.Node):
        return int(along.sum())
    share = Fraction(int(along.sum()), len(along))
    with new.graph.inserting_before(new):
        parts = new.graph.call_function(operator.floordiv, (size, share.denominator))
        parts.meta["val"] = value(size) // share.denominator
        whole = new.graph.call_function(operator.mul, (parts, share.numerator))
    whole.meta["val"] = _fewer(value(size), along)
    return whole


def _unflattened(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    axis, written = _dim(node, 1), list(args(new)[2])
    for i in range(len(written)):
        along = keeps[node][0][axis + i]
        if not along.all() and written[i] != -1:
            written[i] = int(along.sum())
    new.args = (new.args[0], new.args[1], written)


def _pieces(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Write the new sizes of the pieces of a split."""
    axis = _dim(node, 2)
    sizes = [int(axes[axis].sum()) for axes in keeps[node]]
    source = new.args[0]
    if "chunk" in kind(node) and len(set(sizes)) == 1:
        return
    if isinstance(args(node)[1], int) and "chunk" not in kind(node) and len(set(sizes)) == 1:
        new.args = (source, sizes[0], axis)
        return
    new.target, new.args, new.kwargs = aten.split_with_sizes.default, (source, sizes, axis), {}


def _cut(new: fx.Node, node: fx.Node, keeps: Mapping[fx.Node, list[list[Tensor]]]) -> None:
    """Move the ends of a slice to where they come to lie."""
    axis = _dim(node, 1)
    source = args(node)[0]
    if source not in keeps or keeps[source][0][axis].all():
        return
    stays = keeps[source][0][axis]
    start, stop = (node.args[i] if len(node.args) > i else None for i in (2, 3))
    size = len(stays)
    first = 0 if not isinstance(start, int) else start % size if start < 0 else min(start, size)
    last = size if not isinstance(stop, int) else stop % size if stop < 0 else min(stop, size)
    moved = (int(stays[:first].sum()), int(stays[:last].sum()))
    new.args = (new.args[0], axis, *moved, *new.args[4:])


_ARGUMENTS: dict[str, Callable[[fx.Node, fx.Node, Mapping[fx.Node, list[list[Tensor]]]], None]] = {
    **dict.fromkeys(_SIZED, _sizes),
    **dict.fromkeys(_SPLITTING, _pieces),
    "unflatten": _unflattened,
    "slice": _cut,
}


def _narrow_state(edit: GraphEdit, node: fx.Node, axes: list[Tensor]) -> None:
    for state in edit.program.states:
        if state.placeholder == node.name:
            sizes = list(state.shape)
            for axis, along in enumerate(axes):
                if not along.all() and isinstance(sizes[axis], int):
                    sizes[axis] = int(along.sum())
            edit.states[state.name] = replace(state, shape=tuple(sizes))
