"""Attention in plain torch, by blocks of queries: scores may be capped, and sinks join the sum.

So many queries are attended with at a time that their scores stay in the cache; where gradients are
wanted a block is computed again for its own, so that no more than one block's scores are ever held.
Axis letters as in `attnopt.ops.attention`; U key heads with G query heads each, n queries of a
block.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LOW_PRECISION = (torch.float16, torch.bfloat16)
# Scores of a block, and its fewest queries, which a product of matrices wants.
_SCORES: Final = 2**19
_LEAST: Final = 16


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    """Attend to all keys that an additive mask leaves; `causal` asks for as many queries as keys.

    Keys and values have equally many heads. A query that sees nothing gives zeros.
    """
    dtype = torch.float32 if q.dtype in _LOW_PRECISION else q.dtype
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    wide = q.to(dtype) * (factor if softcap is None else factor / softcap)
    given = (wide, k.to(dtype), v.to(dtype), mask, sinks)
    whole = torch.compiler.is_compiling()
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    size = q.shape[2] if whole else _rows(q, k)
    found: list[Tensor] = []
    for start in range(0, q.shape[2], size):
        part = _part(*given, start, size, causal)
        if learns and not whole:
            block: Any = checkpoint(
                _block, *part, softcap, False, use_reentrant=False, preserve_rng_state=False
            )
        else:
            block = _block(*part, softcap, not learns and not whole)
        found.append(block)
    return (found[0] if len(found) == 1 else torch.cat(found, dim=2)).to(v.dtype)


def _rows(q: Tensor, k: Tensor) -> int:
    """Return how many queries a block has."""
    return max(_LEAST, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def _part(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, start: int,
    size: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return what a block of queries attends with."""
    stop = min(start + size, q.shape[2])
    if causal:
        k, v = k[:, :, :stop], v[:, :, :stop]
        own = q.new_full((stop - start, stop - start), -torch.inf).triu(1)
        mask = F.pad(own, (start, 0))
    elif mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., start:stop, :]
    return q[:, :, start:stop], k, v, mask, sinks


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    quiet: bool,
) -> Tensor:
    """Attend with scaled queries (B, H, n, D); `quiet` computes in place."""
    heads = (k.shape[1], q.shape[1] // k.shape[1])
    rows = q.unflatten(1, heads)
    scores = rows.flatten(2, 3) @ k.transpose(-1, -2)
    place = scores if quiet else None
    if softcap is not None:
        scores = torch.mul(torch.tanh(scores, out=place), softcap, out=place)
    scores = scores.view(*rows.shape[:-1], k.shape[2])
    place = scores if quiet else None
    if mask is not None:
        scores = torch.add(scores, _by_group(mask, heads).to(scores.dtype), out=place)
    top = scores.detach().amax(dim=-1, keepdim=True)
    sink: Tensor | None = None
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, *heads, 1, 1)
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(torch.sub(scores, top, out=place), out=place)
    total = weights.sum(dim=-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0) if sink is None else total + torch.exp(sink - top)
    found = (weights.flatten(2, 3) @ v).view(*rows.shape[:-1], v.shape[3]) / total
    return found.flatten(1, 2)


def _by_group(mask: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return a mask that broadcasts to (B, H, n, S) as one for (B, U, G, n, S)."""
    if mask.dim() < 3:
        return mask
    return mask.unsqueeze(-3) if mask.shape[-3] == 1 else mask.unflatten(-3, heads)
