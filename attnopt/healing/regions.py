"""The rewritten parts of a program, each from the inputs of its projections to its output.

The graph of the student is cut open before every region, so that one run computes all of them on
what the teacher puts in, and no gradient passes from one to another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnopt.calibrating import Product, products_of
from attnopt.frontend.cleanup import remove_dead
from attnopt.graphs import copied_module
from attnopt.nouns import No
from attnopt.program import Binding, Program

_LAST = ("o", "down")


@dataclass(frozen=True)
class Region:
    """An attention or MLP by its parameters: those that read its inputs, and the last one."""

    name: str
    first: tuple[str, ...]
    last: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every parameter of the region."""
        return (*self.first, self.last)


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


def regions_of(program: Program, changed: Collection[str]) -> tuple[Region, ...]:
    """List the attentions, and the MLPs where they are known, that have changed parameters."""
    found: list[Region] = []
    units: Sequence[Any] = (*program.sites, *getattr(program, "mlps", ()))
    for unit in units:
        held = {name: p.parameter for name, p in unit.projections.items()}
        last = next((held[name] for name in _LAST if name in held), None)
        first = tuple(dict.fromkeys(p for name, p in held.items() if name not in _LAST))
        if last is not None and first and {last, *first} & set(changed):
            found.append(Region(unit.name, first, last))
    return tuple(found)


def cut(student: Program, teacher: Program, regions: Sequence[Region]) -> Cut:
    """Cut both programs at the regions that can be found in both."""
    names = [p for region in regions for p in region.parameters]
    ours, theirs = products_of(student, names), products_of(teacher, names)
    kept: list[Region] = []
    skipped: list[No] = []
    for region in regions:
        refusal = _unlike(region, ours, theirs)
        if refusal is None:
            kept.append(region)
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
        missing = [p for p in region.parameters if p not in products]
        if missing:
            return No(f"nothing in the {whose} multiplies {missing[0]}", region.name)
    pairs = [(ours[p].factor, theirs[p].factor) for p in region.first]
    for a, b in (*pairs, (ours[region.last].node, theirs[region.last].node)):
        if _axes(a) != _axes(b):
            return No("program and teacher shape its values in different ways", region.name)
    return None


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
