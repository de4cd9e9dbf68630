"""AMP as its paper has it (2504.21174): scores by mean size, a uniform budget, no compensation.

A head is worth the mean L1 norm of what it adds to the residual stream, a neuron its mean size
without the norm of its column. Means are taken per prompt and then over prompts, which is the mean
over tokens where all prompts are of one length, as here.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from attnopt.calibrating import Statistics
from attnopt.nouns import Mlp, Site
from attnopt.program import Program
from baselines.removing import HEADS, all_but, count, reader, targets


def chosen(
    program: Program, stats: Statistics, share: float, units: Collection[str]
) -> dict[str, Tensor]:
    """Return what stays of each site and MLP."""
    stays: dict[str, Tensor] = {}
    for target in targets(program, units):
        order = scores(target, stats).argsort(stable=True)
        heads = program.sites[0].kv_heads if HEADS in units else 0
        gone = allocation(share, heads, count(target))[isinstance(target, Mlp)]
        stays[target.name] = all_but(count(target), order[: min(gone, count(target) - 1)])
    return stays


def allocation(share: float, heads: int, neurons: int) -> tuple[int, int]:
    """Return how many heads and neurons of a layer go.

    The fraction of a head that rounding leaves over is traded for as large a fraction of a neuron,
    as published, though a head has the parameters of many neurons.
    """
    whole = round(share * heads)
    return whole, round(share * neurons + (share * heads - whole))


def scores(target: Site | Mlp, stats: Statistics) -> Tensor:
    """Return what each key head, with its readers, or each neuron is worth."""
    parameter = reader(target).parameter
    if isinstance(target, Mlp):
        return stats.absolute(parameter)[torch.tensor(target.down.rows)[:, 0]]
    return stats.contribution(parameter).view(target.kv_heads, -1).sum(1)
