"""What the tests of Triton kernels share: where they run, and what they must equal."""

from typing import Any

import torch
from torch import Tensor

from attnopt.ops import block_attention_reference
from attnopt.ops.plans import BlockPlan
from tests.conformance import TOLERANCE, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 16, *,
    v_width: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw queries, keys and values; queries lie in memory as projections leave them."""
    q = draw(batch, queries, heads, width, seed=1).transpose(1, 2)
    k = draw(batch, kv_heads, keys, width, seed=2)
    v = draw(batch, kv_heads, keys, v_width or width, seed=3)
    return tuple(x.to(DEVICE, dtype) for x in (q, k, v))  # type: ignore[return-value]


def defined(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by the definition, in float64 from the same numbers."""
    wide = {n: x.double() if is_real(x) else x for n, x in options.items()}
    return block_attention_reference(
        q.double(), k.double(), v.double(), *plan.tensors, q_tile=plan.q_tile, k_tile=plan.k_tile,
        **wide,
    )  # fmt: skip


def is_real(x: Any) -> bool:
    """Tell whether something is a tensor of real numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare by the largest error as a share of the largest value."""
    assert found.shape == wanted.shape
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    far = (found.double() - wanted)[finite].abs().max() if finite.any() else 0.0
    most = wanted[finite].abs().max().clamp(min=1.0) if finite.any() else 1.0
    assert far <= TOLERANCE[dtype or found.dtype] * most
