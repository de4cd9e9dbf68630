"""Axis orders that the scores can have, and the contractions to and from them.

Queries, keys and values come as [batch, length, heads, channels] (seq_first: length first) and the
output goes back so. Terms added to the scores come as [batch, heads, queries, keys].
"""

from collections.abc import Callable
from typing import Final, Protocol

import torch
from torch import Tensor

from fuzz_grammar.spec import STATIC_LENGTH, Spec

BLOCKS: Final = {2: 2, 3: 3, 4: 4, 5: 6}


class Layout(Protocol):
    """One axis order."""

    def queries(self, x: Tensor) -> Tensor: ...
    def keys(self, x: Tensor) -> Tensor: ...
    def scores(self, q: Tensor, k: Tensor) -> Tensor: ...
    def fit(self, term: Tensor) -> Tensor:
        """Bring a term into the axes of the scores."""
        ...

    def values(self, weights: Tensor, v: Tensor) -> Tensor: ...
    def rows(self, x: Tensor) -> Tensor:
        """Bring a number per row of the scores into the axes of `values`."""
        ...

    def merge(self, out: Tensor) -> Tensor: ...


def contract_keys(q: Tensor, k: Tensor, how: str) -> Tensor:
    if how == "einsum":
        return torch.einsum("...td,...sd->...ts", q, k)
    if how == "sum":
        return (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    if how == "transposed":
        return torch.matmul(k, q.transpose(-1, -2)).transpose(-1, -2)
    return torch.matmul(q, k.transpose(-1, -2))


def contract_values(weights: Tensor, v: Tensor, how: str) -> Tensor:
    if how == "einsum":
        return torch.einsum("...ts,...sd->...td", weights, v)
    if how == "sum":
        return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)
    if how == "transposed":
        return torch.matmul(v.mT, weights.mT).mT
    return torch.matmul(weights, v)


class HeadsFirst:
    """Scores [B, H, T, S] from [B, H, T, D]."""

    def __init__(self, spec: Spec):
        self.how = spec.contraction

    def queries(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return contract_keys(q, k, self.how)

    def fit(self, term: Tensor) -> Tensor:
        return term

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        return contract_values(weights, v, self.how)

    def rows(self, x: Tensor) -> Tensor:
        return x

    def merge(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2)


class LengthFirst(HeadsFirst):
    """Scores [B, H, T, S] from [B, T, H, D] by einsum."""

    def queries(self, x: Tensor) -> Tensor:
        return x

    def keys(self, x: Tensor) -> Tensor:
        return x

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bthd,bshd->bhts", q, k)

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhts,bshd->bthd", weights, v)

    def merge(self, out: Tensor) -> Tensor:
        return out


class Flat:
    """Batched matrices [B * H, T, D] and `bmm`, with the scores viewed as [B, H, T, S]."""

    def __init__(self, spec: Spec):
        self.heads = spec.heads
        self.length_first = spec.layout == "seq_first"
        self.alpha = spec.scale_number if spec.scale_place == "baddbmm" else None

    def queries(self, x: Tensor) -> Tensor:
        if self.length_first:
            return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(0, 1)
        return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[-1])

    keys = queries

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        flat = self._product(q, k.transpose(1, 2))
        return flat.view(-1, self.heads, q.shape[1], k.shape[1])

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        if self.alpha is None:
            return torch.bmm(q, k)
        start = torch.empty(q.shape[0], q.shape[1], k.shape[2], dtype=q.dtype)
        return torch.baddbmm(start, q, k, beta=0, alpha=self.alpha)

    def fit(self, term: Tensor) -> Tensor:
        return term

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(weights.reshape(-1, weights.shape[2], weights.shape[3]), v)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[2], 1)

    def merge(self, out: Tensor) -> Tensor:
        if self.length_first:
            return out.transpose(0, 1).reshape(out.shape[1], -1, self.heads, out.shape[-1])
        return out.view(-1, self.heads, out.shape[1], out.shape[2]).transpose(1, 2)


class Grouped:
    """Scores [B, key heads, group, T, S]: the keys of a group are broadcast."""

    def __init__(self, spec: Spec):
        self.sizes = (spec.kv_heads, spec.groups)
        self.how = spec.contraction

    def queries(self, x: Tensor) -> Tensor:
        return x.unflatten(2, self.sizes).permute(0, 2, 3, 1, 4)

    def keys(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unsqueeze(2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("bkgtd,bksd->bkgts", q, k.squeeze(2))
        return contract_keys(q, k, self.how)

    def fit(self, term: Tensor) -> Tensor:
        if term.shape[1] == 1:
            return term.unsqueeze(1)
        return term.unflatten(1, self.sizes)

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("bkgts,bksd->bkgtd", weights, v.squeeze(2))
        return contract_values(weights, v, self.how)

    def rows(self, x: Tensor) -> Tensor:
        return x

    def merge(self, out: Tensor) -> Tensor:
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


class Folded:
    """All heads' queries against one head of keys: [B, T * H, D], scores [B, T, H, S]."""

    def __init__(self, spec: Spec):
        self.heads = spec.heads

    def queries(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        return x.squeeze(2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        flat = torch.bmm(q, k.transpose(1, 2))
        return flat.view(flat.shape[0], -1, self.heads, flat.shape[-1])

    def fit(self, term: Tensor) -> Tensor:
        return term.transpose(1, 2)

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(weights.reshape(weights.shape[0], -1, weights.shape[-1]), v)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def merge(self, out: Tensor) -> Tensor:
        return out.view(out.shape[0], -1, self.heads, out.shape[-1])


class SingleHead(HeadsFirst):
    """Scores [B, T, S]: no axis for the one head."""

    def queries(self, x: Tensor) -> Tensor:
        return x.squeeze(2)

    def keys(self, x: Tensor) -> Tensor:
        return x.squeeze(2)

    def fit(self, term: Tensor) -> Tensor:
        return term.squeeze(1)

    def merge(self, out: Tensor) -> Tensor:
        return out.unsqueeze(2)


class Blocked:
    """Each block of queries sees its own block of keys and the one before: [B, N, H, Q, K]."""

    def __init__(self, spec: Spec):
        self.block = BLOCKS[spec.size]

    def queries(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.block))

    def keys(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(1, (-1, self.block))
        before = torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], dim=1)
        return torch.cat([before, blocks], dim=2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bnqhd,bnkhd->bnhqk", q, k)
        first = torch.arange(STATIC_LENGTH // self.block) == 0
        before = torch.arange(2 * self.block) < self.block
        hidden = (first[:, None] & before[None, :])[None, :, None, None, :]
        return scores.masked_fill(hidden, -1e4)

    def fit(self, term: Tensor) -> Tensor:
        return term

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bnhqk,bnkhd->bnqhd", weights, v)

    def rows(self, x: Tensor) -> Tensor:
        return x

    def merge(self, out: Tensor) -> Tensor:
        return out.flatten(1, 2)


LAYOUTS: Final[dict[str, Callable[[Spec], Layout]]] = {
    "bhtd": HeadsFirst,
    "bthd": LengthFirst,
    "bmm": Flat,
    "seq_first": Flat,
    "grouped": Grouped,
    "mqa_folded": Folded,
    "no_head_axis": SingleHead,
    "blocked": Blocked,
}
