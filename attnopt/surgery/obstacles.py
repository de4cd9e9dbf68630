"""What stands in the way of narrowing: ops that mix what stays with what goes, other readers."""

from collections.abc import Mapping

from torch import Tensor, fx

from attnopt.calibrating import inputs_of
from attnopt.finder.contraction import read_contraction
from attnopt.finder.evaluate import is_size
from attnopt.finder.ops import JOINING, LAYOUT, NORMS, TRANSPARENT, kind, shape, value
from attnopt.finder.provenance import ELEMENTWISE
from attnopt.frontend.skeletons import cache_slots
from attnopt.nouns import No
from attnopt.program import Program
from attnopt.surgery.arguments import SPLITTING, dim_of
from attnopt.surgery.edit import GraphEdit

_PICKING = frozenset("select index_select roll flip unfold index gather unbind".split())
_PAIRING = frozenset({"view_as_complex", "view_as_real"})
_KNOWN = TRANSPARENT | NORMS | ELEMENTWISE | JOINING | LAYOUT | _PAIRING
_SHAPE_READERS = frozenset("sym_size size numel dim zeros_like ones_like empty_like".split())


def read_elsewhere(
    edit: GraphEdit, line: set[fx.Node], readers: set[fx.Node], last: str
) -> No | None:
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


def cannot_narrow(
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
        axis = dim_of(node, 0 if name == "unbind" else 1) if name != "index" else None
        before = keeps[sources[0]][0]
        if axis is None or not bool(before[axis].all()):
            return No(f"{name} picks by number", node.name)
    if name in SPLITTING or name in ("slice", "narrow"):
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
