"""Gated linear attention: a state that decays, and takes the product of each key and value.

S_t = exp(g_t) S_{t-1} + k_t v_t^T, and o_t = S_t^T q_t. With a decay of each head it is the state
space of Mamba 2 (Dao and Gu 2024, arXiv 2405.21060: queries C, keys B, values the steps of x) and
the lightning attention of MiniMax; with one of each channel, the layer of Yang et al. 2023 (arXiv
2312.06635).

Axis letters: B batch, T tokens, G heads of queries and keys, H heads of values, each of R = H / G
consecutive ones reads the same keys; N channels of keys, M channels of values, C chunks, L tokens
of a chunk. Decays are logarithms, (B, T, H, 1) or (B, T, H, N).
"""

import torch
from torch import Tensor

from attnopt.ops.states import chunks, decays_between, register


def gated_linear_attention_reference(
    q_BTGN: Tensor, k_BTGN: Tensor, v_BTHM: Tensor, decay_BTHN: Tensor, initial_BHNM: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what every token reads (B, T, H, M), and the last state (B, H, N, M)."""
    shared = v_BTHM.shape[2] // k_BTGN.shape[2]
    q, k = (x.repeat_interleave(shared, dim=2).unsqueeze(-1) for x in (q_BTGN, k_BTGN))
    state = initial_BHNM
    read: list[Tensor] = []
    for token in range(q_BTGN.shape[1]):
        state = state * decay_BTHN[:, token].exp().unsqueeze(-1)
        state = state + k[:, token] * v_BTHM[:, token].unsqueeze(-2)
        read.append((state * q[:, token]).sum(-2))
    if not read:
        return torch.zeros_like(v_BTHM), initial_BHNM.clone()
    return torch.stack(read, 1), state.contiguous()


def _computed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Run many tokens by chunks where heads decay as one, and what else there is token by token."""
    if q.shape[1] > 1 and decay.shape[-1] == 1:
        return _by_chunks(q, k, v, decay, initial)
    return gated_linear_attention_reference(q, k, v, decay, initial)


def _by_chunks(
    q_BTGN: Tensor, k_BTGN: Tensor, v_BTHM: Tensor, decay_BTH1: Tensor, initial_BHNM: Tensor
) -> tuple[Tensor, Tensor]:
    """Read what each chunk writes as a product, then what comes from the states before it."""
    tokens, groups = q_BTGN.shape[1:3]
    q_BG1CLN, k_BG1CLN = (chunks(x).unsqueeze(2) for x in (q_BTGN, k_BTGN))
    v_BGRCLM, decay = (chunks(x).unflatten(1, (groups, -1)) for x in (v_BTHM, decay_BTH1))
    sums = decay.cumsum(-2)
    within = (q_BG1CLN @ k_BG1CLN.transpose(-1, -2)) * decays_between(sums)
    last = sums[..., -1:, :]
    written_BGRCNM = k_BG1CLN.transpose(-1, -2) @ (v_BGRCLM * (last - sums).exp())
    faded = last.exp()
    state_BGRNM = initial_BHNM.unflatten(1, (groups, -1))
    before = []
    for chunk in range(q_BG1CLN.shape[3]):
        before.append(state_BGRNM)
        state_BGRNM = faded[:, :, :, chunk] * state_BGRNM + written_BGRCNM[:, :, :, chunk]
    read = within @ v_BGRCLM + (q_BG1CLN @ torch.stack(before, 3)) * sums.exp()
    read_BTHM = read.flatten(3, 4).flatten(1, 2)[:, :, :tokens].transpose(1, 2)
    return read_BTHM.contiguous(), state_BGRNM.flatten(1, 2).contiguous()


gated_linear_attention = register(
    "gated_linear_attention", ("q", "k", "v", "decay", "initial"), _computed, written="v"
)
