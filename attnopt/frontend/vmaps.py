"""Mapped functions, such as the steps of a scan, as the plain ops that they are.

Dynamo hands over what torch.vmap wraps and unwraps, beside the ops in between. Tracing such a graph
again before dispatch sees ops on wrapped values, and loses what becomes of them.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._functorch.predispatch import (
    _vmap_decrement_nesting as _END,  # pyright: ignore[reportPrivateUsage]
)
from torch._functorch.predispatch import (
    _vmap_increment_nesting as _BEGIN,  # pyright: ignore[reportPrivateUsage]
)
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.graphs import copied_module


def without_vmaps(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Return a graph with the ops of mapped functions on whole values; itself without any.

    The `inputs` are fake, and their mode is active.
    """
    if not any(n.target is _BEGIN for n in graph_module.graph.nodes):
        return graph_module
    made = copied_module(graph_module)
    known = _Values(made)
    known.run(*inputs)
    for number, region in enumerate(_regions(made.graph)):
        _flatten(made, region, known.values, f"mapped_{number}")
    made.recompile()
    return made


class _Values(fx.Interpreter):
    """Runs a graph, and keeps the values outside of mapped functions."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self._depth = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        found = super().run_node(n)
        self._depth += (n.target is _BEGIN) - (n.target is _END)
        if not self._depth:
            self.values[n] = found
        return found


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    """List the nodes of each outermost mapped function, in order."""
    found: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is _BEGIN and not depth:
            found.append([])
        depth += node.target is _BEGIN
        if depth:
            found[-1].append(node)
        depth -= node.target is _END
    return found


def _flatten(
    graph_module: fx.GraphModule, region: list[fx.Node], values: dict[fx.Node, Any], name: str
) -> None:
    """Put a module of plain ops in the place of a region."""
    inside = set(region)
    read = list(dict.fromkeys(a for n in region for a in n.all_input_nodes if a not in inside))
    given = [n for n in region if any(user not in inside for user in n.users)]
    graph = fx.Graph()
    twins = {n: graph.placeholder(f"given_{i}") for i, n in enumerate(read)}
    for node in region:
        twins[node] = graph.node_copy(node, lambda n: twins[n])
    graph.output(tuple(twins[n] for n in given))
    mapped = fx.GraphModule(graph_module, graph)
    plain = make_fx(fx.Interpreter(mapped).run)(*(values[n] for n in read))
    graph_module.add_submodule(name, plain)
    with graph_module.graph.inserting_before(region[0]):
        call = graph_module.graph.call_module(name, tuple(read))
        call.meta = dict(region[0].meta)
        for number, node in enumerate(given):
            part = graph_module.graph.call_function(operator.getitem, (call, number))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in reversed(region):
        graph_module.graph.erase_node(node)
