"""The op library `torch.ops.attnopt`: each op's reference is its definition."""

from attnopt.ops.agent import agent_attention, agent_attention_reference
from attnopt.ops.attention import attention, attention_lse, attention_reference
from attnopt.ops.blocks import block_attention, block_attention_lse, block_attention_reference
from attnopt.ops.cached import cached_attention, cached_attention_reference
from attnopt.ops.delta import gated_delta_rule, gated_delta_rule_reference
from attnopt.ops.gated import gated_linear_attention, gated_linear_attention_reference
from attnopt.ops.gates import fitted_gates, norm_gates, router_gates
from attnopt.ops.linear import (
    linear_attention,
    linear_attention_reference,
    linear_attention_step,
    linear_attention_step_reference,
)
from attnopt.ops.neighborhood import (
    neighborhood_attention,
    neighborhood_attention_lse,
    neighborhood_attention_reference,
)
from attnopt.ops.opaque import block_attention_fast
from attnopt.ops.plan_blocks import plan_blocks
from attnopt.ops.recurrence import linear_recurrence, linear_recurrence_reference
from attnopt.ops.routed import routed_attention, routed_attention_reference
from attnopt.ops.selective import selective_scan, selective_scan_reference
from attnopt.ops.tiles import tile_tokens
from attnopt.ops.window import window_attention, window_attention_reference

__all__ = [
    "agent_attention",
    "agent_attention_reference",
    "attention",
    "attention_lse",
    "attention_reference",
    "block_attention",
    "block_attention_fast",
    "block_attention_lse",
    "block_attention_reference",
    "cached_attention",
    "cached_attention_reference",
    "fitted_gates",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_linear_attention",
    "gated_linear_attention_reference",
    "linear_attention",
    "linear_attention_reference",
    "linear_attention_step",
    "linear_attention_step_reference",
    "linear_recurrence",
    "linear_recurrence_reference",
    "neighborhood_attention",
    "neighborhood_attention_lse",
    "neighborhood_attention_reference",
    "norm_gates",
    "plan_blocks",
    "routed_attention",
    "routed_attention_reference",
    "router_gates",
    "selective_scan",
    "selective_scan_reference",
    "tile_tokens",
    "window_attention",
    "window_attention_reference",
]
