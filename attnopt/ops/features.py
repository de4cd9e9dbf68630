"""Feature maps of linear attention: what stands for queries and keys where no softmax is taken.

A map (H, D, R) turns the channels of each head, then a function makes them positive. `hedgehog`
takes a softmax over the features of x W and one over those of -x W, and joins both; `elu` is
elu(x W) + 1, `relu` cuts off, `identity` leaves the features as they are.
https://arxiv.org/abs/2402.04347
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor


def _hedgehog(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


FEATURES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "hedgehog": _hedgehog,
    "elu": _elu,
    "relu": F.relu,
    "identity": _identity,
}


def features(x: Tensor, by: Tensor | None, feature: str) -> Tensor:
    """Return the features (B, H, T, F) of queries or keys (B, H, T, D) by a map (H, D, R)."""
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r}: it is {', '.join(FEATURES)}")
    return FEATURES[feature](x if by is None else x @ by.to(x.dtype))


def width(channels: int, feature: str) -> int:
    """Return how many features so many channels after the map become."""
    return 2 * channels if feature == "hedgehog" else channels
