"""What every implementation of attention by a plan must do, against a mask made key by key.

An implementation joins by a row in IMPLEMENTATIONS: a function with the reference's arguments that
returns the output.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from conformance import KINDS, TOLERANCE, Implementation, Kind, defined, draw, padding
from torch import Tensor

from attnopt.ops import block_attention_reference
from attnopt.ops.blocks import listed
from attnopt.ops.blockwise import attend_blocks


def _reference(*args: Any, **options: Any) -> Tensor:
    return block_attention_reference(*args, **options)[0]


def _with_memo(*args: Any, **options: Any) -> Tensor:
    return attend_blocks(*args, memo={}, **options)


IMPLEMENTATIONS: Final = (
    Implementation("reference", _reference),
    Implementation("fast copy, op by op", _with_memo),
    Implementation("fast copy, as one op", attend_blocks),
)

NONE, CAUSAL = KINDS[:2]
NEAR: Final = Kind(
    "window 40", {"causal": True, "window": 40}, lambda i, j: (j <= i) & (j > i - 40)
)
AROUND: Final = Kind(
    "both sides", {"window": 30, "right": 9}, lambda i, j: (j >= i - 30) & (j <= i + 9)
)


@dataclass(frozen=True)
class Problem:
    """Sizes, plan and options of one call, from which its tensors are drawn.

    `density` is the chance of a tile to be visited, `whole` that of one to be seen whole.
    """

    heads: tuple[int, int, int] = (4, 2, 2)
    plan_heads: int = 2
    queries: int = 61
    keys: int = 61
    tiles: tuple[int, int] = (16, 16)
    kind: Kind = CAUSAL
    density: float = 0.5
    whole: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    one_plan: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw queries, keys and values of two rows."""
        heads, key_heads, value_heads = self.heads
        return (
            draw(2, heads, self.queries, 8, seed=1).to(self.dtype),
            draw(2, key_heads, self.keys, 8, seed=2).to(self.dtype),
            draw(2, value_heads, self.keys, 6, seed=3).to(self.dtype),
        )

    def grids(self) -> tuple[Tensor, Tensor]:
        """Draw which tiles are visited through the masks, and which are seen whole."""
        rows, columns = -(-self.queries // self.tiles[0]), -(-self.keys // self.tiles[1])
        sizes = (1 if self.one_plan else 2, self.plan_heads, rows, columns)
        chance = torch.rand(sizes, generator=torch.Generator().manual_seed(4))
        return chance < self.density, chance > 1 - self.whole

    def call(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the arguments of an implementation behind queries, keys and values."""
        masked, whole = self.grids()
        lists = (*listed(masked), *(listed(whole) if self.whole else ()))
        tiles = {"q_tile": self.tiles[0], "k_tile": self.tiles[1]}
        return lists, {**tiles, **self.kind.options, **self.options}

    def seen(self) -> Tensor:
        """Return which keys the plan and the positions show, (B or 1, H, T, S)."""
        masked, whole = self.grids()
        heads = [h * self.plan_heads // self.heads[0] for h in range(self.heads[0])]
        rows = torch.arange(self.queries) // self.tiles[0]
        columns = torch.arange(self.keys) // self.tiles[1]
        by_pair = [g[:, heads][:, :, rows][..., columns] for g in (masked, whole)]
        place = torch.arange(self.queries)[:, None] + self.keys - self.queries
        within = self.kind.rule(place, torch.arange(self.keys))
        return (by_pair[0] & within) | by_pair[1]


def problems() -> Iterator[Problem]:
    """Yield what every implementation is asked for."""
    sizes = ((1, 61), (61, 61), (64, 64), (40, 61), (61, 40), (7, 7), (63, 190))
    for dtype, (queries, keys) in itertools.product(TOLERANCE, sizes):
        yield Problem(queries=queries, keys=keys, dtype=dtype)
    for plan_heads, density in itertools.product((1, 2, 4), (0.0, 0.1, 0.9, 1.0)):
        yield Problem(plan_heads=plan_heads, density=density, one_plan=density == 0.1)
    for kind, (queries, keys) in itertools.product(
        (NONE, CAUSAL, NEAR, AROUND, *KINDS[5:6], *KINDS[10:]), ((100, 100), (37, 100))
    ):
        shared: dict[str, Any] = {"kind": kind, "queries": queries, "keys": keys}
        yield Problem(**shared, whole=0.2)
        yield Problem(**shared, options={"padding": padding(2, keys)}, density=0.4, whole=0.3)
        yield Problem(**shared, options={"padding": padding(2, keys), "mean_if_blind": True})
        yield Problem(**shared, tiles=(1, 16))
        yield Problem(**shared, tiles=(1, 16), whole=0.2)
    yield Problem(tiles=(16, 8), heads=(6, 2, 3), plan_heads=6)
    yield Problem(tiles=(32, 8), heads=(6, 2, 3), plan_heads=2)
    yield Problem(options={"k_map": [0, 1, 0, 1], "v_map": [1, 1, 0, 1]}, plan_heads=4)
    yield Problem(options={"softcap": 3.0, "scale": 0.4})
    yield Problem(options={"sinks": draw(4, seed=5)})
    yield Problem(options={"bias": draw(1, 4, 61, 61, seed=9)})
    yield Problem(options={"mask": draw(2, 1, 61, 61, seed=9) > 0})
    yield Problem(options={"mask": draw(2, 1, 61, 61, seed=9) > 0}, density=1.0)


def error(implementation: Implementation, problem: Problem) -> float:
    """Return the largest error as a share of the largest value."""
    q, k, v = problem.tensors()
    lists, options = problem.call()
    got = implementation.call(q, k, v, *lists, **options)
    seen = problem.seen()
    if "mask" in options:
        seen = seen & options["mask"]
    rest = {n: x for n, x in options.items() if n not in problem.kind.options}
    want = defined(q, k, v, lambda i, j: torch.ones_like(i == j), {**rest, "mask": seen})
    assert got.shape == want.shape
    assert got.dtype == problem.dtype
    return float((got.double() - want).abs().max() / v.double().abs().max())
