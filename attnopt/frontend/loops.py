"""Loops of Transformers that no graph of every length can hold, spelled without them while tracing.

A loop over experts takes values to run; one over tokens or chunks is unrolled, for one length.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch._dynamo import trace_rules

from attnopt.frontend.branches import BRANCHES, size_of
from attnopt.frontend.experts import EXPERTS
from attnopt.frontend.landmarks import LANDMARKS
from attnopt.frontend.pooling import POOLING
from attnopt.frontend.scans import SCANS
from attnopt.frontend.windows import WINDOWS, divide

_HOME = "transformers.models."
# Functions and methods of the files that define a source, with what computes the same.
_LOOPLESS: Final[Mapping[str, Callable[..., Any]]] = {
    **BRANCHES,
    **EXPERTS,
    **LANDMARKS,
    **POOLING,
    **SCANS,
    **WINDOWS,
}


@contextlib.contextmanager
def without_loops(source: nn.Module) -> Generator[None]:
    """Trace without loops on values or lengths, and without casts that do nothing."""
    # Dynamo notes which functions it knows when it is first asked: not while one is replaced.
    trace_rules.get_torch_obj_rule_map()
    homes = {type(m).__module__ for m in source.modules()}
    with contextlib.ExitStack() as stack:
        for home in sorted(h for h in homes if h.startswith(_HOME)):
            for path, value in _LOOPLESS.items():
                stack.enter_context(_replaced(sys.modules[home], path, value))
            stack.enter_context(_added(sys.modules[home], "len", size_of))
        stack.enter_context(_replaced(nn, "Module.to", _to))
        stack.enter_context(_replaced(torch, "div", divide))
        yield


@contextlib.contextmanager
def _replaced(home: ModuleType, path: str, value: object) -> Generator[None]:
    """Replace a function, or a method of a class, where the file has it."""
    prefix, _, name = path.rpartition(".")
    owner = getattr(home, prefix, None) if prefix else home
    original = inspect.getattr_static(owner, name, None)
    if original is None:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _added(home: ModuleType, name: str, value: object) -> Generator[None]:
    """Give a file a name of its own for a builtin."""
    setattr(home, name, value)
    try:
        yield
    finally:
        delattr(home, name)


_stock_to = nn.Module.to


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a module as it is where it has the wanted dtype already."""
    wanted = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(wanted, torch.dtype) and all(p.dtype is wanted for p in module.parameters()):
        return module
    return _stock_to(module, *args, **kwargs)
