"""Causal language models: one graph for prefill and decode, with the cache as explicit states."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import sympy
import torch
from torch import Tensor, fx, nn

from attnopt.frontend import cleanup
from attnopt.frontend.calls import Example, Inputs, Outputs
from attnopt.frontend.exporting import Attempt, Trace, dry_run, trace
from attnopt.frontend.recurrences import go_on
from attnopt.frontend.remembering import Kept, observed, remembering, with_kept
from attnopt.frontend.skeletons import CacheLayers, Made, Slot, put_together
from attnopt.nouns import No
from attnopt.program import Binding, CallForm, Carry, Role, State

# The example past: long enough to be no special case, and unlike common sizes of models.
_PAST = 5
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")


@final
@dataclass(frozen=True)
class Stateful:
    """A trace whose cache became states."""

    trace: Trace
    states: tuple[State, ...]
    cache_argument: str
    forms: list[Any]


def cache_argument(source: nn.Module, example: Example) -> str | None:
    """Return the name of the argument that takes the cache, if the call would use one."""
    parameters = example.signature.parameters
    name = next((n for n in _CACHE_ARGUMENTS if n in parameters), None)
    config = getattr(source, "config", None)
    if name is None or config is None or getattr(config, "is_encoder_decoder", False):
        return None
    wanted = example.skeleton.get("use_cache")
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    used = getattr(text, "use_cache", False) if wanted is None else wanted
    return name if used and "input_ids" in example.tensors else None


def trace_stateful(
    source: nn.Module,
    example: Example,
    axes: Mapping[str, tuple[int, ...]],
    attempts: tuple[Attempt, ...] = (),
) -> Stateful | No:
    """Trace a causal language model with its cache as inputs and outputs."""
    argument = cache_argument(source, example)
    assert argument is not None
    found = _cache_forms(source, example, argument)
    if isinstance(found, No):
        return found
    forms, kept = found
    masked = _PAST if any(form.kind == "full" for form in forms) else 0
    with_state = _stateful_example(example, argument, masked)
    states, state_axes = _example_states(forms, with_state.tensors["input_ids"].shape[0])
    given = {**with_state.tensors, **states}
    dynamic = {**{n: _dynamic(t) for n, t in with_state.tensors.items()}, **state_axes}
    dynamic |= {n: a for n, a in axes.items() if n in example.tensors}

    def call(module: nn.Module, tensors: Mapping[str, Any]) -> Any:
        from attnopt.frontend.caches import build_cache

        cache = build_cache(forms, lambda layer, name: tensors[state_name(layer, name)])
        run = partial(_with(with_state, argument, cache).call, module, tensors)
        return run() if kept is None else remembering(module, cache, kept, run)

    result = trace(source, call, given, dynamic if axes else {}, attempts)
    if isinstance(result, No):
        return result
    return with_states(result, forms, argument)


def state_name(layer: int, name: str) -> str:
    """Return the name of a state and its placeholder."""
    return f"past_{layer}_{name}"


def _dynamic(tensor: Tensor) -> tuple[int, ...]:
    return (0, 1) if tensor.dim() > 1 else (0,)


Forms = tuple[list[Any], tuple[Kept, ...] | None]


def _with(example: Example, argument: str, cache: Any) -> Example:
    given = {**example.skeleton, "use_cache": True}
    return replace(example, skeleton=given if cache is None else {**given, argument: cache})


def _cache_forms(source: nn.Module, example: Example, argument: str) -> Forms | No:
    """Run the source once from an empty cache and see what its layers store.

    The second result has what its modules keep, or is None where the cache keeps everything.
    """
    from attnopt.frontend.caches import empty_cache, read_layers

    seen = _observe(source, _with(example, argument, None))
    if isinstance(seen, No):
        return seen
    result, kept = seen
    cache = getattr(result, argument, None)
    if cache is None and kept:
        return _forms_beside(source, example, argument, empty_cache(example.config))
    if cache is None:
        return No("the forward returns no cache")
    try:
        forms = read_layers(cache)
    except (TypeError, AttributeError) as error:
        return No(f"a cache of an unknown kind: {error}")
    if not any(form.tensors for form in forms):
        return No("the model keeps its state outside of the cache")
    return forms, None


def _forms_beside(source: nn.Module, example: Example, argument: str, cache: Any) -> Forms | No:
    """Give the source a cache that it does not return, and see what its modules keep beside it."""
    from attnopt.frontend.caches import read_layers

    seen = _observe(source, _with(example, argument, cache))
    if isinstance(seen, No):
        return seen
    _, kept = seen
    forms = with_kept(read_layers(cache), kept)
    if not any(form.kind == "full" for form in forms):
        return No("the forward returns no cache")
    return forms, tuple(kept)


def _observe(source: nn.Module, example: Example) -> tuple[Any, dict[Kept, Tensor]] | No:
    def run(module: nn.Module, tensors: Mapping[str, Any]) -> Any:
        return observed(module, lambda: example.call(module, tensors))

    seen: tuple[Any, dict[Kept, Tensor]] | No = dry_run(source, run, example.tensors)
    return seen


def _stateful_example(example: Example, argument: str, masked: int) -> Example:
    """Lengthen the mask by the past tokens in it, and make the positions explicit."""
    tensors = dict(example.tensors)
    ids = tensors["input_ids"]
    if ids.shape[1] < 2:
        ids = tensors["input_ids"] = ids.repeat(1, 4)
    batch, length = ids.shape
    skeleton = {k: v for k, v in example.skeleton.items() if k not in (argument, "use_cache")}
    mask = torch.ones(batch, masked + length, dtype=torch.long, device=ids.device)
    if "attention_mask" in example.signature.parameters:
        tensors["attention_mask"], skeleton["attention_mask"] = mask, Slot("attention_mask")
    if "position_ids" in example.signature.parameters:
        positions = torch.arange(_PAST, _PAST + length, device=ids.device).expand(batch, -1)
        tensors["position_ids"] = positions.contiguous()
        skeleton["position_ids"] = Slot("position_ids")
    return replace(example, skeleton=skeleton, tensors=tensors)


def _example_states(
    forms: list[Any], batch: int
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    tensors: dict[str, Tensor] = {}
    axes: dict[str, tuple[int, ...]] = {}
    for layer, form in enumerate(forms):
        for name, stored in form.tensors.items():
            shape = [batch, *stored.shape[1:]]
            grows = name in ("key", "value")
            if grows:
                shape[2] = _PAST
            tensors[state_name(layer, name)] = torch.zeros(shape, dtype=stored.dtype)
            axes[state_name(layer, name)] = (0, 2) if grows else (0,)
    return tensors, axes


def with_states(result: Trace, forms: list[Any], argument: str) -> Stateful | No:
    """Turn the cache\'s inputs and outputs of a trace into a State table, and its past explicit."""
    outputs = _state_outputs(result.skeleton, argument)
    places = [(state_name(i, n), o) for i, layer in enumerate(outputs) for n, o in layer.items()]
    go_on(result.graph_module, dict(places))
    names = {node.name: node for node in result.graph_module.graph.nodes}
    states: list[State] = []
    for layer, form in enumerate(forms):
        for name, stored in form.tensors.items():
            placeholder = state_name(layer, name)
            if not names[placeholder].users:
                return No(
                    f"the graph of several tokens does not read the {name} state", placeholder
                )
            states.append(_state(layer, name, stored, outputs[layer][name]))
    bindings = dict(result.bindings)
    for state in states:
        bindings[state.placeholder] = Binding("state", state.name)
    bindings["past_length"] = Binding("past_length", "past_length")
    make_past_explicit(result.graph_module, tuple(states))
    kept = {s.placeholder for s in states}
    skeleton = _without_cache(result.skeleton, argument)
    shapes = {n: s for n, s in result.shapes.items() if n not in kept}
    dtypes = {n: d for n, d in result.dtypes.items() if n not in kept}
    made = replace(
        result,
        bindings=bindings,
        skeleton=skeleton,
        shapes=shapes,
        dtypes=dtypes,
        bounds={s: (0, high) for s, (_, high) in result.bounds.items()},
    )
    return Stateful(made, tuple(states), argument, forms)


