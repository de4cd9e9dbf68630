"""State spaces and recurrences whose loop over tokens is one op, at any length."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.ops.recurrence import linear_recurrence


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's scan: B batch, C channels, T tokens, N states of a channel."""
    x_BTC = hidden_states.transpose(1, 2)
    steps_BTC = _steps(dt, delta_bias, softplus=delta_softplus).transpose(1, 2)
    decay_BTCN = torch.exp(A * steps_BTC.unsqueeze(-1))
    new_BTCN = steps_BTC.unsqueeze(-1) * B.transpose(1, 2).unsqueeze(2).float()
    new_BTCN = new_BTCN * x_BTC.unsqueeze(-1).float()
    states_BTCN = linear_recurrence(decay_BTCN, new_BTCN, torch.zeros_like(new_BTCN[:, 0]))
    read = torch.matmul(states_BTCN.to(hidden_states.dtype), C.transpose(1, 2).unsqueeze(-1))
    result: Tensor = read.squeeze(-1).transpose(1, 2)
    if D is not None:
        result = result + hidden_states * D[None, :, None]
    if z is not None:
        result = result * functional.silu(z)
    return (result, states_BTCN[:, -1]) if return_last_state else result


def _steps(dt: Tensor, bias: Tensor | None, *, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)[..., None]
    return functional.softplus(dt) if softplus else dt


def _rglru(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of a Griffin block from a state, or from none."""
    decay = (recurrent_gate * ~reset).type(acc_dtype)
    new = hidden_states.type(acc_dtype)
    initial = torch.zeros_like(new[:, 0]) if recurrent_states is None else recurrent_states
    states = linear_recurrence(decay, new, initial)
    return states.type(hidden_states.dtype), states[:, -1]


SCANS: Final[Mapping[str, Callable[..., Any]]] = {
    "mamba_selective_scan": _selective_scan,
    "RecurrentGemmaRglru._rnn_scan": _rglru,
}
