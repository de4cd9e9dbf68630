"""The weights that healing moves: whole, or by a low-rank product that is merged at the end."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.healing.recipe import Recipe
from attnopt.healing.regions import regions_of
from attnopt.program import Program


@dataclass(frozen=True)
class Learner:
    """Frozen weights, and the leaves that learn; names that share a weight share a leaf.

    A leaf has the name of its weight; a low-rank one is a pair, NAME.up and NAME.down.
    """

    frozen: Mapping[str, Tensor]
    leaves: Mapping[str, Tensor]
    owners: Mapping[str, str]
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        program: Program,
        weights: Mapping[str, Tensor],
        moving: Collection[str],
        recipe: Recipe,
    ) -> "Learner":
        """Let some weights of a program learn."""
        owners = {n: o for n, o in _owners(program, weights).items() if n in moving or o in moving}
        leaves: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(recipe.seed)
        for name in sorted(set(owners.values())):
            weight = weights[name]
            if recipe.rank is None or weight.dim() < 2:
                leaves[name] = weight.clone()
                continue
            rows, columns = weight.flatten(1).shape
            down = torch.randn(recipe.rank, columns, generator=generator) * columns**-0.5
            leaves[f"{name}.down"] = down.to(weight.device)
            leaves[f"{name}.up"] = weight.new_zeros(rows, recipe.rank)
        for leaf in leaves.values():
            leaf.requires_grad_()
        scale = 1.0 if recipe.rank is None else recipe.alpha / recipe.rank
        return cls(weights, leaves, owners, scale)

    def weights(self) -> dict[str, Tensor]:
        """Return every weight as it is now; gradients flow to the leaves."""
        now = {owner: self._now(owner) for owner in set(self.owners.values())}
        return {**self.frozen, **{name: now[owner] for name, owner in self.owners.items()}}

    def leaves_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the leaves that some weights are made of."""
        owners = {self.owners[name] for name in names if name in self.owners}
        kinds = ("", ".down", ".up")
        wanted = {f"{owner}{kind}" for owner in owners for kind in kinds}
        return {name: leaf for name, leaf in self.leaves.items() if name in wanted}

    def changed_weights(self, program: Program) -> dict[str, Tensor]:
        """Return the weights that learnt, in the dtype that the program stores them in."""
        with torch.no_grad():
            now = self.weights()
            made = {owner: _stored(now[owner], program, owner) for owner in self.owners.values()}
        return {name: made[owner] for name, owner in self.owners.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Give the leaves other values."""
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(values[name])

    def copy(self) -> dict[str, Tensor]:
        """Return the values of the leaves."""
        return {name: leaf.detach().clone() for name, leaf in self.leaves.items()}

    def _now(self, name: str) -> Tensor:
        if name in self.leaves:
            return self.leaves[name]
        moved = self.leaves[f"{name}.up"] @ self.leaves[f"{name}.down"]
        weight = self.frozen[name]
        return weight + self.scale * moved.view(weight.shape)


def _stored(weight: Tensor, program: Program, name: str) -> Tensor:
    return weight.detach().to("cpu", program.weights[name].dtype).clone().contiguous()


def _owners(program: Program, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Name, for every floating parameter, the one that holds it; tied ones share one."""
    read = {b.name for b in program.bindings.values() if b.kind == "parameter"}
    found = {name: name for name in sorted(read) if weights[name].is_floating_point()}
    for group in program.source.tied:
        owner = next((name for name in group if name in found), None)
        for twin in group:
            if owner is not None and _same(program, twin, owner):
                found[twin] = owner
    return found


def _same(program: Program, twin: str, owner: str) -> bool:
    return twin in program.weights and torch.equal(program.weights[twin], program.weights[owner])


def moving(program: Program, teacher: Program, recipe: Recipe) -> frozenset[str]:
    """Choose the parameters that learn; ValueError where there are none."""
    every = {b.name for b in program.bindings.values() if b.kind == "parameter"}
    floating = {name for name in every if program.weights[name].is_floating_point()}
    if recipe.train == "all":
        return frozenset(floating)
    if recipe.train == "sites":
        named = {p.parameter for s in program.sites for p in s.projections.values()}
        named |= {p.bias for s in program.sites for p in s.projections.values() if p.bias}
        return frozenset((named | added(program, teacher)) & floating)
    found = {n for n in floating if changed(program, teacher, n)}
    # The weights around an op that was replaced are to make up for what it does differently.
    found |= {p for r in regions_of(program, (), teacher) for p in r.ends} & floating
    if not found:
        raise ValueError(
            "neither a weight nor an attention of the program differs from the teacher's, so "
            "nothing that the rewrite changed can be healed; choose train='sites' or train='all'"
        )
    return frozenset(found)


def added(program: Program, teacher: Program) -> frozenset[str]:
    """Return the parameters that the teacher does not have."""
    read = (b.name for b in program.bindings.values() if b.kind == "parameter")
    return frozenset(name for name in read if name not in teacher.weights)


def changed(program: Program, teacher: Program, name: str) -> bool:
    """Tell whether a weight is another one than the teacher's of that name."""
    try:
        before = teacher.weights[name]
    except KeyError:
        return True
    now = program.weights[name]
    return now.shape != before.shape or not torch.equal(now.double(), before.double())
