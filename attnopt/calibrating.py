"""Calibration: run a program once over data and keep the moments that the passes ask for.

All batches go through the graph together, a layer at a time: each run stops before the next layer
until the others are there too. So the sums of one layer are in memory at a time, and each is
finished before the next begins.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from attnopt import debug
from attnopt.finder.contraction import read_contraction
from attnopt.finder.ops import CONTRACTIONS, LAYOUT, TRANSPARENT, args, kind
from attnopt.moments import Moments as Moments
from attnopt.moments import Statistics as Statistics
from attnopt.moments import contribution
from attnopt.nouns import Projection
from attnopt.program import Program
from attnopt.resuming import Workplace, data_digest, place_of, refuse_other
from attnopt.running import Run
from attnopt.weights import Spool, described, fingerprint, give_back


def calibrate(program: Program, data: Any, out: str | os.PathLike[str] | None = None) -> Statistics:
    """Run a program over calibration data, layer by layer, and gather the moments of its sites.

    With `out`, a directory or a .safetensors file, the sums are written there as they are finished:
    a call that was interrupted goes on where it stopped, and one for the same program and data
    reads what is there.
    """
    from attnopt.data import batches_of

    program = program.main
    batches = list(batches_of(program, data))
    if not any(kept is None or bool(kept.any()) for kept in map(kept_tokens, batches)):
        raise ValueError(
            "no token to calibrate with: the first of each row does not count, and there are no "
            "others; give longer rows"
        )
    work = _Work.of(program, batches)
    if out is None:
        return work.gathered(None)
    place = place_of(Path(out).absolute())
    if place.exists():
        work.known(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with Workplace(place, work.identity) as workplace:
        if not place.exists():
            work.gathered(workplace).save(workplace.whole)
            workplace.whole.replace(place)
        workplace.remove()
    return work.known(place)


@dataclass(frozen=True)
class _Work:
    """What is to be gathered: from which inputs, in which layers, over which batches."""

    program: Program
    wide: Program
    batches: list[dict[str, Any]]
    inputs: Mapping[str, fx.Node]
    layers: tuple[tuple[fx.Node, ...], ...]
    outputs: Mapping[str, Projection]
    identity: Mapping[str, str]

    @classmethod
    def of(cls, program: Program, batches: list[dict[str, Any]]) -> "_Work":
        """List the inputs of every projection of every site, and of what follows each MLP."""
        projections = [p for s in program.sites for p in s.projections.values()]
        downs = [m.down for m in program.mlps]
        wide = program.cast(torch.float32)
        inputs = inputs_of(wide, [p.parameter for p in (*projections, *downs)])
        sites = [
            [inputs[p.parameter] for p in s.projections.values() if p.parameter in inputs]
            for s in program.sites
        ]
        outputs = [s.projections["o"] for s in program.sites if "o" in s.projections]
        readable = [o for o in outputs if _reads_channels(wide, o, inputs)]
        return cls(
            program,
            wide,
            batches,
            inputs,
            tuple(_layers(wide, set(inputs.values()), sites)),
            {o.parameter: o for o in readable},
            {
                "program": _digest(program),
                "data": data_digest(batches),
                "wanted": hashlib.sha256("\n".join(sorted(inputs)).encode()).hexdigest(),
            },
        )

    @property
    def tokens(self) -> int:
        """The tokens that count."""
        kept = (kept_tokens(batch) for batch in self.batches)
        return sum(int(k.sum()) for k in kept if k is not None)

    def known(self, place: Path) -> Statistics:
        """Open statistics that are there already; ValueError where they are not these."""
        found = Statistics.load(place, self.program.weights)
        refuse_other(found.identity, self.identity, place)
        return replace(found, batches=tuple(self.batches))

    def gathered(self, workplace: Workplace | None) -> Statistics:
        """Run all batches, one layer after the other; what the workplace has done stays done."""
        done = workplace.done() if workplace is not None else 0
        runs = [Run(self.wide, batch, set(self.inputs.values())) for batch in self.batches]
        found = _Found(Spool(), {}, {})
        for layer in range(len(self.layers)):
            if workplace is not None and layer < done:
                found.take(*workplace.sums(layer))
                continue
            moments = self._gather(layer, runs, workplace)
            if workplace is None:
                found.take(*moments)
            else:
                workplace.finish(layer, *moments)
                found.take(*workplace.sums(layer))
            del moments
            give_back()
        owners = {name: self.key_of(node) for name, node in self.inputs.items()}
        return Statistics(
            self.program.weights,
            found.tensors,
            owners,
            found.counts,
            found.firsts,
            self.tokens,
            self.identity,
            tuple(self.batches),
        )

    def _gather(
        self, layer: int, runs: list[Run], workplace: Workplace | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Run a layer on every batch; return its sums and the counts that belong to them."""
        gathering = _Gathering(self, {})
        more = self.layers[layer + 1 :]
        for number, run in enumerate(runs):
            if workplace is not None and layer:
                run.resume(self.layers[layer][0], workplace.resume(layer, number))
            for node in self.layers[layer]:
                gathering.see(node, run.until(node), self.batches[number])
            if more:
                run.before(more[0][0])
            if workplace is not None:
                if more:
                    workplace.pause(layer + 1, number, run.paused())
                run.forget()
            debug.advance("calibrate", layer * len(runs) + number + 1, len(self.layers) * len(runs))
        return gathering.sums(), gathering.notes()

    def key_of(self, node: fx.Node) -> str:
        """Name an input by the first parameter that it is multiplied with."""
        return next(name for name, found in self.inputs.items() if found is node)


