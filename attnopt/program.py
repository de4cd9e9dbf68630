"""A captured model: an ATen graph, its weights by their original names, and its explicit state."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx

from attnopt.tensorfiles import Described
from attnopt.weights import Spool, described

if TYPE_CHECKING:
    from attnopt.nouns import Mlp, NearMiss, No, Site

BindingKind = Literal["parameter", "buffer", "constant", "input", "state", "past_length"]


@dataclass(frozen=True)
class Binding:
    """What a placeholder of the graph stands for, by its name in the source."""

    kind: BindingKind
    name: str


Role = Literal["key", "value", "cross_key", "cross_value", "conv", "recurrent"]


@dataclass(frozen=True)
class State:
    """One tensor that a program carries from step to step, such as the keys of a layer's cache.

    `placeholder` takes it in, output number `output` gives its successor; `grows` is the axis that
    lengthens with the tokens seen (None: constant size). `shape` has "batch" for the batch size,
    "past" for the growing size and "source" for the encoder's; a state starts as zeros of this
    shape with past = 0. `index` tells several states of one role and layer apart. Keys and values
    that do not grow are rings (`attnopt.ops.window`) of the `first` tokens and of the last ones.
    """

    name: str
    layer: int
    role: Role
    placeholder: str
    output: int
    grows: int | None
    shape: tuple[int | str, ...] = ()
    dtype: torch.dtype = torch.float32
    index: int = 0
    first: int = 0

    @property
    def counts(self) -> bool:
        """Whether it holds tokens by number, so that a mask says which of them are real."""
        return self.role in ("key", "value")

    @property
    def ring(self) -> bool:
        """Whether it holds the last tokens only."""
        return self.counts and self.grows is None

    def initial(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the value before the first token."""
        sizes = {"batch": batch, "past": 0, "source": 0}
        shape = [sizes[s] if isinstance(s, str) else s for s in self.shape]
        return torch.zeros(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Carry:
    """What a program hands from one step to the next: its states by name, and the tokens seen."""

    tensors: Mapping[str, Tensor]
    past_length: int


@dataclass(frozen=True)
class CallForm:
    """How a call of the source becomes inputs of the graph, and outputs become its result.

    `flatten(args, kwargs)` gives a value for each input, state and past_length placeholder by name.
    `unflatten(outputs, values)` rebuilds the source's output class from the graph's flat outputs
    and the flattened call. `restate(states)` is the form for other states. `route(program, args,
    kwargs)` calls a program of parts. `made_of` is the data behind the functions, where they are
    not code of their own.
    """

    flatten: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]
    unflatten: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]
    restate: Callable[[tuple[State, ...]], "CallForm"] | None = None
    route: Callable[["Program", tuple[Any, ...], dict[str, Any]], Any] | None = None
    made_of: Any = None


@dataclass(frozen=True)
class Uncaptured:
    """A module that could not be captured, with the reason and the source line."""

    module: str
    why: str
    where: str


