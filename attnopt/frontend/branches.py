"""Branches of Transformers on values, spelled without them while tracing.

Which tokens are global, or whether any is padding, is asked of the data; what is computed here is
the same for either answer. Sizes that data decide stay symbols, and lengths of lists too.
"""

import builtins
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch


def size_of(x: Any) -> Any:
    """Return the length of a value; that of a tensor may be a symbol."""
    return x.shape[0] if isinstance(x, Tensor) else builtins.len(x)


def plans_blocks(config: Any, tokens: int) -> bool:
    """Tell whether a model chooses blocks of keys for this number of tokens, and no other."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return False
    return bool(tokens > (5 + 2 * config.num_random_blocks) * config.block_size)


Indices = tuple[Tensor, ...]


def _global_indices(is_index_global_attn: Tensor) -> tuple[Any, Indices, Indices, Indices]:
    """Return how many slots global tokens need, where they are, and which slots are in use.

    There are two slots more than needed, so that no size is 0 or 1, whatever the data say: they
    are masked like other free slots.
    """
    counts = is_index_global_attn.long().sum(dim=1)
    numbers = torch.arange(is_index_global_attn.shape[1], device=counts.device)
    # As many numbers as the largest count: a size, and known not to be negative.
    slots = (numbers < counts.max()).nonzero().shape[0] + 2
    tokens = is_index_global_attn.nonzero(as_tuple=True)
    used = torch.arange(slots, device=counts.device) < counts.unsqueeze(-1)
    places = used.nonzero(as_tuple=True)
    torch._check(places[0].shape[0] == tokens[0].shape[0])  # pyright: ignore[reportPrivateUsage]
    return slots, tokens, places, used.logical_not().nonzero(as_tuple=True)


def _question_end(input_ids: Tensor, sep_token_id: int) -> Tensor:
    """Find the first separator of each row.

    The source refuses a batch with other than three in every row, which no graph of all batches
    asks: here only the first one counts.
    """
    return (input_ids == sep_token_id).long().argmax(dim=1)


def _hash_vectors(
    self: Any,
    vectors: Tensor,
    num_hashes: int,
    attention_mask: Tensor | None,
    increase_num_buckets: bool = False,
) -> Tensor:
    """Give padding a bucket of its own, without asking first whether there is any."""
    factors = [self.num_buckets] if isinstance(self.num_buckets, int) else self.num_buckets
    shape = (self.num_attention_heads, vectors.shape[-1], num_hashes, sum(factors) // 2)
    rotations = _drawn(self.hash_seed, shape, vectors)
    rotated = torch.einsum("bmtd,mdhr->bmhtr", vectors, rotations)
    buckets = torch.zeros_like(rotated[..., 0], dtype=torch.long)
    count = 1
    for part, factor in zip(rotated.split([f // 2 for f in factors], -1), factors, strict=True):
        buckets = buckets + count * torch.cat([part, -part], dim=-1).argmax(dim=-1)
        count *= factor
    extra = torch.tensor(int(increase_num_buckets), device=vectors.device)
    if attention_mask is not None:
        kept = attention_mask.to(torch.bool)
        buckets = torch.where(kept[:, None, None, :], buckets, count)
        extra = extra.maximum(kept.logical_not().any().long())
    offsets = torch.arange(num_hashes, device=vectors.device) * (count + extra)
    return (buckets + offsets.view(1, 1, -1, 1)).flatten(start_dim=2, end_dim=3)


def _drawn(seed: int | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draw the rotations once where the seed is fixed: they are a constant of the graph then."""
    if seed is None:
        return torch.randn(shape, device=like.device, dtype=like.dtype)
    with _python_dispatch._disable_current_modes():  # pyright: ignore[reportPrivateUsage]
        state = torch.Generator(like.device).manual_seed(seed)
        drawn = torch.randn(shape, dtype=like.dtype, device=like.device, generator=state)
    return drawn.clone()


def _positions_of_prophetnet(
    self: Any,
    inputs_shape: Any,
    device: Any,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Number the token of a step by its past, which the source makes a plain number first."""
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    if position_ids is not None:
        numbers = position_ids
    elif seen != 0:
        last = self.padding_idx + inputs_shape[1] + seen
        numbers = torch.full((1, 1), last, dtype=torch.long, device=device)
    else:
        ones = torch.ones(inputs_shape, dtype=torch.long, device=device)
        shown = ones if attention_mask is None else attention_mask.long()
        numbers = (shown.cumsum(1) * shown + self.padding_idx).clamp(0, self.max_length - 1)
    return nn.Embedding.forward(self, numbers), numbers


BRANCHES: Final[Mapping[str, Callable[..., Any]]] = {
    "LSHSelfAttention._hash_vectors": _hash_vectors,
    "LongformerSelfAttention._get_global_attn_indices": staticmethod(_global_indices),
    "ProphetNetPositionalEmbeddings.forward": _positions_of_prophetnet,
    "LEDEncoderSelfAttention._get_global_attn_indices": staticmethod(_global_indices),
    "_get_question_end_index": _question_end,
}
