"""Run a program's graph node by node, reading each weight when a node needs it and no sooner."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.ops import attention
from attnopt.ops.sdpa import Memo, attend
from attnopt.program import Program


class Run(fx.Interpreter):
    """One call of a program, which can be stopped at any node and continued.

    What `weights` holds takes the place of the program's own weights from then on. Where `wanted`
    names nodes, only they are computed and what they depend on.
    """

    def __init__(
        self, program: Program, batch: Mapping[str, Any], wanted: Collection[fx.Node] = ()
    ) -> None:
        super().__init__(program.graph_module, graph=program.graph)
        self.program = program
        self.values = program.form.flatten((), dict(batch))
        self.masks: Memo = {}
        self.weights: dict[str, Tensor] = {}
        self._nodes = _needed(program.graph, wanted)
        self._next = 0
        if wanted:
            self.user_to_last_uses = _last_uses(self._nodes)

    def until(self, node: fx.Node) -> Any:
        """Run up to a node that has not been run yet, and return its value."""
        with torch.no_grad():
            while self._next < len(self._nodes):
                current = self._nodes[self._next]
                self._next += 1
                self.env[current] = result = self.run_node(current)
                for unused in self.user_to_last_uses.get(current, []):
                    self.env.pop(unused, None)
                if current is node:
                    return result
        raise ValueError(f"{node.name} was run before")

    def before(self, node: fx.Node) -> None:
        """Run up to a node that has not been run yet, and stop before it."""
        place = self._nodes.index(node)
        if place > self._next:
            self.until(self._nodes[place - 1])

    def paused(self) -> dict[str, Any]:
        """Return the values that the rest of the run needs, by the names of their nodes."""
        return {n.name: v for n, v in self.env.items() if n.op != "placeholder"}

    def forget(self) -> None:
        """Drop all values; the run can go on from where it is paused with them given back."""
        self.env.clear()
        self.masks.clear()

    def resume(self, node: fx.Node, values: Mapping[str, Any]) -> None:
        """Go on before a node, with the values of a run that was paused there."""
        self._next = self._nodes.index(node)
        for done in self._nodes[: self._next]:
            if done.op == "placeholder":
                self.env[done] = self.run_node(done)
            elif done.name in values:
                self.env[done] = values[done.name]

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


def _needed(graph: fx.Graph, wanted: Collection[fx.Node]) -> list[fx.Node]:
    """List the nodes that some nodes depend on, themselves included, in order of execution."""
    if not wanted:
        return list(graph.nodes)
    kept = set(wanted)
    for node in reversed(graph.nodes):
        if node in kept:
            kept.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in kept]


def _last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """List, for each of some nodes, what none of them reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        for given in node.all_input_nodes:
            last[given] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        found.setdefault(reader, []).append(node)
    return found
