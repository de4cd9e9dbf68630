"""Which kernel attends to the keys of a call, and what it is given.

scaled_dot_product_attention takes what is scaled and hidden. A sink takes a share of what the
others leave: out * exp(lse - total) where total = log(exp(lse) + exp(sink)), and the kernel of CPUs
says its log-sum-exp; its gradient is the kernel's own with `total` in place of `lse`. A soft cap,
and sinks elsewhere, are computed block by block (`attnopt.ops.capped`).
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.ops.capped import by_blocks

FEWEST: Final = 640
"""Pairs of queries and keys that a compiled graph scores itself: too few to call a kernel for."""

_FORWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Scoring:
    """What is done to the scores of a call, beside hiding some; `sinks` has one logit a head."""

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Way:
    """How the keys of a call are attended to, and why."""

    name: Literal["kernel", "shared", "blocks"]
    why: str


def way(q: Tensor, mask: Tensor | None, scoring: Scoring) -> Way:
    """Choose how to attend."""
    if scoring.softcap is not None:
        return Way("blocks", "no kernel caps scores")
    if scoring.sinks is None:
        return Way("kernel", "scores are scaled and hidden, as the kernel does")
    if q.device.type != "cpu":
        return Way("blocks", "sinks need the log-sum-exp that the kernel of CPUs gives")
    if torch.compiler.is_compiling():
        return Way("blocks", "a compiler fuses the few ops of one query")
    if mask is not None and mask.requires_grad:
        return Way("blocks", "the kernel has no gradient of what is added to the scores")
    return Way("shared", "a sink takes its share of what the kernel gives")


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    causal: bool = False,
) -> Tensor:
    """Attend to all keys that an additive mask leaves; `causal` asks for as many queries as keys.

    Keys and values have equally many heads. A query that sees nothing gives zeros.
    """
    chosen = way(q, mask, scoring).name
    if chosen == "blocks":
        return by_blocks(q, k, v, mask, scoring.scale, scoring.softcap, scoring.sinks, causal)
    width, out = q.shape[-1], v.shape[-1]
    scale = scoring.scale
    # Of a few scores that a compiled graph makes itself no values need to be as wide as queries.
    padded = out < width and not (torch.compiler.is_compiling() and has_few_pairs(q, k, FEWEST))
    if padded:
        v = F.pad(v, (0, width - out))
    elif out > width:
        scale = width**-0.5 if scale is None else scale
        q, k = F.pad(q, (0, out - width)), F.pad(k, (0, out - width))
    if chosen == "shared":
        found = _shared(q, k, v, scoring.sinks, mask, scale, causal)
    else:
        # A compiler may not know the numbers of heads as numbers; the kernel wants to be told.
        groups = {"enable_gqa": True} if k.shape[1] != q.shape[1] else {}
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, **groups
        )
    return found[..., :out] if padded else found


def has_few_pairs(q: Tensor, k: Tensor, most: int) -> bool:
    """Tell whether queries and keys are known to make at most so many pairs: a size may vary."""
    return bool(statically_known_true(q.shape[2] * k.shape[2] <= most))


def _shared(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Tensor | None,
    scale: float | None, causal: bool,
) -> Tensor:  # fmt: skip
    """Attend beside sinks."""
    assert sinks is not None
    if mask is not None:
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, 1, k.shape[2])))
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    given = (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        found: Tensor = _Shared.apply(*given, mask, scale, causal)  # type: ignore[no-untyped-call]
        return found
    return _with_total(*given, mask, scale, causal)[0]


def _with_total(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None, scale: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, and the logarithm of what weights are divided by, (B, H, T)."""
    out, lse = _FORWARD(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    total = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
    return out * torch.exp(lse - total).unsqueeze(-1).to(out.dtype), total


class _Shared(torch.autograd.Function):
    """Attention beside sinks, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None,
        scale: float | None, causal: bool,
    ) -> Tensor:  # fmt: skip
        """Keep what the backward of the kernel reads."""
        out, total = _with_total(q, k, v, sinks, mask, scale, causal)
        ctx.save_for_backward(q, k, v, sinks, mask, out, total)
        ctx.settings = scale, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Any, ...]:
        """Return the gradients of queries, keys, values and sinks."""
        q, k, v, sinks, mask, out, total = ctx.saved_tensors
        scale, causal = ctx.settings
        slopes = _BACKWARD(gradient, q, k, v, out, total, 0.0, causal, attn_mask=mask, scale=scale)
        pull = (gradient.to(total.dtype) * out.to(total.dtype)).sum(-1)
        taken = torch.exp(sinks.to(total.dtype).view(1, -1, 1) - total)
        return *slopes, -(taken * pull).sum((0, 2)).to(sinks.dtype), None, None, None
