"""Mamba's selective scan: every channel has a state of N numbers, which decay each at its rate.

S_t = exp(s_t A) S_{t-1} + s_t x_t k_t, and o_t = S_t q_t: the steps s are those of a channel and a
token, keys B and queries C those of a token (Gu and Dao 2023, arXiv 2312.00752).

Axis letters: B batch, C channels, T tokens, N numbers of a channel's state.
"""

import torch
from torch import Tensor

from attnopt.ops.recurrence import linear_recurrence
from attnopt.ops.states import CHUNK, register


def selective_scan_reference(
    x_BCT: Tensor, steps_BCT: Tensor, rates_CN: Tensor, k_BTN: Tensor, q_BTN: Tensor,
    initial_BCN: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what every token reads (B, C, T), and the last state (B, C, N)."""
    state = initial_BCN
    read: list[Tensor] = []
    for token in range(x_BCT.shape[2]):
        step = steps_BCT[:, :, token, None]
        new = step * x_BCT[:, :, token, None] * k_BTN[:, token, None]
        state = state * torch.exp(rates_CN * step) + new
        read.append((state * q_BTN[:, token, None]).sum(-1))
    if not read:
        return torch.zeros_like(x_BCT), initial_BCN.clone()
    return torch.stack(read, -1), state.contiguous()


def _computed(
    x: Tensor, steps: Tensor, rates: Tensor, k: Tensor, q: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Run a chunk of tokens at a time, whose states are kept until they are read."""
    if x.shape[2] <= 1:
        return selective_scan_reference(x, steps, rates, k, q, initial)
    state, read = initial, []
    written_BTC, steps_BTC = (z.transpose(1, 2).contiguous() for z in (steps * x, steps))
    k, q = k.contiguous(), q.contiguous()
    for start in range(0, x.shape[2], CHUNK):
        now = slice(start, start + CHUNK)
        decay_BTCN = torch.exp(rates * steps_BTC[:, now, :, None])
        new_BTCN = written_BTC[:, now, :, None] * k[:, now, None]
        states_BTCN = linear_recurrence(decay_BTCN, new_BTCN, state)
        read.append((states_BTCN @ q[:, now, :, None]).squeeze(-1))
        state = states_BTCN[:, -1]
    return torch.cat(read, 1).transpose(1, 2).contiguous(), state.clone()


selective_scan = register(
    "selective_scan", ("x", "steps", "rates", "k", "q", "initial"), _computed, written="x"
)
