"""A captured model: an ATen graph, its weights by their original names, and its explicit state."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from attnopt.nouns import NearMiss, No, Site

BindingKind = Literal["parameter", "buffer", "constant", "input", "state", "past_length"]


@dataclass(frozen=True)
class Binding:
    """What a placeholder of the graph stands for, by its name in the source."""

    kind: BindingKind
    name: str


@dataclass(frozen=True)
class State:
    """One tensor that a program carries from step to step, such as the keys of a layer's cache.

    `placeholder` takes it in, output number `output` gives its successor; `grows` is the axis that
    lengthens with the tokens seen (None: constant size).
    """

    name: str
    layer: int
    role: Literal["key", "value"]
    placeholder: str
    output: int
    grows: int | None


@dataclass(frozen=True)
class CallForm:
    """How a call of the source becomes inputs of the graph, and outputs become its result.

    `flatten(args, kwargs)` gives a tensor for each input and state placeholder by name;
    `unflatten(outputs)` rebuilds the source's output class from the graph's flat outputs.
    """

    flatten: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]
    unflatten: Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Uncaptured:
    """A module that could not be captured, with the reason and the source line."""

    module: str
    why: str
    where: str


@dataclass(frozen=True)
class Program:
    """A captured model.

    Either one graph (`parts` empty), or, for an encoder-decoder or a model captured module by
    module, named parts that are Programs themselves; `graph_module` then is empty.
    """

    name: str
    graph_module: fx.GraphModule
    bindings: Mapping[str, Binding]
    weights: Mapping[str, Tensor]
    form: CallForm
    states: tuple[State, ...] = ()
    history: tuple[str, ...] = ()
    config: Any = None
    parts: Mapping[str, "Program"] = field(default_factory=dict)
    uncaptured: tuple[Uncaptured, ...] = ()
    refused: tuple["No", ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The graph, whose placeholders are named in `bindings`."""
        return self.graph_module.graph

    @cached_property
    def sites(self) -> tuple["Site", ...]:
        """Every attention in the program, in order of execution."""
        from attnopt.finder import find_sites

        return find_sites(self).sites

    @cached_property
    def near_misses(self) -> tuple["NearMiss", ...]:
        """What almost matched, and why it did not."""
        from attnopt.finder import find_sites

        return find_sites(self).near_misses

    def with_graph(self, graph_module: fx.GraphModule, *, note: str) -> "Program":
        """Return a program with another graph and one more line of history."""
        return replace(self, graph_module=graph_module, history=(*self.history, note))

    def run(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Run the graph on tensors by placeholder name; weights are bound by the program."""
        arguments = [
            values[node.name] if node.name in values else self.weights[self.bindings[node.name].name]
            for node in self.graph.nodes
            if node.op == "placeholder"
        ]
        outputs = self.graph_module(*arguments)
        return tuple(outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program as the source is called; omitted state is the initial one."""
        with torch.no_grad():
            return self.form.unflatten(self.run(self.form.flatten(args, kwargs)))
