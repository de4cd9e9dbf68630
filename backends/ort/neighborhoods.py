"""Neighbourhood attention in ONNX: the canonical attention under a mask that all layers share."""

from typing import Any

import torch
from torch import Tensor, fx

from attnopt.neighborhoods import Neighborhood
from attnopt.ops import attention, neighborhood_attention
from attnopt.ops.neighborhood import visible_tokens

_SETTINGS = ("grid", "window", "stride", "dilation", "causal", "border", "leading", "tile")

aten = torch.ops.aten


def neighbors_as_masks(graph: fx.Graph) -> None:
    """Let every neighbourhood attention be a canonical one under a mask, in place."""
    made: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=neighborhood_attention):
        settings = {n: node.kwargs[n] for n in _SETTINGS if n in node.kwargs}
        options = {n: x for n, x in node.kwargs.items() if n not in _SETTINGS}
        key = repr(sorted(settings.items()))
        if key not in made:
            first = next(n for n in graph.nodes if n.op != "placeholder")
            with graph.inserting_before(first):
                made[key] = graph.call_function(_mask, (), settings)
        options["mask"] = _both(graph, node, made[key], options.get("mask"))
        node.target, node.kwargs = attention, options


def _both(graph: fx.Graph, node: fx.Node, mask: fx.Node, given: Any) -> fx.Node:
    if given is None:
        return mask
    with graph.inserting_before(node):
        return graph.call_function(aten.logical_and.default, (mask, given))


def _mask(tile: Any = (), **settings: Any) -> Tensor:
    return visible_tokens(Neighborhood.of(**settings), tile)
