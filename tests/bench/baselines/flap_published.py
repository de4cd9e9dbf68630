"""FLAP as its paper and code have it (2312.11983): one ranking over all layers, and a bias.

A channel is worth its variance times the energy of the column that reads it, squared in attention;
the worths are standardised within each layer and averaged over a head's channels, and one sort over
all layers, in which a head counts as the neurons that have as many parameters, decides what goes.
What goes is replaced by its mean, which stock layers can do where their projections have a bias.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.calibrating import Statistics
from attnopt.heads import removable
from attnopt.nouns import Mlp, Site
from attnopt.program import Program
from baselines.removing import HEADS, NEURONS, read_by, reader, targets


def chosen(
    program: Program, stats: Statistics, share: float, units: Collection[str]
) -> dict[str, Tensor]:
    """Return what stays of each site and MLP, a unit of each at the least.

    Units are kept from the best on, until what is kept comes closest to what may be.
    """
    found = targets(program, units)
    worth = [scores(t, stats) for t in found]
    sizes = [removable(t, stats.weights)[0] for t in found]
    price = [torch.full_like(w, size) for w, size in zip(worth, sizes, strict=True)]
    order = torch.cat(worth).argsort(descending=True, stable=True)
    kept_price = torch.cat(price)[order].cumsum(0)
    left = int((kept_price - (1 - share) * kept_price[-1]).abs().argmin()) + 1
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:left]] = True
    stays: dict[str, Tensor] = {}
    for target, own, values in zip(found, mask.split([len(w) for w in worth]), worth, strict=True):
        stays[target.name] = own if own.any() else values == values.max()
    return stays


def scores(target: Site | Mlp, stats: Statistics) -> Tensor:
    """Return the standardised worth of each key head, with its readers, or of each neuron."""
    read = reader(target)
    weight = stats.weights[read.parameter].double().movedim(read.axis, -1).flatten(0, -2)
    energy = stats.ridge(read.parameter, 0.0).energy()
    variance = energy - stats.mean(read.parameter).square()
    worth = (variance * weight.square().sum(0))[torch.tensor(read.rows)]
    if isinstance(target, Mlp):
        return _standardised(worth)[:, 0]
    return _standardised(worth.square()).view(target.kv_heads, -1).mean(1)


def _standardised(worth: Tensor) -> Tensor:
    return (worth - worth.mean()) / worth.std()


@contextmanager
def compensated(
    model: nn.Module, program: Program, stats: Statistics, stays: Mapping[str, Tensor]
) -> Iterator[Callable[..., Any]]:
    """Lend a stock model in which what goes is replaced by its mean over the calibration data.

    That equals removal with the bias `W_gone mean(x_gone)` added to the projection's outputs.
    """
    hooks = []
    for target in targets(program, (HEADS, NEURONS)):
        if target.name not in stays:
            continue
        read = reader(target)
        gone = torch.tensor(read.rows)[~read_by(target, stays[target.name])].flatten()
        module = model.get_submodule(read.parameter.removesuffix(".weight"))
        mean = stats.mean(read.parameter)[gone]
        hooks.append(module.register_forward_pre_hook(_replacing(gone, mean)))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _replacing(gone: Tensor, mean: Tensor) -> Callable[..., Any]:
    """Return a hook that gives the inputs that are gone their means."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[..., gone] = mean.to(x.dtype)
        return (x, *inputs[1:])

    return hook
