"""A stock checkpoint of a program whose layers differ: every layer gets the heads of the largest.

A key and value head that several query heads share is written once for each of them, which changes
nothing but the size: what was saved is given up again, and anything loads the result.
"""

import copy
import os
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.artifacts.saving import Result, refuse_foreign, write
from attnopt.artifacts.staging import staged
from attnopt.artifacts.stock import build, kv_heads_of, stock_class, unmarked
from attnopt.nouns import No, Plan, Projection, Site
from attnopt.program import Program
from attnopt.verifying import in_float32

_AGREES = 1e-4


@dataclass(frozen=True)
class Widened:
    """A stock model that computes what a program does, and what that costs and proves."""

    path: Path
    heads: int
    kv_elements: tuple[int, int]
    difference: float


def export_stock(program: Program, out: str | os.PathLike[str]) -> Widened:
    """Write a plain Transformers checkpoint; ValueError where no stock class can compute it."""
    target = Path(out).absolute()
    refuse_foreign(target, program)
    weights, heads = _widened(program)
    model = _stock(program, weights, heads)
    difference = _difference(program, model)
    if not difference <= _AGREES:
        raise ValueError(
            f"the stock class computes something else than the program: results differ by "
            f"{difference:.2g} of their size"
        )
    with staged(target) as staging:
        write(Result(program, program, Plan(())), model, staging)
    before = sum(s.kv_heads * (s.head_dim + s.v_head_dim) for s in program.sites if s.cached)
    after = sum(heads * (s.head_dim + s.v_head_dim) for s in program.sites if s.cached)
    return Widened(target, heads, (before, after), difference)


def _widened(program: Program) -> tuple[dict[str, Tensor], int]:
    """Return the parameters that change, and the heads that every layer has then."""
    if program.tier > 1 or program.parts:
        raise ValueError(f"{program.name} computes what no stock class does")
    sites = [s for s in program.sites if s.projections.keys() >= {"k", "v"}]
    if not sites:
        raise ValueError(f"{program.name} has no attention whose keys and values are projected")
    heads = lcm(*(s.kv_heads for s in sites))
    found: dict[str, Tensor] = {}
    for site in sites:
        if site.heads % heads:
            raise ValueError(
                f"{site.name} has {site.heads} query heads, which {heads} key heads cannot share"
            )
        if site.kv_heads != heads:
            found |= _repeated(program, site, heads // site.kv_heads)
    return found, heads


def _repeated(program: Program, site: Site, times: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for role in ("k", "v"):
        projection = site.projections[role]
        weight = program.weights[projection.parameter]
        rows = [r for head in projection.rows for r in head]
        if sorted(rows) != list(range(weight.shape[projection.axis])):
            raise ValueError(
                f"{projection.parameter} holds more than the {role} heads of {site.name}"
            )
        order = _order(projection, times)
        found[projection.parameter] = weight.index_select(projection.axis, order)
        if projection.bias is not None:
            found[projection.bias] = program.weights[projection.bias].index_select(0, order)
    return found


def _order(projection: Projection, times: int) -> Tensor:
    return torch.tensor([r for head in projection.rows for _ in range(times) for r in head])


def _stock(program: Program, weights: dict[str, Tensor], heads: int) -> nn.Module:
    cls = stock_class(program)
    if isinstance(cls, No):
        raise ValueError(str(cls))
    config = unmarked(program.config)
    inner = config.get_text_config()
    name = kv_heads_of(inner)
    if name is not None:
        setattr(inner, name, heads)
    elif weights:
        raise ValueError(f"the config of {program.name} has no number of key and value heads")
    config.name_or_path = ""
    return build(cls, copy.deepcopy(config), {**program.weights, **weights})


@torch.no_grad()
def _difference(program: Program, model: Any) -> float:
    """Compare logits, or the first result, on random tokens."""
    vocabulary = int(program.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (2, 17), generator=torch.Generator().manual_seed(0))
    stock = copy.deepcopy(model).to(torch.float32)
    want, got = in_float32(program)(input_ids=ids)[0], stock(input_ids=ids)[0]
    size = float(want.double().square().mean().sqrt())
    return float((got - want).abs().max()) / size
