"""Ways to normalise scores over their last axis."""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor


def functional(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


def of_torch(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def positive_dim(x: Tensor) -> Tensor:
    return torch.softmax(x, dim=x.dim() - 1)


def method(x: Tensor) -> Tensor:
    return x.softmax(dim=-1)


def in_float32(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def upcast(x: Tensor) -> Tensor:
    return F.softmax(x.float(), dim=-1).type_as(x)


def manual(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(dim=-1, keepdim=True)


def manual_max(x: Tensor) -> Tensor:
    e = (x - x.max(dim=-1, keepdim=True).values).exp()
    return e / torch.sum(e, -1, keepdim=True)


def logsumexp(x: Tensor) -> Tensor:
    return torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True))


def log_softmax(x: Tensor) -> Tensor:
    return F.log_softmax(x, dim=-1).exp()


def safe(x: Tensor) -> Tensor:
    """Rows that see nothing give zeros."""
    blind = (x <= torch.finfo(x.dtype).min).all(dim=-1, keepdim=True)
    return torch.where(blind, torch.zeros_like(x), torch.softmax(x, dim=-1))


SOFTMAXES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "functional": functional,
    "torch": of_torch,
    "positive_dim": positive_dim,
    "method": method,
    "dtype32": in_float32,
    "upcast": upcast,
    "manual": manual,
    "manual_max": manual_max,
    "logsumexp": logsumexp,
    "log_softmax": log_softmax,
    "safe": safe,
}


def with_sinks(x: Tensor, sink: Tensor, form: str) -> Tensor:
    """Normalise with one more score, whose weight is dropped; `sink` has 1 on the last axis."""
    if form == "denominator":
        top = torch.maximum(x.amax(-1, keepdim=True), sink)
        e = torch.exp(x - top)
        return e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))
    joined = torch.cat([x, sink.expand(*x.shape[:-1], 1)], dim=-1)
    if form == "concat_max":
        joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1]
