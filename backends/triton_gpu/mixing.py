"""Linear attention by the kernels: a window by those of attention, far keys by those of chunks.

What both give is joined by their log-sum-exps, which is one denominator. Steps of a text, decays
that learn, and features that the largest near score does not divide go to the fast copy that every
machine has.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.backends.triton_gpu import routing
from attnopt.backends.triton_gpu.attending import attend_by_plan
from attnopt.backends.triton_gpu.linear import far_sums
from attnopt.ops.chunks import attend_linear as attend_linear_anywhere
from attnopt.ops.features import CENTROIDS, mapped
from attnopt.ops.linear import Mixing
from attnopt.ops.options import Options
from attnopt.ops.plans import plan_of_structure
from attnopt.ops.sdpa import Memo


def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor | None = None,
    map_k: Tensor | None = None,
    gate: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    padding: Tensor | None = None,
    memo: Memo | None = None,
    **settings: Any,
) -> Tensor:
    """Return what the reference returns."""
    mixing = Mixing(map_q, map_k, gate, decay, **settings)
    if not _fits(q, k, v, mixing):
        return attend_linear_anywhere(
            q, k, v, map_q, map_k, gate, decay, padding=padding, memo=memo, **settings
        )
    wide, keys, values = mixing.widened(q, k, v)
    of_keys = mixing.of_keys(keys, padding)
    own = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    if mixing.feature == CENTROIDS:
        logits = mapped(wide, map_q)
        top = logits.detach().amax(dim=-1, keepdim=True)
        of_queries = torch.exp(logits - top)
    else:
        of_queries, top = mixing.of_queries(wide, None), None
    sums = far_sums(of_queries.to(own), of_keys.to(own), values.to(own), decay, mixing.window)
    if not mixing.window:
        return mixing.divided(sums, v.dtype)
    assert top is not None
    plan = plan_of_structure(
        q.shape[2], k.shape[2], whole=True, device=q.device, causal=True, window=mixing.window
    )
    options: dict[str, Any] = {"padding": padding, "scale": mixing.scale, "k_map": mixing.k_map}
    options |= {"v_map": mixing.v_map, "causal": True, "window": mixing.window}
    near, lse = attend_by_plan(q, k, v, plan, **{n: x for n, x in options.items() if x is not None})
    both = torch.maximum(lse.unsqueeze(-1).detach(), top)
    weight, of_far = torch.exp(lse.unsqueeze(-1) - both), torch.exp(top - both)
    if gate is not None:
        weight = weight * gate.view(-1, 1, 1)
    found = weight * near.float() + of_far * sums[..., :-1]
    total = weight + of_far * sums[..., -1:]
    # A blind query has neither near keys nor far ones.
    return (found / total.clamp(min=torch.finfo(torch.float32).tiny)).to(v.dtype)


def _fits(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing) -> bool:
    """Tell whether the kernels take a call."""
    if not routing.fits(q, k, v, Options()) or not mixing.causal:
        return False
    if q.shape[2] != k.shape[2] or (mixing.decay is not None and mixing.decay.requires_grad):
        return False
    return not mixing.window or mixing.feature == CENTROIDS
