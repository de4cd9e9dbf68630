"""How well agents stand in for an attention, on what calibration saw: the settings that fit best.

Queries, keys and values of every site are caught as the program runs, and attended densely and
through agents. With W the part of the output projection that reads a head, and O and A the outputs
of both, the best shortcut of that head is closed form: c = <V, O - A> / <V, V> in the metric W W^T.
What is tried beside it are the cores and the exponents given; the least error left decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.finder import find_sites
from attnopt.finder.match import Match
from attnopt.heads import read_heads
from attnopt.moments import Statistics
from attnopt.nouns import Site
from attnopt.ops.sdpa import attend
from attnopt.ops.through_agents import attend_agents
from attnopt.program import Program
from attnopt.running import Run

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """What is tried at a site: options of the op, each without a shortcut, or with one that stays.

    `rows` gives the range of an input of the call in which a row counts, and its name.
    """

    options: Sequence[Options]
    rows: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Fit:
    """The options that fit best, the shortcut of each head, and the share of output lost."""

    options: Options
    shortcut: tuple[float, ...]
    error: float


@torch.no_grad()
def fit_agents(program: Program, stats: Statistics, trials: Mapping[str, Trial]) -> dict[str, Fit]:
    """Try what is asked for at every site named, on the rows of the calibration."""
    if not stats.batches:
        raise ValueError(
            "the statistics came without their rows, which agents are fitted on; calibrate again, "
            "or give core, exponent and shortcut in the plan"
        )
    wide = program.cast(torch.float32)
    findings = find_sites(wide)
    nodes = {
        pieces[0].anchor: site
        for site, pieces in zip(findings.sites, findings.groups, strict=True)
        if site.name in trials and isinstance(pieces[0], Match)
    }
    sums = {
        site.name: [_Sums.of(site, stats.weights) for _ in trials[site.name].options]
        for site in nodes.values()
    }
    for batch in stats.batches:
        run = Run(wide, batch, list(nodes))
        for node, site in nodes.items():
            run.before(node)
            q, k, v = (run.env[n] for n in node.args)  # type: ignore[index]
            trial = trials[site.name]
            q, k, v = _counting(trial, batch, q, k, v)
            _add(sums[site.name], trial.options, q, k, v, dict(node.kwargs))
    for name, held in sums.items():
        _must_have_rows(name, trials[name], held[0])
    return {name: _best(trials[name].options, held) for name, held in sums.items()}


def _must_have_rows(name: str, trial: Trial, total: "_Sums") -> None:
    """Raise a ValueError where no row of the calibration counts at a site."""
    if trial.rows is not None and not bool(total.whole.any()):
        said, low, high = trial.rows
        raise ValueError(
            f"{name}: no row of the calibration data has {said!r} from {low:g} to below {high:g}, "
            "which its agents are fitted on; add calls at such time steps"
        )


def _counting(
    trial: Trial, batch: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Return the rows of a batch that count."""
    if trial.rows is None:
        return q, k, v
    name, low, high = trial.rows
    given = torch.as_tensor(batch[name]).reshape(-1).expand(q.shape[0])
    counts = (given >= low) & (given < high)
    return q[counts], k[counts], v[counts]


def _add(
    sums: "list[_Sums]", tried: Sequence[Options], q: Tensor, k: Tensor, v: Tensor, given: Options
) -> None:
    """Attend densely once, and through agents each way."""
    if not len(q):
        return
    scale = given.get("scale")
    dense = attend(q, k, v, None, scale=scale)
    for total, options in zip(sums, tried, strict=True):
        leading = options.get("leading", 0)
        found = attend_agents(q, k, v, scale=scale, **options)
        total.add(*(x[:, :, leading:].double() for x in (dense - found, v, dense)))


def _best(tried: Sequence[Options], sums: "list[_Sums]") -> Fit:
    fits = [
        Fit(options, total.shortcut(), total.error(given="shortcut" in options))
        for options, total in zip(tried, sums, strict=True)
    ]
    return min(fits, key=lambda fit: fit.error)


@dataclass
class _Sums:
    """What is summed over the tokens of one site, by head: products in the metric of its readers.

    `gap` is what agents leave out.
    """

    metric: Tensor
    gap: Tensor
    cross: Tensor
    value: Tensor
    whole: Tensor

    @classmethod
    def of(cls, site: Site, weights: Mapping[str, Tensor]) -> "_Sums":
        """Start with the metric in which an error of each head counts."""
        eye = torch.eye(site.v_head_dim, dtype=torch.float64)
        metric = eye.expand(site.heads, -1, -1)
        if "o" in site.projections:
            maps = read_heads(weights, site.projections["o"]).maps.double()
            metric = maps @ maps.mT
        zeros = (torch.zeros(site.heads, dtype=torch.float64) for _ in range(4))
        return cls(metric, *zeros)

    def add(self, gap: Tensor, v: Tensor, whole: Tensor) -> None:
        """Add what is left out, the values and the whole output, (B, H, T, E) each."""
        self.gap += self._product(gap, gap)
        self.cross += self._product(v, gap)
        self.value += self._product(v, v)
        self.whole += self._product(whole, whole)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a @ self.metric) * b).sum((0, 2, 3))

    def shortcut(self) -> tuple[float, ...]:
        """Return the least-squares factor of the values of each head."""
        found = self.cross / self.value.clamp_min(1e-30)
        return tuple(round(float(c), 6) for c in found)

    def error(self, *, given: bool) -> float:
        """Return the share of the output that is lost with the best shortcut, or the one given."""
        gained = 0.0 if given else (self.cross**2 / self.value.clamp_min(1e-30)).sum()
        left = float((self.gap.sum() - gained) / self.whole.sum().clamp_min(1e-30))
        return math.sqrt(max(left, 0.0))
