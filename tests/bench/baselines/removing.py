"""A program without some key heads and neurons that a published method has chosen."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from attnopt.calibrating import Statistics
from attnopt.heads import Written, write_heads
from attnopt.nouns import Choice, Mlp, Plan, Projection, Site
from attnopt.program import Program
from attnopt.rewriting import apply, reweighted

HEADS, NEURONS = "heads", "neurons"


def targets(program: Program, units: Collection[str]) -> list[Site | Mlp]:
    """List what a method may remove from: sites lose heads, MLPs neurons."""
    sites = program.sites if HEADS in units else ()
    return [*sites, *(program.mlps if NEURONS in units else ())]


def count(target: Site | Mlp) -> int:
    """Return how many key heads or neurons there are."""
    return target.neurons if isinstance(target, Mlp) else target.kv_heads


def reader(target: Site | Mlp) -> Projection:
    """Return the projection that reads the heads or neurons."""
    return target.down if isinstance(target, Mlp) else target.projections["o"]


def read_by(target: Site | Mlp, stays: Tensor) -> Tensor:
    """Widen a mask of key heads to their query heads; one of neurons is as it was."""
    if isinstance(target, Mlp):
        return stays
    return stays.repeat_interleave(target.heads // target.kv_heads)


def without(program: Program, stats: Statistics, stays: Mapping[str, Tensor]) -> Program:
    """Return a program that keeps, of each site or MLP named, the key heads or neurons told.

    The graph is that of pass amp for as many; the weights that stay are what they were.
    """
    known = {t.name: t for t in targets(program, (HEADS, NEURONS))}
    choices: list[Choice] = []
    weights: dict[str, Tensor] = {}
    for name, kept in stays.items():
        target, gone = known[name], int((~kept).sum())
        if not gone:
            continue
        setting = "neurons" if isinstance(target, Mlp) else "groups"
        config = {setting: gone, "score": "random", "compensate": False}
        choices.append(Choice(name, "amp", config))
        weights |= write_heads(stats.weights, _written(target, kept))
    return reweighted(apply(program, Plan(tuple(choices), statistics=stats)), weights)


Method = Callable[[Program, Statistics, float, Collection[str]], dict[str, Tensor]]


def pruned(
    method: Method,
    program: Program,
    stats: Statistics,
    share: float,
    units: Collection[str] = (HEADS, NEURONS),
) -> Program:
    """Return a program that has lost a share of its heads, of its neurons, or of both.

    `method` chooses what stays; nothing makes up for what goes.
    """
    return without(program, stats, method(program, stats, share, units))


def _written(target: Site | Mlp, kept: Tensor) -> list[Written]:
    """Say which rows and columns stay."""
    if isinstance(target, Mlp):
        return [_kept(p, kept) for p in (*target.inputs, target.down)]
    read = read_by(target, kept)
    masks = {"q": read, "k": kept, "v": kept, "o": read}
    return [_kept(target.projections[n], mask) for n, mask in masks.items()]


def _kept(projection: Projection, mask: Tensor) -> Written:
    return Written(projection, mask.unsqueeze(1).expand(-1, len(projection.rows[0])))


def all_but(total: int, gone: Tensor) -> Tensor:
    """Return a mask without some."""
    mask = torch.ones(total, dtype=torch.bool)
    mask[gone] = False
    return mask
