"""Routed attention in ONNX: the canonical attention, times its gates.

The shapes of ONNX are static, so that heads which are off are computed all the same: their gates
come of a TopK and a scatter, and save nothing here.
"""

import torch
from torch import fx

from attnopt.ops import attention, routed_attention

aten = torch.ops.aten


def routes_as_products(graph: fx.Graph) -> None:
    """Let every routed attention be a canonical one and a product, in place."""
    for node in graph.find_nodes(op="call_function", target=routed_attention):
        q, k, v, gates = node.args
        with graph.inserting_before(node):
            found = graph.call_function(attention, (q, k, v), dict(node.kwargs))
            shares = graph.call_function(aten.unsqueeze.default, (gates, -1))
            made = graph.call_function(aten.mul.Tensor, (found, shares))
        found.meta = dict(node.meta)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
