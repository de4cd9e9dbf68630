"""Which elements of every tensor stay, by the numbers that the finder gives them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import is_size
from attnopt.finder.layout import Layout
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import is_tensor
from attnopt.finder.provenance import View
from attnopt.nouns import No


class Selection:
    """Which elements stay, by the numbers that the finder gives them."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._known = torch.zeros(0, dtype=torch.bool)
        self._stays = torch.zeros(0, dtype=torch.bool)

    def mark(self, node: fx.Node, layout: Layout, order: str, kept: Tensor) -> None:
        """Say what stays of an operand, (heads, channels) of its axes 1 and 3."""
        for second in (False, True):
            numbers = self.view.provenance.numbers(node, second=second)
            canonical = canonical_numbers(numbers, layout, order)
            stays = kept[None, :, None, :].expand(canonical.shape)
            self._note(canonical.flatten(), stays.flatten())

    def mark_channels(self, root: Any, rows: tuple[tuple[int, ...], ...], stay: Tensor) -> None:
        """Say which channels of a root stay: those of the neurons that do."""
        numbers = torch.arange(root.base, root.end)
        width = 1 + max(c for row in rows for c in row)
        stays = torch.ones(max(width, int(root.place(numbers)[1].max()) + 1), dtype=torch.bool)
        known = torch.zeros_like(stays)
        for row, kept in zip(rows, stay.tolist(), strict=True):
            for channel in row:
                stays[channel], known[channel] = kept, True
        channels = root.place(numbers)[1]
        of = known[channels]
        self._note(numbers[of], stays[channels][of])

    def _note(self, numbers: Tensor, stays: Tensor) -> None:
        real = numbers >= 0
        numbers, stays = numbers[real], stays[real]
        if not len(numbers):
            return
        more = int(numbers.max()) + 1 - len(self._known)
        if more > 0:
            self._known = torch.cat([self._known, self._known.new_zeros(more)])
            self._stays = torch.cat([self._stays, self._stays.new_ones(more)])
        self._known[numbers] = True
        self._stays[numbers] = stays

    def at(self, node: fx.Node) -> list[tuple[Tensor, Tensor]]:
        """Return, for each tensor of a node, which elements come from somewhere and which stay."""
        return [self._looked_up(n) for n in self.view.provenance.all_numbers(node)]

    def _looked_up(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        marked = self._marked(numbers)
        index = numbers.clamp(0, max(len(self._known) - 1, 0))
        return numbers >= 0, torch.where(marked, self._stays[index], True)

    def _marked(self, numbers: Tensor) -> Tensor:
        inside = (numbers >= 0) & (numbers < len(self._known))
        return inside & self._known[numbers.clamp(0, max(len(self._known) - 1, 0))]

    def knows(self, node: fx.Node) -> bool:
        """Tell whether a node carries something that was marked."""
        return any(bool(self._marked(n).any()) for n in self.view.provenance.all_numbers(node))

    def line(self, end: fx.Node, stops: Iterable[fx.Node]) -> list[fx.Node]:
        """List the nodes that carry marked elements to `end`, from their roots."""
        roots = {r.node for r in self.view.provenance.roots} | set(stops)
        found: dict[fx.Node, None] = {}
        todo = [end]
        while todo:
            node = todo.pop()
            if node in found or not self.knows(node):
                continue
            found[node] = None
            if node not in roots:
                todo.extend(n for n in node.all_input_nodes if not is_size(n) and is_tensor(n))
                roots |= {r.node for r in self.view.provenance.roots}
        return list(found)

    def keeps(self, node: fx.Node) -> list[list[Tensor]] | No:
        """Return, for each tensor of a node and each axis, which indices stay."""
        found: list[list[Tensor]] = []
        for known, stays in self.at(node):
            axes: list[Tensor] = []
            for axis in range(stays.dim()):
                others = [a for a in range(stays.dim()) if a != axis]
                some = (known & stays).any(dim=others) if others else known & stays
                none = ~(known.any(dim=others) if others else known)
                axes.append(some | none)
            if not _explains(axes, known, stays):
                return No("what stays does not lie along axes of its own", node.name)
            found.append(axes)
        return found


def _product(axes: list[Tensor]) -> Tensor:
    whole = torch.ones([len(a) for a in axes], dtype=torch.bool)
    for i, along in enumerate(axes):
        whole &= along.view([-1 if j == i else 1 for j in range(len(axes))])
    return whole


def _explains(axes: list[Tensor], known: Tensor, stays: Tensor) -> bool:
    """Whether the axes say of every known element whether it stays."""
    return bool((_product(axes) == stays)[known].all())