class _Cast(Mapping[str, Tensor]):
    """Weights seen in another floating dtype."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return weight.to(self._dtype) if weight.is_floating_point() else weight

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def describe(self, name: str) -> Described:
        """Return shape and type of a weight."""
        shape, dtype = described(self._weights, name)
        return Described(shape, self._dtype if dtype.is_floating_point else dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class Source:
    """What a graph does not say of the module that it was captured from.

    `transient` names the buffers that its state_dict leaves out, `tied` the names that share one
    parameter; `generation_config` is there where the source had `generate()`.
    """

    transient: frozenset[str] = frozenset()
    tied: tuple[tuple[str, ...], ...] = ()
    generation_config: Any = None


@dataclass(frozen=True)
class Growing:
    """The form of a program in which every cache grows, which rewrites and exports start from."""

    graph_module: fx.GraphModule
    bindings: Mapping[str, Binding]
    states: tuple[State, ...]
    form: CallForm


@dataclass(frozen=True)
class Program:
    """A captured model.

    Either one graph (`parts` empty), or, for an encoder-decoder or a model captured module by
    module, named parts that are Programs themselves; `graph_module` then is empty. Where states are
    rings, `grown` is the form without them.
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
    source: Source = field(default_factory=Source)
    tier: int = 0
    grown: Growing | None = None

    @property
    def growing(self) -> "Program":
        """The same program with caches that grow in place of rings."""
        if self.grown is None:
            return self
        form = {name: getattr(self.grown, name) for name in Growing.__dataclass_fields__}
        return replace(self, grown=None, **form)

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
    def mlps(self) -> tuple["Mlp", ...]:
        """Every MLP in the program, in order of execution."""
        from attnopt.finder import find_sites

        return find_sites(self).mlps

    @cached_property
    def near_misses(self) -> tuple["NearMiss", ...]:
        """What almost matched, and why it did not."""
        from attnopt.finder import find_sites

        return find_sites(self).near_misses

    @property
    def main(self) -> "Program":
        """The graph that runs every site: that of an encoder-decoder's first step."""
        if not self.parts:
            return self.growing
        if set(self.parts) != {"encode", "decode"}:
            raise NotImplementedError(
                f"{self.name} was captured in parts ({', '.join(self.parts)}); plans other than "
                "'exact' change one graph, or both steps of an encoder-decoder"
            )
        return self.parts["encode"]

    @property
    def generates(self) -> bool:
        """Whether it continues a text token by token, with a cache or without one."""
        if self.source.generation_config is None:
            return False
        return bool(self.states) or not getattr(self.config, "is_encoder_decoder", False)

    def with_graph(self, graph_module: fx.GraphModule, *, note: str) -> "Program":
        """Return a program with another graph and one more line of history."""
        history = (*self.history, note)
        return replace(self, graph_module=graph_module, history=history, grown=None)

    def with_states(self, states: tuple[State, ...]) -> "Program":
        """Return a program with another State table; the graph must already take and give it."""
        form = self.form.restate(states) if self.form.restate else self.form
        return replace(self, states=states, form=form)

    def with_weights(self, weights: Mapping[str, Tensor]) -> "Program":
        """Return a program in which some weights are other tensors."""
        own = weights if isinstance(weights, Spool) else dict(weights)
        merged = ChainMap(own, self.weights)  # type: ignore[arg-type]  # only read
        return replace(self, weights=merged)

    def cast(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Program":
        """Return a program that computes in another floating dtype, its graph a copy."""
        from attnopt.lowering import retargeted
        from attnopt.rings import with_rings

        if self.grown is not None:
            return with_rings(self.growing.cast(dtype, device))
        parts = {name: part.cast(dtype, device) for name, part in self.parts.items()}
        cast = retargeted(self, dtype, torch.device(device))
        return replace(cast, weights=_Cast(self.weights, dtype), parts=parts)

    def run(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Run the graph on tensors by placeholder name; weights are bound by the program."""
        arguments = [self._value(n.name, values) for n in self.placeholders]
        outputs = self.graph_module(*arguments)
        return tuple(outputs)

    @cached_property
    def placeholders(self) -> tuple[fx.Node, ...]:
        """The placeholders of the graph, in order."""
        return tuple(n for n in self.graph.nodes if n.op == "placeholder")

    def step(
        self, inputs: Mapping[str, Any], state: Carry | None = None
    ) -> tuple[tuple[Any, ...], Carry]:
        """Run one step from a state (None: initial); return the flat outputs and the next state."""
        with torch.no_grad():
            given = dict(inputs) if state is None else {**inputs, "past_key_values": state}
            values = self.form.flatten((), given)
            outputs = self.run(values)
        tensors = {s.name: outputs[s.output] for s in self.states}
        carried = {s.output for s in self.states}
        results = tuple(o for i, o in enumerate(outputs) if i not in carried)
        return results, Carry(tensors, values.get("past_length", 0) + self._step_length(values))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the program as the source is called; omitted state is the initial one."""
        with torch.no_grad():
            if self.form.route is not None:
                return self.form.route(self, args, kwargs)
            values = self.form.flatten(args, kwargs)
            return self.form.unflatten(self.run(values), values)

    def _step_length(self, values: Mapping[str, Any]) -> int:
        for name in ("input_ids", "decoder_input_ids"):
            if name in values:
                return int(values[name].shape[1])
        return 0

    def _value(self, name: str, values: Mapping[str, Any]) -> Any:
        return values[name] if name in values else self.weights[self.bindings[name].name]
