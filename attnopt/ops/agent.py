"""Attention through agents: few mean queries of a grid collect from all keys, and spread to all.

With agents A, the mean queries of the cells that a grid is pooled into, every token gets
softmax(t Q A^T + B2) C with C = softmax(s A K^T + B1) V, so that no token meets another. The second
softmax is sharpened: t = s D^((1 - exponent) / 2), which is s^exponent where s = D^-1/2. What is
near is given back by a shortcut of V, or by `filter`, a depth-wise convolution of V on the grid.
With `nystrom` the core undoes what the agents have in common, C = pinv(softmax(t A A^T)) softmax(s
A K^T) V, which is exact where every token is an agent. The first `leading` tokens (class or
register tokens) stand before the grid: they are in no agent and see all keys themselves.

B1 is the sum of the tables `collect` (H, A, r, c), interpolated to the grid, and of
`collect_first` (H, A, leading); B2 that of the tables `spread`. `active` (B) or one boolean says
where agents are used; elsewhere attention is dense. Letters as in `attnopt.ops.attention`.
https://arxiv.org/abs/2312.08874, https://arxiv.org/abs/2102.03902
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.attention import attention_reference

STEPS = 12
_LOW_PRECISION = (torch.float16, torch.bfloat16)


def agent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    agents: Sequence[int],
    leading: int = 0,
    exponent: float = 1.0,
    shortcut: Sequence[float] = (),
    nystrom: bool = False,
    ridge: float = 0.0,
    steps: int = STEPS,
    collect: Sequence[Tensor] | None = None,
    collect_first: Tensor | None = None,
    spread: Sequence[Tensor] | None = None,
    filter: Tensor | None = None,  # noqa: A002  # what it is
    active: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the output (B, H, T, E); `shortcut` is one number for all heads, or one for each."""
    check(q, k, v, grid=grid, agents=agents, leading=leading, nystrom=nystrom, shortcut=shortcut,
          biased=bool(collect or spread or collect_first is not None))  # fmt: skip
    dtype = torch.float32 if q.dtype in _LOW_PRECISION else q.dtype
    first, on_grid = q[:, :, :leading].to(dtype), q[:, :, leading:].to(dtype)
    keys, values = k.to(dtype), v.to(dtype)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    sharp = sharpened(factor, q.shape[-1], exponent)
    mean = pooled(on_grid, grid, agents)
    bias = collecting_bias(collect, collect_first, grid, leading)
    collected = _weights(mean, keys, factor, bias) @ values
    if nystrom:
        collected = undone(_weights(mean, mean, sharp, None), ridge, steps) @ collected
    found = _weights(on_grid, mean, sharp, spreading_bias(spread, grid)) @ collected
    found = found + near(values[:, :, leading:], grid, shortcut, filter)
    found = torch.cat([_weights(first, keys, factor, None) @ values, found], dim=2).to(v.dtype)
    if active is None:
        return found
    dense = attention_reference(q, k, v, scale=factor)[0]
    return torch.where(active.reshape(-1, 1, 1, 1), found, dense)


def check(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], agents: Sequence[int], leading: int,
    nystrom: bool, shortcut: Sequence[float], biased: bool,
) -> None:  # fmt: skip
    """Raise a ValueError for a call that means nothing."""
    count = leading + math.prod(grid)
    if len(grid) != 2 or (q.shape[2], k.shape[2]) != (count, count):
        raise ValueError(
            f"{q.shape[2]} queries and {k.shape[2]} keys are no grid {list(grid)} after "
            f"{leading} tokens; agents pool images of height and width"
        )
    if len(agents) != 2 or any(not 0 < a <= n for a, n in zip(agents, grid, strict=True)):
        raise ValueError(f"agents {list(agents)} of a grid {list(grid)}: from 1 to all, each way")
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads share {k.shape[1]} key heads: agents do not")
    if len(shortcut) not in (0, 1, q.shape[1]):
        raise ValueError(f"{len(shortcut)} shortcuts for {q.shape[1]} heads: one, or one for each")
    if nystrom and biased:
        raise ValueError("the nystrom core undoes what agents share, which has no biases")


def sharpened(scale: float, width: int, exponent: float) -> float:
    """Return the factor of the scores of the second softmax."""
    return float(scale * width ** ((1 - exponent) / 2))


