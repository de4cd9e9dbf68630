"""Nystromformer under a mask: its landmarks are fewer than the queries that a traced mask has."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor


def _attention(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Any, ...]:
    """Hide the same keys from every landmark: the rows of the mask are all alike."""
    row = None if attention_mask is None else attention_mask[:, :, :1]
    found = self.self(hidden_states, row, output_attentions)
    return (self.output(found[0], hidden_states), *found[1:])


LANDMARKS: Final[Mapping[str, Callable[..., Any]]] = {"NystromformerAttention.forward": _attention}