def _state(layer: int, name: str, stored: Tensor, output: int) -> State:
    role, index = _role(name)
    grows = 2 if name in ("key", "value") else None
    shape: list[int | str] = ["batch", *(int(s) for s in stored.shape[1:])]
    if role not in ("conv", "recurrent"):
        shape[2] = "source" if grows is None else "past"
    return State(
        name=state_name(layer, name),
        layer=layer,
        role=role,
        placeholder=state_name(layer, name),
        output=output,
        grows=grows,
        shape=tuple(shape),
        dtype=stored.dtype,
        index=index,
    )


def _role(name: str) -> tuple[Role, int]:
    parts: list[str] = name.split("_")
    match parts:
        case ["key"]:
            return "key", 0
        case ["value"]:
            return "value", 0
        case ["cross", "key"]:
            return "cross_key", 0
        case ["cross", "value"]:
            return "cross_value", 0
        case ["conv", index]:
            return "conv", int(index)
        case ["recurrent", index]:
            return "recurrent", int(index)
        case _:
            raise ValueError(f"unknown state {name!r}")


def _state_outputs(skeleton: Any, argument: str) -> list[dict[str, int]]:
    cache = _field(skeleton, argument)
    assert isinstance(cache, CacheLayers)
    outputs = [{name: int(slot.key) for name, slot in layer.items()} for layer in cache.layers]
    crossing: Any = cache.cross or ()
    for layer, crossed in zip(outputs, crossing, strict=False):
        layer |= {f"cross_{name}": int(slot.key) for name, slot in crossed.items()}
    return outputs


