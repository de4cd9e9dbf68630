"""The graph compiled by inductor, with attention by scaled_dot_product_attention.

Prefill, decode steps, and calls with and without padding become graphs of their own; lengths and
batch sizes stay symbolic in each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.inlining import inline_attention


def prepare(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Return the compiled graph."""
    inline_attention(graph_module, remember=False)
    return torch.compile(graph_module, dynamic=True)
