"""The structure of a mask: which keys a query sees as far as positions decide it.

T queries sit at the end of S keys: query t is at position t + S - T. The options of an op say the
structure in plain numbers; a `Mask` is the same by name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.nouns import Mask

OPTIONS = ("causal", "window", "right", "prefix", "chunk", "first")


def visible_keys(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    right: int | None = None,
    prefix: int | None = None,
    chunk: int | None = None,
    first: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor | None:
    """Return the (T, S) structure, true = visible; None where everything is.

    `window` alone is causal and counts the query's own key; with `right` it counts keys to the
    left, as `right` does to the right, both without the query's own. `chunk` hides other chunks of
    that length. `prefix` keys are seen by every query that is causal otherwise; the `first` keys by
    every later query, however far behind its window they are.
    """
    row = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries)
    column = torch.arange(keys, device=device)
    return visible_at(
        row, column, causal=causal, window=window, right=right, prefix=prefix, chunk=chunk,
        first=first,
    )  # fmt: skip


def visible_at(
    row: Tensor,
    column: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    right: int | None = None,
    prefix: int | None = None,
    chunk: int | None = None,
    first: int | None = None,
) -> Tensor | None:
    """Return whether queries at the positions `row` see keys at those of `column`."""
    seen: list[Tensor] = []
    if causal or (window is not None and right is None):
        past = column <= row
        seen.append(past if prefix is None else past | (column < prefix))
    if window is not None:
        near = row - column < window if right is None else row - column <= window
        seen.append(near if first is None else near | (column < first))
    if right is not None:
        seen.append(column - row <= right)
    if chunk is not None:
        seen.append(chunk_of(row, chunk) == chunk_of(column, chunk))
    return _all(seen)


def chunk_of(position: Tensor, length: int) -> Tensor:
    """Return the number of the chunk that a position is in."""
    return torch.div(position, length, rounding_mode="floor")


def _all(seen: list[Tensor]) -> Tensor | None:
    if not seen:
        return None
    total = seen[0]
    for more in seen[1:]:
        total = total & more
    return total


def options_of(mask: Mask) -> dict[str, Any]:
    """Return the options of an op that stand for a named mask."""
    match mask.kind:
        case "none":
            return {}
        case "causal":
            return {"causal": True}
        case "sliding":
            side = {"causal": True} if mask.right is None else {"right": mask.right}
            first = {} if mask.first is None else {"first": mask.first}
            return {**side, "window": mask.window, **first}
        case "prefix":
            return {"causal": True, "prefix": mask.prefix}
        case "chunked":
            return {"causal": True, "chunk": mask.window}
        case "block":
            return {"chunk": mask.window}
        case _:
            raise ValueError(f"a {mask.kind} mask has no structure")


def mask_of(options: Mapping[str, Any]) -> Mask:
    """Name the structure that the options of an op say; those of other variants have no name."""
    if "grid" in options or "feature" in options:
        return Mask("dense")
    window, right, prefix, chunk, first = (options.get(n) for n in OPTIONS[1:])
    if chunk is not None:
        return Mask("chunked" if options.get("causal") else "block", window=chunk)
    if prefix is not None:
        return Mask("prefix", prefix=prefix)
    if window is not None:
        return Mask("sliding", window=window, right=right, first=first)
    return Mask("causal" if options.get("causal") else "none")
