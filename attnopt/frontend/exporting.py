"""Trace a source whole: torch.export on named tensors, with as many dynamic sizes as it allows."""

import contextlib
import inspect
import io
import logging
import os
import random
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import sympy
import torch
from sympy import Function
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram

import attnopt
from attnopt.frontend import cleanup
from attnopt.frontend.loops import without_loops
from attnopt.frontend.patience import patience
from attnopt.frontend.picks import picks_as_slices
from attnopt.frontend.skeletons import Slot, take_apart
from attnopt.nouns import No
from attnopt.program import Binding

# Where the source sits in the traced wrapper; removed from every name afterwards.
SOURCE = "source"

# How many sizes a condition is tried at, and how far from the least.
_DRAWS = 16
_MOST = 1000

Call = Callable[[nn.Module, Mapping[str, Any]], Any]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Trace:
    """A traced source: its normalized graph, what the inputs are, and the result's skeleton."""

    graph_module: fx.GraphModule
    bindings: dict[str, Binding]
    constants: dict[str, Tensor]
    skeleton: Any
    shapes: dict[str, tuple[Any, ...]]
    dtypes: dict[str, torch.dtype]
    bounds: dict[str, tuple[int, int | None]]
    level: str
    fixed: tuple[str, ...]
    conditions: tuple[Any, ...] = ()
    attempt: "Attempt | None" = None


class Flat(nn.Module):
    """A source seen as a function from named tensors to a flat tuple of tensors."""

    def __init__(self, source: nn.Module, call: Call, names: tuple[str, ...], results: list[Any]):
        super().__init__()
        self.source = source

        def forward(**tensors: Any) -> tuple[Any, ...]:
            flat: list[Any] = []

            def put(_: str, tensor: Any) -> Slot:
                flat.append(tensor)
                return Slot(len(flat) - 1)

            results.append(take_apart(call(source, tensors), put))
            return tuple(flat)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward


def trace(
    source: nn.Module,
    call: Call,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, tuple[int, ...]],
    attempts: "tuple[Attempt, ...]" = (),
) -> Trace | No:
    """Trace a call of the source; `axes` lists the axes of each tensor that should be dynamic."""
    reasons: list[No] = []
    best: Trace | None = None
    for attempt in attempts or (_ATTEMPTS if any(axes.values()) else _STATIC):
        result = _try(source, call, tensors, axes, attempt)
        if isinstance(result, No):
            reasons.append(result)
            continue
        if best is None or len(result.fixed) < len(best.fixed):
            best = result
        if not best.fixed:
            break
    return best if best is not None else reasons[0]


@dataclass(frozen=True)
class Attempt:
    """How to trace: under the patches of Transformers, with guards as asserts."""

    patches: bool = False
    deferred: bool = False


FIRST = Attempt()
_STATIC = (FIRST, Attempt(patches=True))
_ATTEMPTS = (FIRST, Attempt(patches=True, deferred=True))


def _try(
    source: nn.Module,
    call: Call,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, tuple[int, ...]],
    attempt: Attempt,
) -> Trace | No:
    skeletons: list[Any] = []
    flat = Flat(source, call, tuple(tensors), skeletons)
    shapes = {n: dict.fromkeys(axes.get(n, ()), Dim.AUTO) for n in tensors}

    def export() -> tuple[ExportedProgram, tuple[Any, ...], dict[str, tuple[int, int | None]]]:
        with _tracing(source, patches=attempt.patches):
            exported = torch.export.export(
                flat,
                (),
                dict(tensors),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=attempt.deferred,
            )
            conditions, bounds = _conditions(exported), _bounds(exported)
            return cleanup.functional(exported), conditions, bounds

    found = attempted(export)
    if isinstance(found, No):
        return found
    exported, conditions, bounds = found
    made = _finish(exported, skeletons[0], axes, bounds=bounds, conditions=conditions)
    return replace(made, attempt=attempt)


def judged(trace: Trace, axes: Mapping[str, tuple[int, ...]]) -> Trace:
    """Say of a trace which of these axes it fixes."""
    own = tuple(f for f in trace.fixed if f.startswith("only where"))
    fixed = (*_fixed(trace.shapes, axes, trace.bounds), *own)
    return replace(trace, fixed=fixed, level=_level(axes, fixed))


def branches_on_values(reason: No) -> bool:
    """Say whether a trace failed at a branch on values, which other sizes do not change."""
    return reason.why.startswith("GuardOnDataDependentSymNode")


def finish_exported(exported: ExportedProgram) -> Trace:
    """Normalize a program that torch.export made elsewhere."""
    bounds = _bounds(exported)
    return _finish(cleanup.functional(exported), None, {}, bounds=bounds, conditions=())