def _field(skeleton: Any, name: str) -> Any:
    fields = skeleton.arguments if isinstance(skeleton, Made) else skeleton
    return fields[name]


def _without_cache(skeleton: Any, argument: str) -> Any:
    assert isinstance(skeleton, Made)
    return Made(skeleton.cls, {**skeleton.arguments, argument: Slot("cache")})


def make_past_explicit(graph_module: fx.GraphModule, states: tuple[State, ...]) -> None:
    """Compute every size that counts past tokens from the one input `past_length`, in place."""
    graph = graph_module.graph
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    past = _past_symbols(placeholders, states)
    with graph.inserting_after(list(placeholders.values())[-1]):
        length = graph.placeholder("past_length")
    length.meta["val"] = _past_value(placeholders, states)
    sources = cleanup.symbol_sources(graph, {s.placeholder for s in states})
    sources |= _cross_sources(placeholders, states, sources)
    sizes = cleanup.Sizes(graph, length, sources, dict.fromkeys(past, length))
    held = set(_state_nodes(placeholders, states))
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.sym_size.int:
            continue
        expression: Any = sympy.sympify(cleanup.size_expression(node))
        reads_state = node.args[0] in held
        if reads_state or (expression is not None and expression.free_symbols & past):
            made = sizes.node_for(expression, node.meta["val"])
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    cleanup.remove_dead(graph_module)
    graph_module.recompile()


def _state_nodes(placeholders: Mapping[str, fx.Node], states: tuple[State, ...]) -> list[fx.Node]:
    return [placeholders[s.placeholder] for s in states]


def _cross_sources(
    placeholders: Mapping[str, fx.Node], states: tuple[State, ...], sources: Mapping[Any, Any]
) -> dict[sympy.Basic, tuple[fx.Node, int]]:
    """Read the length of the encoder's result from it, not from the cross-attention states."""
    encoded = next((n for k, n in placeholders.items() if k.startswith("encoder_outputs")), None)
    found: dict[sympy.Basic, tuple[fx.Node, int]] = {}
    for state in states:
        size = placeholders[state.placeholder].meta["val"].shape
        length = size[2] if state.role.startswith("cross") else None
        if encoded is None or not isinstance(length, torch.SymInt):
            continue
        if length.node.expr not in sources:
            found[length.node.expr] = (encoded, 1)
    return found


def _past_symbols(
    placeholders: Mapping[str, fx.Node], states: tuple[State, ...]
) -> set[sympy.Basic]:
    symbols: set[sympy.Basic] = set()
    for state in states:
        if state.grows is not None:
            size = placeholders[state.placeholder].meta["val"].shape[state.grows]
            if isinstance(size, torch.SymInt):
                symbols |= size.node.expr.free_symbols
    return symbols


def _past_value(placeholders: Mapping[str, fx.Node], states: tuple[State, ...]) -> Any:
    for state in states:
        if state.grows is not None:
            return placeholders[state.placeholder].meta["val"].shape[state.grows]
    return 0


