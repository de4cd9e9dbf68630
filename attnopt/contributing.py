"""What a head gives to its layer's output for each unit of its query's norm.

A long query makes a head attend sharply, and how much a head gives then differs from head to head:
b = E[|q| |a W|] / E[|q|^2] for queries q, head outputs a and the columns W that read them makes the
norms of different heads comparable. It is measured on the rows of the calibration.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.calibrating import kept_tokens
from attnopt.finder import find_sites
from attnopt.finder.match import Match
from attnopt.heads import read_heads
from attnopt.moments import Statistics
from attnopt.nouns import Site
from attnopt.program import Program
from attnopt.running import Run


@torch.no_grad()
def norm_scales(program: Program, statistics: Statistics, site: Site) -> Tensor:
    """Return b of each head of a site; all sites are measured at once, and kept for a replay."""
    key = _key(site)
    if key not in statistics.refits:
        _measure(program, statistics)
    products, squares = statistics.refits[key]
    return products / squares.clamp_min(1e-30)


def _key(site: Site) -> str:
    return f"norms/{site.name}"


def _measure(program: Program, statistics: Statistics) -> None:
    if not statistics.batches:
        raise ValueError(
            "the statistics came without their rows, which the scales of query norms are measured "
            "on; calibrate again, or choose scaled=False"
        )
    wide = program.growing.cast(torch.float32)
    found = find_sites(wide)
    sites = {
        groups[0].anchor: site
        for site, groups in zip(found.sites, found.groups, strict=True)
        if len(groups) == 1 and isinstance(groups[0], Match) and "o" in site.projections
    }
    sums = {site.name: _Sums.of(site, statistics) for site in sites.values()}
    for batch in statistics.batches:
        run = Run(wide, batch, list(sites))
        for node, site in sites.items():
            run.before(node)
            queries: Any = run.env[node.args[0]]  # type: ignore[index]  # a node
            sums[site.name].add(queries, run.until(node), kept_tokens(batch))
    for site in sites.values():
        statistics.refits[_key(site)] = sums[site.name].products, sums[site.name].squares


@dataclass
class _Sums:
    """Over the rows of one site: E[|q| |a W|] and E[|q|^2] of each head, times their number."""

    readers: Tensor
    products: Tensor
    squares: Tensor

    @classmethod
    def of(cls, site: Site, statistics: Statistics) -> "_Sums":
        """Start with the metric in which the output of each head counts."""
        maps = read_heads(statistics.weights, site.projections["o"]).maps
        zeros = torch.zeros(site.heads, dtype=torch.float64)
        return cls(maps @ maps.mT, zeros, zeros.clone())

    def add(self, queries: Tensor, outputs: Tensor, kept: Tensor | None) -> None:
        """Add queries and outputs, (B, H, T, channels)."""
        real = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool)
        if kept is not None and kept.shape == real.shape:
            real = kept
        norms, given = (x.transpose(1, 2)[real].double() for x in (queries, outputs))
        norms = torch.linalg.vector_norm(norms, dim=-1)
        sizes = torch.einsum("nhd,hde,nhe->nh", given, self.readers, given).clamp_min(0).sqrt()
        self.products += (norms * sizes).sum(0)
        self.squares += norms.square().sum(0)
