"""Capture module by module, for a model that no single graph can hold.

The source runs at two sizes, and its modules' inputs are recorded, so that every size that varies
is known. Then the largest modules that can be captured become Programs; the others are opened.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.frontend.calls import Example, take_call_apart
from attnopt.frontend.exporting import (
    FIRST,
    Trace,
    attempted,
    branches_on_values,
    quiet,
    trace,
)
from attnopt.nouns import No
from attnopt.program import Program, Uncaptured

MakeProgram = Callable[[nn.Module, Example, Trace], Program]


@dataclass(frozen=True)
class Parts:
    """What could be captured of a model, and what could not."""

    programs: dict[str, Program]
    uncaptured: tuple[Uncaptured, ...]


@dataclass
class _Recorded:
    """The calls of one module during a run of the source."""

    examples: list[Example] = field(default_factory=list)


def capture_parts(
    source: nn.Module, examples: list[Example], make: MakeProgram, why: No
) -> Parts | No:
    """Capture the largest capturable modules; `examples` call the source at several sizes."""
    tried = [_record(source, e) for e in examples]
    runs = [r for r in tried if not isinstance(r, No)]
    if not runs:
        failed = next((r for r in tried if isinstance(r, No)), why)
        told = f"the source does not run on the example: {failed.why}"
        return No(told, failed.where or why.where)
    search = _Search(runs, make)
    if not search.open("", source):
        search.uncaptured.append(Uncaptured("", why.why, why.where))
    return Parts(search.programs, tuple(search.uncaptured))


@dataclass
class _Search:
    runs: list[dict[str, _Recorded]]
    make: MakeProgram
    programs: dict[str, Program] = field(default_factory=dict)
    uncaptured: list[Uncaptured] = field(default_factory=list)

    def open(self, path: str, module: nn.Module) -> bool:
        """Visit the children of a module; say whether any of them could not be captured."""
        visited = [
            self.visit(f"{path}.{name}" if path else name, child)
            for name, child in module.named_children()
        ]
        return any(visited)

    def visit(self, path: str, module: nn.Module) -> bool:
        """Capture a module, or open it; say whether something in it could not be captured."""
        if path not in self.runs[0]:
            return self.open(path, module)
        if not any(True for _ in module.children()) and type(module).__module__.startswith(
            "torch."
        ):
            return False
        program = self._capture(path, module)
        if not isinstance(program, No):
            self.programs[path] = program
            return False
        if not self.open(path, module):
            self.uncaptured.append(Uncaptured(path, program.why, program.where))
        return True

    def _capture(self, path: str, module: nn.Module) -> Program | No:
        recorded = [run[path].examples for run in self.runs if path in run]
        first = recorded[0][0]
        if any(e.skeleton != first.skeleton for run in recorded for e in run):
            return No("the module is called in several ways")
        axes = _varying([run[0] for run in recorded])
        rows = {name: tuple(a for a in found if a == 0) for name, found in axes.items()}
        reason: No | None = None
        for dynamic in (axes, rows, {}):
            attempts = (FIRST,) if reason and branches_on_values(reason) else ()
            result = trace(module, first.call, first.tensors, dynamic, attempts)
            if not isinstance(result, No):
                return _at(path, self.make(module, first, result))
            reason = reason or result
        assert reason is not None
        return reason


def _record(source: nn.Module, example: Example) -> dict[str, _Recorded] | No:
    """Run the source and note how each module is called."""
    calls: dict[str, _Recorded] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                taken = take_call_apart(module, args, kwargs)
            except (TypeError, ValueError, AttributeError):
                return
            copies = {n: t.clone() for n, t in taken.tensors.items()}
            calls.setdefault(path, _Recorded()).examples.append(replace(taken, tensors=copies))

        return note

    handles = [
        module.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, module in source.named_modules()
        if path
    ]
    flags = [(m, m.training) for m in source.modules()]
    try:
        source.eval()
        with quiet(), torch.no_grad():
            ended = attempted(lambda: example.call(source, example.tensors))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
    return ended if isinstance(ended, No) else calls


def _varying(examples: list[Example]) -> dict[str, tuple[int, ...]]:
    """Return the axes whose sizes differ between calls of a module."""
    first = examples[0].tensors
    return {
        name: tuple(
            axis
            for axis in range(tensor.dim())
            if any(_size(e.tensors[name], axis) != tensor.shape[axis] for e in examples)
        )
        for name, tensor in first.items()
    }


def _size(tensor: Tensor, axis: int) -> int:
    return tensor.shape[axis] if axis < tensor.dim() else 0


def _at(path: str, program: Program) -> Program:
    """Name the weights and modules of a part as the whole source does."""
    bindings = {
        name: replace(b, name=f"{path}.{b.name}") if b.kind in ("parameter", "buffer") else b
        for name, b in program.bindings.items()
    }
    wanted = {b.name for b in program.bindings.values() if b.kind == "constant"}
    weights = {n if n in wanted else f"{path}.{n}": t for n, t in program.weights.items()}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (f"{path}.{inner}" if inner else path, cls)
                for key, (inner, cls) in stack.items()
            }
    return replace(program, name=path, bindings=bindings, weights=weights)


def with_parts(source: nn.Module, parts: Mapping[str, Program], *, strict: bool) -> nn.Module:
    """Return the source with the captured modules running their Programs; it shares all tensors.

    A call that does not fit a part runs the source's own module, which is equal, or raises if
    `strict`: a part that was rewritten must never be left out in silence.
    """
    return _copied(source, parts, "", strict)


def _copied(module: nn.Module, parts: Mapping[str, Program], path: str, strict: bool) -> nn.Module:
    copied = copy.copy(module)
    copied.__dict__ = dict(module.__dict__)
    copied.__dict__["_modules"] = {
        name: None
        if child is None
        else _copied(child, parts, f"{path}.{name}" if path else name, strict)
        for name, child in module.__dict__["_modules"].items()
    }
    if path in parts:
        copied.forward = parts[path].__call__ if strict else _either(parts[path], module)
    return copied


def _either(program: Program, module: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            values = program.form.flatten(args, kwargs)
        except (TypeError, ValueError):
            return module(*args, **kwargs)
        with torch.no_grad():
            return program.form.unflatten(program.run(values), values)

    return forward
