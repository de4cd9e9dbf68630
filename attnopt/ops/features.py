"""Feature maps of linear attention: what stands for queries and keys where no softmax is taken.

A map (H, D, R) turns the channels of each head; one more row (H, D + 1, R) is added as a bias. A
function then makes the features positive. `centroids` shares each key out among R centres by a
softmax, and a query weighs the centres as a softmax would weigh keys: exp(x W + b). `hedgehog`
takes a softmax over the features of x W and one over those of -x W, and joins both; `elu` is
elu(x W) + 1, `relu` cuts off, `identity` leaves the features as they are.
https://arxiv.org/abs/2402.04347
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

CENTROIDS: Final = "centroids"
# A centre counts at most e to this times as much as the best near key.
MOST: Final = 30.0


def _hedgehog(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _identity(x: Tensor) -> Tensor:
    return x


def _shares(x: Tensor) -> Tensor:
    return x.softmax(dim=-1)


_OF_KEYS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    CENTROIDS: _shares,
    "hedgehog": _hedgehog,
    "elu": _elu,
    "relu": F.relu,
    "identity": _identity,
}
FEATURES: Final = tuple(_OF_KEYS)


def of_keys(x: Tensor, by: Tensor | None, feature: str) -> Tensor:
    """Return the features (B, H, S, F) of keys (B, H, S, D)."""
    if feature not in _OF_KEYS:
        raise ValueError(f"feature {feature!r}: it is {', '.join(FEATURES)}")
    return _OF_KEYS[feature](mapped(x, by))


def of_queries(x: Tensor, by: Tensor | None, feature: str, top: Tensor | None) -> Tensor:
    """Return the features (B, H, T, F) of queries (B, H, T, D).

    `top` (B, H, T, 1) is the largest near score, which near keys are weighed against; without it a
    query's centres are weighed against the best of them.
    """
    if feature != CENTROIDS:
        return of_keys(x, by, feature)
    logits = mapped(x, by)
    top = logits.detach().amax(dim=-1, keepdim=True) if top is None else top
    return torch.exp((logits - top).clamp(max=MOST))


def mapped(x: Tensor, by: Tensor | None) -> Tensor:
    """Return x W, with the bias where there is one."""
    if by is None:
        return x
    by = by.to(x.dtype)
    if by.shape[-2] == x.shape[-1]:
        return x @ by
    return x @ by[..., :-1, :] + by[..., -1:, :]


def width(channels: int, feature: str) -> int:
    """Return how many features so many channels after the map become."""
    return 2 * channels if feature == "hedgehog" else channels
