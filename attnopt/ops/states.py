"""Ops that run over tokens from a state, and hand on the last: their chunks and registration.

Such an op takes what its rule reads, and a state as the last; it returns what every token reads,
shaped as what is written, and the state after the last token.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

CHUNK: Final = 64

Computed = Callable[..., tuple[Tensor, Tensor]]
_LIBRARY: Final = torch.library.Library("attnopt", "FRAGMENT")


def chunks(x_BTHX: Tensor) -> Tensor:
    """Return (B, H, C, L, X): the last chunk ends with zeros, which neither decay nor write."""
    tokens = x_BTHX.shape[1]
    length = min(tokens, CHUNK)
    padded = functional.pad(x_BTHX.transpose(1, 2), (0, 0, 0, -tokens % length))
    found: Tensor = padded.unflatten(2, (-1, length))
    return found


def decays_between(sums_L1: Tensor) -> Tensor:
    """Return how much of what token s wrote is left at token l (..., L, L), from running sums."""
    length = sums_L1.shape[-2]
    ahead = torch.ones(length, length, dtype=torch.bool, device=sums_L1.device).triu(1)
    return (sums_L1 - sums_L1.transpose(-1, -2)).masked_fill(ahead, -torch.inf).exp()


def register(name: str, given: Sequence[str], computed: Computed, *, written: str) -> Any:
    """Return the op `attnopt::name`; its gradients compute it once more, with a record of it."""
    like = given.index(written)

    def shaped(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[like].new_empty(inputs[like].shape), inputs[-1].new_empty(inputs[-1].shape)

    def gradients(ctx: Any, of_read: Tensor, of_state: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            made = computed(*inputs)
        found: Any = torch.autograd.grad(made, inputs, (of_read, of_state))
        return tuple(found)

    parameters = ", ".join(f"Tensor {x}" for x in given)
    _LIBRARY.define(f"{name}({parameters}) -> (Tensor, Tensor)")
    _LIBRARY.impl(name, computed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnopt::{name}", shaped, lib=_LIBRARY)
    torch.library.register_autograd(
        f"attnopt::{name}", gradients, setup_context=_save, lib=_LIBRARY
    )
    return getattr(torch.ops.attnopt, name).default


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
