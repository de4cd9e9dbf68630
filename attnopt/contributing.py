"""What a head gives to its layer's output, foretold before its attention is computed.

A head's output a, read by the columns W of the output projection, gives |a W| to a token. Two
things tell it. Norms of queries q need one number a head, as a long query attends sharply:
b = E[|q| |a W|] / E[|q|^2] makes those of different heads comparable. A router is a linear map of
the token that queries are made of, the norms of its queries and 1, by ridge regression. Both are
solved on the rows of the calibration, as they are in the source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnopt.calibrating import inputs_of, kept_tokens
from attnopt.finder import find_sites
from attnopt.finder.match import Match
from attnopt.finder.ops import args, kind, value
from attnopt.heads import read_heads
from attnopt.moments import Statistics
from attnopt.nouns import No, Site
from attnopt.ops.gates import told_by
from attnopt.program import Program
from attnopt.running import Run

# Relative to what a feature says on average. Ten and a hundred times as much lose a little more:
# 0.140 and 0.144 nats for 0.139 (code-llama, 4 of 8 heads, rows that nothing was fitted on).
_RIDGE: Final = 1e-3


@torch.no_grad()
def norm_scales(program: Program, statistics: Statistics, site: Site) -> Tensor:
    """Return b of each head of a site; all sites are measured at once, and kept for a replay."""
    gram, cross = _moments(program, statistics, site)
    norms = _norms(site, gram)
    return cross[norms].diagonal() / gram.diagonal()[norms].clamp_min(1e-30)


@torch.no_grad()
def fitted_router(
    program: Program, statistics: Statistics, site: Site, *, group: bool = False
) -> Tensor:
    """Return the map (heads, features) that tells what heads give, or key heads with readers."""
    gram, cross = _moments(program, statistics, site)
    sizes = gram.diagonal().sqrt().clamp_min(1e-30)
    left = gram / sizes / sizes.unsqueeze(1)
    left.diagonal().add_(_RIDGE)
    right = cross[:, site.heads :] if group else cross[:, : site.heads]
    solved: Tensor = torch.linalg.solve(left, right / sizes.unsqueeze(1))
    return (solved / sizes.unsqueeze(1)).T


def tokens_of(program: Program, queries: fx.Node, site: Site) -> fx.Node | No:
    """Return what the queries are made of, as tokens (B, T, C); some sources flatten it first."""
    name = site.projections["q"].parameter
    batch, _, tokens, _ = value(queries).shape
    found = inputs_of(program, [name]).get(name)
    while found is not None and found.op == "call_function":
        shape = value(found).shape
        if len(shape) == 3 and shape[0] == batch and shape[1] == tokens:
            return found
        found = args(found)[0] if kind(found) in ("view", "reshape", "_unsafe_view") else None
    return No("its queries are not made of tokens in the order of a batch", site.name)


def _moments(program: Program, statistics: Statistics, site: Site) -> tuple[Tensor, Tensor]:
    """Return E[f f^T] of the features and E[f g^T] of what heads, and groups of them, give."""
    key = _key(site)
    if key not in statistics.refits:
        _measure(program, statistics)
    return statistics.refits[key]


def _norms(site: Site, gram: Tensor) -> slice:
    """Say where the norms are among the features."""
    return slice(len(gram) - 1 - site.heads, len(gram) - 1)


def _key(site: Site) -> str:
    return f"gives/{site.name}"


def _measure(program: Program, statistics: Statistics) -> None:
    if not statistics.batches:
        raise ValueError(
            "the statistics came without their rows, on which it is measured what heads give; "
            "calibrate again, or choose score='norm'"
        )
    wide = program.growing.cast(torch.float32)
    looks = _looks(wide)
    sums = {look.site.name: _Sums.of(look.site, statistics) for look in looks.values()}
    for batch in statistics.batches:
        held: dict[fx.Node, Any] = {}
        places = {node for look in looks.values() for node in look.nodes}
        for node, found in Run(wide, batch, places).seen(places):
            held[node] = found
            if node in looks:
                look = looks[node]
                tokens = None if look.tokens is None else held[look.tokens]
                sums[look.site.name].add(tokens, held.pop(look.queries), held.pop(node),
                                         kept_tokens(batch))  # fmt: skip
    for found in sums.values():
        statistics.refits[_key(found.site)] = found.means()


@dataclass(frozen=True)
class _Look:
    """Where to look: at what queries are made of, if that is known, at queries and at outputs."""

    site: Site
    tokens: fx.Node | None
    queries: fx.Node
    outputs: fx.Node

    @property
    def nodes(self) -> list[fx.Node]:
        """All of them."""
        return [n for n in (self.tokens, self.queries, self.outputs) if n is not None]


def _looks(program: Program) -> Mapping[fx.Node, _Look]:
    """Return where to look, by the attention."""
    found = find_sites(program)
    looks: dict[fx.Node, _Look] = {}
    for site, groups in zip(found.sites, found.groups, strict=True):
        if len(groups) == 1 and isinstance(groups[0], Match) and "o" in site.projections:
            node = groups[0].anchor
            queries: Any = node.args[0]
            tokens = tokens_of(program, queries, site) if "q" in site.projections else None
            looks[node] = _Look(site, None if isinstance(tokens, No) else tokens, queries, node)
    return looks


@dataclass
class _Sums:
    """Over the rows of one site: f f^T and f g^T of features and of what heads give."""

    site: Site
    readers: Tensor
    gram: Any = 0.0
    cross: Any = 0.0
    count: int = 0

    @classmethod
    def of(cls, site: Site, statistics: Statistics) -> "_Sums":
        """Start with the metric in which the output of each head counts."""
        maps = read_heads(statistics.weights, site.projections["o"]).maps
        return cls(site, maps @ maps.mT)

    def add(
        self, tokens: Tensor | None, queries: Tensor, outputs: Tensor, kept: Tensor | None
    ) -> None:
        """Add tokens (B, T, C), queries and outputs (B, H, T, channels)."""
        real = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool)
        if kept is not None and kept.shape == real.shape:
            real = kept
        features = told_by(queries, tokens)[real].double()
        given = outputs.transpose(1, 2)[real].double()
        sizes = torch.einsum("nhd,hde,nhe->nh", given, self.readers, given).clamp_min(0).sqrt()
        groups = sizes.unflatten(1, (self.site.kv_heads, -1)) if self._even else sizes[:, :0, None]
        told = torch.cat([sizes, torch.linalg.vector_norm(groups, dim=-1)], dim=1)
        self.gram = self.gram + features.T @ features
        self.cross = self.cross + features.T @ told
        self.count += len(features)

    def means(self) -> tuple[Tensor, Tensor]:
        """Return both moments."""
        return self.gram / self.count, self.cross / self.count

    @property
    def _even(self) -> bool:
        return self.site.heads % self.site.kv_heads == 0
