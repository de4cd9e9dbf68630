"""Attention by the kernels, with gradients: the fast copies of the ops, and what plans add to them.

A call that the kernels do not take goes to the fast copy that every machine has.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

from attnopt.backends.triton_gpu import routing
from attnopt.backends.triton_gpu.backward import backward_launches, delta_launch
from attnopt.backends.triton_gpu.decoding import decode_launches
from attnopt.backends.triton_gpu.forward import forward_launch
from attnopt.backends.triton_gpu.masking import Hidden, Rules
from attnopt.backends.triton_gpu.routed import routed_launch
from attnopt.ops.agent import agent_attention
from attnopt.ops.attention import attention
from attnopt.ops.blocks import TILE, block_attention, reads_plan
from attnopt.ops.blockwise import attend_blocks as attend_blocks_anywhere
from attnopt.ops.linear import linear_attention
from attnopt.ops.options import Options
from attnopt.ops.packed import attend_routed as attend_routed_anywhere
from attnopt.ops.plans import BlockPlan, plan_of_mask, plan_of_structure
from attnopt.ops.routed import gated, routed_attention
from attnopt.ops.sdpa import Memo
from attnopt.ops.sdpa import attend as attend_anywhere
from attnopt.ops.structure import visible_keys
from attnopt.ops.through_agents import Call, by_schedule
from attnopt.ops.variants import Fast, fast_copy

_REMEMBERED = 16


def kernel_of(node: fx.Node) -> Fast | None:
    """Return what a node of a graph is run by: a kernel, or the fast copy of any machine."""
    from attnopt.backends.triton_gpu.mixing import attend_linear

    own: dict[Any, Fast] = {
        attention: attend,
        block_attention: attend_blocks,
        routed_attention: attend_routed,
        agent_attention: attend_agents,
        linear_attention: attend_linear,
    }
    return own.get(node.target) or fast_copy(node)


class Windows(NamedTuple):
    """Windows over coordinates: a query sees keys from `start` up to `stop` on every axis.

    `start` and `stop` are (T, axes), `place` of the keys is (S, axes), all int32; a key of negative
    place is seen by every query.
    """

    start: Tensor
    stop: Tensor
    place: Tensor

    @property
    def mask(self) -> Tensor:
        """Return the same as booleans (T, S)."""
        near = (self.start.unsqueeze(1) <= self.place) & (self.place < self.stop.unsqueeze(1))
        return near.all(-1) | (self.place < 0).any(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, memo: Memo | None = None, **options: Any) -> Tensor:
    """Return what `attention_reference` returns first."""
    given = Options.read(options)
    if not (routing.fits(q, k, v, given) and routing.favours(q, k, given)):
        return attend_anywhere(q, k, v, memo, **options)
    keys, values = given.heads_of(k, v)
    if routing.splits_keys(q, keys, values):
        out, lse = attend_few(q, k, v, **options)
    else:
        out, lse = attend_by_plan(q, k, v, _plan(q, k, given, memo), **options)
    # Without padding and a mask each query sees its own key at least.
    sees = given.padding is None and given.mask is None and q.shape[2] <= k.shape[2]
    return out if sees else _blind(out, lse, values, given)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    index: Tensor,
    full_count: Tensor | None = None,
    full_index: Tensor | None = None,
    *,
    q_tile: int = TILE,
    k_tile: int = TILE,
    least_tokens: int = 0,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what `block_attention_reference` returns first."""
    if not reads_plan(q.shape[2], k.shape[2], q_tile, least_tokens):
        return attend(q, k, v, memo=memo, **options)
    given = Options.read(options)
    plan = BlockPlan(count, index, full_count, full_index, q_tile, k_tile)
    if not (routing.fits(q, k, v, given) and routing.fits_plan(plan, q.shape[1])):
        return attend_blocks_anywhere(
            q, k, v, *plan.tensors, q_tile=q_tile, k_tile=k_tile, memo=memo, **options
        )
    found = attend_by_plan(q, k, v, plan, **options)
    return _blind(*found, given.heads_of(k, v)[1], given)


def attend_routed(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *, memo: Memo | None = None, **options: Any
) -> Tensor:
    """Return what `routed_attention_reference` returns; gradients go another way."""
    given = Options.read(options)
    keys, values = given.heads_of(k, v)
    trained = routing.wants_gradients(q, k, v, gates)
    if trained or keys.shape[1] != values.shape[1] or not routing.fits(q, k, v, given):
        return attend_routed_anywhere(q, k, v, gates, memo=memo, **options)
    gates = gates.expand(q.shape[:3])
    if routing.splits_keys(q, keys, values):
        live = (gates != 0).unflatten(1, (keys.shape[1], -1)).flatten(2).any(-1)
        out, lse = attend_few(q, k, v, live=live.to(torch.uint8), **options)
        return gated(_blind(out, lse, values, given), gates)
    hidden = Hidden.of(given, (*q.shape[:3], keys.shape[2]))
    launch, out, lse = routed_launch(
        q, keys, values, gates, hidden, Rules.of(**given.structure), sinks=given.sinks,
        scale=_scale(q, given), softcap=given.softcap,
    )  # fmt: skip
    launch.run()
    if not given.mean_if_blind or given.sinks is not None:
        return out
    return torch.where(
        lse.isneginf().unsqueeze(-1), gated(_blind(out, lse, values, given), gates), out
    )


