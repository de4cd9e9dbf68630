"""The rewritten parts of a program, each from the inputs of its projections to its output.

The graph of the student is cut open before every region, so that one run computes all of them on
what the teacher puts in, and no gradient passes from one to another. A part is rewritten where its
weights are others than the teacher's, or where its attention is computed in another way. What reads
other values than the projections do is not cut off: a router has to read what the queries are made
of.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnopt.calibrating import Product, products_of
from attnopt.finder import find_sites
from attnopt.finder.anchors import is_canonical, is_variant
from attnopt.finder.evaluate import ancestors, leaves
from attnopt.finder.grouping import Piece
from attnopt.frontend.cleanup import remove_dead
from attnopt.graphs import copied_module
from attnopt.nouns import No
from attnopt.program import Binding, Program

_LAST = ("o", "down")


@dataclass(frozen=True)
class Region:
    """An attention or MLP by its parameters: those that read its inputs, and the last one.

    `inside` are the others between them, such as biases and what a rewrite added; `cut` finds them.
    """

    name: str
    first: tuple[str, ...]
    last: str
    inside: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """The parameters that the region begins and ends with."""
        return (*self.first, self.last)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter of the region."""
        return (*self.ends, *self.inside)


@dataclass(frozen=True)
class Cut:
    """A student that takes the inputs of its regions from outside, and a teacher that gives them.

    The teacher's outputs are the values of `inputs`, then the outputs of the regions; the
    student's are the outputs of the regions. Without a region nothing is cut.
    """

    student: Program
    teacher: Program
    inputs: tuple[str, ...]
    regions: tuple[Region, ...]
    skipped: tuple[No, ...] = ()


def regions_of(
    program: Program, changed: Collection[str], teacher: Program | None = None
) -> tuple[Region, ...]:
    """List the attentions, and the MLPs where they are known, that are not the teacher's.

    They have changed parameters, or compute with the same ones in another way.
    """
    ours = _calls(program)
    others = {} if teacher is None else _calls(teacher)
    moved = set(changed) | {last for last, said in ours.items() if others.get(last, said) != said}
    found: dict[str, Region] = {}
    units: Sequence[Any] = (*program.sites, *getattr(program, "mlps", ()))
    for unit in units:
        held = {name: p.parameter for name, p in unit.projections.items()}
        last = next((held[name] for name in _LAST if name in held), None)
        first = tuple(dict.fromkeys(p for name, p in held.items() if name not in _LAST))
        if last is None or not first or not {last, *first} & moved:
            continue
        # Several attentions may stand for one, each with some of its heads.
        known = found.setdefault(last, Region(unit.name, first, last))
        found[last] = replace(known, first=tuple(dict.fromkeys((*known.first, *first))))
    return tuple(found.values())


def _calls(program: Program) -> dict[str, frozenset[Any]]:
    """Say how each attention is computed, by the parameter that reads its heads."""
    findings = find_sites(program)
    found: dict[str, frozenset[Any]] = {}
    for site, pieces in zip(findings.sites, findings.groups, strict=True):
        if "o" in site.projections:
            said = frozenset((str(site.mask), _settings(p)) for p in pieces)
            last = site.projections["o"].parameter
            found[last] = found.get(last, frozenset()) | said
    return found


def _settings(piece: Piece) -> Any:
    """Return the op and the settings of what is no plain attention; None for one in any form."""
    node = piece.anchor
    if not is_variant(node) or is_canonical(node):
        return None
    plain = [(n, str(x)) for n, x in node.kwargs.items() if not isinstance(x, fx.Node)]
    return str(node.target), tuple(sorted(plain))


def cut(student: Program, teacher: Program, regions: Sequence[Region]) -> Cut:
    """Cut both programs at the regions that can be found in both."""
    names = [p for region in regions for p in region.ends]
    ours, theirs = products_of(student, names), products_of(teacher, names)
    kept: list[Region] = []
    skipped: list[No] = []
    for region in regions:
        refusal = _unlike(region, ours, theirs)
        if refusal is None:
            kept.append(replace(region, inside=_inside(student, region, ours)))
        else:
            skipped.append(refusal)
    owners: dict[fx.Node, str] = {}
    for region in kept:
        for parameter in region.first:
            owners.setdefault(ours[parameter].factor, parameter)
    inside = {f"teacher_{i}": parameter for i, parameter in enumerate(owners.values())}
    opened = _regraphed(
        student,
        [ours[r.last].node for r in kept],
        {place: ours[p].factor for place, p in inside.items()},
    )
    seen = [theirs[p].factor for p in inside.values()]
    tapped = _regraphed(teacher, [*seen, *(theirs[r.last].node for r in kept)], {})
    return Cut(opened, tapped, tuple(inside), tuple(kept), tuple(skipped))


def _unlike(
    region: Region, ours: Mapping[str, Product], theirs: Mapping[str, Product]
) -> No | None:
    """Say why a region of the student has no counterpart in the teacher."""
    for whose, products in (("program", ours), ("teacher", theirs)):
        missing = [p for p in region.ends if p not in products]
        if missing:
            return No(f"nothing in the {whose} multiplies {missing[0]}", region.name)
    pairs = [(ours[p].factor, theirs[p].factor) for p in region.first]
    for a, b in (*pairs, (ours[region.last].node, theirs[region.last].node)):
        if _axes(a) != _axes(b):
            return No("program and teacher shape its values in different ways", region.name)
    return None


def _inside(program: Program, region: Region, products: Mapping[str, Product]) -> tuple[str, ...]:
    """List the parameters between the inputs of a region and its output."""
    before = set(ancestors([products[p].factor for p in region.first]))
    read = [n for n in leaves([products[region.last].node], before) if n not in before]
    bindings = [program.bindings[n.name] for n in read]
    return tuple(b.name for b in bindings if b.kind == "parameter" and b.name not in region.ends)


def _axes(node: fx.Node) -> tuple[int, Any]:
    shape = node.meta["val"].shape
    return len(shape), shape[-1] if len(shape) else None


def _regraphed(
    program: Program, outputs: Sequence[fx.Node], inside: Mapping[str, fx.Node]
) -> Program:
    """Return a program that gives these nodes, and takes those of `inside` as inputs."""
    module = copied_module(program.graph_module)
    graph = module.graph
    twin = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(twin[node] for node in outputs),)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    bindings = dict(program.bindings)
    for place, node in inside.items():
        with graph.inserting_after(last):
            last = graph.placeholder(place)
        last.meta = dict(node.meta)
        # A region's output may be another's input: it is given as it is, and taken from outside.
        twin[node].replace_all_uses_with(last, delete_user_cb=lambda user: user.op != "output")
        bindings[last.name] = Binding("input", place)
    remove_dead(module)
    module.recompile()
    return replace(program, graph_module=module, bindings=bindings)
