"""A linear recurrence over tokens: h_t = decay_t * h_{t-1} + new_t, with h_{-1} = initial.

Axis letters: B batch, T tokens; all axes behind them are channels that never meet.
"""

from typing import Any

import torch
from torch import Tensor


def linear_recurrence_reference(decay: Tensor, new: Tensor, initial: Tensor) -> Tensor:
    """Return all states (B, T, ...) from decays and new terms (B, T, ...) and a state (B, ...)."""
    state = initial
    states = torch.empty_like(new)
    tokens = zip(decay.unbind(1), new.unbind(1), states.unbind(1), strict=True)
    for factor, term, following in tokens:
        state = torch.addcmul(term, factor, state, out=following)
    return states


def _shaped(decay: Tensor, new: Tensor, initial: Tensor) -> Tensor:
    return torch.empty_like(new)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    decay, _, initial = inputs
    ctx.save_for_backward(decay, initial, output)


def _gradients(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence backwards: what reaches h_t also comes from h_{t+1}, by its decay."""
    decay, initial, states = context.saved_tensors
    later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
    reached = linear_recurrence(later.flip(1), gradient.flip(1), torch.zeros_like(initial)).flip(1)
    before = torch.cat([initial.unsqueeze(1), states[:, :-1]], dim=1)
    return reached * before, reached, reached[:, 0] * decay[:, 0]


_NAME = "attnopt::linear_recurrence"
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define("linear_recurrence(Tensor decay, Tensor new, Tensor initial) -> Tensor")
_LIBRARY.impl("linear_recurrence", linear_recurrence_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _shaped, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradients, setup_context=_save, lib=_LIBRARY)

linear_recurrence = torch.ops.attnopt.linear_recurrence.default
