"""What it costs each key head to look back over a window only, beside the first tokens.

Every attention of a program is run twice on calibration rows, whole and windowed. A key head's
damage is the energy of what its readers then write wrongly to the residual stream, as a share of
what the whole site writes; its mass is the attention that the window leaves out, which the two
log-sum-exps say: 1 - exp(windowed - whole).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.calibrating import kept_tokens
from attnopt.finder import find_sites
from attnopt.finder.match import Match
from attnopt.heads import read_heads
from attnopt.moments import Statistics
from attnopt.nouns import Site
from attnopt.ops import attention_lse
from attnopt.ops.structure import OPTIONS
from attnopt.program import Program
from attnopt.rewriting import apply
from attnopt.running import Run


@dataclass(frozen=True)
class Streaming:
    """For each key head of a site: the share of output that a window spoils, and the mass lost."""

    damage: Tensor
    mass: Tensor


@torch.no_grad()
def streaming(
    program: Program,
    statistics: Statistics,
    window: int,
    first: int,
    *,
    names: Collection[str] | None = None,
) -> dict[str, Streaming]:
    """Measure every site whose heads can be told apart, on the rows of the calibration.

    `names` are the sites that are measured, where that is not all of them.
    """
    if not statistics.batches:
        raise ValueError(
            "the statistics came without their rows, which windows are measured on; calibrate "
            "again, or name the heads that stay whole in the plan ('full')"
        )
    wide = apply(program.main, "exact").growing.cast(torch.float32)
    found = find_sites(wide)
    sites = {
        groups[0].anchor: site
        for site, groups in zip(found.sites, found.groups, strict=True)
        if (names is None or site.name in names)
        and len(groups) == 1
        and isinstance(groups[0], Match)
        and "o" in site.projections
    }
    sums = {site.name: _Sums.of(site, statistics.weights) for site in sites.values()}
    for batch in statistics.batches:
        run = Run(wide, batch, list(sites))
        for node, site in sites.items():
            sums[site.name].add(_call(run, node), kept_tokens(batch), window, first)
    return {name: total.result() for name, total in sums.items()}


def _call(run: Run, node: fx.Node) -> Any:
    """Return the arguments of an attention as values."""
    run.before(node)
    return fx.map_arg((node.args, dict(node.kwargs)), lambda n: run.env[n])


@dataclass
class _Sums:
    """What is summed over the rows of one site."""

    readers: Tensor
    wrong: Tensor
    mass: Tensor
    written: float = 0.0
    rows: int = 0

    @classmethod
    def of(cls, site: Site, weights: Mapping[str, Tensor]) -> "_Sums":
        """Start with the metric in which an error of each query head counts."""
        maps = read_heads(weights, site.projections["o"]).maps
        zeros = torch.zeros(site.kv_heads, dtype=torch.float64)
        return cls(maps @ maps.mT, zeros, zeros.clone())

    def add(self, call: Any, kept: Tensor | None, window: int, first: int) -> None:
        """Attend both ways and add what differs."""
        args, options = call
        streamed = {n: x for n, x in options.items() if n not in OPTIONS}
        whole, all_lse = attention_lse(*args, **options)
        part, part_lse = attention_lse(
            *args, **streamed, causal=True, window=window, first=first or None
        )
        real = torch.ones(whole.shape[0], whole.shape[2], dtype=torch.bool)
        if kept is not None:
            real = kept[:, -whole.shape[2] :]
        gap = (part - whole).transpose(1, 2)[real].double()
        value = whole.transpose(1, 2)[real].double()
        lost = 1 - torch.exp((part_lse - all_lse).transpose(1, 2)[real].double())
        groups = len(self.wrong)
        error = torch.einsum("nhd,hde,nhe->h", gap, self.readers, gap)
        self.wrong += error.view(groups, -1).sum(1)
        self.mass += lost.sum(0).view(groups, -1).mean(1)
        self.written += float(torch.einsum("nhd,hde,nhe->", value, self.readers, value))
        self.rows += len(gap)

    def result(self) -> Streaming:
        """Divide by what there was."""
        return Streaming(self.wrong / max(self.written, 1e-30), self.mass / max(self.rows, 1))