def _conditions(exported: ExportedProgram) -> tuple[sympy.Basic, ...]:
    """Return what sizes must satisfy because the trace took a branch or unrolled a loop."""
    found = (g for g in _guards(exported) if isinstance(g, sympy.Eq) and not g.is_number)
    return tuple(dict.fromkeys(g for g in found if g.free_symbols))


def _restricts(condition: Any) -> bool:
    """Say whether a condition fixes sizes, and not only relates the inputs to each other."""
    return len(condition.free_symbols) == 1 or bool(condition.atoms(Function, sympy.Min, sympy.Max))


def _about_layout(guard: Any) -> bool:
    """Say whether a guard only asks if strides are contiguous, which changes no value."""
    frame = str(guard.sloc.framework_loc)
    return "contiguous" in frame or "channels_last" in frame


def _guards(exported: ExportedProgram) -> list[Any]:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            environment = value.fake_mode.shape_env
            guards = [guard.expr for guard in environment.guards if not _about_layout(guard)]
            # An attempt with guards as asserts has these instead, which the clean graph drops.
            asserts = [a.expr for a in environment.deferred_runtime_asserts.get(None, [])]
            known = (environment.replace(condition) for condition in asserts)
            failing = (condition for condition in known if _can_fail(condition, exported))
            return [*map(environment.replace, guards), *failing]
    return []


def _can_fail(condition: Any, exported: ExportedProgram) -> bool:
    """Say whether sizes within their bounds miss a condition; an assert may be true of all."""
    chance = random.Random(0)
    bounds = _bounds(exported)
    drawn: list[dict[Any, int]] = [{} for _ in range(_DRAWS)]
    for symbol in sorted(condition.free_symbols, key=str):
        low, high = bounds.get(str(symbol), (0, None))
        most = low + _MOST if high is None else min(high, low + _MOST)
        for sizes in drawn:
            sizes[symbol] = chance.randint(min(max(low, 2), most), most)
    return any(condition.subs(sizes) == False for sizes in drawn)  # noqa: E712


def _finish(
    exported: ExportedProgram,
    skeleton: Any,
    axes: Mapping[str, Any],
    *,
    bounds: dict[str, tuple[int, int | None]],
    conditions: tuple[Any, ...],
) -> Trace:
    graph_module = exported.graph_module
    _drop_mutation_outputs(exported)
    cleanup.clean(graph_module)
    bindings, constants = _bind(exported)
    lists = {n: constants[b.name] for n, b in bindings.items() if b.name in constants}
    picks_as_slices(graph_module, lists)
    for gone in cleanup.drop_unread(graph_module, lambda n: bindings[n].kind == "input"):
        del bindings[gone]
    _name_modules_from_source(graph_module)
    inputs = [
        n for n in graph_module.graph.nodes if n.op == "placeholder" and _is_input(n, bindings)
    ]
    shapes = {bindings[n.name].name: _shape(n) for n in inputs}
    fixed = (
        *_fixed(shapes, axes, bounds),
        *(f"only where {c}" for c in conditions if _restricts(c)),
    )
    return Trace(
        graph_module=graph_module,
        bindings=bindings,
        constants={b.name: constants[b.name] for b in bindings.values() if b.name in constants},
        skeleton=skeleton,
        shapes=shapes,
        dtypes={bindings[n.name].name: n.meta["val"].dtype for n in inputs},
        bounds=bounds,
        level=_level(axes, fixed),
        fixed=fixed,
        conditions=conditions,
    )


def _is_input(node: fx.Node, bindings: Mapping[str, Binding]) -> bool:
    return bindings[node.name].kind == "input" and isinstance(node.meta.get("val"), Tensor)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(_size(s) for s in node.meta["val"].shape)


def _size(size: int | torch.SymInt) -> int | str:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression)


def _bind(exported: ExportedProgram) -> tuple[dict[str, Binding], dict[str, Tensor]]:
    signature = exported.graph_signature
    constants: dict[str, Tensor] = {}
    bindings: dict[str, Binding] = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.name
        if name in signature.inputs_to_parameters:
            made = Binding("parameter", source_name(signature.inputs_to_parameters[name]))
        elif name in signature.inputs_to_buffers:
            made = Binding("buffer", source_name(signature.inputs_to_buffers[name]))
        elif name in signature.inputs_to_lifted_tensor_constants:
            stored = signature.inputs_to_lifted_tensor_constants[name]
            made = Binding("constant", source_name(stored))
            constants[made.name] = _tensor(exported.constants[stored])
        else:
            made = Binding("input", name)
        bindings[name] = made
    return _renamed(exported.graph_module, bindings), constants


def _tensor(constant: Any) -> Tensor:
    assert isinstance(constant, Tensor)
    return constant


