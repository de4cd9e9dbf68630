"""Mixtures of experts whose loop over the chosen experts no graph can hold, spelled without it.

Every expert sees every token, and a token's weight for an expert that it did not choose is 0. The
replacements hold while tracing only.
"""

import contextlib
import importlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rewriting:
    """A class of Transformers, and a forward that computes the same without a loop on values."""

    module: str
    name: str
    forward: Callable[..., Tensor]


@contextlib.contextmanager
def without_loops(source: nn.Module) -> Generator[None]:
    """Trace with experts spelled without loops on values, and without casts that do nothing."""
    used = {f"{type(m).__module__}.{type(m).__name__}" for m in source.modules()}
    with contextlib.ExitStack() as stack:
        for row in _REWRITINGS:
            if f"{row.module}.{row.name}" in used:
                cls = getattr(importlib.import_module(row.module), row.name)
                stack.enter_context(_replaced(cls, "forward", row.forward))
        stack.enter_context(_replaced(nn.Module, "to", _to))
        yield


@contextlib.contextmanager
def _replaced(cls: type, name: str, value: object) -> Generator[None]:
    original = getattr(cls, name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        setattr(cls, name, original)


_stock_to = nn.Module.to


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a module as it is where it has the wanted dtype already."""
    wanted = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(wanted, torch.dtype) and all(p.dtype is wanted for p in module.parameters()):
        return module
    return _stock_to(module, *args, **kwargs)


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    batch = hidden_states.shape[0]
    flat = hidden_states.reshape(-1, self.hidden_size)
    w1, v1, w2 = (
        w.view(-1, self.ffn_hidden_size, self.hidden_size)
        for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2)
    )
    result = torch.zeros_like(flat)
    for expert in range(self.num_experts):
        weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)
        states: Tensor = self.mlp(flat, w1[expert], v1[expert], w2[expert])
        result = result + states.view(-1, self.hidden_size) * weight
    return result.view(batch, -1, self.hidden_size)


def _switch(
    self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    result = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        weight = routing_weights * selected_experts[:, :, expert]
        states: Tensor = self[f"expert_{expert}"](hidden_states)
        result = result + (states * weight).to(hidden_states.dtype)
    return result


_MODELS = "transformers.models"
_REWRITINGS = (
    Rewriting(module=f"{_MODELS}.dbrx.modeling_dbrx", name="DbrxExperts", forward=_dbrx),
    Rewriting(
        module=f"{_MODELS}.switch_transformers.modeling_switch_transformers",
        name="SwitchTransformersExperts",
        forward=_switch,
    ),
)
