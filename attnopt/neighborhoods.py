"""Neighbourhoods on a grid of tokens: which keys each query sees, and which tiles that takes.

One axis of length L with window w and stride s: queries come in groups of s, and each group sees
the w keys around its leader, floor(w / 2) of them before it. At a border the window moves inwards
("shift") or loses what lies outside ("clamp"). On a causal axis the window ends at the last query
of the group, and no query sees what comes after it. Dilation g parts the axis in g residue classes,
each an axis of its own. Several axes: a key is seen where every axis says so. s = 1 is attention to
neighbours (https://arxiv.org/abs/2204.07143), s = w that within blocks; in between lies the
generalised one (https://arxiv.org/abs/2504.16922).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

Border = Literal["shift", "clamp"]
BORDERS: Final = get_args(Border)


@dataclass(frozen=True)
class Axis:
    """One axis of a grid, and which keys of it a query sees."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    border: Border = "shift"

    def span(self, position: int, length: int) -> tuple[int, int]:
        """Return the first key that a query of a class of this length sees, and the one after."""
        group = position // self.stride * self.stride
        if self.causal:
            leader = min(group + self.stride - 1, length - 1)
            return max(leader - self.window + 1, 0), position + 1
        leader = min(group + self.stride // 2, length - 1)
        start = leader - self.window // 2
        if self.border == "clamp":
            return max(start, 0), min(start + self.window, length)
        start = min(max(start, 0), length - self.window)
        return start, start + self.window

    def class_length(self, residue: int) -> int:
        """Return how many positions have this residue by the dilation."""
        return len(range(residue, self.length, self.dilation))

    def keys(self, position: int) -> range:
        """Return the keys that a query sees."""
        residue = position % self.dilation
        start, stop = self.span(position // self.dilation, self.class_length(residue))
        return range(residue + self.dilation * start, residue + self.dilation * stop, self.dilation)

    @property
    def is_dense(self) -> bool:
        """Whether every query sees every key."""
        everything = range(self.length)
        return all(self.keys(i) == everything for i in range(self.length))

    @property
    def mean_window(self) -> float:
        """How many keys a query sees on average."""
        return sum(len(self.keys(i)) for i in range(self.length)) / self.length

    def pieces(self, tile: int) -> Iterator["Piece"]:
        """Cut the queries into tiles, class by class, each with the box of keys that it sees."""
        for residue in range(min(self.dilation, self.length)):
            length = self.class_length(residue)
            for first in range(0, length, tile):
                queries = range(first, min(first + tile, length))
                spans = [self.span(i, length) for i in queries]
                low, high = min(a for a, _ in spans), max(b for _, b in spans)
                yield Piece(
                    _spread(queries, residue, self.dilation),
                    _spread(range(low, high), residue, self.dilation),
                    tuple((a - low, b - low) for a, b in spans),
                )


def _spread(numbers: range, residue: int, dilation: int) -> range:
    """Return the positions of the numbers of a class."""
    first, last = residue + dilation * numbers.start, residue + dilation * numbers.stop
    return range(first, last, dilation)


@dataclass(frozen=True)
class Piece:
    """A tile of queries of one axis, its box of keys, and what each query sees of the box."""

    queries: range
    keys: range
    spans: tuple[tuple[int, int], ...]

    @property
    def is_dense(self) -> bool:
        """Whether each of its queries sees the whole box."""
        return all(span == (0, len(self.keys)) for span in self.spans)


@dataclass(frozen=True)
class Neighborhood:
    """A grid of tokens, what each of them sees, and how many tokens before it see everything."""

    axes: tuple[Axis, ...]
    leading: int = 0

    @classmethod
    def of(
        cls,
        grid: Sequence[int],
        window: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        causal: Sequence[bool],
        border: str = "shift",
        leading: int = 0,
    ) -> "Neighborhood":
        """Read the settings of an op; a ValueError says which of them cannot be."""
        given = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"a grid has one to three axes, not {list(grid)}")
        for name, values in given.items():
            if len(values) != len(grid):
                raise ValueError(f"{name} {list(values)} needs a value for each of {list(grid)}")
            if min(values) < 1 and name != "causal":
                raise ValueError(f"{name} {list(values)} must be positive")
        if border not in BORDERS:
            raise ValueError(f"border {border!r}: it is {' or '.join(BORDERS)}")
        if leading < 0:
            raise ValueError(f"leading {leading} must not be negative")
        rows = zip(grid, window, stride, dilation, causal, strict=True)
        axes = tuple(Axis(*row, border=border) for row in rows)  # type: ignore[arg-type]
        for axis in axes:
            _check(axis)
        return cls(axes, leading)

    @property
    def grid(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(axis.length for axis in self.axes)

    @property
    def tokens(self) -> int:
        """How many tokens there are, those before the grid included."""
        return self.leading + math.prod(self.grid)

    @property
    def is_dense(self) -> bool:
        """Whether every token sees every token."""
        return all(axis.is_dense for axis in self.axes)

    @property
    def share(self) -> float:
        """Which share of all pairs of tokens a neighbourhood sees."""
        cells = math.prod(self.grid)
        seen = cells * math.prod(axis.mean_window for axis in self.axes)
        return (seen + 2 * self.leading * cells + self.leading**2) / self.tokens**2


def _check(axis: Axis) -> None:
    if axis.length < 1:
        raise ValueError(f"an axis of a grid has {axis.length} tokens; it needs one at least")
    if axis.stride > axis.window:
        raise ValueError(f"stride {axis.stride} is larger than the window of {axis.window} keys")
    moves = axis.border == "shift" and not axis.causal
    if moves and axis.window * axis.dilation > axis.length:
        raise ValueError(
            f"a window of {axis.window} keys, {axis.dilation} apart, does not fit an axis of "
            f"{axis.length}: make it smaller, or let border='clamp' cut it"
        )
