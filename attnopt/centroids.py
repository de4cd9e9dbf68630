"""Centres of an attention's keys, which linear attention begins with: maps in closed form.

Keys are gathered on calibration rows and grouped by k-means, in the metric in which the queries
tell them apart. A key belongs to a centre by its distance there, and a query weighs a centre as it
would weigh a key that lies there, times what the keys of the centre weigh more than that on
average. So the far keys of a query come out right where those of a centre are alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.ops import attention
from attnopt.ops.features import CENTROIDS, MOST
from attnopt.ops.linear import Mixing
from attnopt.program import Program
from attnopt.running import Run

# How much nearer the own centre of a key is to it than another, before the softmax.
_SHARPNESS = 4.0
_ROUNDS, _ROWS, _TOKENS = 12, 8, 1024
# Centres that no query weighs are left as light, or as heavy, as that.
_FACTORS = 1e-6, 1e6


@dataclass(frozen=True)
class Sample:
    """Queries and keys of an attention (B, H, T, D), wide; `shown` says which keys are real."""

    q: Tensor
    k: Tensor
    shown: Tensor | None
    scale: float


@torch.no_grad()
def sampled(program: Program, node: fx.Node, batches: Sequence[Any], scale: float) -> Sample:
    """Run a program on a few rows up to an attention, and return what it reads."""
    wide = program.cast(torch.float32)
    number = _attentions(program).index(node)
    twin = _attentions(wide)[number]
    batch = {n: x[:_ROWS, :_TOKENS] if x.dim() == 2 else x[:_ROWS] for n, x in batches[0].items()}
    run = Run(wide, batch, [twin])
    run.before(twin)
    args, options = run.map_nodes_to_values((twin.args, dict(twin.kwargs)), twin)
    maps = {n: options.get(n) for n in ("k_map", "v_map")}
    q, k, _ = Mixing(**maps).widened(*args[:3])
    return Sample(q, k, options.get("padding"), scale)


def _attentions(program: Program) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=attention))


@torch.no_grad()
def centroid_maps(sample: Sample, count: int, *, window: int, causal: bool) -> dict[str, Tensor]:
    """Return maps of queries and keys (H, D + 1, count) for so many centres."""
    q, k, scale = sample.q, sample.k, sample.scale
    queries = q.transpose(0, 1).flatten(1, 2)
    metric = queries.mT @ queries / queries.shape[1] * scale**2
    values, vectors = torch.linalg.eigh(metric.double())
    values = values.clamp(min=float(values.max()) * 1e-9)
    root = (vectors * values.sqrt().unsqueeze(-2)).float()
    back = (vectors / values.sqrt().unsqueeze(-2)).float()
    keys = k.transpose(0, 1).flatten(1, 2) @ root
    real = None if sample.shown is None else sample.shown.flatten()
    centres = _centres(keys if real is None else keys[:, real], count)
    distance = centres.square().sum(-1, keepdim=True).mT / 2
    of_keys = torch.cat([root @ centres.mT, -distance], dim=1) * _SHARPNESS
    of_queries = back @ centres.mT * scale
    weight = _weight(sample, of_keys, of_queries, window, causal).log()
    return {"map_q": torch.cat([of_queries, weight.unsqueeze(1)], dim=1), "map_k": of_keys}


def _centres(x: Tensor, count: int) -> Tensor:
    """Group the rows (H, N, D) of each head around so many centres (H, count, D)."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(x.shape[1], generator=generator)
    found = x[:, order.repeat(-(-count // len(order)))[:count]]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(x, found).argmin(dim=-1, keepdim=True)
        mine = torch.zeros(*x.shape[:2], count).scatter_(2, nearest, 1.0)
        held = mine.sum(dim=1).unsqueeze(-1)
        found = torch.where(held > 0, mine.mT @ x / held.clamp(min=1), found)
    return found


def _weight(
    sample: Sample, of_keys: Tensor, of_queries: Tensor, window: int, causal: bool
) -> Tensor:
    """Return what the far keys of each centre weigh, over what keys at the centre would (H, R)."""
    q, k = sample.q, sample.k
    shares = Mixing(map_k=of_keys, feature=CENTROIDS).of_keys(k, sample.shown)
    column = torch.arange(k.shape[2])
    distance = column[k.shape[2] - q.shape[2] :].unsqueeze(1) - column
    far = distance >= window if causal else torch.ones_like(distance, dtype=torch.bool)
    near = (distance >= 0) & (distance < window) if window else far
    want = got = torch.zeros(())
    for row in range(len(q)):
        scores = q[row] @ k[row].mT * sample.scale
        top = scores.masked_fill(~near, -torch.inf).amax(dim=-1, keepdim=True)
        own = torch.exp((scores - top).clamp(max=MOST)) * far
        logits = torch.exp((q[row] @ of_queries - top).clamp(max=MOST))
        want = want + torch.einsum("hij,hjc->hc", own, shares[row])
        got = got + torch.einsum("hic,ij,hjc->hc", logits, far.float(), shares[row])
    return (want / got.clamp(min=1e-20)).clamp(*_FACTORS)
