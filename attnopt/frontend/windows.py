"""Longformer's sliding chunks at every length, with global tokens or without.

The source pads to whole windows only where a remainder asks for it, divides sizes as tensors, and
looks in the mask for global tokens, which only the argument global_attention_mask makes. With it
the graph has room for as many as a call gives, none too.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_stock_div: Any = torch.div

# Windows of which two are not too long for the finder to read which tokens see each other.
_LONGEST: Final = 4096


def divide(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    """Divide as torch.div does, and two sizes without making a tensor of them."""
    whole = kwargs.get("rounding_mode") in ("trunc", "floor")
    if whole and isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return a // b
    return _stock_div(a, b, *args, **kwargs)


def _missing(config: Any, mask: Tensor, tokens: Tensor | None, *, least: int = 0) -> Any:
    """Return how many tokens, `least` or more, fill the last window of those in the mask."""
    length = mask.shape[1]
    same = tokens is None or tokens.shape[1] == length
    torch._check(same)  # pyright: ignore[reportPrivateUsage]
    windows = config.attention_window
    window = windows if isinstance(windows, int) else max(windows)
    # The chunks of one window alone have a size of 1, which a graph would fix.
    fewest = 2 if window <= _LONGEST else 1
    return torch.sym_max((length + least + window - 1) // window, fewest) * window - length


def _padded(tensor: Tensor | None, missing: Any, fill: int) -> Tensor | None:
    return None if tensor is None else functional.pad(tensor, (0, missing), value=fill)


def _embedded(embed: Callable[[Tensor], Tensor], embeds: Tensor, missing: Any, fill: int) -> Tensor:
    ids = embeds.new_full((embeds.shape[0], missing), fill, dtype=torch.long)
    return torch.cat([embeds, embed(ids)], dim=-2)


def _pad_model(
    self: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    pad_token_id: int,
) -> tuple[Any, ...]:
    missing = _missing(self.config, attention_mask, input_ids)
    if inputs_embeds is not None:
        inputs_embeds = _embedded(self.embeddings, inputs_embeds, missing, pad_token_id)
    return (
        missing,
        _padded(input_ids, missing, pad_token_id),
        _padded(attention_mask, missing, 0),
        _padded(token_type_ids, missing, 0),
        _padded(position_ids, missing, pad_token_id),
        inputs_embeds,
    )


def _pad_encoder(
    self: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor,
    inputs_embeds: Tensor,
    pad_token_id: int,
) -> tuple[Any, ...]:
    # The encoder cuts the padding off as [:-missing], which is wrong for none.
    missing = _missing(self.config, attention_mask, input_ids, least=1)
    return (
        missing,
        _padded(input_ids, missing, pad_token_id),
        _padded(attention_mask, missing, 0),
        _embedded(self.embed_tokens, inputs_embeds, missing, pad_token_id),
    )


# What says of a module, while it is traced, that its call has global tokens.
_MARK: Final = "_has_global_tokens"


def _merge(self: Any, attention_mask: Tensor, global_attention_mask: Tensor) -> Tensor:
    """Count global tokens twice, as the source does, and tell the attentions below of them."""
    for module in self.modules():
        setattr(module, _MARK, True)
    return attention_mask * (global_attention_mask + 1)


def _known(attention: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Say whether there may be global tokens, which the source asks the mask."""
    known = isinstance(options.get("is_global_attn"), bool)
    return options if known else {**options, "is_global_attn": hasattr(attention, _MARK)}


def _attention(self: Any, hidden_states: Tensor, **options: Any) -> tuple[Any, ...]:
    found = self.self(hidden_states, **_known(self, options))
    return (self.output(found[0], hidden_states), *found[1:])


def _encoder_attention(self: Any, hidden_states: Tensor, **options: Any) -> tuple[Any, ...]:
    found = self.longformer_self_attn(hidden_states, **_known(self, options))
    return (self.output(found[0]), *found[1:])


WINDOWS: Final[Mapping[str, Callable[..., Any]]] = {
    "LEDEncoder._merge_to_attention_mask": _merge,
    "LEDEncoder._pad_to_window_size": _pad_encoder,
    "LEDEncoderAttention.forward": _encoder_attention,
    "LongformerAttention.forward": _attention,
    "LongformerModel._merge_to_attention_mask": _merge,
    "LongformerModel._pad_to_window_size": _pad_model,
}
