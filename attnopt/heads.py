"""Projections by head: parameters in whatever layout become one linear map a head, and back."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.nouns import Projection


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
    if projection.bias is None or not _per_row(weights, projection):
        return Heads(torch.cat([maps, maps.new_zeros(*maps.shape[:2], 1)], dim=-1))
    bias = weights[projection.bias].double()[rows]
    return Heads(torch.cat([maps, bias.unsqueeze(-1)], dim=-1), biased=True)


def write_heads(
    weights: Mapping[str, Tensor], projection: Projection, heads: Heads
) -> dict[str, Tensor]:
    """Return the parameters that hold other maps: as many heads, or fewer in the same order."""
    old = weights[projection.parameter]
    order = _packed(projection.rows, heads.count)
    moved = old.movedim(projection.axis, 0)
    made = heads.maps[..., :-1].flatten(0, 1)
    new = moved.new_empty((len(order), *moved.shape[1:]))
    new[order] = made.reshape(len(order), *moved.shape[1:]).to(old.dtype)
    found = {projection.parameter: new.movedim(0, projection.axis).contiguous()}
    if heads.biased and projection.bias is not None:
        bias = weights[projection.bias]
        made = heads.maps[..., -1].flatten()
        found[projection.bias] = bias.new_empty(len(order)).index_copy(
            0, order, made.to(bias.dtype)
        )
    return found


def _per_row(weights: Mapping[str, Tensor], projection: Projection) -> bool:
    """Tell a bias that belongs to the rows from one that belongs to the outputs of o."""
    shape = weights[projection.parameter].shape
    outputs = 1 if projection.layout in ("conv1d", "einsum") else 0
    return projection.axis == outputs and len(weights[str(projection.bias)]) == shape[outputs]


def _packed(rows: tuple[tuple[int, ...], ...], count: int) -> Tensor:
    """Place the rows of the first `count` heads as the old ones lay, without gaps."""
    kept = torch.tensor(rows[:count]).flatten()
    return kept.argsort().argsort()
