"""The masks of the GPU benchmark, each said once: as a structure and a window of keys a query.

Names as in LongCA-bench (arXiv 2510.17896). Documents have lengths drawn once, a few long ones
among many short ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from attnopt.backends.triton_gpu.attending import Windows
from attnopt.ops.plans import BlockPlan, plan_of_structure, plan_of_windows

DEVICE: Final = "cuda"
PART: Final = 0.1
"""A prefix or question is this share of its document."""
BLOCK: Final = 2048


@dataclass(frozen=True)
class Shown:
    """What a mask shows: a structure, and where there are `windows` only what lies in them."""

    tokens: int
    structure: dict[str, Any] = field(default_factory=dict)
    windows: Windows | None = None

    def plan(self, tile: int = 128) -> BlockPlan:
        """Return the plan of tiles."""
        if self.windows is None:
            return plan_of_structure(
                self.tokens, self.tokens, tile, tile, device=DEVICE, **self.structure
            )
        return plan_of_windows(*self.windows, tile, tile, **self.structure)

    def rows(self, first: int, count: int) -> Tensor:
        """Return the mask of some queries as booleans."""
        row = torch.arange(first, first + count, device=DEVICE).unsqueeze(1)
        column = torch.arange(self.tokens, device=DEVICE)
        return self.rule(row, row, row, column).expand(count, self.tokens)

    @cached_property
    def rule(self) -> Callable[..., Tensor]:
        """Return the same as a mask function of FlexAttention."""
        window, right = self.structure.get("window"), self.structure.get("right")
        causal = self.structure.get("causal") or (window is not None and right is None)
        first, prefix = self.structure.get("first") or 0, self.structure.get("prefix") or 0
        chunk, windows = self.structure.get("chunk"), self.windows

        def shown(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (j <= i) | (j < prefix) if causal else j >= 0
            if window is not None:
                reach = window if right is None else window + 1
                seen = seen & ((i - j < reach) | (j < first))
            if right is not None:
                seen = seen & (j - i <= right)
            if chunk is not None:
                seen = seen & (i // chunk == j // chunk)
            if windows is not None:
                near = windows.place[j, 0] < 0
                inside = windows.start[i, 0] >= 0
                for axis in range(windows.place.shape[1]):
                    place = windows.place[j, axis]
                    inside = inside & (windows.start[i, axis] <= place)
                    inside = inside & (place < windows.stop[i, axis])
                seen = seen & (near | inside)
            return seen

        return shown


def documents(tokens: int) -> tuple[Tensor, Tensor]:
    """Return where the document of each token begins and ends."""
    generator = torch.Generator().manual_seed(0)
    lengths = (2 ** (7 + 6 * torch.rand(tokens, generator=generator))).int()
    ends = lengths.cumsum(0).clamp(max=tokens)
    ends = ends[: int((ends < tokens).sum()) + 1]
    which = torch.searchsorted(ends, torch.arange(tokens), right=True)
    starts = torch.cat([torch.zeros(1, dtype=ends.dtype), ends[:-1]])
    return starts[which].to(DEVICE), ends[which].to(DEVICE)


def in_line(start: Tensor, stop: Tensor, place: Tensor | None = None) -> Windows:
    """Return windows over positions."""
    place = torch.arange(len(start), device=DEVICE) if place is None else place
    return Windows(*(x.int().unsqueeze(-1).contiguous() for x in (start, stop, place)))


def mask(name: str, tokens: int) -> Shown:
    """Return a mask by name."""
    if name in STRUCTURES:
        return Shown(tokens, STRUCTURES[name])
    start, stop = documents(tokens)
    place = torch.arange(tokens, device=DEVICE)
    match name:
        case "document":
            return Shown(tokens, {}, in_line(start, stop))
        case "document causal":
            return Shown(tokens, {"causal": True}, in_line(start, stop))
        case "prefix document":
            prefix = start + ((stop - start) * PART).long()
            return Shown(tokens, {}, in_line(start, torch.maximum(place + 1, prefix)))
        case "block-causal document":
            end = torch.minimum(stop, (place // BLOCK + 1) * BLOCK)
            return Shown(tokens, {}, in_line(start, end))
        case _:
            question = int(tokens * PART)
            where = torch.where(place < question, -1, place)
            return Shown(tokens, {"causal": True}, in_line(start, stop, where))


STRUCTURES: Final[dict[str, dict[str, Any]]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 1024, "right": 1024},
    "window causal": {"window": 1024},
    "blockwise causal": {"causal": True, "chunk": BLOCK},
    "prefix": {"causal": True, "prefix": 2048},
    "window and first": {"window": 1024, "first": 64},
}
MASKS: Final = (
    *STRUCTURES,
    "document",
    "document causal",
    "prefix document",
    "block-causal document",
    "shared question",
)


def neighborhood(
    lengths: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    tile: tuple[int, ...],
) -> tuple[Shown, Tensor]:
    """Return shifted windows over a grid, and the order of its tokens: tile after tile.

    The last tiles of an axis may be cut off.
    """
    axes = torch.meshgrid(*(torch.arange(n, device=DEVICE) for n in lengths), indexing="ij")
    place = torch.stack(axes, -1).flatten(0, -2)
    size = torch.tensor(tile, device=DEVICE)
    rank = torch.zeros(len(place), dtype=torch.int64, device=DEVICE)
    tiles = [-(-n // t) for n, t in zip(lengths, tile, strict=True)]
    for part, counts in ((place // size, tiles), (place % size, tile)):
        for axis, count in enumerate(counts):
            rank = rank * count + part[:, axis]
    order = rank.argsort()
    place = place[order]
    length, width, step = (torch.tensor(x, device=DEVICE) for x in (lengths, window, stride))
    leader = torch.minimum(step * (place // step) + step // 2, length - 1)
    start = (leader - width // 2).clamp(min=0).minimum(length - width)
    seen = Windows(*(x.int().contiguous() for x in (start, start + width, place)))
    return Shown(len(place), {}, seen), order
