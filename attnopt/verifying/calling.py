"""Programs and modules, called alike: by name, in eval mode, without gradients."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.lowering import lower
from attnopt.program import Program

Run = Callable[..., Any]
Call = Mapping[str, Any]


def in_float32(program: Program) -> Any:
    """Return something callable that runs a program in float32, fast where that is possible."""
    if set(program.parts) - {"encode", "decode"}:
        return program.cast(torch.float32)
    return lower(program, "eager").to(torch.float32)


@contextmanager
def ready(model: Any) -> Generator[Run]:
    """Give what runs a Program in float32, or a module as it is, its dropout off meanwhile."""
    if isinstance(model, Program):
        model = in_float32(model)
    if not callable(model):
        raise TypeError(f"a Program or a module can be compared, not {type(model).__name__}")
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def without_labels(call: Call) -> dict[str, Any]:
    """Return what a model is given of a call."""
    return {name: value for name, value in call.items() if name != "labels"}


def valid(call: Call, name: str = "attention_mask") -> Tensor | None:
    """Return which tokens are real, (rows, tokens); None where nothing tells padding."""
    mask = call.get(name)
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def field(output: Any, *names: str) -> Any:
    """Return the first of some fields that an output has, or None."""
    for name in names:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return None
