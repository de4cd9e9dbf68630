"""Change what a graph computes with at a site: another number of heads, other parameter shapes.

Works on the exact form of a program, where every attention is one canonical op. The elements of an
operand are followed back (by their numbers, not by names) to the projections and states that make
them; wherever an axis on that way counts heads, its size and the sizes written into views change.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from attnopt.finder import find_sites
from attnopt.finder.emit import fake_mode_of
from attnopt.finder.evaluate import ancestors
from attnopt.finder.finding import Findings
from attnopt.finder.match import Match, Operand
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import JOINING, LAYOUT, NORMS, TRANSPARENT, args, kind, shape, value
from attnopt.finder.provenance import ELEMENTWISE, View
from attnopt.finder.scores import is_canonical
from attnopt.graphs import copied, drop_unused
from attnopt.nouns import No, Site
from attnopt.program import Program, State
from attnopt.weights import described

_RESIZED = frozenset("view _unsafe_view reshape expand".split())
_PASSING = TRANSPARENT | NORMS | ELEMENTWISE | JOINING | (LAYOUT - {"view", "reshape", "expand"})


@dataclass
class GraphEdit:
    """A copy of a program's graph that changes step by step; the program stays as it is."""

    program: Program
    findings: Findings
    graph: fx.Graph
    mapping: dict[fx.Node, fx.Node]
    states: dict[str, State] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> "GraphEdit":
        """Start with an exact copy."""
        graph, mapping = copied(program.graph)
        return cls(program, find_sites(program), graph, mapping)

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
        drop_unused(self.graph)
        self.graph.lint()
        module = fx.GraphModule(self.program.graph_module, self.graph)
        result = self.program.with_graph(module, note=note).with_weights(changed)
        if not self.states:
            return result
        return result.with_states(tuple(self.states.get(s.name, s) for s in result.states))


def resize_heads(edit: GraphEdit, site: Site, count: int) -> No | None:
    """Give the keys and values of a site another number of heads."""
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    if {"k_map", "v_map"} & set(match.anchor.kwargs):
        return No("query heads read key heads in another order than h // group", site.name)
    for operand, order in ((match.k, "BHSD"), (match.v, "BHSE")):
        refusal = _resize_operand(edit, operand, order, count)
        if refusal is not None:
            return No(refusal.why, f"{site.name} ({refusal.where})")
    return None


def _resize_operand(edit: GraphEdit, operand: Operand, order: str, count: int) -> No | None:
    heads = _HeadNumbers.of(edit.view, operand, order)
    line = _line(edit.view, operand.node, heads)
    plans: list[tuple[fx.Node, int, int]] = []
    for node in line:
        axis = heads.axis_of(node)
        if isinstance(axis, No):
            return axis
        size = shape(node)[axis] // heads.count * count
        refusal = _refusal(edit.view, node, axis, line)
        if refusal is not None:
            return refusal
        plans.append((node, axis, size))
    for node, axis, size in plans:
        _resize(edit, node, axis, size)
    return None


@dataclass(frozen=True)
class _HeadNumbers:
    """Which head of an operand each element number belongs to."""

    view: View
    head_of: Tensor
    count: int

    @classmethod
    def of(cls, view: View, operand: Operand, order: str) -> "_HeadNumbers":
        """Read the heads of an operand."""
        tables: list[tuple[Tensor, Tensor]] = []
        for second in (False, True):
            numbers = view.provenance.numbers(operand.node, second=second)
            canonical = canonical_numbers(numbers, operand.layout, order)
            heads = torch.arange(canonical.shape[1]).view(1, -1, 1, 1).expand(canonical.shape)
            tables.append((canonical.flatten(), heads.flatten()))
        top = max(int(n.max()) for n, _ in tables) + 1
        head_of = torch.full((top,), -1)
        for numbers, heads in tables:
            kept = numbers >= 0
            head_of[numbers[kept]] = heads[kept]
        return cls(view, head_of, int(head_of.max()) + 1)

    def at(self, node: fx.Node) -> Tensor:
        """Return the head of each element of a node, -1 where it goes elsewhere."""
        numbers = self.view.provenance.numbers(node)
        known = (numbers >= 0) & (numbers < len(self.head_of))
        return torch.where(known, self.head_of[numbers.clamp(0, len(self.head_of) - 1)], -1)

    def axis_of(self, node: fx.Node) -> int | No:
        """Return the one axis along which the head changes."""
        heads = self.at(node)
        if (heads < 0).any():
            return No("other tensors lie in one tensor with the heads", node.name)
        moving = [a for a in range(heads.dim()) if heads.shape[a] > 1 and heads.diff(dim=a).any()]
        if len(moving) != 1 or heads.shape[moving[0]] % self.count:
            return No("the heads do not lie along one axis", node.name)
        return moving[0]


def _line(view: View, node: fx.Node, heads: _HeadNumbers) -> list[fx.Node]:
    """List the nodes that carry the heads from their projection and state to an operand."""
    roots = {r.node for r in view.provenance.roots}
    found: list[fx.Node] = []
    todo = [node]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.append(current)
        if current in roots:
            continue
        todo.extend(
            n
            for n in current.all_input_nodes
            if isinstance(value(n), Tensor) and (heads.at(n) >= 0).any()
        )
    order = {n: i for i, n in enumerate(ancestors([node]))}
    return sorted(found, key=lambda n: order[n])


def _refusal(view: View, node: fx.Node, axis: int, line: Iterable[fx.Node]) -> No | None:
    """Say why the heads of a node cannot be resized by changing sizes alone."""
    name = kind(node)
    if node.op == "placeholder" or node in {r.node for r in view.provenance.roots}:
        return None
    if name not in _PASSING | _RESIZED:
        return No(f"{name} is not known to treat heads alike", node.name)
    if name in ("slice", "split", "split_with_sizes", "chunk", "select", "index_select", "roll"):
        along = args(node)[2 if "split" in name or name == "chunk" else 1] if args(node)[1:] else 0
        if isinstance(along, int) and along % len(shape(node)) == axis:
            return No(f"{name} picks heads by number", node.name)
    for other in node.all_input_nodes:
        if other in line or not isinstance(value(other), Tensor):
            continue
        aligned = axis - (len(shape(node)) - len(shape(other)))
        if name in ELEMENTWISE and aligned >= 0 and shape(other)[aligned] != 1:
            return No(f"{other.name} has a value for each head", node.name)
    return None


def _resize(edit: GraphEdit, node: fx.Node, axis: int, size: int) -> None:
    """Change the size of one axis of a node, in its arguments and in its example value."""
    new = edit.mapping[node]
    sizes = list(value(new).shape)
    sizes[axis] = size
    if kind(node) in _RESIZED and isinstance(new.args[1], list | tuple):
        written = list(new.args[1])
        if written[axis] != -1:
            written[axis] = size
        new.args = (new.args[0], written, *new.args[2:])
    if node.op == "placeholder":
        _resize_state(edit, node, axis, size)
    with fake_mode_of((node,)):
        new.meta["val"] = value(new).new_empty(sizes)


def _resize_state(edit: GraphEdit, node: fx.Node, axis: int, size: int) -> None:
    for state in edit.program.states:
        if state.placeholder == node.name:
            sizes = list(state.shape)
            sizes[axis] = size
            edit.states[state.name] = replace(state, shape=tuple(sizes))
