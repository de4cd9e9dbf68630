"""How a tensor's axes hold the roles of attention.

Roles: B batch, H head, T query, S key, D channel of q and k, E channel of v. One axis may hold
several roles (batch x head in one), and one role may spread over several axes (windows of rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Coordinates = Mapping[str, Tensor]


@dataclass(frozen=True)
class Factor:
    """A part of an axis: `size` steps of `stride` in the running number of a role."""

    role: str
    size: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """For each axis its factors, the slowest first; an axis of size 1 has none."""

    axes: tuple[tuple[Factor, ...], ...]

    @property
    def roles(self) -> frozenset[str]:
        """Return the roles that occur."""
        return frozenset(f.role for axis in self.axes for f in axis)

    def size(self, role: str) -> int:
        """Return the size of a role, over all its axes."""
        count = 1
        for factor in self.factors(role):
            count *= factor.size
        return count

    def factors(self, role: str) -> tuple[Factor, ...]:
        """Return the factors of a role, the slowest first."""
        found = [f for axis in self.axes for f in axis if f.role == role]
        return tuple(sorted(found, key=lambda f: -f.stride))

    def is_plain(self, order: str) -> bool:
        """Tell whether axis i holds role order[i] and nothing else."""
        if len(self.axes) != len(order):
            return False
        pairs = zip(self.axes, order, strict=True)
        return all(len(a) <= 1 and all(f.role == role for f in a) for a, role in pairs)


def read_layout(coordinates: Coordinates) -> Layout | None:
    """Find the factors of each axis from the running number of each role at every element.

    None where the numbers are not a plain product structure.
    """
    some = next(iter(coordinates.values()))
    axes = tuple(_axis_factors(coordinates, axis) for axis in range(some.dim()))
    if any(a is None for a in axes):
        return None
    layout = Layout(tuple(a for a in axes if a is not None))
    return layout if _reproduces(layout, coordinates) else None


def _axis_factors(coordinates: Coordinates, axis: int) -> tuple[Factor, ...] | None:
    """Read one axis: every role's number along it, all other axes at 0."""
    lines: dict[str, Tensor] = {}
    for role, numbers in coordinates.items():
        line = numbers
        for other in range(numbers.dim() - 1, -1, -1):
            if other != axis:
                line = line.select(other, 0)
        if (line != line[0]).any():
            lines[role] = line - line[0]
    size = some_size(coordinates, axis)
    factors: list[Factor] = []
    inner = 1
    while inner < size:
        step = {role: int(line[inner]) for role, line in lines.items() if int(line[inner]) != 0}
        if len(step) != 1:
            return None
        ((role, stride),) = step.items()
        length = _run_length(lines[role][::inner], stride)
        if stride < 0 or length < 2:
            return None
        factors.append(Factor(role, length, stride))
        inner *= length
    return tuple(reversed(factors)) if inner == size or size == 0 else None


def _run_length(line: Tensor, stride: int) -> int:
    """Count how far a line climbs evenly from its start."""
    even = line == torch.arange(len(line)) * stride
    broken = (~even).nonzero()
    return int(broken[0]) if len(broken) else len(line)


def some_size(coordinates: Coordinates, axis: int) -> int:
    """Return the size of an axis."""
    return int(next(iter(coordinates.values())).shape[axis])


def _reproduces(layout: Layout, coordinates: Coordinates) -> bool:
    return all(
        torch.equal(found, place(layout, role, tuple(found.shape)))
        for role, found in coordinates.items()
    )


def place(layout: Layout, role: str, shape: tuple[int, ...]) -> Tensor:
    """Return the running number of a role at every element of a tensor of that layout."""
    total = torch.zeros(shape, dtype=torch.long)
    for axis, factors in enumerate(layout.axes):
        index = torch.arange(shape[axis])
        part = torch.zeros_like(index)
        inner = 1
        for factor in reversed(factors):
            if factor.role == role:
                part = part + (index // inner) % factor.size * factor.stride
            inner *= factor.size
        view = [1] * len(shape)
        view[axis] = shape[axis]
        total = total + part.view(view)
    return total
