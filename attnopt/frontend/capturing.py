"""The entry: a module, a checkpoint or a factory becomes a Program."""

import importlib
import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from attnopt.frontend.branches import plans_blocks
from attnopt.frontend.calls import Example, Inputs, Outputs, take_call_apart
from attnopt.frontend.encoderdecoder import (
    decode_example,
    has_two_steps,
    route,
    trace_decode,
    trace_encode,
)
from attnopt.frontend.exporting import (
    FIRST,
    Attempt,
    Trace,
    attempted,
    branches_on_values,
    judged,
    trace,
)
from attnopt.frontend.inputs import dynamic_axes, example_inputs, grown
from attnopt.frontend.lengths import with_lengths
from attnopt.frontend.modules import capture_parts, with_parts
from attnopt.frontend.positions import with_positions
from attnopt.frontend.skeletons import Slot, keeps_tensors
from attnopt.frontend.stateful import (
    Stateful,
    StatefulCalls,
    cache_argument,
    positions_follow_mask,
    trace_stateful,
)
from attnopt.nouns import No
from attnopt.program import CallForm, Program, Source


def capture(
    model: nn.Module | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool = True,
    *,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a module with an example call, or a checkpoint, as a Program."""
    if isinstance(model, nn.Module):
        return capture_module(model, args, kwargs or {}, dynamic=dynamic)
    place = os.fspath(model)
    if place.endswith(".pt2"):
        return capture_saved(place, trust_pickle=trust_pickle)
    if not os.path.exists(place) and place.count(":") == 1 and "/" not in place:
        made, args, kwargs = call_factory(place, args, kwargs or {})
        return capture_module(made, args, kwargs, dynamic=dynamic)
    from attnopt.frontend.checkpoints import holds_program, open_checkpoint

    if holds_program(place):
        from attnopt.artifacts.loading import load_program

        return load_program(place)
    checkpoint = open_checkpoint(place, trust_remote_code=trust_remote_code)
    example, axes = example_call(checkpoint.model, args, kwargs or {}, dynamic=dynamic)
    program = whole(checkpoint.model, example, axes)
    if not isinstance(program, No):
        return with_weights(program, checkpoint.weights, checkpoint.note)
    return by_parts(checkpoint.loaded(program), example, axes, program)


def with_weights(program: Program, weights: Mapping[str, Tensor], note: str) -> Program:
    """Return the program with other weights; constants made by the capture stay."""
    own = {
        binding.name: program.weights[binding.name]
        for binding in program.bindings.values()
        if binding.kind == "constant"
    }
    return replace(
        program,
        weights=ChainMap(own, weights),  # type: ignore[arg-type]  # both are only read
        history=(*program.history, f"weights: {note}"),
        parts={n: with_weights(p, weights, note) for n, p in program.parts.items()},
    )


def call_factory(
    place: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    """Import "package.module:factory" and call it for a module, (module, args), or with kwargs."""
    module_name, name = place.split(":")
    factory = attempted(lambda: getattr(importlib.import_module(module_name), name))
    if isinstance(factory, No):
        raise ValueError(f"cannot import {place!r}: {_said(factory)}")
    made = attempted(factory)
    if isinstance(made, No):
        raise ValueError(f"{place!r} failed: {_said(made)}")
    if isinstance(made, nn.Module):
        if not args and not kwargs and not hasattr(made, "config"):
            raise ValueError(
                f"{place!r} returned a {type(made).__name__} without an example call; return "
                "(module, args, kwargs)"
            )
        return made, args, kwargs
    found: tuple[Any, ...] = made if isinstance(made, tuple) else ()
    kinds = (nn.Module, tuple | list, Mapping)[: len(found)]
    if 2 <= len(found) <= 3 and all(map(isinstance, found, kinds)):
        return found[0], tuple(found[1]), found[2] if len(found) == 3 else {}
    told = (
        f"a tuple of {', '.join(type(x).__name__ for x in found)}" if found else type(made).__name__
    )
    raise ValueError(f"{place!r} must return a module or (module, args, kwargs), not {told}")


def _said(failure: No) -> str:
    return failure.why + (f" ({failure.where})" if failure.where else "")


def capture_saved(place: str, *, trust_pickle: bool) -> Program:
    """Read an ExportedProgram that torch.export.save wrote."""
    if not trust_pickle:
        raise ValueError(
            f"{place} can run code when read; if you trust it, pass trust_pickle=True "
            "(--trust-pickle)"
        )
    from attnopt.frontend.saved import read_saved

    return read_saved(place)


def capture_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dynamic: bool
) -> Program:
    """Capture a module with an example call: whole if that works, else module by module."""
    example, axes = example_call(model, args, kwargs, dynamic=dynamic)
    program = whole(model, example, axes)
    return by_parts(model, example, axes, program) if isinstance(program, No) else program


def example_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dynamic: bool
) -> tuple[Example, dict[str, tuple[int, ...]]]:
    """Take an example call apart, or make one up, and say which of its sizes may vary."""
    if not args and not kwargs:
        kwargs = example_inputs(model)
    example = take_call_apart(model, args, kwargs)
    if not dynamic:
        return example, {}
    return example, with_lengths(model, example, dynamic_axes(example.tensors))


def by_parts(
    model: nn.Module, example: Example, axes: Mapping[str, tuple[int, ...]], why: No
) -> Program:
    """Capture the modules of a model that cannot be captured whole."""
    switched = {"use_cache": False} if "use_cache" in example.signature.parameters else {}
    example = replace(example, skeleton={**example.skeleton, **switched})
    enlarged = replace(example, tensors=grown(example.tensors, axes))
    rows = {n: a[:1] for n, a in axes.items()}
    wider = replace(example, tensors=grown(example.tensors, rows))
    runs = [enlarged, example, wider] if axes else [example]
    found = capture_parts(model, runs, plain_program, why)
    if isinstance(found, No) or not found.programs:
        reason = found if isinstance(found, No) else why
        raise ValueError(f"cannot capture {type(model).__name__}: {reason}")
    parts = found.programs

    def run(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rewritten = any(program.parts[n] is not parts[n] for n in parts)
        return with_parts(model, program.parts, strict=rewritten)(*args, **{**switched, **kwargs})

    return Program(
        name=type(model).__name__,
        graph_module=empty_graph(),
        bindings={},
        weights=source_weights(model),
        form=CallForm(_no_inputs, _no_outputs, route=run),
        history=(f"capture: {len(parts)} modules, because {why}",),
        config=example.config,
        source=source_of(model),
        parts=parts,
        uncaptured=found.uncaptured,
    )


def _no_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    raise TypeError("a program of modules has no inputs of its own; flatten the call of a part")


def _no_outputs(outputs: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
    raise TypeError("a program of modules has no outputs of its own; unflatten those of a part")


def whole(model: nn.Module, example: Example, axes: Mapping[str, tuple[int, ...]]) -> Program | No:
    """Capture the whole model in one graph, with states where the call uses a cache."""
    refused: tuple[No, ...] = ()
    if has_two_steps(model, example):
        program = two_steps(model, example, axes)
        if not isinstance(program, No):
            return program
        refused = (No(f"captured without its cache: {program.why}", program.where),)
        example = without_cache(example)
    if cache_argument(model, example):
        stateful = best_of(example, axes, lambda e, a, t: trace_stateful(model, e, a, t))
        if not isinstance(stateful, No):
            return stateful_program(model, example, stateful)
        if may_generate(model):
            refused = (No(f"captured without its cache: {stateful.why}", stateful.where),)
        example = without_cache(example)
    numbered = with_positions(model, example) if may_generate(model) else example
    more = {"position_ids": (0, 1)} if axes and numbered is not example else {}
    result = _traced(model, numbered, {**axes, **more})
    if isinstance(result, No):
        return result
    foreign = keeps_tensors(result.skeleton)
    if foreign is not None and _uses_cache(example):
        program = whole(model, without_cache(example), axes)
        return program if isinstance(program, No) else _noted(program, foreign)
    program = plain_program(model, numbered, result, counts=numbered is not example)
    notes = tuple(str(no) for no in refused)
    return replace(program, refused=refused, history=(*program.history, *notes))


def _uses_cache(example: Example) -> bool:
    """Tell whether a call may leave its cache away."""
    switched = example.skeleton.get("use_cache", True)
    return "use_cache" in example.signature.parameters and switched is not False


def _noted(program: Program, cache: str) -> Program:
    """Say of a program that it was captured without the cache that its source returns."""
    note = f"captured without its cache: a {cache} is none of Transformers' own caches"
    return replace(program, history=(*program.history, note))


def _traced(model: nn.Module, example: Example, axes: Mapping[str, tuple[int, ...]]) -> Trace | No:
    tokens = example.tensors.get("input_ids")
    if tokens is not None and plans_blocks(example.config, tokens.shape[-1]):
        rows = {name: found[:1] for name, found in axes.items()}
        result = trace(model, example.call, example.tensors, rows, (FIRST,))
        return result if isinstance(result, No) else judged(result, axes)
    return best_of(example, axes, lambda e, a, t: trace(model, e.call, e.tensors, a, t))


Traced = TypeVar("Traced", Trace, Stateful)
Trial = Callable[[Example, Mapping[str, tuple[int, ...]], tuple[Attempt, ...]], Traced | No]


def best_of(
    example: Example, axes: Mapping[str, tuple[int, ...]], trial: Trial[Traced]
) -> Traced | No:
    """Trace with sizes that are special to nothing; where that fixes sizes, with those given."""
    if not any(axes.values()):
        return trial(example, {}, ())
    first = trial(replace(example, tensors=grown(example.tensors, axes)), axes, ())
    if isinstance(first, No):
        return _as_given(example, axes, trial, first)
    if not fixed_sizes(first):
        return first
    attempt = (first.trace if isinstance(first, Stateful) else first).attempt
    second = trial(example, axes, (attempt,) if attempt else ())
    if isinstance(second, No) or len(fixed_sizes(second)) > len(fixed_sizes(first)):
        return first
    return second


def _as_given(
    example: Example, axes: Mapping[str, tuple[int, ...]], trial: Trial[Traced], why: No
) -> Traced | No:
    """Trace with the sizes given: all of the axes dynamic, then the rows, then none."""
    rows = {name: found[:1] for name, found in axes.items()}
    on_values = branches_on_values(why)
    for dynamic in (rows, {}) if on_values else (axes, rows, {}):
        result = trial(example, dynamic, (FIRST,) if on_values else ())
        if not isinstance(result, No):
            return _judged(result, axes)
    return why


def _judged(result: Traced, axes: Mapping[str, tuple[int, ...]]) -> Traced:
    if isinstance(result, Stateful):
        return replace(result, trace=judged(result.trace, axes))
    return judged(result, axes)


def may_generate(model: nn.Module) -> bool:
    """Say whether a model is made to generate token by token."""
    return bool(getattr(model, "can_generate", lambda: False)())


def fixed_sizes(result: Trace | Stateful) -> tuple[str, ...]:
    """Return the sizes that should have been dynamic and are not."""
    return result.trace.fixed if isinstance(result, Stateful) else result.fixed


def two_steps(
    model: nn.Module, example: Example, axes: Mapping[str, tuple[int, ...]]
) -> Program | No:
    """Capture an encoder-decoder as the parts "encode" and "decode"."""
    first = best_of(example, axes, lambda e, a, t: trace_encode(model, e, a, t))
    if isinstance(first, No):
        return first
    later = _later_steps(model, example, axes)
    if isinstance(later, No):
        return later
    encode = plain_program(model, example, first)
    decode = stateful_program(model, decode_example(example, later.trace), later)
    return Program(
        name=type(model).__name__,
        graph_module=empty_graph(),
        bindings={},
        weights=encode.weights,
        form=CallForm(encode.form.flatten, encode.form.unflatten, route=route),
        states=decode.states,
        history=(
            f"capture: encode, {first.level}",
            f"capture: decode, {later.trace.level}, {len(later.states)} states",
        ),
        config=example.config,
        source=source_of(model),
        parts={"encode": encode, "decode": decode},
    )


def _later_steps(
    model: nn.Module, example: Example, axes: Mapping[str, tuple[int, ...]]
) -> Stateful | No:
    """Trace later calls of any number of tokens, or of one where a source takes no more."""
    several = best_of(example, axes, lambda e, a, t: trace_decode(model, e, a, t))
    if not isinstance(several, No):
        return several
    one = best_of(example, axes, lambda e, a, t: trace_decode(model, e, a, t, new=1))
    return several if isinstance(one, No) else one


def without_cache(example: Example) -> Example:
    """Return the same call with its cache switched off."""
    return replace(example, skeleton={**example.skeleton, "use_cache": False})


def stateful_program(model: nn.Module, example: Example, made: Stateful) -> Program:
    """Make the Program of a causal language model with explicit states."""
    result = made.trace
    calls = StatefulCalls(
        inputs=Inputs(
            _called(example, result), result.shapes, result.dtypes, result.bounds, result.conditions
        ),
        outputs=Outputs(result.skeleton),
        states=made.states,
        argument=made.cache_argument,
        positions_from_mask=positions_follow_mask(model),
        tokens="input_ids" if "input_ids" in result.shapes else "decoder_input_ids",
    )
    return Program(
        name=type(model).__name__,
        graph_module=result.graph_module,
        bindings=result.bindings,
        weights={**source_weights(model), **result.constants},
        form=calls.form(),
        states=made.states,
        history=(f"capture: whole, {result.level}, {len(made.states)} states",),
        config=example.config,
        source=source_of(model),
    )


def _called(example: Example, result: Trace) -> Example:
    skeleton = {k: v for k, v in example.skeleton.items() if k != "use_cache"}
    return replace(example, skeleton={**skeleton, **{n: Slot(n) for n in result.shapes}})


def plain_program(
    model: nn.Module, example: Example, result: Trace, *, counts: bool = False
) -> Program:
    """Make the Program of a trace without state; `counts` is what it does without positions."""
    sizes = (result.shapes, result.dtypes, result.bounds, result.conditions)
    inputs = Inputs(example, *sizes, counts=counts)
    outputs = Outputs(result.skeleton)
    return Program(
        name=type(model).__name__,
        graph_module=result.graph_module,
        bindings=result.bindings,
        weights={**source_weights(model), **result.constants},
        form=CallForm(inputs.flatten, outputs.unflatten, made_of=(inputs, outputs)),
        history=(f"capture: whole, {result.level}",),
        config=example.config,
        source=source_of(model),
    )


def source_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the source's own parameters and buffers by dotted name; nothing is copied."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def source_of(model: nn.Module) -> Source:
    """Return what the graph of a model will not say."""
    transient = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in vars(module)["_non_persistent_buffers_set"]
    }
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = tuple(tuple(found) for found in names.values() if len(found) > 1)
    config = getattr(model, "generation_config", None) if may_generate(model) else None
    return Source(frozenset(transient), tied, config)


def empty_graph() -> fx.GraphModule:
    """Return the graph of a Program that consists of parts."""
    graph = fx.Graph()
    graph.output(())
    return fx.GraphModule({}, graph)