def _renamed(graph_module: fx.GraphModule, bindings: dict[str, Binding]) -> dict[str, Binding]:
    """Take the wrapper's prefix out of the placeholders' names."""
    renamed: dict[str, Binding] = {}
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        old = node.name
        if old.startswith((f"p_{SOURCE}_", f"b_{SOURCE}_")):
            node._rename(old.replace(f"_{SOURCE}_", "_", 1))
            node.target = node.name
        renamed[node.name] = bindings[old]
    return renamed


def source_name(name: str) -> str:
    """Return a dotted name in the source from its name in the wrapper."""
    return name.removeprefix(f"{SOURCE}.")


def _drop_mutation_outputs(exported: ExportedProgram) -> None:
    """Keep the outputs that the source returns; updated buffers are not part of the result."""
    wanted = [s.kind.name for s in exported.graph_signature.output_specs]
    output = exported.graph.output_node()
    results: Any = output.args[0]
    kept = [a for a, kind in zip(results, wanted, strict=True) if kind == "USER_OUTPUT"]
    output.args = (tuple(kept),)


def _name_modules_from_source(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (source_name(path).removeprefix(SOURCE), cls)
                for key, (path, cls) in stack.items()
                if path
            }


def _bounds(exported: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the sizes that each symbol may have; 0 and 1 are as good as 2 to this graph."""
    bounds: dict[str, tuple[int, int | None]] = {}
    for symbol, limits in exported.range_constraints.items():
        low = int(limits.lower) if isinstance(limits.lower, sympy.Integer) else 0
        high = int(limits.upper) if isinstance(limits.upper, sympy.Integer) else None
        bounds[str(symbol)] = (low if low > 2 else 0, high)
    return bounds


def _fixed(
    shapes: Mapping[str, tuple[Any, ...]],
    axes: Mapping[str, Any],
    bounds: Mapping[str, tuple[int, int | None]],
) -> tuple[str, ...]:
    found: list[str] = []
    for name, shape in shapes.items():
        for axis in axes.get(name, ()):
            size = shape[axis]
            low, high = (size, size) if isinstance(size, int) else bounds.get(size, (0, None))
            if low == high:
                found.append(f"{name} axis {axis} = {low}")
    return tuple(found)


def _level(axes: Mapping[str, Any], fixed: tuple[str, ...]) -> str:
    if not any(axes.values()):
        return "static"
    return f"dynamic except {', '.join(fixed)}" if fixed else "dynamic"


def dry_run(
    source: nn.Module, call: Call, tensors: Mapping[str, Tensor], *, with_values: bool = True
) -> Any | No:
    """Call a source on shapes only; where it asks for values, call it for real if it has them."""
    with quiet(), _evaluating(source), torch.no_grad():
        found = attempted(lambda: _called_on_shapes(source, call, tensors))
        if with_values and isinstance(found, No):
            return attempted(lambda: call(source, tensors))
        return found


def _called_on_shapes(source: nn.Module, call: Call, tensors: Mapping[str, Tensor]) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return call(source, {n: mode.from_tensor(t) for n, t in tensors.items()})


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silence the warnings and logs of torch.export and of model code; errors are raised."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _tracing(source: nn.Module, *, patches: bool) -> Generator[None]:
    """Put a source into the state in which it is traced, and put it back."""
    with (
        _silent(),
        _evaluating(source),
        _patched(patches),
        without_loops(source),
        torch.no_grad(),
        patience(),
    ):
        yield


@contextlib.contextmanager
def _silent() -> Generator[None]:
    """Be quiet, and keep torch.export from printing the graph of a failed attempt."""
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _evaluating(source: nn.Module) -> Generator[None]:
    """Run in eval mode, and give every module its own attributes back, the training flag too."""
    before = [(m, dict(vars(m))) for m in source.modules()]
    try:
        source.eval()
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


@contextlib.contextmanager
def _patched(wanted: bool) -> Generator[None]:
    """Trace under the export patches that Transformers ships for its own models."""
    if not wanted:
        yield
        return
    from transformers.exporters import exporter_dynamo
    from transformers.exporters.utils import apply_patches

    assert exporter_dynamo.__name__
    with apply_patches("dynamo"):
        yield


def attempted(work: Callable[[], Found]) -> Found | No:
    """Run what runs a model's own code; whatever it raises is the reason of a refusal."""
    try:
        return work()
    # No class is known beforehand: foreign code raises what it likes, and so does torch.export.
    except Exception as error:
        return No(first_line(error), user_line(error))


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


_NOT_THE_USERS = tuple(f"{Path(m.__file__ or '').parent}{os.sep}" for m in (torch, attnopt))


def user_line(error: BaseException) -> str:
    """Return the innermost source line that is neither torch's nor ours, as file:line."""
    found = ""
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        if not filename.startswith(("<", *_NOT_THE_USERS)):
            found = f"{filename}:{step.tb_lineno}"
        step = step.tb_next
    return found