def attend_agents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    active: Tensor | None = None,
    memo: Memo | None = None,
    **options: Any,
) -> Tensor:
    """Return what `agent_attention_reference` returns.

    Agents are few queries over many keys, which are split among processors, and then few keys.
    """
    return by_schedule(q, k, v, Call(**options), active, _collect, attend)


def _collect(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attend with the queries of agents."""
    if routing.fits(q, k, v, Options.read(options)) and routing.splits_keys(q, k, v):
        return attend_few(q, k, v, **options)[0]
    return attend(q, k, v, **options)


def attend_by_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    windows: Windows | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of attention by a plan.

    What `windows` hide is hidden in partial tiles, as the rules are. A blind query gives zeros.
    """
    given = Options.read(options)
    k, v = given.heads_of(k, v)
    if k.shape[1] != v.shape[1] and routing.wants_gradients(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    hidden = Hidden.of(given, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    if windows is not None:
        start, stop, place = (x.contiguous() for x in windows)
        hidden = hidden._replace(start=start, stop=stop, place=place)
    call = _Call(plan, hidden, Rules.of(**given.structure), _scale(q, given), given.softcap)
    found: tuple[Tensor, Tensor] = _ByPlan.apply(q, k, v, given.sinks, call)
    return found


@torch.no_grad()
def attend_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Tensor | None = None,
    place: int | None = None,
    splits: int | None = None,
    live: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of few queries over many keys, without gradients.

    The first query stands at `place`: by default, the queries are the last of the keys. Keys stand
    where `positions` (S,), int32, says; -1 says that a place holds no key. Keys of heads that are
    not `live`, (B, key heads) bytes, are not read; key heads are then as many as value heads.
    """
    given = Options.read(options)
    k, v = given.heads_of(k, v)
    hidden = Hidden.of(given, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    launches, out, lse = decode_launches(
        q, k, v, hidden, Rules.of(**given.structure), sinks=given.sinks, scale=_scale(q, given),
        softcap=given.softcap, positions=positions, place=place, splits=splits, live=live,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return out, lse


@dataclass(frozen=True)
class _Call:
    """What a call by a plan says besides its tensors that have gradients."""

    plan: BlockPlan
    hidden: Hidden
    rules: Rules
    scale: float
    softcap: float | None


class _ByPlan(torch.autograd.Function):
    """Attention by a plan, with gradients of queries, keys, values and sinks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor]:
        launch, out, lse = forward_launch(
            q, k, v, call.plan, call.hidden, call.rules, sinks=sinks, scale=call.scale,
            softcap=call.softcap,
        )  # fmt: skip
        launch.run()
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        launch, of_row = delta_launch(out, grad)
        launch.run()
        total = lse if sinks is None else torch.logaddexp(lse, sinks.float().view(1, -1, 1))
        of_sinks = None
        if sinks is not None:
            of_sinks = -((sinks.float().view(1, -1, 1) - total).exp() * of_row).sum((0, 2))
            of_sinks = of_sinks.to(sinks.dtype)
        blind = lse.isneginf()
        if grads[1] is not None:
            of_row = of_row - (grads[1] * (total - lse).exp()).masked_fill(blind, 0.0)
        call = ctx.call
        launches, found = backward_launches(
            q, k, v, grad, total.masked_fill(blind, torch.inf), of_row, call.plan, call.hidden,
            call.rules, scale=call.scale, softcap=call.softcap,
        )  # fmt: skip
        for launch in launches:
            launch.run()
        return *found, of_sinks, None


def _scale(q: Tensor, given: Options) -> float:
    return q.shape[-1] ** -0.5 if given.scale is None else given.scale


def _blind(out: Tensor, lse: Tensor, v: Tensor, given: Options) -> Tensor:
    """Put the mean of the values where a query saw nothing and the call wants it."""
    if not given.mean_if_blind or given.sinks is not None:
        return out
    mean = v.mean(dim=2, keepdim=True).repeat_interleave(out.shape[1] // v.shape[1], dim=1)
    return torch.where(lse.isneginf().unsqueeze(-1), mean, out)


def _plan(q: Tensor, k: Tensor, given: Options, memo: Memo | None) -> BlockPlan:
    """Return the plan of a call, made once for all layers that say the same."""
    sizes = (q.shape[2], k.shape[2])
    structure = tuple(sorted(given.structure.items()))
    key: Hashable = ("plan", *sizes, q.device, structure, id(given.mask))
    if memo is None:
        return _made(*sizes, q, given)
    if key not in memo:
        while len(memo) >= _REMEMBERED:
            memo.pop(next(iter(memo)))
        # The mask is kept with the plan, so that no other tensor gets its number.
        memo[key] = (_made(*sizes, q, given), given.mask)
    found: BlockPlan = memo[key][0]
    return found


def _made(queries: int, keys: int, q: Tensor, given: Options) -> BlockPlan:
    mask, whole = given.mask, given.mask is None
    if mask is not None and mask.dim() == 4 and mask.shape[-2:] == (queries, keys):
        structure = visible_keys(queries, keys, device=q.device, **given.structure)
        return plan_of_mask(mask if structure is None else mask & structure)
    return plan_of_structure(queries, keys, whole=whole, device=q.device, **given.structure)
