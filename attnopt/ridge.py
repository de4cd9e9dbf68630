"""Ridge solves on the second moments of some inputs, dense or by their few rows.

With G the second moment, `solve(stay, gone)` is G[gone, stay] (G[stay, stay] + lambda)^-1: how the
inputs that go are best told from those that stay. `blocks(places)` are blocks of the inverse over
what stays, whose own inverses say what an input tells that no other does. Where there are fewer
rows than inputs, both come from a matrix of the size of the rows (Woodbury).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Ridge(Protocol):
    """What solves need of the inputs of a projection, in float64."""

    def energy(self) -> Tensor:
        """Return E[x^2] of every input."""
        ...

    def solve(self, stay: Tensor, gone: Tensor) -> Tensor:
        """Return the best map (gone, stay) from the inputs that stay to those that go."""
        ...

    def blocks(self, places: Tensor) -> Tensor:
        """Return blocks (units, width, width) of the inverse over what is still there."""
        ...

    def eliminate(self, gone: Tensor) -> Tensor:
        """Take inputs out; return the map (gone, all) by which their columns move to the others."""
        ...


@dataclass
class Dense:
    """Solves on a second moment, whose inverse is kept up to date while inputs are taken out."""

    gram: Tensor
    ridge: float
    _inverse: Tensor | None = field(default=None, repr=False)

    def energy(self) -> Tensor:
        """Return E[x^2] of every input."""
        return self.gram.diagonal()

    def solve(self, stay: Tensor, gone: Tensor) -> Tensor:
        """Return the best map (gone, stay) from the inputs that stay to those that go."""
        inner = self.gram[stay][:, stay]
        inner.diagonal().add_(self._small())
        moved: Tensor = torch.linalg.solve(inner, self.gram[stay][:, gone])
        return moved.T

    def blocks(self, places: Tensor) -> Tensor:
        """Return blocks (units, width, width) of the inverse over what is still there."""
        inverse = self._current()
        return inverse[places.unsqueeze(-1), places.unsqueeze(-2)]

    def eliminate(self, gone: Tensor) -> Tensor:
        """Take inputs out; return the map (gone, all) by which their columns move to the others."""
        inverse = self._current()
        to_others: Tensor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        inverse -= inverse[:, gone] @ to_others
        # What is gone is gone to the last bit.
        inverse[gone] = inverse[:, gone] = 0.0
        return -to_others

    def _small(self) -> float:
        return self.ridge * float(self.gram.diagonal().mean())

    def _current(self) -> Tensor:
        if self._inverse is None:
            padded = self.gram.clone()
            padded.diagonal().add_(self._small())
            self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(padded))
        return self._inverse


@dataclass
class Few:
    """The same solves by the rows themselves, (rows, inputs), of which there are few."""

    rows: Tensor
    ridge: float
    _left: Tensor | None = field(default=None, repr=False)

    def energy(self) -> Tensor:
        """Return E[x^2] of every input."""
        return self.rows.square().mean(0)

    def solve(self, stay: Tensor, gone: Tensor) -> Tensor:
        """Return the best map (gone, stay) from the inputs that stay to those that go."""
        kept = self.rows[:, stay]
        moved: Tensor = torch.linalg.solve(self._kernel(kept), kept)
        return self.rows[:, gone].T @ moved

    def blocks(self, places: Tensor) -> Tensor:
        """Return blocks (units, width, width) of the inverse over what is still there."""
        kept = self.rows[:, self._there()]
        units = self.rows[:, places].movedim(0, 1)
        told = units.mT @ torch.linalg.solve(self._kernel(kept), units)
        one = torch.eye(places.shape[1], dtype=self.rows.dtype)
        inverse: Tensor = (one - told) / self._small()
        return inverse

    def eliminate(self, gone: Tensor) -> Tensor:
        """Take inputs out; return the map (gone, all) by which their columns move to the others."""
        there = self._there().clone()
        there[gone] = False
        self._left = there
        moved = torch.zeros(len(gone), self.rows.shape[1], dtype=self.rows.dtype)
        moved[:, there] = self.solve(there, gone)
        moved[torch.arange(len(gone)), gone] = -1.0
        return moved

    def _small(self) -> float:
        return self.ridge * float(self.energy().mean())

    def _kernel(self, kept: Tensor) -> Tensor:
        kernel = kept @ kept.T
        kernel.diagonal().add_(self._small() * len(self.rows))
        return kernel

    def _there(self) -> Tensor:
        if self._left is None:
            self._left = torch.ones(self.rows.shape[1], dtype=torch.bool)
        return self._left
