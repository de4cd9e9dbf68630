"""Projections by head: parameters in whatever layout become one linear map a head, and back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.nouns import Mlp, Projection, Site
from attnopt.weights import described


@dataclass(frozen=True)
class Heads:
    """One linear map per head, (heads, channels, inputs), in float64.

    The last input of a biased projection of q, k and v is the constant 1.
    """

    maps: Tensor
    biased: bool = False

    @property
    def count(self) -> int:
        """The number of heads."""
        return self.maps.shape[0]

    @property
    def width(self) -> int:
        """The number of channels of a head."""
        return self.maps.shape[1]


def read_heads(weights: Mapping[str, Tensor], projection: Projection) -> Heads:
    """Read the rows of each head, with the bias as the last input.

    For an output projection the rows are the columns that read a head, and its bias, which is
    added once and not per head, stays out.
    """
    rows = torch.tensor(projection.rows)
    weight = weights[projection.parameter].double()
    maps = weight.movedim(projection.axis, 0).flatten(1)[rows]
    if projection.bias is None or not per_row(weights, projection):
        return Heads(torch.cat([maps, maps.new_zeros(*maps.shape[:2], 1)], dim=-1))
    bias = weights[projection.bias].double()[rows]
    return Heads(torch.cat([maps, bias.unsqueeze(-1)], dim=-1), biased=True)


def first_channels(width: int, left: int) -> Tensor:
    """Return a mask (1, channels) of the first channels."""
    return (torch.arange(width) < left).unsqueeze(0)


@dataclass(frozen=True)
class Written:
    """What becomes of a projection: which channels of which heads stay, and their new maps.

    Without maps the rows that stay are what they were.
    """

    projection: Projection
    stays: Tensor
    maps: Tensor | None = None


def first_heads(count: int, width: int, left: int) -> Tensor:
    """Return a mask (heads, channels) of the first heads."""
    return (torch.arange(count) < left).unsqueeze(1).expand(-1, width)


def write_heads(weights: Mapping[str, Tensor], written: Iterable[Written]) -> dict[str, Tensor]:
    """Return the parameters with what stays of each projection, several in one parameter too."""
    owners: dict[str, list[Written]] = {}
    for one in written:
        owners.setdefault(one.projection.parameter, []).append(one)
    found: dict[str, Tensor] = {}
    for name, ones in owners.items():
        axis = ones[0].projection.axis
        rows = _Rows(weights[name].movedim(axis, 0))
        bias = _bias_rows(weights, ones[0].projection)
        for one in ones:
            rows.put(one, None if one.maps is None else one.maps[..., :-1])
            if bias is not None:
                bias.put(one, None if one.maps is None else one.maps[..., -1:])
        found[name] = rows.result().movedim(0, axis).contiguous()
        if bias is not None:
            found[str(ones[0].projection.bias)] = bias.result()
    return found


class _Rows:
    """The rows of a parameter, some of which change and some of which go."""

    def __init__(self, old: Tensor) -> None:
        self._new = old.clone()
        self._stays = torch.ones(len(old), dtype=torch.bool)

    def put(self, written: Written, maps: Tensor | None) -> None:
        """Write what becomes of a projection's rows."""
        rows = torch.tensor(written.projection.rows)
        self._stays[rows[~written.stays]] = False
        if maps is not None:
            made = maps.flatten(0, 1).reshape(-1, *self._new.shape[1:])
            self._new[rows[written.stays]] = made.to(self._new.dtype)

    def result(self) -> Tensor:
        """Return the rows that stay."""
        return self._new[self._stays]


def _bias_rows(weights: Mapping[str, Tensor], projection: Projection) -> _Rows | None:
    if projection.bias is None or not per_row(weights, projection):
        return None
    return _Rows(weights[projection.bias])


def per_row(weights: Mapping[str, Tensor], projection: Projection) -> bool:
    """Tell a bias that belongs to the rows from one that belongs to the outputs of o."""
    if projection.bias is None:
        return False
    shape = described(weights, projection.parameter).shape
    outputs = 1 if projection.layout in ("conv1d", "einsum") else 0
    return projection.axis == outputs and (
        described(weights, projection.bias).shape[0] == shape[outputs]
    )


def removable(thing: Site | Mlp, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the parameters of one key head with its readers, or of a neuron, and how many."""
    if isinstance(thing, Mlp):
        units, projections = thing.neurons, (*thing.inputs, thing.down)
    else:
        units, projections = thing.kv_heads, tuple(thing.projections.values())
    size = 0
    for projection in projections:
        shape = described(weights, projection.parameter).shape
        rows = len(projection.rows) * len(projection.rows[0])
        size += rows * math.prod(shape) // shape[projection.axis]
        if per_row(weights, projection):
            size += rows
    return size // units, units
