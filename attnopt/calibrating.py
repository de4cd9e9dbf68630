"""Calibration: run a program once over data and keep the second moments that the passes ask for."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from attnopt import debug
from attnopt.finder.contraction import read_contraction
from attnopt.finder.ops import CONTRACTIONS, LAYOUT, TRANSPARENT, args, kind
from attnopt.program import Program
from attnopt.running import Run


@dataclass
class Gram:
    """The second moment of what a parameter is multiplied with, a constant 1 appended to it."""

    total: Tensor
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Add the rows (tokens, inputs)."""
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).double()
        self.total += rows.T @ rows
        self.count += len(rows)


@dataclass(frozen=True)
class Statistics:
    """What calibration saw: moments by parameter, and the weights that they belong to."""

    weights: Mapping[str, Tensor] = field(repr=False)
    grams: Mapping[str, Gram] = field(repr=False)
    tokens: int = 0
    batches: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    refits: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def gram(self, parameter: str) -> Tensor:
        """Return E[x x^T] of the inputs of a parameter, whose last entry is the constant 1."""
        if parameter not in self.grams:
            known = ", ".join(list(self.grams)[:4])
            raise KeyError(f"no statistics of {parameter}; there are those of {known} ...")
        gram = self.grams[parameter]
        return gram.total / gram.count

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the moments to a safetensors file, each shared one once."""
        from safetensors.torch import save_file

        owners: dict[int, str] = {}
        names = {name: owners.setdefault(id(gram), name) for name, gram in self.grams.items()}
        tensors = {name: self.grams[name].total for name in owners.values()}
        counts = {name: self.grams[name].count for name in owners.values()}
        for name, (gram, cross) in self.refits.items():
            tensors |= {f"refit.gram.{name}": gram, f"refit.cross.{name}": cross}
        notes = {
            "same": names,
            "counts": counts,
            "tokens": self.tokens,
            "refits": sorted(self.refits),
        }
        save_file(tensors, path, {"attnopt": json.dumps(notes, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> "Statistics":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get("attnopt", "null"))
            if notes is None:
                raise ValueError(f"{Path(path).name} holds no calibration statistics of attnopt")
            counts = notes["counts"]
            held = {n: Gram(file.get_tensor(n), counts[n]) for n in counts}
            refits = {name: _refit(file, name) for name in notes["refits"]}
        grams = {n: held[o] for n, o in notes["same"].items()}
        return cls(weights, grams, notes["tokens"], refits=refits)


def _refit(file: Any, name: str) -> tuple[Tensor, Tensor]:
    return file.get_tensor(f"refit.gram.{name}"), file.get_tensor(f"refit.cross.{name}")


def calibrate(program: Program, data: Any) -> Statistics:
    """Run a program over calibration data, node by node, and gather the moments of its sites."""
    from attnopt.data import batches_of

    if program.parts:
        raise NotImplementedError(
            f"cannot calibrate {program.name}: it was captured in parts "
            f"({', '.join(program.parts)}), and statistics are gathered in one graph so far"
        )
    wanted = [p.parameter for s in program.sites for p in s.projections.values()]
    wide = program.cast(torch.float32)
    inputs = inputs_of(wide, wanted)
    grams: dict[fx.Node, Gram] = {}
    batches = list(batches_of(program, data))
    tokens = 0
    for number, batch in enumerate(batches, 1):
        kept = kept_tokens(batch)
        tokens += int(kept.sum()) if kept is not None else 0

        for node, value in Run(wide, batch).seen(inputs.values()):
            rows = rows_of(value, kept)
            if node not in grams:
                size = rows.shape[1] + 1
                grams[node] = Gram(torch.zeros(size, size, dtype=torch.float64))
            grams[node].add(rows)
        debug.advance("calibrate", number, len(batches))
    by_name = {name: grams[node] for name, node in inputs.items()}
    return Statistics(program.weights, by_name, tokens, tuple(batches))


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


def rows_of(value: Tensor, kept: Tensor | None) -> Tensor:
    """Return the rows of a (batch, tokens, channels) tensor that count."""
    if kept is not None and value.shape[:2] == kept.shape:
        return value[kept]
    return value.reshape(-1, value.shape[-1])
