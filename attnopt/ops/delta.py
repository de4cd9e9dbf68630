"""The gated delta rule: a linear attention that first takes out what it would read for a key.

S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T, and o_t = S_t^T q_t: the rule
of Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464; Qwen3-Next, OLMo hybrid) and, with a decay
of each channel, of Kimi Linear.

Axis letters: B batch, T tokens, H heads, N channels of keys, M channels of values, C chunks,
L tokens of a chunk. Decays are logarithms, (B, T, H, 1) or (B, T, H, N).
"""

import torch
from torch import Tensor

from attnopt.ops.states import chunks, decays_between, register


def gated_delta_rule_reference(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHM: Tensor,
    decay_BTHN: Tensor,
    beta_BTH: Tensor,
    initial_BHNM: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what every token reads (B, T, H, M), and the last state (B, H, N, M)."""
    state = initial_BHNM
    read: list[Tensor] = []
    for token in range(q_BTHN.shape[1]):
        key = k_BTHN[:, token].unsqueeze(-1)
        state = state * decay_BTHN[:, token].exp().unsqueeze(-1)
        known = (state * key).sum(-2)
        new = (v_BTHM[:, token] - known) * beta_BTH[:, token].unsqueeze(-1)
        state = state + key * new.unsqueeze(-2)
        read.append((state * q_BTHN[:, token].unsqueeze(-1)).sum(-2))
    if not read:
        return torch.zeros_like(v_BTHM), initial_BHNM.clone()
    return torch.stack(read, 1), state.contiguous()


def _computed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Run many tokens by chunks where heads decay as one, and what else there is token by token."""
    if q.shape[1] > 1 and decay.shape[-1] == 1:
        return _by_chunks(q, k, v, decay.squeeze(-1), beta, initial)
    return gated_delta_rule_reference(q, k, v, decay, beta, initial)


def _by_chunks(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHM: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    initial_BHNM: Tensor,
) -> tuple[Tensor, Tensor]:
    """Solve each chunk for what it would write after zeros, then go from state to state."""
    tokens = q_BTHN.shape[1]
    q, k, v = (chunks(x) for x in (q_BTHN, k_BTHN, v_BTHM))
    decay, beta = (chunks(x.unsqueeze(-1)) for x in (decay_BTH, beta_BTH))
    sums = decay.cumsum(-2)
    between = decays_between(sums)
    products = k.transpose(-1, -2)
    # Its diagonal is not read: each token takes its own key as new.
    system = (beta * k) @ products * between
    written = torch.cat([v, k * sums.exp()], -1) * beta
    solved = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    new, known = solved.split([v.shape[-1], k.shape[-1]], -1)
    within = q @ products * between
    queries = q * sums.exp()
    last = sums[..., -1:, :]
    keys = (k * (last - sums).exp()).transpose(-1, -2)
    faded = last.exp()
    state, read = initial_BHNM, []
    for chunk in range(q.shape[2]):
        value = new[:, :, chunk] - known[:, :, chunk] @ state
        read.append(queries[:, :, chunk] @ state + within[:, :, chunk] @ value)
        state = faded[:, :, chunk] * state + keys[:, :, chunk] @ value
    return torch.cat(read, 2)[:, :, :tokens].transpose(1, 2).contiguous(), state.contiguous()


gated_delta_rule = register(
    "gated_delta_rule", ("q", "k", "v", "decay", "beta", "initial"), _computed, written="v"
)
