"""The graph run op by op, with attention by the kernels of scaled_dot_product_attention."""

from collections.abc import Callable
from typing import Any

from torch import fx

from attnopt.inlining import inline_attention


def prepare(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Return the graph with its attention inlined."""
    inline_attention(graph_module, remember=True)
    return graph_module.forward
