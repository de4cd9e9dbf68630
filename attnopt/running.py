"""Run a program's graph node by node, reading each weight when a node needs it and no sooner."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.ops import attention
from attnopt.ops.sdpa import Memo, attend
from attnopt.program import Program


class Run(fx.Interpreter):
    """One call of a program, which can be stopped at any node and continued.

    What `weights` holds takes the place of the program's own weights from then on.
    """

    def __init__(self, program: Program, batch: Mapping[str, Any]) -> None:
        super().__init__(program.graph_module, graph=program.graph)
        self.program = program
        self.values = program.form.flatten((), dict(batch))
        self.masks: Memo = {}
        self.weights: dict[str, Tensor] = {}
        self._rest = iter(list(program.graph.nodes))

    def until(self, node: fx.Node) -> Any:
        """Run up to a node that has not been run yet, and return its value."""
        with torch.no_grad():
            for current in self._rest:
                self.env[current] = result = self.run_node(current)
                for unused in self.user_to_last_uses.get(current, []):
                    self.env.pop(unused, None)
                if current is node:
                    return result
        raise ValueError(f"{node.name} was run before")

    def seen(self, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Any]]:
        """Yield some nodes with their values, in order of execution."""
        wanted = set(nodes)
        for node in self.program.graph.nodes:
            if node in wanted:
                yield node, self.until(node)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; placeholders of weights stay empty."""
        return self.values.get(n.name) if n.op == "placeholder" else super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an op, attention by the kernels of scaled_dot_product_attention."""
        if target is attention:
            q, k, v = args
            return attend(q, k, v, self.masks, **kwargs)
        return super().call_function(target, args, kwargs)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """Return the values of a node's arguments; weights come from where they are stored."""

        def value(given: fx.Node) -> Any:
            if given.op == "placeholder" and given.name not in self.values:
                name = self.program.bindings[given.name].name
                if name in self.weights:
                    return self.weights[name]
                return self.program.weights[name]
            return self.env[given]

        return fx.map_arg(args, value)
