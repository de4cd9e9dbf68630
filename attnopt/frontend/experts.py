"""Mixtures of experts whose loop over the chosen experts no graph can hold, spelled without it.

Every expert sees every token, and a token's weight for an expert that it did not choose is 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor


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


EXPERTS: Final[Mapping[str, Callable[..., Any]]] = {
    "DbrxExperts.forward": _dbrx,
    "SwitchTransformersExperts.forward": _switch,
}
