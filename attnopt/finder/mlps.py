"""The MLPs of a program: a weight that reads neurons, and the projections that make each neuron.

Found by meaning, as attention is: a contraction with a learned weight whose other operand comes, by
elementwise ops alone, from contractions of one input with learned weights. Every neuron's number is
followed through splits and views, so that gated, plain and fused gate-up forms are one thing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.ops import (
    CONTRACTIONS,
    LAYOUT,
    NORMS,
    TRANSPARENT,
    args,
    kind,
    module_path,
    shape,
    value,
)
from attnopt.finder.projections import Weight, indexed, parameter_rows
from attnopt.finder.provenance import ELEMENTWISE, Root, View, weight_of
from attnopt.nouns import Mlp, Projection, Site

# Elementwise over channels: a neuron depends on its own row of each projection and on nothing else.
_FOREIGN = frozenset("softmax _softmax normalize".split())
_COMPARING = frozenset("gt lt ge le min max expm1".split())
_POINTWISE = (ELEMENTWISE | TRANSPARENT | _COMPARING) - _FOREIGN


_CHOOSING = frozenset("topk argmax max sort argsort kthvalue nonzero".split())
_MOST_WAYS = 16
_Numbers = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class _Way:
    """The element numbers of neurons along one way back, None where it ends elsewhere.

    `active` says that something on the way is not linear.
    """

    numbers: _Numbers
    active: bool


def find_mlps(view: View, sites: Sequence[Site]) -> tuple[Mlp, ...]:
    """Find every MLP; the parameters and names of the attentions are taken."""
    taken = frozenset(p.parameter for s in sites for p in s.projections.values())
    found: list[Mlp] = []
    for node in view.program.graph.nodes:
        if kind(node) in CONTRACTIONS:
            mlp = _read(view, node, taken)
            if mlp is not None:
                found.append(mlp)
    names = _names([m.module for m in found], {s.name for s in sites})
    return tuple(
        Mlp(n, m.module, m.neurons, m.inputs, m.down) for n, m in zip(names, found, strict=True)
    )


def _read(view: View, node: fx.Node, taken: frozenset[str]) -> Mlp | None:
    contraction = read_contraction(node)
    weight = None if contraction is None else weight_of(contraction, view.origins)
    if contraction is None or weight is None or len(contraction.summed) != 1:
        return None
    if not _is_pointwise(contraction, weight) or _is_routed(node):
        return None
    neurons = contraction.lhs if weight is contraction.rhs else contraction.rhs
    axis = contraction.labels(neurons).index(contraction.summed[0])
    if axis != len(shape(neurons)) - 1 and not kind(node).startswith("conv"):
        return None  # calibration counts the inputs of a projection along the last axis
    made = made_of(view, neurons, axis)
    if made is None:
        return None
    count = shape(neurons)[axis]
    down = _columns(view, contraction, weight, count)
    inputs = tuple(parameter_rows(view, root, rows) for root, rows in made.items())
    if down is None or down.parameter in taken or any(p is None for p in inputs):
        return None
    projections = tuple(p for p in inputs if p is not None)
    if any(p.parameter in taken or p.parameter == down.parameter for p in projections):
        return None
    module = _common_module([module_path(node), *(module_path(r.node) for r in made)])
    return Mlp(module, module, count, projections, down)


def _is_routed(result: fx.Node) -> bool:
    """Whether a choice between experts weighs or masks a result: few of its tokens count."""
    todo, seen = [result], {result}
    while todo:
        node = todo.pop()
        for user in node.users:
            if kind(user) in ("mul", "where", "masked_fill", "index_add", "index_put", "scatter"):
                others = [n for n in user.all_input_nodes if n not in seen]
                if any(_is_chosen(n) for n in others):
                    return True
            elif kind(user) in TRANSPARENT | LAYOUT and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _is_chosen(node: fx.Node) -> bool:
    """Whether the largest of some scores are picked on the way to a node."""
    todo, seen = [node], {node}
    while todo:
        found = todo.pop()
        if kind(found) in _CHOOSING:
            return True
        if kind(found) not in CONTRACTIONS | NORMS:
            todo.extend(n for n in found.all_input_nodes if n not in seen)
            seen.update(found.all_input_nodes)
    return False


def _is_pointwise(contraction: Contraction, weight: fx.Node) -> bool:
    """Whether each output reads all channels of one place; convolutions may see neighbours."""
    if not kind(contraction.node).startswith("conv"):
        return len(shape(weight)) == 2  # more axes tell experts apart
    channels = shape(contraction.lhs)[contraction.lhs_labels.index("k")]
    return shape(weight)[1] == channels and all(size == 1 for size in shape(weight)[2:])


def made_of(
    view: View, neurons: fx.Node, axis: int
) -> dict[Root, tuple[tuple[int, ...], ...]] | None:
    """Return the contractions that make the neurons, and the channels of each neuron in them."""
    made: dict[Root, tuple[tuple[int, ...], ...]] = {}
    inputs: set[fx.Node] = set()
    acted = False
    ways = _ways(view, neurons)
    if len(ways) > _MOST_WAYS:
        return None
    for way in ways:
        acted = acted or way.active
        channels = _channels(view, way.numbers, axis)
        if channels is None:
            return None
        root, line = channels
        assert root.contraction is not None
        weight = weight_of(root.contraction, view.origins)
        if weight is None or not _is_pointwise(root.contraction, weight):
            return None
        inputs.add(root.contraction.lhs if weight is root.contraction.rhs else root.contraction.rhs)
        made[root] = tuple(
            (*old, new) if new not in old else old
            for old, new in zip(made.get(root, ((),) * len(line)), line, strict=True)
        )
    return made if made and acted and len(inputs) == 1 else None


def _ways(view: View, neurons: fx.Node) -> list[_Way]:
    """Return the numbers of the neurons along every way back to a contraction."""
    known: dict[fx.Node, list[_Way]] = {}
    todo = [neurons]
    while todo:
        node = todo[-1]
        missing = [n for n in _before(view, node) if n not in known]
        todo.extend(missing)
        if not missing:
            known[todo.pop()] = _step(view, node, known)
    return known[neurons]


def _before(view: View, node: fx.Node) -> list[fx.Node]:
    """List what the neurons of a node come from; nothing at a contraction or elsewhere."""
    if read_contraction(node) is not None:
        return []
    if kind(node) in _POINTWISE:
        return _operands(view, node)
    return [args(node)[0]] if kind(node) in _MOVING else []


def _step(view: View, node: fx.Node, known: Mapping[fx.Node, list[_Way]]) -> list[_Way]:
    before = _before(view, node)
    if not before:
        numbers = None if read_contraction(node) is None else view.provenance.numbers(node)
        return [_Way(numbers, False)]
    if kind(node) in _MOVING:
        return [_Way(_moved(view, node, w.numbers), w.active) for w in known[before[0]]]
    active = kind(node) in _ACTIVE and not _is_scaling(view, node)
    ways = [_Way(_broadcast(w.numbers, node), w.active or active) for n in before for w in known[n]]
    return ways[: _MOST_WAYS + 1]


def _is_scaling(view: View, node: fx.Node) -> bool:
    """Whether a node multiplies neurons by what they do not depend on."""
    return kind(node) in ("mul", "div") and len(_operands(view, node)) == 1 and not _squares(node)


def _squares(node: fx.Node) -> bool:
    given = [a for a in args(node)[:2] if isinstance(a, fx.Node)]
    return len(given) != len(set(given))


def _moved(view: View, node: fx.Node, numbers: _Numbers) -> _Numbers:
    return None if numbers is None else view.provenance.moved(node, numbers)


def _broadcast(numbers: _Numbers, node: fx.Node) -> _Numbers:
    """Return the numbers of an operand at the places of the result."""
    if not isinstance(numbers, Tensor) or not isinstance(value(node), Tensor):
        return None
    return numbers if tuple(numbers.shape) == shape(node) else None


_LINEAR = frozenset("add sub rsub neg true_divide".split()) | TRANSPARENT
_ACTIVE = (ELEMENTWISE | _COMPARING) - _LINEAR
_MOVING = frozenset(
    "view reshape _unsafe_view split split_with_sizes unsafe_split chunk unsafe_chunk slice "
    "getitem narrow select unbind transpose permute unsqueeze squeeze flatten unflatten".split()
)


def _operands(view: View, node: fx.Node) -> list[fx.Node]:
    """List the operands that carry data; numbers and what is learned act on them."""
    operands = [n for n in dict.fromkeys(node.all_input_nodes) if isinstance(value(n), Tensor)]
    return [n for n in operands if view.origins.is_data(n)]


def _channels(view: View, numbers: _Numbers, axis: int) -> tuple[Root, tuple[int, ...]] | None:
    """Return the contraction and its channel of each neuron; None where they are not one each."""
    if not isinstance(numbers, Tensor) or not numbers.numel() or (numbers < 0).any():
        return None
    root = view.provenance.root_of(int(numbers.flatten()[0]))
    if root.contraction is None or not (numbers < root.end).all() or (numbers < root.base).any():
        return None
    moved = root.place(numbers)[1].movedim(axis, -1).flatten(0, -2)
    if (moved != moved[:1]).any() or len(set(moved[0].tolist())) != moved.shape[1]:
        return None
    return root, tuple(moved[0].tolist())


def _columns(
    view: View, contraction: Contraction, weight: fx.Node, count: int
) -> Projection | None:
    axis = contraction.labels(weight).index(contraction.summed[0])
    return indexed(view, Weight(contraction, weight, [axis]), tuple((i,) for i in range(count)))


def _common_module(paths: list[str]) -> str:
    """Return the innermost module that all paths lie in."""
    parts = [p.split(".") for p in paths]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _names(modules: list[str], taken: set[str]) -> list[str]:
    """Name each MLP for its module, with a number where that is the name of something else."""
    seen = dict.fromkeys(taken, 1)
    names: list[str] = []
    for module in modules:
        seen[module] = seen.get(module, 0) + 1
        stem = module or "mlp"
        names.append(stem if seen[module] == 1 else f"{stem}#{seen[module]}")
    return names
