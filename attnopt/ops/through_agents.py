"""Attention through agents by two calls of dense attention: the fast copy of the reference.

The leading tokens see all keys as the agents do, so that one call serves both. Which of the two
ways a scheduled call goes is decided before anything is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
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

_TENSORS = ("collect", "collect_first", "spread", "filter")


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

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        given = [self.collect_first, self.filter]
        return [*(self.collect or ()), *(self.spread or ()), *(x for x in given if x is not None)]

    def with_tensors(self, given: Sequence[Tensor]) -> "Call":
        """Return the same call with other tensors, in the order of `tensors`."""
        left = list(given)
        changes: dict[str, Any] = {}
        for name in ("collect", "spread"):
            if getattr(self, name):
                changes[name] = [left.pop(0) for _ in getattr(self, name)]
        for name in ("collect_first", "filter"):
            if getattr(self, name) is not None:
                changes[name] = left.pop(0)
        return replace(self, **changes)

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
    if torch.compiler.is_exporting():
        return _by_branches(q, k, v, call, active)
    if torch.compiler.is_compiling():
        # A compiler does not know which rows are active; with gradients it sees both ways.
        return (
            _both_ways(q, k, v, call, active)
            if torch.is_grad_enabled()
            else _chosen(q, k, v, call, active)
        )
    rows = active.reshape(-1).expand(q.shape[0])
    if bool(rows.all()):
        return by_agents(q, k, v, call, few, many)
    if not bool(rows.any()):
        return many(q, k, v, scale=call.scale)
    through, dense = rows.nonzero().flatten(), (~rows).nonzero().flatten()
    parts = [
        by_agents(q[through], k[through], v[through], call, few, many),
        many(q[dense], k[dense], v[dense], scale=call.scale),
    ]
    return torch.cat(parts)[torch.argsort(torch.cat([through, dense]))]


def _both_ways(q: Tensor, k: Tensor, v: Tensor, call: Call, active: Tensor) -> Tensor:
    """Compute all rows either way, and choose."""
    through = by_agents(q, k, v, call, attend, attend)
    dense = attend(q, k, v, scale=call.scale)
    return torch.where(active.reshape(-1, 1, 1, 1), through, dense)


def _by_branches(q: Tensor, k: Tensor, v: Tensor, call: Call, active: Tensor) -> Tensor:
    """Choose by a branch of the graph; rows that are not alike are computed both ways."""

    def through(q: Tensor, k: Tensor, v: Tensor, active: Tensor, *more: Tensor) -> Tensor:
        return by_agents(q, k, v, call.with_tensors(more), attend, attend).contiguous()

    def mixed(q: Tensor, k: Tensor, v: Tensor, active: Tensor, *more: Tensor) -> Tensor:
        return _both_ways(q, k, v, call.with_tensors(more), active).contiguous()

    # Branches take no views of one tensor, and give none.
    operands = (*(x.clone() for x in (q, k, v)), active, *call.tensors)
    found: Tensor = torch.cond(active.all(), through, mixed, operands)
    return found


def _chosen(q: Tensor, k: Tensor, v: Tensor, call: Call, active: Tensor) -> Tensor:
    """Call an op that chooses when it runs."""
    options = {f.name: getattr(call, f.name) for f in fields(call) if f.name not in _TENSORS}
    given = [getattr(call, name) for name in _TENSORS]
    found: Tensor = torch.ops.attnopt.scheduled_agents(q, k, v, active, *given, **options)
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
    # Rows side by side: read across, they cost kernels registers.
    bias = None if bias is None else bias.to(dtype).contiguous()
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
    """Return the matrix (cells, length) of means over the cells of an axis, which may overlap."""
    place = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    inside = (place >= cell * length // cells) & (
        place < ((cell + 1) * length + cells - 1) // cells
    )
    counted = inside.to(like.dtype)
    return counted / counted.sum(1, keepdim=True)


def _scheduled(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, *tensors: Any, **options: Any
) -> Tensor:
    """Attend by schedule; the result always lies in memory as (B, T, H, E)."""
    call = Call(**dict(zip(_TENSORS, tensors, strict=True)), **options)
    found = by_schedule(q, k, v, call, active, attend, attend)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


def _shaped(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    batch, heads, queries, _ = q.shape
    return v.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


_NAME = "attnopt::scheduled_agents"
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "scheduled_agents(Tensor q, Tensor k, Tensor v, Tensor active, Tensor[]? collect, "
    "Tensor? collect_first, Tensor[]? spread, Tensor? filter, *, int[] grid, int[] agents, "
    "int leading=0, float exponent=1.0, float[] shortcut=[], bool nystrom=False, "
    f"float ridge=0.0, int steps={STEPS}, float? scale=None) -> Tensor"
)
_LIBRARY.impl("scheduled_agents", _scheduled, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _shaped, lib=_LIBRARY)
