"""A program as JSON: its graph, its call, its states; the weights go by name in safetensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.frontend.encoderdecoder import route
from attnopt.nouns import No
from attnopt.program import Binding, CallForm, Program, Source, State
from attnopt.rings import with_rings
from attnopt.stored.calls import read_call, write_call
from attnopt.stored.graphs import read_graph, write_graph

FORMAT = 1
_TWO_STEPS = {"encode", "decode"}


def write_program(program: Program) -> dict[str, Any]:
    """Return the JSON of a program without its weights; ValueError says what cannot be stored."""
    if program.parts and set(program.parts) != _TWO_STEPS:
        raise ValueError(
            f"{program.name} was captured module by module, and only the graph of a whole model "
            "can be stored"
        )
    try:
        content = _write_one(program)
        content["parts"] = {n: _write_one(p) for n, p in program.parts.items()}
    except ValueError as error:
        raise ValueError(f"{program.name} cannot be stored as a program: {error}") from error
    source = program.source
    generation = source.generation_config
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        **content,
        "source": {
            "transient": sorted(source.transient),
            "tied": [list(names) for names in source.tied],
            "generation": None if generation is None else generation.to_dict(),
        },
    }


def read_program(content: Mapping[str, Any], weights: Mapping[str, Tensor], config: Any) -> Program:
    """Return the program that was written, on these weights; ValueError where it is none."""
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r}; this attnopt reads {FORMAT}")
    try:
        parts = {
            str(name): _read_one(part, weights, config) for name, part in content["parts"].items()
        }
        if parts and parts.keys() != _TWO_STEPS:
            raise ValueError(f"parts {sorted(parts)}")
        source = _read_source(content["source"])
        program = _read_one(content, weights, config, parts, source)
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return program


def _write_one(program: Program) -> dict[str, Any]:
    rings, program = program.grown is not None, program.growing
    content: dict[str, Any] = {"graph": None, "call": None}
    if not program.parts:
        content = {"graph": write_graph(program.graph), "call": write_call(program.form)}
    bindings = {n: [b.kind, b.name] for n, b in program.bindings.items()}
    return {
        "name": program.name,
        **content,
        "bindings": bindings,
        "states": [_write_state(s) for s in program.states],
        "history": list(program.history),
        "refused": [[no.why, no.where] for no in program.refused],
        "tier": program.tier,
        "rings": rings,
    }


def _read_one(
    content: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    config: Any,
    parts: Mapping[str, Program] | None = None,
    source: Source | None = None,
) -> Program:
    states = tuple(_read_state(s) for s in content["states"])
    if parts:
        first = parts["encode"].form
        form = CallForm(first.flatten, first.unflatten, route=route)
        graph = fx.Graph()
        graph.output(())
        module = fx.GraphModule({}, graph)
    else:
        form = read_call(content["call"], states, config)
        module = read_graph(content["graph"])
    bindings = {str(n): Binding(kind, str(name)) for n, (kind, name) in content["bindings"].items()}
    _check(module, bindings, weights)
    made = Program(
        name=str(content["name"]),
        graph_module=module,
        bindings=bindings,
        weights=weights,
        form=form,
        states=states,
        history=tuple(map(str, content["history"])),
        config=config,
        parts=parts or {},
        refused=tuple(No(str(why), str(where)) for why, where in content["refused"]),
        source=source or Source(),
        tier=int(content["tier"]),
    )
    return with_rings(made) if content.get("rings") else made


def _check(
    module: fx.GraphModule, bindings: Mapping[str, Binding], weights: Mapping[str, Tensor]
) -> None:
    """Refuse a graph that reads what is not there, or in another shape."""
    for node in module.graph.find_nodes(op="placeholder"):
        binding = bindings.get(node.name)
        if binding is None:
            raise ValueError(f"input {node.name} stands for nothing")
        if binding.kind not in ("parameter", "buffer", "constant"):
            continue
        if binding.name not in weights:
            raise ValueError(f"tensor {binding.name} is missing")
        wanted = tuple(node.meta["val"].shape)
        if tuple(weights[binding.name].shape) != wanted:
            found = list(weights[binding.name].shape)
            raise ValueError(f"tensor {binding.name} has shape {found}, not {list(wanted)}")


def _read_source(content: Mapping[str, Any]) -> Source:
    generation = content["generation"]
    if generation is not None:
        from transformers import GenerationConfig

        generation = GenerationConfig.from_dict(dict(generation))
    tied = tuple(tuple(map(str, names)) for names in content["tied"])
    return Source(frozenset(map(str, content["transient"])), tied, generation)


def _write_state(state: State) -> dict[str, Any]:
    return {
        "name": state.name,
        "layer": state.layer,
        "role": state.role,
        "placeholder": state.placeholder,
        "output": state.output,
        "grows": state.grows,
        "shape": list(state.shape),
        "dtype": str(state.dtype).removeprefix("torch."),
        "index": state.index,
    }


def _read_state(content: Mapping[str, Any]) -> State:
    dtype = getattr(torch, str(content["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {content['dtype']!r} of a state is not known")
    given: dict[str, Any] = {**content, "shape": tuple(content["shape"]), "dtype": dtype}
    return State(**given)
