"""Attention through agents by two calls of dense attention: the fast copy of the reference.

The leading tokens see all keys as the agents do, so that one call serves both. Which of the two
ways a scheduled call goes is decided before anything is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ops.agent import (
    STEPS,
    check,
    collecting_bias,
    near,
    sharpened,
    spreading_bias,
    undone,
)
from attnopt.ops.sdpa import Memo, attend

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """The options of a call beside queries, keys, values and who is active."""

    grid: Sequence[int]
    agents: Sequence[int]
    leading: int = 0
    exponent: float = 1.0
    shortcut: Sequence[float] = ()
    nystrom: bool = False
    ridge: float = 0.0
    steps: int = STEPS
    collect: Sequence[Tensor] | None = None
    collect_first: Tensor | None = None
    spread: Sequence[Tensor] | None = None
    filter: Tensor | None = None
    scale: float | None = None

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise a ValueError for a call that means nothing."""
        biased = bool(self.collect or self.spread or self.collect_first is not None)
        check(q, k, v, grid=self.grid, agents=self.agents, leading=self.leading,
              nystrom=self.nystrom, shortcut=self.shortcut, biased=biased)  # fmt: skip


def attend_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    active: Tensor | None = None,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what the reference returns."""
    return by_schedule(q, k, v, Call(**options), active, attend, attend)


def by_schedule(
    q: Tensor, k: Tensor, v: Tensor, call: Call, active: Tensor | None, few: Attend, many: Attend
) -> Tensor:
    """Attend through agents where they are active, and densely elsewhere.

    `few` attends with few queries to all keys, `many` with all queries to few or all keys.
    """
    call.check(q, k, v)
    if active is None:
        return by_agents(q, k, v, call, few, many)
    if torch.compiler.is_compiling():
        return _by_branches(q, k, v, call, active, few, many)
    rows = active.reshape(-1).expand(q.shape[0])
    if bool(rows.all()):
        return by_agents(q, k, v, call, few, many)
    if not bool(rows.any()):
        return many(q, k, v, scale=call.scale)
    found = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=v.dtype,
                        device=v.device).transpose(1, 2)  # fmt: skip
    with_agents, without = rows.nonzero().flatten(), (~rows).nonzero().flatten()
    parts = [x.index_select(0, with_agents) for x in (q, k, v)]
    found = found.index_copy(0, with_agents, by_agents(*parts, call, few, many))
    parts = [x.index_select(0, without) for x in (q, k, v)]
    return found.index_copy(0, without, many(*parts, scale=call.scale))


def _by_branches(
    q: Tensor, k: Tensor, v: Tensor, call: Call, active: Tensor, few: Attend, many: Attend
) -> Tensor:
    """Choose by a branch of the graph; rows that are not alike are computed both ways."""
    tables = [*(call.collect or ()), *(call.spread or ())]
    more = [x for x in (call.collect_first, call.filter) if x is not None]

    def through(*_: Tensor) -> Tensor:
        return by_agents(q, k, v, call, few, many).contiguous()

    def mixed(*_: Tensor) -> Tensor:
        dense = many(q, k, v, scale=call.scale)
        found = by_agents(q, k, v, call, few, many)
        return torch.where(active.reshape(-1, 1, 1, 1), found, dense).contiguous()

    operands = (q, k, v, active, *tables, *more)
    found: Tensor = torch.cond(active.all(), through, mixed, operands)
    return found


def by_agents(q: Tensor, k: Tensor, v: Tensor, call: Call, few: Attend, many: Attend) -> Tensor:
    """Attend through agents: they and the leading tokens collect, then the grid reads them."""
    leading, dtype = call.leading, q.dtype
    scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
    sharp = sharpened(scale, q.shape[-1], call.exponent)
    on_grid = q[:, :, leading:]
    agents = pooled(on_grid, call.grid, call.agents)
    bias = collecting_bias(call.collect, call.collect_first, call.grid, leading)
    if bias is not None:
        bias = F.pad(bias, (0, 0, leading, 0)).to(dtype)
    collectors = agents if not leading else torch.cat([q[:, :, :leading], agents], dim=2)
    collected = few(collectors, k, v, bias=bias, scale=scale)
    first, collected = collected[:, :, :leading], collected[:, :, leading:]
    if call.nystrom:
        collected = _undone(agents, collected, sharp, call)
    bias = spreading_bias(call.spread, call.grid)
    bias = None if bias is None else bias.to(dtype)
    found = many(on_grid, agents, collected, bias=bias, scale=sharp)
    if call.shortcut or call.filter is not None:
        found = found + near(v[:, :, leading:], call.grid, call.shortcut, call.filter)
    if not leading:
        return found
    # Side by side in memory as projections leave them, which is how they are read on.
    return torch.cat([first.transpose(1, 2), found.transpose(1, 2)], dim=1).transpose(1, 2)


def _undone(agents: Tensor, collected: Tensor, sharp: float, call: Call) -> Tensor:
    """Undo what the agents have in common, in float32 at least."""
    wide = torch.promote_types(agents.dtype, torch.float32)
    a = agents.to(wide)
    core = ((a @ a.mT) * sharp).softmax(-1)
    return (undone(core, call.ridge, call.steps) @ collected.to(wide)).to(collected.dtype)


def pooled(q: Tensor, grid: Sequence[int], agents: Sequence[int]) -> Tensor:
    """Return the mean queries of the cells by two products: down the columns, along the rows."""
    batch, heads, _, width = q.shape
    down, along = (_means(n, a, q) for n, a in zip(grid, agents, strict=True))
    rows = q.transpose(1, 2).reshape(batch, grid[0], grid[1] * heads * width)
    cells = along @ (down @ rows).reshape(batch, agents[0], grid[1], heads * width)
    return cells.reshape(batch, -1, heads, width).transpose(1, 2)


def _means(length: int, cells: int, like: Tensor) -> Tensor:
    """Return the matrix (cells, length) of means over the cells of an axis."""
    constant: Callable[..., list[list[float]]] = torch.compiler.assume_constant_result(_shares)
    return torch.tensor(constant(length, cells), dtype=like.dtype, device=like.device)


@lru_cache(maxsize=64)
def _shares(length: int, cells: int) -> list[list[float]]:
    """List which share each place of an axis has in the mean of each cell; cells may overlap."""
    spans = [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]
    return [[(a <= n < b) / (b - a) for n in range(length)] for a, b in spans]
