"""Remove attention heads and MLP neurons that do little, and let the others make up for them.

A key head goes with the query heads that read it, or as many query heads go from every group, or
neurons go from an MLP. What goes is chosen by a score of the inputs of the projection that reads
it; `obs` is exactly what the output loses once the remaining columns are solved anew. That solve is
a ridge regression on second moments and needs no training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.calibrating import Statistics
from attnopt.heads import Written, write_heads
from attnopt.nouns import Mlp, No, Projection, Site
from attnopt.refusals import cached_elsewhere, unreadable
from attnopt.ridge import Ridge
from attnopt.surgery import GraphEdit, Kept, narrow, narrow_mlp

exact = False
tier = 0
removes = True

Score = Literal["obs", "amp", "amp_w", "flap", "l2", "random"]


@dataclass(frozen=True)
class Config:
    """How much goes: key heads with their readers, query heads of each group, or neurons.

    `score` says what goes first; `compensate` solves the remaining columns anew with a relative
    `ridge`; `refit` solves them once more, layer after layer, for what rewritten layers hand on.
    """

    groups: int = 0
    queries: int = 0
    neurons: int = 0
    score: Score = "obs"
    compensate: bool = True
    ridge: float = 1e-4
    refit: bool = False


def fits(site: Site | Mlp, config: Config) -> Literal[True] | No:
    """Say whether heads or neurons can be removed."""
    if isinstance(site, Mlp):
        return _fits_neurons(site, config)
    refusals = (unreadable(site), cached_elsewhere(site), _norms(site), _counts(site, config))
    return next((r for r in refusals if r is not None), True)


def proposals(thing: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List the numbers of heads or of neurons worth removing, the fewest first."""
    if isinstance(thing, Mlp):
        counts = sorted({round(thing.neurons * part / _PARTS) for part in range(1, _PARTS)})
        return tuple(Config(neurons=n, refit=True) for n in counts if 0 < n < thing.neurons)
    found = [Config(groups=n, refit=True) for n in _few(thing.kv_heads)]
    if asked.goals != ("kv_cache",) and thing.heads % thing.kv_heads == 0:
        found += [Config(queries=n, refit=True) for n in _few(thing.heads // thing.kv_heads)]
    return tuple(found)


def _few(units: int) -> list[int]:
    """Return how many of some units may go, at most so many numbers of them."""
    step = max(units / _FEW, 1)
    return sorted({round(step * i) for i in range(1, units) if 0 < round(step * i) < units})


# MLPs lose so many sixteenths, attentions their heads in at most so many steps.
_PARTS = 16
_FEW = 8


def _fits_neurons(mlp: Mlp, config: Config) -> Literal[True] | No:
    if config.groups or config.queries:
        return No("an MLP has neurons and no heads", mlp.name)
    if mlp.down.layout == "conv":
        return No("its neurons are channels of an image, which calibration does not see", mlp.name)
    if not 0 <= config.neurons < mlp.neurons:
        return No(f"of {mlp.neurons} neurons 0 to {mlp.neurons - 1} can go", mlp.name)
    return True


def _norms(site: Site) -> No | None:
    if site.qk_norm == "full":
        return No("queries and keys pass a norm over all heads together", site.name)
    return None


def _counts(site: Site, config: Config) -> No | None:
    per_group = site.heads // site.kv_heads
    if config.neurons:
        return No("an attention has heads and no neurons", site.name)
    if not 0 <= config.groups < site.kv_heads:
        return No(f"of {site.kv_heads} key heads 0 to {site.kv_heads - 1} can go", site.name)
    if config.queries and site.heads % site.kv_heads:
        return No("its key heads have unlike numbers of query heads", site.name)
    if not 0 <= config.queries < per_group:
        why = f"of the {per_group} query heads of a group 0 to {per_group - 1} can go"
        return No(why, site.name)
    return None


def convert(site: Site | Mlp, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return the parameters without what goes; none where nothing does."""
    if _is_idle(config):
        return {}
    chosen = choose(site, stats, config)
    # The graph needs to know what stays; the columns of a large model are better solved again.
    stats.memo[_key(site, config)] = chosen.stays
    if isinstance(site, Mlp):
        stays = chosen.stays
        written = [_written(p, stays) for p in site.inputs]
        return write_heads(stats.weights, [*written, _columns(site.down, stays, chosen.columns)])
    kept = _kept(site, chosen.stays)
    output = _columns(site.projections["o"], chosen.stays, chosen.columns)
    inputs = [Written(site.projections[n], getattr(kept, n)) for n in ("q", "k", "v")]
    return write_heads(stats.weights, [*inputs, output])


def emit(edit: GraphEdit, site: Site | Mlp, config: Config) -> No | None:
    """Give the graph its new number of heads or neurons."""
    if _is_idle(config):
        return None
    stays = edit.statistics.memo.get(_key(site, config))
    if stays is None:
        stays = choose(site, edit.statistics, config).stays
    if isinstance(site, Mlp):
        return narrow_mlp(edit, site, stays)
    return narrow(edit, site, _kept(site, stays))


def cost(site: Site | Mlp, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV bytes per token, in units of one element; the parameters: heads.removable."""
    if isinstance(site, Mlp) or not site.cached:
        return {"kv_elements_per_token": 0}
    left = site.kv_heads - config.groups
    return {"kv_elements_per_token": left * (site.head_dim + site.v_head_dim)}


def _is_idle(config: Config) -> bool:
    return not (config.groups or config.queries or config.neurons)


# ---------------------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Chosen:
    """Which query heads or neurons stay, and the new columns that read them, (outputs, columns)."""

    stays: Tensor
    columns: Tensor


def _key(site: Site | Mlp, config: Config) -> str:
    return f"amp/{site.name}/{config}"


def choose(site: Site | Mlp, stats: Statistics, config: Config) -> Chosen:
    """Choose what stays, and solve the columns that read it."""
    reader = _Reader.of(site, stats)
    removal = _Removal(reader, config)
    if isinstance(site, Mlp):
        removal.remove([[(i,) for i in range(site.neurons)]], config.neurons)
    else:
        per_group = site.heads // site.kv_heads
        groups = _groups(site)
        removal.remove([groups], config.groups)
        left = [g for g in groups if removal.stays[list(g)].all()]
        removal.remove([[(h,) for h in g] for g in left], config.queries)
        assert per_group > config.queries
    return Chosen(removal.stays, removal.columns())


def _groups(site: Site) -> list[tuple[int, ...]]:
    """List the query heads of each key head."""
    size = site.heads // site.kv_heads
    return [tuple(range(g * size, (g + 1) * size)) for g in range(site.kv_heads)]


@dataclass(frozen=True)
class _Reader:
    """The projection that reads heads or neurons, in float64.

    `weight` is (outputs, inputs) with the inputs of unit u at `places[u]`.
    """

    weight: Tensor
    places: Tensor
    stats: Statistics
    parameter: str

    @classmethod
    def of(cls, site: Site | Mlp, stats: Statistics) -> "_Reader":
        """Read the o or down projection of a site."""
        projection = site.down if isinstance(site, Mlp) else site.projections["o"]
        weight = stats.weights[projection.parameter].double()
        flat = weight.movedim(projection.axis, -1).flatten(0, -2)
        return cls(flat, torch.tensor(projection.rows), stats, projection.parameter)

    @property
    def of_heads(self) -> bool:
        """Whether the units are heads, of several inputs each."""
        return self.places.shape[1] > 1


class _Removal:
    """Units go one after another; what stays is known, and the columns that make up for them."""

    def __init__(self, reader: _Reader, config: Config) -> None:
        self.reader = reader
        self.config = config
        self.stays = torch.ones(len(reader.places), dtype=torch.bool)
        self._ridge = reader.stats.ridge(reader.parameter, config.ridge)
        self._weight = reader.weight.clone()

    def remove(self, pools: Sequence[Sequence[tuple[int, ...]]], count: int) -> None:
        """Remove from each pool as many of its units, given by their heads or neurons."""
        if not count:
            return
        for pool in pools:
            if self.config.score == "obs":
                self._remove_by_growth(list(pool), count)
                continue
            worth = _SCORES[self.config.score](self.reader, self._ridge)
            scores = torch.stack([worth[list(unit)].sum() for unit in pool])
            for index in scores.argsort(stable=True)[:count].tolist():
                self.stays[list(pool[index])] = False

    def columns(self) -> Tensor:
        """Return the columns that stay, solved anew where that is asked for."""
        stay, gone = self._inputs(self.stays), self._inputs(~self.stays)
        weight = self.reader.weight
        if not self.config.compensate:
            return weight[:, stay]
        return weight[:, stay] + weight[:, gone] @ self._ridge.solve(stay, gone)

    def _inputs(self, units: Tensor) -> Tensor:
        return self.reader.places[units].flatten()

    def _remove_by_growth(self, pool: list[tuple[int, ...]], count: int) -> None:
        """Remove the units whose going costs least once the others are solved anew.

        Few units go one by one, many in rounds, with the inverse brought up to date in between.
        """
        size = max(count // _ROUNDS, 1)
        while count:
            growth = self._growth(pool)
            going = set(growth.argsort(stable=True)[: min(size, count)].tolist())
            self._eliminate([u for i in sorted(going) for u in pool[i]])
            pool = [unit for i, unit in enumerate(pool) if i not in going]
            count -= len(going)

    def _growth(self, pool: list[tuple[int, ...]]) -> Tensor:
        """Return, for each unit, the growth of the squared error when it goes."""
        places = self.reader.places[torch.tensor(pool)].flatten(1)
        blocks = self._ridge.blocks(places)
        if places.shape[1] == 1:
            sizes: Tensor = torch.linalg.vector_norm(self._weight, dim=0).square()
            return sizes[places[:, 0]] / blocks[:, 0, 0]
        weights = self._weight[:, places].movedim(1, 0)
        solved: Tensor = torch.linalg.solve(blocks, weights.mT)
        return (solved * weights.mT).sum((-1, -2))

    def _eliminate(self, units: list[int]) -> None:
        """Take units out, and move their columns to the others."""
        gone = self.reader.places[torch.tensor(units)].flatten()
        self._weight += self._weight[:, gone] @ self._ridge.eliminate(gone)
        self.stays[torch.tensor(units)] = False


_ROUNDS = 16


def _by_amplitude(reader: _Reader, ridge: Ridge) -> Tensor:
    """Mean size of a head's contribution, or of a neuron, as AMP publishes it."""
    if reader.of_heads:
        return reader.stats.contribution(reader.parameter)
    return reader.stats.absolute(reader.parameter)[reader.places].sum(1)


def _by_weighted_amplitude(reader: _Reader, ridge: Ridge) -> Tensor:
    """Mean size of a contribution; a neuron's is weighted by its column."""
    if reader.of_heads:
        return reader.stats.contribution(reader.parameter)
    sizes = reader.stats.absolute(reader.parameter) * reader.weight.abs().sum(0)
    return sizes[reader.places].sum(1)


def _by_variance(reader: _Reader, ridge: Ridge) -> Tensor:
    """Variance of the inputs, weighted by their columns (FLAP)."""
    variance = ridge.energy() - reader.stats.mean(reader.parameter).square()
    return (variance * reader.weight.square().sum(0))[reader.places].sum(1)


def _by_energy(reader: _Reader, ridge: Ridge) -> Tensor:
    """Energy of the inputs, weighted by their columns."""
    return (ridge.energy() * reader.weight.square().sum(0))[reader.places].sum(1)


def _by_chance(reader: _Reader, ridge: Ridge) -> Tensor:
    """Random scores, the same in every run."""
    return torch.rand(len(reader.places), generator=torch.Generator().manual_seed(0))


_SCORES = {
    "amp": _by_amplitude,
    "amp_w": _by_weighted_amplitude,
    "flap": _by_variance,
    "l2": _by_energy,
    "random": _by_chance,
}


# ----------------------------------------------------------------------------------------- writing


def _kept(site: Site, heads: Tensor) -> Kept:
    """Return the masks of q, k and v: a key head stays while a query head reads it."""
    whole = Kept.of(site)
    read = torch.stack([heads[list(g)].any() for g in _groups(site)])
    return Kept(
        whole.q & heads.unsqueeze(1), whole.k & read.unsqueeze(1), whole.v & read.unsqueeze(1)
    )


def _written(projection: Projection, stays: Tensor) -> Written:
    return Written(projection, stays.unsqueeze(1).expand(-1, len(projection.rows[0])))


def _columns(projection: Projection, stays: Tensor, columns: Tensor) -> Written:
    """Return new columns of the units that stay, with nothing for the constant input."""
    count, width = int(stays.sum()), len(projection.rows[0])
    maps = columns.T.reshape(count, width, -1)
    maps = torch.cat([maps, maps.new_zeros(count, width, 1)], dim=-1)
    return Written(projection, stays.unsqueeze(1).expand(-1, width), maps)
