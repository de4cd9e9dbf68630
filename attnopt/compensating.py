"""Compensation: refit the output projections of rewritten sites to what the source computed.

Layer by layer, with the layers before it already rewritten and refitted: the least-squares solution
of `new inputs x new weight = old inputs x old weight` over the calibration data, with a small ridge
that pulls towards the weight as it was. Where the projection is added to a residual stream, it also
makes up for what the layers before it have changed there. Source and rewritten program run side by
side and wait for each other at every projection, so that each runs once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt import debug
from attnopt.calibrating import Statistics, inputs_of, kept_tokens, rows_of
from attnopt.finder.contraction import read_contraction
from attnopt.finder.ops import TRANSPARENT, kind, shape, value
from attnopt.program import Program
from attnopt.running import Run
from attnopt.weights import Spool

RIDGE = 1e-4
# How much of what is lost before a projection it makes up for: all of it is too much where the loss
# is large, and half brings nearly as much where it is small.
DRIFT = 0.5


def refit(
    source: Program, rewritten: Program, axes: Mapping[str, int], stats: Statistics, key: str
) -> Spool:
    """Return the weights named, refitted in order of execution.

    `axes` says along which axis of each its inputs lie. Moments are kept in `stats` under `key`, so
    that the same plan is replayed without data.
    """
    places = {name: f"{key}/{name}" for name in axes}
    missing = [n for n, place in places.items() if place not in stats.refits]
    if missing and not stats.batches:
        raise ValueError(
            f"the plan's statistics have no moments for {missing[0]}: the plan was edited after "
            "them; calibrate again (attnopt.calibrate) and set them in the plan"
        )
    if missing:
        _gather(source, rewritten, axes, places, stats)
    solved = Spool()
    for name, place in places.items():
        both = rewritten.weights[name], source.weights[name]
        solved[name] = _solve(*both, axes[name], *stats.refits[place])
    return solved


def _gather(
    source: Program,
    rewritten: Program,
    axes: Mapping[str, int],
    places: Mapping[str, str],
    stats: Statistics,
) -> None:
    """Run both programs side by side and keep the moments of every projection."""
    wide = source.cast(torch.float32), rewritten.cast(torch.float32)
    looks = [_Looks.of(program, axes) for program in wide]
    order = {node: i for i, node in enumerate(wide[1].graph.nodes)}
    walks = [
        [_Walk(Run(p, b, look.nodes), look) for p, look in zip(wide, looks, strict=True)]
        for b in stats.batches
    ]
    kept = [kept_tokens(b) for b in stats.batches]
    for number, name in enumerate(sorted(places, key=lambda n: order[looks[1].inputs[n]]), 1):
        # An earlier process may have gathered some of them.
        if places[name] not in stats.refits:
            together = all(name in look.residuals for look in looks)
            stats.refits[places[name]] = _moments(name, walks, kept, together=together)
        both = rewritten.weights[name], source.weights[name]
        solved = _solve(*both, axes[name], *stats.refits[places[name]])
        for _, new in walks:
            new.run.weights[name] = solved.float()
        debug.advance("refit", number, len(places))


def _moments(
    name: str,
    walks: Sequence[Sequence["_Walk"]],
    kept: Sequence[Tensor | None],
    *,
    together: bool,
) -> tuple[Tensor, Tensor]:
    """Return the moments of a projection over all calls, of its drift too where both have one."""
    moments = _Moments()
    for (old, new), counted in zip(walks, kept, strict=True):
        streams = [w.residual(name) for w in (old, new)] if together else []
        drift = rows_of(DRIFT * (streams[0] - streams[1]), counted) if together else None
        after, before = (rows_of(w.input(name), counted) for w in (new, old))
        moments.add(after, before, drift)
    return moments.means()


@dataclass(frozen=True)
class _Looks:
    """Where to look in a graph: at the input of each projection, and at the stream it is added to.

    A stream that is known only after the input is left out.
    """

    inputs: Mapping[str, fx.Node]
    residuals: Mapping[str, fx.Node]

    @classmethod
    def of(cls, program: Program, names: Mapping[str, int]) -> "_Looks":
        """Find both for every projection."""
        inputs = inputs_of(program, names)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        found: dict[str, fx.Node] = {}
        for name, node in inputs.items():
            stream = _residual(node, program, name)
            if stream is not None and order[stream] < order[node]:
                found[name] = stream
        return cls(inputs, found)

    @property
    def nodes(self) -> set[fx.Node]:
        """All of them."""
        return {*self.inputs.values(), *self.residuals.values()}


def _residual(given: fx.Node, program: Program, name: str) -> fx.Node | None:
    """Follow the product of an input and a weight to where it is added; return the other addend."""
    product = next((u for u in given.users if _reads(u, program, name)), None)
    while product is not None and len(product.users) == 1:
        (user,) = product.users
        if kind(user) == "add" and len(user.all_input_nodes) == 2:
            (other,) = (n for n in user.all_input_nodes if n is not product)
            same = isinstance(value(other), Tensor) and shape(other) == shape(user)
            return other if same and other.op == "call_function" else None
        product = user if kind(user) in TRANSPARENT or _keeps_rows(user) else None
    return None


def _keeps_rows(node: fx.Node) -> bool:
    """Tell whether a node says only how rows of channels are numbered."""
    if kind(node) not in ("view", "reshape", "_unsafe_view"):
        return False
    return bool(shape(node)[-1] == shape(node.all_input_nodes[0])[-1])


def _reads(user: fx.Node, program: Program, name: str) -> bool:
    if read_contraction(user) is None:
        return False
    todo = list(user.all_input_nodes)
    while todo:
        node = todo.pop()
        if node.op == "placeholder" and program.bindings[node.name].name == name:
            return True
        if kind(node) in ("t", "transpose", "permute") or kind(node) in TRANSPARENT:
            todo.extend(node.all_input_nodes)
    return False


@dataclass
class _Walk:
    """A run that is stopped at every look, in order of execution."""

    run: Run
    looks: _Looks
    held: dict[fx.Node, Tensor] = field(default_factory=dict)

    def residual(self, name: str) -> Tensor:
        """Return the stream that a projection is added to; several may be added to one."""
        node = self.looks.residuals[name]
        if node not in self.held:
            self.held = {node: self.run.until(node)}
        return self.held[node]

    def input(self, name: str) -> Tensor:
        """Return the input of a projection."""
        found: Tensor = self.run.until(self.looks.inputs[name])
        return found


class _Moments:
    """The running sums of new^T new, of new^T old, and of new^T drift where there is a drift."""

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.count = 0

    def add(self, new: Tensor, old: Tensor, drift: Tensor | None) -> None:
        """Add rows of inputs before and after, and of how far the streams are apart."""
        told = [old] if drift is None else [old, drift]
        new = new.double()
        self.gram = self.gram + new.T @ new
        self.cross = self.cross + new.T @ torch.cat(told, dim=1).double()
        self.count += len(new)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return both moments."""
        return self.gram / self.count, self.cross / self.count


def _solve(now: Tensor, before: Tensor, axis: int, gram: Tensor, cross: Tensor) -> Tensor:
    """Return the weight that makes the old outputs, and the drift, of the new inputs."""
    old, whole = (w.double().movedim(axis, -1) for w in (now, before))
    outputs = old.shape[:-1]
    old, whole = old.flatten(0, -2), whole.flatten(0, -2)
    small = RIDGE * gram.diagonal().mean()
    left = gram + small * torch.eye(len(gram), dtype=gram.dtype)
    width = whole.shape[1]
    right = cross[:, :width] @ whole.T + small * old.T
    if cross.shape[1] > width:
        right = right + cross[:, width:]
    solved: Tensor = torch.linalg.solve(left, right).T.reshape(*outputs, -1)
    return solved.movedim(-1, axis).to(now.dtype).contiguous()
