"""Linear attention in ONNX: by its definition over a cache that grows, or the runtime's own op."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnopt.ops import (
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    linear_attention_reference,
)


def linear_kernel(node: fx.Node) -> Callable[..., Any] | None:
    """Return what a linear attention of a graph is traced by; None for another op."""
    target: Any = node.target
    return _KERNELS.get(target)


def _attend(*args: Any, memo: Any = None, **options: Any) -> Tensor:
    return linear_attention_reference(*args, **options)


def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial: Tensor,
    *,
    memo: Any = None,
) -> tuple[Tensor, Tensor]:
    return _run("gated_delta", q, k, v, initial, decay, beta)


def _gated(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor, *, memo: Any = None
) -> tuple[Tensor, Tensor]:
    return _run("gated", q, k, v, initial, decay)


def _run(
    rule: str, q: Tensor, k: Tensor, v: Tensor, initial: Tensor, decay: Tensor, *rates: Tensor
) -> tuple[Tensor, Tensor]:
    """Call ONNX Runtime's op on heads side by side; the queries are scaled before."""
    rows = [x.flatten(2) for x in (q, k, v, decay)]
    read, last = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (*rows[:3], initial, rows[3], *rates),
        attrs={
            "q_num_heads": q.shape[2],
            "kv_num_heads": v.shape[2],
            "scale": 1.0,
            "update_rule": rule,
        },
        dtypes=(v.dtype, initial.dtype),
        shapes=(rows[2].shape, initial.shape),
        version=1,
    )
    return read.unflatten(-1, v.shape[2:]), last


_KERNELS: Final[Mapping[Any, Callable[..., Any]]] = {
    linear_attention: _attend,
    gated_delta_rule: _delta_rule,
    gated_linear_attention: _gated,
}
