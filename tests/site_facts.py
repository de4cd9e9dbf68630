"""What a test expects a site to say, and how a found site differs from it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from attnopt.nouns import Mask, Site

ANY: Final = "any"
"""A fact that the source does not settle: not compared."""

TOLERANCE: Final = 1e-5
"""Relative: a scale read from a float32 constant carries its rounding."""


@dataclass(frozen=True)
class Expected:
    """The facts of one site as its author knows them; a tuple allows each of its members."""

    heads: Any = ANY
    kv_heads: Any = ANY
    head_dim: Any = ANY
    v_head_dim: Any = ANY
    scale: Any = ANY
    mask: Any = ANY
    kind: Any = ANY
    softcap: Any = ANY
    sinks: Any = ANY
    padded: Any = ANY
    bias: Any = ANY
    cached: Any = ANY
    note: str = ""


COMPARED: Final = tuple(f.name for f in fields(Expected) if f.name != "note")


def mismatches(site: Site, expected: Expected) -> tuple[str, ...]:
    """List the facts that differ, one line each."""
    return tuple(
        f"{name}: found {getattr(site, name)}, expected {_shown(getattr(expected, name))}"
        for name in COMPARED
        if not _agree(getattr(site, name), getattr(expected, name))
    )


def all_mismatches(sites: Sequence[Site], expected: Sequence[Expected]) -> tuple[str, ...]:
    """Compare sites with expectations in order of execution, or pairwise where counts differ."""
    if len(sites) != len(expected):
        return (f"count: found {len(sites)}, expected {len(expected)}",)
    return tuple(
        f"{site.name}: {line}"
        for site, facts in zip(sites, expected, strict=True)
        for line in mismatches(site, facts)
    )


def _agree(found: Any, expected: Any) -> bool:
    if expected is ANY:
        return True
    if isinstance(expected, tuple):
        return any(_agree(found, one) for one in expected)
    if isinstance(expected, Mask):
        return isinstance(found, Mask) and _mask_facts(found) == _mask_facts(expected)
    if isinstance(expected, float) and isinstance(found, float | int):
        return abs(found - expected) <= TOLERANCE * abs(expected)
    return bool(found == expected)


def _mask_facts(mask: Mask) -> Iterable[Any]:
    return (mask.kind, mask.window, mask.right or None, mask.prefix)


def _shown(expected: Any) -> str:
    if isinstance(expected, tuple):
        return " or ".join(str(one) for one in expected)
    return str(expected)
