"""Which heads each token uses, and how much: gates (B, H, T), zero where a head is off.

Two kinds need no training: by `norm_gates` those heads are on whose queries are longest, each by
its own measure, and by `fitted_gates` those that give most by a linear map of the token and of
these norms. `router_gates` are learned in two stages, with the constants that make routers of zeros
let every head through as it was: with (a, b) = 2 softmax(x P), a shared head has a N softmax(x S),
N of them, and a routed one b K r, where r is softmax(x R) within its K largest, to sum 1. Of equal
heads the one listed first is on. https://arxiv.org/abs/2410.11842
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

BALANCE: Final = 0.01
"""The weight of the balance loss, as published."""


def norm_gates_reference(
    q: Tensor, *, count: int, scales: Sequence[float] | None = None, group: int = 1
) -> Tensor:
    """Return 1 for the `count` heads of largest scaled norm of their query, (B, H, T, D).

    Heads go together in groups of `group`, by the root of the sum of their squares.
    """
    norms = _norms(q)
    if scales is not None:
        norms = norms * torch.tensor(scales, dtype=norms.dtype, device=norms.device)
    if group > 1:
        norms = torch.linalg.vector_norm(norms.unflatten(-1, (-1, group)), dim=-1)
    return _on(norms, count, group, q.dtype)


def fitted_gates_reference(
    q: Tensor, x: Tensor, router: Tensor, *, count: int, group: int = 1
) -> Tensor:
    """Return 1 for the `count` heads that tokens x (B, T, C) and the norms of q tell most of.

    `router` has a row for each group of `group` heads, and the columns of `told_by`.
    """
    told = told_by(q, x)
    return _on(told @ router.to(told.dtype).mT, count, group, q.dtype)


def told_by(q: Tensor, x: Tensor | None) -> Tensor:
    """Return tokens x, the norms of their queries (B, H, T, D), and 1: (B, T, C + H + 1)."""
    norms = _norms(q)
    parts = [norms, torch.ones_like(norms[..., :1])]
    return torch.cat(parts if x is None else [_wide(x), *parts], dim=-1)


def _norms(q: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(_wide(q), dim=-1)
    return found.transpose(1, 2)


def _on(scores: Tensor, count: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return gates of groups of heads that score highest, (B, H, T)."""
    on = _largest(scores, count)
    if group > 1:
        on = on.repeat_interleave(group, dim=-1)
    return on.to(dtype).transpose(1, 2)


def router_gates_reference(
    x: Tensor,
    routed: Tensor,
    pair: Tensor | None = None,
    shared: Tensor | None = None,
    *,
    count: int,
    heads: Sequence[int],
) -> Tensor:
    """Return the gates of tokens (B, T, C), of which each uses `count` routed heads.

    `heads` says which head each row of `shared` and then of `routed` is for; both are (rows, C),
    `pair` is (2, C). A single shared head has all of the share, and no row.
    """
    chances = torch.softmax(_wide(x) @ _wide(routed).mT, dim=-1)
    kept = chances * _largest(chances, count)
    least = torch.finfo(kept.dtype).eps
    gates = count * kept / kept.sum(-1, keepdim=True).clamp_min(least)
    if pair is not None:
        both = 2 * torch.softmax(_wide(x) @ _wide(pair).mT, dim=-1)
        always = both[..., :1]
        if shared is not None:
            always = always * len(shared) * torch.softmax(_wide(x) @ _wide(shared).mT, dim=-1)
        gates = torch.cat([always, both[..., 1:] * gates], dim=-1)
    order = [list(heads).index(head) for head in range(len(heads))]
    if order != list(range(len(heads))):
        gates = gates[..., order]
    return gates.to(x.dtype).transpose(1, 2)


def balance(x: Tensor, routed: Tensor, count: int) -> Tensor:
    """Return E^2 mean(P F): for each routed head its mean chance and how often it is on.

    It is `count` where all heads are used alike, and more where they are not.
    """
    chances = torch.softmax(_wide(x) @ _wide(routed).mT, dim=-1).flatten(0, -2)
    used = _largest(chances, count).mean(0)
    return len(routed) ** 2 * (chances.mean(0) * used).mean()


def norm_options(share: float, q: Tensor, *rest: Any, **options: Any) -> Mapping[str, Any]:
    """Let all heads be on at first."""
    whole = q.shape[1] // options.get("group", 1)
    return {**options, "count": annealed(whole, options["count"], share)}


def router_options(share: float, x: Tensor, routed: Tensor, *rest: Any, **options: Any) -> Any:
    """Let all routed heads be on at first."""
    return {**options, "count": annealed(len(routed), options["count"], share)}


def router_loss(x: Tensor, routed: Tensor, *rest: Any, count: int, **options: Any) -> Tensor:
    """Return what keeps routers from using the same heads for all tokens."""
    return BALANCE * balance(x, routed, count)


def annealed(whole: int, count: int, share: float) -> int:
    """Return how many are on at a share of the way from all of them."""
    return round(whole - share * (whole - count))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return 1 for the largest of the last axis, those further left first, and 0 for the rest."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define("norm_gates(Tensor q, *, int count, float[]? scales=None, int group=1) -> Tensor")
_LIBRARY.impl("norm_gates", norm_gates_reference, "CompositeImplicitAutograd")
_LIBRARY.define(
    "fitted_gates(Tensor q, Tensor x, Tensor router, *, int count, int group=1) -> Tensor"
)
_LIBRARY.impl("fitted_gates", fitted_gates_reference, "CompositeImplicitAutograd")
_LIBRARY.define(
    "router_gates(Tensor x, Tensor routed, Tensor? pair=None, Tensor? shared=None, *, int count, "
    "int[] heads) -> Tensor"
)
_LIBRARY.impl("router_gates", router_gates_reference, "CompositeImplicitAutograd")

norm_gates = torch.ops.attnopt.norm_gates.default
fitted_gates = torch.ops.attnopt.fitted_gates.default
router_gates = torch.ops.attnopt.router_gates.default
