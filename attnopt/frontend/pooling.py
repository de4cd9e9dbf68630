"""Positions of pooled sequences, which Funnel lists in Python, as progressions of any length."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Positions:
    """The positions first, first + step, ... of `count` tokens, each of `step` original ones."""

    first: int
    step: int
    count: Any

    def pooled(self, config: Any) -> "_Positions":
        """Return every second position; a separate first token counts as a block of its own."""
        step = 2 * self.step
        if not config.separate_cls:
            return _Positions(self.first, step, (self.count - 1) // 2 + 1)
        joined = self.count if config.truncate_seq else self.count + 1
        return _Positions(1 - step, step, (joined - 1) // 2 + 1)


def _position_embeds(self: Any, seq_len: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return Funnel's encodings of positions, factorized or of all distances in each block."""

    def waves(positions: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.d_model // 2
        frequencies = 1 / (10000 ** (torch.arange(half, device=device).to(dtype) / half))
        angles = positions.to(dtype)[:, None] * frequencies[None]
        return torch.sin(angles), torch.cos(angles)

    if self.config.attention_type == "factorized":
        sine, cosine = waves(torch.arange(seq_len, device=device))
        pairs = (sine, sine), (cosine, cosine), (cosine, sine), (-sine, cosine)
        return tuple(torch.cat(pair, dim=-1) for pair in pairs)
    keys = _Positions(0, 1, seq_len)
    blocks = [[torch.cat(waves(_distances(keys, keys, 1, device)), dim=-1), None]]
    for _ in range(1, self.config.num_blocks):
        queries = keys.pooled(self.config)
        crossing = torch.cat(waves(_distances(queries, keys, 2, device)), dim=-1)
        within = torch.cat(waves(_distances(queries, queries, 1, device)), dim=-1)
        blocks.append([within, crossing])
        keys = queries
    return blocks


def _distances(queries: _Positions, keys: _Positions, shift: int, device: torch.device) -> Tensor:
    """Return the distances from queries to keys, falling, from the farthest that a shift meets."""
    farthest = queries.first - keys.first + shift * queries.count * keys.step
    count = shift * queries.count + keys.count
    distances: Tensor = torch.arange(count, device=device) * -keys.step + farthest
    return distances


POOLING: Final[Mapping[str, Callable[..., Any]]] = {
    "FunnelAttentionStructure.get_position_embeds": _position_embeds,
}
