"""Read element numbers: bring them to canonical axes, follow them along a line."""

import torch
from torch import Tensor

from attnopt.finder.layout import Factor, Layout
from attnopt.finder.provenance import Root


def canonical_numbers(numbers: Tensor, layout: Layout, order: str) -> Tensor:
    """Bring element numbers to the axes of `order`."""
    sizes: list[int] = []
    factors: list[Factor | None] = []
    for size, axis in zip(numbers.shape, layout.axes, strict=True):
        sizes.extend(f.size for f in axis)
        factors.extend(axis)
        if not axis:
            sizes.append(size)
            factors.append(None)
    split = numbers.reshape(sizes)
    strides = [f.stride if f else 0 for f in factors]
    places = [
        sorted(
            (i for i, f in enumerate(factors) if f and f.role == role),
            key=lambda i: -strides[i],
        )
        for role in order
    ]
    used = [i for group in places for i in group]
    rest = [i for i in range(len(sizes)) if i not in used]
    shape = [count(tuple(sizes[i] for i in group)) for group in places]
    return split.permute(*rest, *used).reshape(shape)


def head_groups(canonical: Tensor) -> tuple[list[int], list[int]]:
    """Number the distinct heads of (B, H, S, D) element numbers in order of first use."""
    groups: list[int] = []
    first: list[int] = []
    for h in range(canonical.shape[1]):
        head = canonical[:, h]
        same = next((g for g, f in enumerate(first) if torch.equal(canonical[:, f], head)), None)
        if same is None:
            first.append(h)
            same = len(first) - 1
        groups.append(same)
    return groups, first


def line_of(numbers: Tensor, axis: int) -> Tensor | None:
    """Return the numbers along an axis at some place without padding."""
    moved = numbers.movedim(axis, -1)
    moved = moved.reshape(-1, moved.shape[-1])
    for row in (moved[-1], moved[0], moved[len(moved) // 2]):
        if (row >= 0).all():
            return row
    return None


def moved_axes(root: Root, line: Tensor) -> set[int]:
    """List the axes of a root that a line of its elements moves along."""
    indices = (root.index(line, axis) for axis in range(len(root.shape)))
    return {axis for axis, index in enumerate(indices) if (index != index[0]).any()}


def count(sizes: tuple[int, ...]) -> int:
    """Return the number of elements of a tensor of these sizes."""
    total = 1
    for size in sizes:
        total *= size
    return total