def pooled(q: Tensor, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
    """Return the mean of each of the cells of a grid of queries, (B, H, A, D)."""
    image = q.mT.flatten(0, 1).unflatten(2, list(grid))
    mean: Tensor = F.adaptive_avg_pool2d(image, (agents[0], agents[1])).flatten(2).mT
    return mean.reshape(*q.shape[:2], *mean.shape[1:])


def collecting_bias(
    tables: Sequence[Tensor] | None, first: Tensor | None, grid: Sequence[int], leading: int
) -> Tensor | None:
    """Return B1 (H, A, T); None where nothing says one."""
    found = _interpolated(tables, grid)
    if found is None:
        return None if first is None else F.pad(first, (0, math.prod(grid)))
    if first is None:
        return F.pad(found, (leading, 0))
    return torch.cat([first.to(found.dtype), found], dim=2)


def spreading_bias(tables: Sequence[Tensor] | None, grid: Sequence[int]) -> Tensor | None:
    """Return B2 (H, N, A) of the tokens of the grid; None where nothing says one."""
    found = _interpolated(tables, grid)
    return None if found is None else found.mT


def _interpolated(tables: Sequence[Tensor] | None, grid: Sequence[int]) -> Tensor | None:
    """Return the sum of tables (H, A, r, c), each as large as the grid, as (H, A, N)."""
    found: Tensor | None = None
    for table in tables or ():
        whole = F.interpolate(table, size=list(grid), mode="bilinear", align_corners=False)
        found = whole if found is None else found + whole
    return None if found is None else found.flatten(2)


def undone(core: Tensor, ridge: float, steps: int) -> Tensor:
    """Return the pseudo-inverse of square maps, by iteration: Z <- (13 - P(15 - P(7 - P))) Z / 4.

    P = Z M, from Z = M^T / (largest row sum x largest column sum). The ridge, a share of the mean
    squared size of the columns, is rows of its own, so that no small number is squared; below the
    precision of the numbers the iteration would lose its way.
    """
    size = core.shape[-1]
    eye = torch.eye(size, dtype=core.dtype, device=core.device)
    share = max(ridge, torch.finfo(core.dtype).eps) / size
    weight = (share * core.square().sum((-1, -2), keepdim=True)).sqrt()
    whole = torch.cat([core, weight * eye], dim=-2)
    rows, columns = (whole.abs().sum(d).amax(-1)[..., None, None] for d in (-1, -2))
    found = whole.mT / (rows * columns)
    for _ in range(steps):
        p = found @ whole
        found = (13 * eye - p @ (15 * eye - p @ (7 * eye - p))) @ found / 4
    return found[..., :size]


def near(
    v: Tensor,
    grid: Sequence[int],
    shortcut: Sequence[float],
    filter: Tensor | None,  # noqa: A002
) -> Tensor:
    """Return what tokens of a grid get of the values around them, (B, H, N, E)."""
    found = torch.zeros((), dtype=v.dtype, device=v.device)
    if shortcut:
        # Filled, not listed: branches of a graph to be exported hold no constants of their own.
        found = torch.cat([v.new_full((1, 1, 1), factor) for factor in shortcut]) * v
    if filter is not None:
        image = v.mT.flatten(1, 2).unflatten(2, list(grid))
        sides = [size // 2 for size in filter.shape[-2:]]
        made = F.conv2d(image, filter.to(v.dtype), padding=sides, groups=image.shape[1])
        found = found + made.flatten(2).unflatten(1, v.shape[1::2]).mT
    return found


def _weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = (q @ k.mT) * scale
    return (scores if bias is None else scores + bias.to(scores.dtype)).softmax(-1)


def _forward(*args: Any, **options: Any) -> Tensor:
    return agent_attention_reference(*args, **options)


# Composite: autograd, fake tensors and every device follow from the reference itself.
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "agent_attention(Tensor q, Tensor k, Tensor v, *, int[] grid, int[] agents, int leading=0, "
    "float exponent=1.0, float[] shortcut=[], bool nystrom=False, float ridge=0.0, "
    f"int steps={STEPS}, Tensor[]? collect=None, Tensor? collect_first=None, "
    "Tensor[]? spread=None, Tensor? filter=None, Tensor? active=None, float? scale=None) -> Tensor"
)
_LIBRARY.impl("agent_attention", _forward, "CompositeImplicitAutograd")

agent_attention = torch.ops.attnopt.agent_attention.default