@dataclass(frozen=True)
class StatefulCalls:
    """The call form of a causal language model: the source's arguments and a cache."""

    inputs: Inputs
    outputs: Outputs
    states: tuple[State, ...]
    argument: str
    positions_from_mask: bool = False
    tokens: str = "input_ids"

    def form(self) -> CallForm:
        """Return this as a CallForm."""
        return CallForm(self.flatten, self.unflatten, self.restate, made_of=self)

    def restate(self, states: tuple[State, ...]) -> CallForm:
        """Return the form for other states."""
        return replace(self, states=states).form()

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a value for each input and state; an omitted cache is empty."""
        given = self.inputs.named(args, kwargs)
        carry = self._carry(given.pop(self.argument, None))
        if given.pop("use_cache", True) is False:
            raise ValueError("argument use_cache=False; the captured call had use_cache=True")
        ids = given.get(self.tokens)
        if not isinstance(ids, Tensor):
            raise ValueError(f"argument {self.tokens} is missing: the captured call had it")
        past = carry.past_length if carry else 0
        if self.tokens == "input_ids":
            self._default_mask(given, ids, past if any(s.counts for s in self.states) else 0)
            self._default_positions(given, ids, past)
        tensors = self.inputs.tensors_of(given)
        self.inputs.check(tensors)
        for state in self.states:
            found = carry.tensors.get(state.name) if carry else None
            tensors[state.placeholder] = (
                state.initial(ids.shape[0], ids.device) if found is None else found
            )
        return {**tensors, "past_length": past}

    def unflatten(self, outputs: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
        """Return the source's result, with the states as its cache."""
        from attnopt.frontend.caches import cache_of_states

        tensors = {s.name: outputs[s.output] for s in self.states}
        seen = values["past_length"] + values[self.tokens].shape[1]
        cache = cache_of_states(self.states, tensors, seen)
        return put_together(
            self.outputs.skeleton, lambda key: cache if key == "cache" else outputs[int(key)]
        )

    def _carry(self, cache: Any) -> Carry | None:
        if cache is None or isinstance(cache, Carry):
            return cache
        from attnopt.frontend.caches import cached_tensor, tokens_seen

        if not hasattr(cache, "layers") and not hasattr(cache, "self_attention_cache"):
            raise TypeError(f"argument {self.argument} must be a Cache, not {type(cache).__name__}")
        stored = {s.name: cached_tensor(cache, s) for s in self.states}
        return Carry({n: t for n, t in stored.items() if t is not None}, tokens_seen(cache))

    def _default_mask(self, given: dict[str, Any], ids: Tensor, past: int) -> None:
        batch, length = ids.shape
        if "attention_mask" in self.inputs.shapes:
            mask = given.get("attention_mask")
            if mask is None:
                mask = torch.ones(batch, past + length, dtype=torch.long, device=ids.device)
            if mask.dim() == 2 and mask.shape[1] != past + length:
                raise ValueError(
                    f"argument attention_mask has length {mask.shape[1]}; expected {past + length} "
                    f"({past} past and {length} new tokens)"
                )
            given["attention_mask"] = mask

    def _default_positions(self, given: dict[str, Any], ids: Tensor, past: int) -> None:
        batch = ids.shape[0]
        if "position_ids" in self.inputs.shapes:
            positions = given.get("position_ids")
            if positions is None:
                positions = self._positions(given, ids, past)
            rows = positions.expand(batch, -1) if positions.dim() == 2 else positions
            given["position_ids"] = rows.contiguous()

    def _positions(self, given: Mapping[str, Any], ids: Tensor, past: int) -> Tensor:
        length = ids.shape[1]
        if self.positions_from_mask:
            mask = given["attention_mask"]
            positions: Tensor = ((mask.cumsum(1) * mask) - 1)[:, past:].long()
            return positions
        return torch.arange(past, past + length, device=ids.device).expand(ids.shape[0], -1)


def positions_follow_mask(source: nn.Module) -> bool:
    """Say whether the source numbers tokens by the attention mask if positions are omitted."""
    for module in source.modules():
        parameters = inspect.signature(module.forward).parameters
        if "position_ids" not in parameters or "inputs_embeds" not in parameters:
            continue
        text = inspect.getsource(type(module).forward)
        if "position_ids = torch.cumsum(" in text and "mask" in text:
            return True
    return False
