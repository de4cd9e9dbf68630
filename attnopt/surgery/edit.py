"""A copy of a program's graph under change, and what of a site's heads and channels stays in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder import find_sites
from attnopt.finder.anchors import is_canonical
from attnopt.finder.emit import fake_mode_of, insert_call
from attnopt.finder.finding import Findings
from attnopt.finder.match import Match
from attnopt.finder.ops import shape, value
from attnopt.finder.provenance import View
from attnopt.graphs import copied, drop_unused
from attnopt.hoisting import hoist
from attnopt.nouns import No, Site
from attnopt.program import Binding, Program, State
from attnopt.weights import described


@dataclass(frozen=True)
class Kept:
    """Which channels of which heads stay: a mask (heads, channels) each for q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, site: Site) -> "Kept":
        """Return masks that keep all of a site."""
        return cls(
            torch.ones(site.heads, site.head_dim, dtype=torch.bool),
            torch.ones(site.kv_heads, site.head_dim, dtype=torch.bool),
            torch.ones(site.kv_heads, site.v_head_dim, dtype=torch.bool),
        )


@dataclass
class GraphEdit:
    """A copy of a program's graph that changes step by step; the program stays as it is.

    `statistics` is what calibration saw of the program, for passes that choose by it.
    """

    program: Program
    findings: Findings
    graph: fx.Graph
    mapping: dict[fx.Node, fx.Node]
    statistics: Any = None
    states: dict[str, State] = field(default_factory=dict)
    added: dict[str, Binding] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, statistics: Any = None) -> "GraphEdit":
        """Start with an exact copy."""
        graph, mapping = copied(program.graph)
        return cls(program, find_sites(program), graph, mapping, statistics)

    @property
    def view(self) -> View:
        """What the finder knows of the program before the edit."""
        return self.findings.view

    def match_of(self, site: Site) -> Match | No:
        """Return the one canonical op of a site."""
        (first, *others) = self.findings.groups[self.findings.sites.index(site)]
        if others or not isinstance(first, Match) or not is_canonical(first.anchor):
            return No("not in its exact form, which every other rewrite starts from", site.name)
        return first

    def parameter(self, name: str, value: Tensor) -> fx.Node:
        """Return a new parameter of the program, with its first value."""
        placeholder = "p_" + "".join(c if c.isalnum() else "_" for c in name)
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(placeholder)
        with fake_mode_of(self.program.placeholders):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        self.added[node.name] = Binding("parameter", name)
        self.values[name] = value
        return node

    def shared_call(self, target: Any, *args: Any) -> fx.Node:
        """Insert a call at the start of the graph, or return the same one that is there."""
        for node in self.graph.find_nodes(op="call_function", target=target):
            if node.args == args and not node.kwargs:
                same: fx.Node = node
                return same
        needed = {self.graph.find_nodes(op="placeholder")[-1], *args}
        after = next(n for n in reversed(self.graph.nodes) if n in needed)
        return insert_call(after.next, target, *args)

    def reshape_weights(self, changed: Mapping[str, Tensor]) -> None:
        """Give the placeholders of parameters the shapes of their new values."""
        for node in self.program.placeholders:
            name = self.program.bindings[node.name].name
            if name not in changed:
                continue
            new = described(changed, name).shape
            if new != shape(node):
                copied = self.mapping[node]
                with fake_mode_of((node,)):
                    copied.meta["val"] = value(node).new_empty(new)

    def finish(self, changed: Mapping[str, Tensor], *, note: str) -> Program:
        """Return the program with the edited graph, new weights and new states."""
        hoist(self.graph)
        drop_unused(self.graph)
        self.graph.lint()
        module = fx.GraphModule(self.program.graph_module, self.graph)
        result = self.program.with_graph(module, note=note)
        result = result.with_weights(self.values).with_weights(changed)
        result = replace(result, bindings={**result.bindings, **self.added})
        if not self.states:
            return result
        return result.with_states(tuple(self.states.get(s.name, s) for s in result.states))
