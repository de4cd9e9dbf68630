"""The ops that an attention may be rewritten to, and the fast copy of each.

A variant takes queries, keys and values first, its own tensors and lengths next, and options by
name, those of the canonical attention among them. Its fast copy takes the same and `memo`, a
dictionary in which the layers of one forward share what they make, or None.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from attnopt.ops.attention import attention
from attnopt.ops.sdpa import attend

Fast = Callable[..., Any]


def fast_copy(node: Any) -> Fast | None:
    """Return the fast copy of what a node of a graph calls; None where it calls no variant."""
    return fast_copies().get(node.target)


@cache
def fast_copies() -> dict[Any, Fast]:
    """Return every variant with its fast copy."""
    from attnopt.ops.agent import agent_attention
    from attnopt.ops.blocks import block_attention
    from attnopt.ops.blockwise import attend_blocks
    from attnopt.ops.boxes import attend_neighborhood
    from attnopt.ops.chunks import attend_linear, attend_linear_step
    from attnopt.ops.linear import linear_attention, linear_attention_step
    from attnopt.ops.neighborhood import neighborhood_attention
    from attnopt.ops.packed import attend_routed
    from attnopt.ops.routed import routed_attention
    from attnopt.ops.through_agents import attend_agents
    from attnopt.ops.window import attend_window, window_attention

    return {
        attention: attend,
        block_attention: attend_blocks,
        window_attention: attend_window,
        neighborhood_attention: attend_neighborhood,
        routed_attention: attend_routed,
        linear_attention: attend_linear,
        linear_attention_step: attend_linear_step,
        agent_attention: attend_agents,
    }


@cache
def direct_calls() -> dict[Any, Callable[..., Any]]:
    """Return what to call in place of other ops where a graph runs op by op or is traced."""
    from attnopt.ops.gates import (
        fitted_gates,
        fitted_gates_reference,
        norm_gates,
        norm_gates_reference,
        router_gates,
        router_gates_reference,
    )
    from attnopt.ops.plan_blocks import plan_blocks, plan_tiles

    return {
        plan_blocks: plan_tiles,
        norm_gates: norm_gates_reference,
        fitted_gates: fitted_gates_reference,
        router_gates: router_gates_reference,
    }
