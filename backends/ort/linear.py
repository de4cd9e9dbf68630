"""Linear attention in ONNX: by its definition, over a cache that grows as every other one does."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from attnopt.ops import linear_attention, linear_attention_reference


def linear_kernel(node: fx.Node) -> Callable[..., Any] | None:
    """Return what a linear attention of a graph is traced by; None for another op."""
    return _attend if node.target is linear_attention else None


def _attend(*args: Any, memo: Any = None, **options: Any) -> Tensor:
    return linear_attention_reference(*args, **options)