@dataclass
class _Found:
    """The sums of the layers that are done."""

    tensors: Any
    counts: dict[str, int]
    firsts: dict[str, tuple[int, float]]

    def take(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Add those of one more layer."""
        self.tensors.update(tensors)
        self.counts.update(notes["counts"])
        self.firsts.update({key: (n, total) for key, (n, total) in notes["firsts"].items()})


@dataclass
class _Gathering:
    """The sums of one layer."""

    work: _Work
    moments: dict[str, Moments]

    def see(self, node: fx.Node, value: Tensor, batch: Mapping[str, Any]) -> None:
        """Add the rows of an input."""
        kept = kept_tokens(batch)
        rows = rows_of(value, kept)
        key = self.work.key_of(node)
        moments = self.moments.setdefault(key, Moments(rows.shape[1]))
        moments.add(rows)
        first = first_tokens(batch)
        apart = None if first is None else rows_at(value, first)
        if apart is not None:
            moments.add_first(apart)
        for parameter, read in self.work.outputs.items():
            if self.work.inputs[parameter] is node:
                weight = self.work.wide.weights[parameter].movedim(read.axis, 0).flatten(1)
                moments.add_contribution(parameter, contribution(rows, weight, read.rows))

    def sums(self) -> dict[str, Tensor]:
        """Return all sums by the names that they are stored under."""
        return {n: t for key, held in self.moments.items() for n, t in held.tensors(key).items()}

    def notes(self) -> dict[str, Any]:
        """Return the counts that the sums are divided by."""
        return {
            "counts": {key: held.count for key, held in self.moments.items()},
            "firsts": {key: held.first for key, held in self.moments.items()},
        }


def _layers(
    program: Program, wanted: set[fx.Node], sites: Iterable[list[fx.Node]]
) -> Iterator[tuple[fx.Node, ...]]:
    """Cut the wanted nodes, in order of execution, where the first of a site's begins."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    starts = {min(nodes, key=order.__getitem__) for nodes in sites if nodes}
    layer: list[fx.Node] = []
    for node in sorted(wanted, key=order.__getitem__):
        if node in starts and layer:
            yield tuple(layer)
            layer = []
        layer.append(node)
    if layer:
        yield tuple(layer)


def _reads_channels(program: Program, read: Projection, inputs: Mapping[str, fx.Node]) -> bool:
    """Tell whether the columns that read each head are channels of the projection's input."""
    if read.parameter not in inputs:
        return False
    channels = inputs[read.parameter].meta["val"].shape[-1]
    return bool(described(program.weights, read.parameter).shape[read.axis] == channels)


def _digest(program: Program) -> str:
    """Name a program by its source's class and config, and by its weights."""
    config = program.config
    told = {} if config is None or not hasattr(config, "to_dict") else dict(config.to_dict())
    kept = {k: v for k, v in told.items() if k not in _NO_MATTER}
    text = f"{program.name} {sorted(kept.items(), key=lambda item: item[0])}"
    return hashlib.sha256(f"{text} {fingerprint(program.weights)}".encode()).hexdigest()


# What a config says besides what its model computes.
_NO_MATTER = frozenset({"_name_or_path", "name_or_path", "transformers_version", "use_cache"})


@dataclass(frozen=True)
class Product:
    """Where a parameter is multiplied: the other factor, and the node of the product."""

    factor: fx.Node
    node: fx.Node


def inputs_of(program: Program, parameters: Iterable[str]) -> dict[str, fx.Node]:
    """Find, for each parameter, the node that it is multiplied with."""
    return {name: product.factor for name, product in products_of(program, parameters).items()}


def products_of(program: Program, parameters: Iterable[str]) -> dict[str, Product]:
    """Find, for each parameter, where it is multiplied; those that never are have no entry."""
    by_name = {
        program.bindings[n.name].name: n
        for n in program.placeholders
        if program.bindings[n.name].kind == "parameter"
    }
    found: dict[str, Product] = {}
    for parameter in dict.fromkeys(parameters):
        product = _product_of(by_name[parameter]) if parameter in by_name else None
        if product is not None:
            found[parameter] = product
    return found


def _product_of(weight: fx.Node) -> Product | None:
    """Follow a weight through transposes and views to its product."""
    todo = [weight]
    while todo:
        node = todo.pop()
        for user in node.users:
            contraction = read_contraction(user) if kind(user) in CONTRACTIONS else None
            if contraction is not None:
                rhs = contraction.rhs is node
                return Product(contraction.lhs if rhs else contraction.rhs, user)
            if kind(user) in TRANSPARENT | LAYOUT and args(user)[0] is node:
                todo.append(user)
    return None


def kept_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """Choose the tokens that count: real ones, without the first, whose activations are massive."""
    ids = batch.get("input_ids")
    if ids is None:
        return None
    mask = batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    first = kept.long().cumsum(1) == 1
    return kept & ~first


def first_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """Choose the first token of each row, those that `kept_tokens` leaves out."""
    kept, ids = kept_tokens(batch), batch.get("input_ids")
    if kept is None or ids is None:
        return None
    mask = batch.get("attention_mask")
    return ~kept if mask is None else ~kept & mask.bool()


def rows_of(value: Tensor, kept: Tensor | None) -> Tensor:
    """Return the rows of channels that count; all of them where there is none for each token."""
    found = None if kept is None else rows_at(value, kept)
    return value.reshape(-1, value.shape[-1]) if found is None else found


def rows_at(value: Tensor, tokens: Tensor) -> Tensor | None:
    """Return the rows of some tokens, of (batch, tokens, channels) or of one row for each token."""
    if value.shape[:2] == tokens.shape:
        return value[tokens]
    one_each = value.dim() == 2 and len(value) == tokens.numel()
    return value[tokens.flatten()] if one_each else None
