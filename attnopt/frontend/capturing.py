"""The entry: a module, a checkpoint or a factory becomes a Program."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from attnopt.frontend.calls import Example, Inputs, Outputs, take_call_apart
from attnopt.frontend.exporting import Trace, trace
from attnopt.frontend.inputs import dynamic_axes
from attnopt.frontend.skeletons import Slot
from attnopt.frontend.stateful import (
    Stateful,
    StatefulCalls,
    cache_argument,
    positions_follow_mask,
    trace_stateful,
)
from attnopt.nouns import No
from attnopt.program import CallForm, Program


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
    raise ValueError(f"cannot capture {model!r}: give a module or a checkpoint directory")


def capture_module(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dynamic: bool
) -> Program:
    """Capture a module with an example call: whole if that works, else module by module."""
    example = take_call_apart(model, args, kwargs)
    axes = dynamic_axes(example.tensors) if dynamic else {}
    refused: tuple[No, ...] = ()
    if cache_argument(model, example):
        stateful = trace_stateful(model, example, axes)
        if not isinstance(stateful, No):
            return stateful_program(model, example, stateful)
        refused = (No(f"captured without its cache: {stateful.why}", stateful.where),)
        example = without_cache(example)
    result = trace(model, example.call, example.tensors, axes)
    if isinstance(result, No):
        raise ValueError(f"cannot capture {type(model).__name__}: {result}")
    program = plain_program(model, example, result)
    notes = tuple(str(no) for no in refused)
    return replace(program, refused=refused, history=(*program.history, *notes))


def without_cache(example: Example) -> Example:
    """Return the same call with its cache switched off."""
    return replace(example, skeleton={**example.skeleton, "use_cache": False})


def stateful_program(model: nn.Module, example: Example, made: Stateful) -> Program:
    """Make the Program of a causal language model with explicit states."""
    result = made.trace
    calls = StatefulCalls(
        inputs=Inputs(_called(example, result), result.shapes, result.dtypes, result.bounds),
        outputs=Outputs(result.skeleton),
        states=made.states,
        argument=made.cache_argument,
        positions_from_mask=positions_follow_mask(model),
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
    )


def _called(example: Example, result: Trace) -> Example:
    skeleton = {k: v for k, v in example.skeleton.items() if k != "use_cache"}
    return replace(example, skeleton={**skeleton, **{n: Slot(n) for n in result.shapes}})


def plain_program(model: nn.Module, example: Example, result: Trace) -> Program:
    """Make the Program of a trace without state."""
    inputs = Inputs(example, result.shapes, result.dtypes, result.bounds)
    return Program(
        name=type(model).__name__,
        graph_module=result.graph_module,
        bindings=result.bindings,
        weights={**source_weights(model), **result.constants},
        form=CallForm(inputs.flatten, Outputs(result.skeleton).unflatten),
        history=(f"capture: whole, {result.level}",),
        config=example.config,
    )


def source_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the source's own parameters and buffers by dotted name; nothing is copied."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def empty_graph() -> fx.GraphModule:
    """Return the graph of a Program that consists of parts."""
    graph = fx.Graph()
    graph.output(())
    return fx.GraphModule({}, graph)
