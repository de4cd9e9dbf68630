"""State spaces and recurrences whose loop over tokens is one op, at any length."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.ops.delta import gated_delta_rule
from attnopt.ops.gated import gated_linear_attention
from attnopt.ops.recurrence import linear_recurrence
from attnopt.ops.selective import selective_scan


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
    # The source rounds these two also where a model is in doubles.
    x_BCT, k_BTN = hidden_states.float(), B.transpose(1, 2).float()
    steps_BCT = _steps(dt, delta_bias, softplus=delta_softplus)
    wide = torch.promote_types(steps_BCT.dtype, torch.float32)
    given = (x.to(wide) for x in (x_BCT, steps_BCT, A, k_BTN, C.transpose(1, 2)))
    before_BCN = x_BCT.new_zeros(*x_BCT.shape[:2], A.shape[-1], dtype=wide)
    read, last = selective_scan(*given, before_BCN)
    result: Tensor = read.to(hidden_states.dtype)
    if D is not None:
        result = result + hidden_states * D[None, :, None]
    if z is not None:
        result = result * functional.silu(z)
    return (result, last) if return_last_state else result


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


def _griffin_block(
    self: Any,
    input_states: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    use_cache: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run a Griffin block from its convolution's state, which the source drops for many tokens."""
    x_BCT = self.linear_x(input_states).transpose(1, 2)
    kept = self.conv1d_width - 1
    before = self.conv1d_state if use_cache else None
    before = x_BCT.new_zeros(*x_BCT.shape[:2], kept) if before is None else before
    full = torch.cat([before, x_BCT], dim=-1)
    self.conv1d_state = full[..., full.shape[-1] - kept :]
    if not use_cache:
        self.conv1d_state = self.rg_lru.recurrent_states = None
    filters = self.conv_1d
    mixed = functional.conv1d(full, filters.weight, filters.bias, groups=filters.groups)
    gate = self.act_fn(self.linear_y(input_states))
    states = self.rg_lru(mixed.transpose(1, 2), position_ids)
    return self.linear_out(states * gate), None


def _lightning(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run MiniMax's linear attention: H heads, D and E channels of keys and of values."""
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        mixed = (mixed * attention_mask[:, :, None]).to(mixed.dtype)
    heads = mixed.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim))
    wide = torch.promote_types(heads.dtype, torch.float32)
    q_BTHD, k_BTHD, v_BTHE = heads.to(wide).split(self.head_dim, dim=-1)
    cache = past_key_values
    before = None if cache is None else cache.get_linear_cache(self.layer_idx)
    if before is None:
        before = heads.new_zeros(len(heads), heads.shape[2], self.head_dim, self.head_dim)
    decay_BTH1 = -self.slope_rate.flatten()[:, None].to(wide).expand(*heads.shape[:3], 1)
    read, last = gated_linear_attention(q_BTHD, k_BTHD, v_BTHE, decay_BTH1, before.to(wide))
    read, last = read.to(heads.dtype), last.to(heads.dtype)
    gated = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(read.flatten(2))
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, last)
    return self.out_proj(gated), last


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba 2's scan: H heads of P channels read the states (B, H, P, N) of their groups."""
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = functional.softplus(dt) if dt_softplus else dt
    # Most sources ask for what softplus gives.
    dt = dt if dt_softplus and tuple(dt_limit) == (0, torch.inf) else dt.clamp(*dt_limit)
    steps_BTH1 = dt.float().unsqueeze(-1)
    x_BTHP = hidden_states.float()
    decay_BTH1 = A.float()[:, None] * steps_BTH1
    if initial_states is None:
        initial_states = x_BTHP.new_zeros(len(x_BTHP), *x_BTHP.shape[2:], B.shape[-1])
    before_BHNP = initial_states.float().transpose(-1, -2)
    given = C.float(), B.float(), x_BTHP * steps_BTH1, decay_BTH1
    read, last_BHNP = gated_linear_attention(*given, before_BHNP)
    result = read if D is None else read + D[:, None] * x_BTHP
    return (result, last_BHNP.transpose(-1, -2)) if return_final_states else result


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a gated delta rule; its decays (B, T, H) are one for a head, or (B, T, H, N)."""
    q, k, v, decay, rate = (x.float() for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    # Each head of queries and keys serves as many consecutive heads of values.
    shared = v.shape[2] // k.shape[2]
    if shared > 1:
        q, k = (x.repeat_interleave(shared, dim=2) for x in (q, k))
    if initial_state is None:
        initial_state = v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    decay = decay.unsqueeze(-1) if decay.dim() == v.dim() - 1 else decay
    read, last = gated_delta_rule(q * q.shape[-1] ** -0.5, k, v, decay, rate, initial_state.float())
    return read.to(query.dtype), last if output_final_state else None


SCANS: Final[Mapping[str, Callable[..., Any]]] = {
    "mamba_selective_scan": _selective_scan,
    "RecurrentGemmaRglru._rnn_scan": _rglru,
    "RecurrentGemmaRecurrentBlock.forward": _griffin_block,
    "MiniMaxLightningAttention.forward": _lightning,
    "mamba2_chunk_scan": _chunk_scan,
    # One op takes one token and many.
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "recurrent_kimi_delta_attention": _delta_rule,
}
