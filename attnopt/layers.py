"""The linear algebra of one attention layer: its projections by head, and moments of their inputs.

Whatever a rewrite makes of keys and values, queries and the output projection undo: here are the
maps of each head in float64, the turning and the still channels, the metrics in which an error of
keys or values counts, and the best common map of several in such a metric.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.heads import Heads, Written, first_heads, read_heads, write_heads
from attnopt.moments import Statistics
from attnopt.nouns import Site

TINY = 1e-30
_RIDGE = 1e-9


@dataclass(frozen=True)
class Layer:
    """The four projections of a site in float64, heads first, and the moments of their inputs.

    `q`, `k`, `v` map inputs (with a 1 appended for the bias) to (heads, channels); `o` has for each
    query head the columns that read it. `gram_q` and `gram_kv` are the second moments.
    """

    q: Heads
    k: Heads
    v: Heads
    o: Heads
    gram_q: Tensor
    gram_kv: Tensor
    turning: int
    interleaved: bool

    @classmethod
    def read(cls, site: Site, stats: Statistics) -> "Layer":
        """Read a site's projections and moments."""
        made = {n: read_heads(stats.weights, p) for n, p in site.projections.items()}
        rope = site.rope
        return cls(
            q=made["q"],
            k=made["k"],
            v=made["v"],
            o=made["o"],
            gram_q=stats.gram(site.projections["q"].parameter),
            gram_kv=stats.gram(site.projections["k"].parameter),
            turning=0 if rope is None else rope.channels,
            interleaved=rope is not None and rope.style != "half",
        )

    def queries_of(self, key_head: int) -> range:
        """List the query heads that read a key head."""
        return _readers(self.q.count, self.k.count, key_head)

    def readers_of_value(self, value_head: int) -> range:
        """List the query heads that read a value head."""
        return _readers(self.q.count, self.v.count, value_head)

    def replaced(self, **maps: Tensor) -> "Layer":
        """Return a layer with other maps of q, k, v or o."""
        return replace(self, **{n: replace(getattr(self, n), maps=m) for n, m in maps.items()})

    def permuted(self, order: list[int]) -> "Layer":
        """Return the same layer with its heads, and those that read them, in another order."""
        readers = [h for k in order for h in self.queries_of(k)]
        return self.replaced(
            q=self.q.maps[readers],
            k=self.k.maps[order],
            v=self.v.maps[order],
            o=self.o.maps[readers],
        )

    def write(self, site: Site, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters, with as many heads of as many channels as the layer has."""
        written: list[Written] = []
        for name, heads in (("q", self.q), ("k", self.k), ("v", self.v), ("o", self.o)):
            projection = site.projections[name]
            count, width = len(projection.rows), len(projection.rows[0])
            stays = first_heads(count, width, heads.count) & (torch.arange(width) < heads.width)
            written.append(Written(projection, stays, heads.maps))
        return write_heads(weights, written)

    def planes(self, w: Tensor) -> Tensor:
        """Read the turning channels (.., channels, inputs) as complex planes."""
        turning = w[..., : self.turning, :]
        if self.interleaved:
            return torch.complex(turning[..., 0::2, :], turning[..., 1::2, :])
        half = self.turning // 2
        return torch.complex(turning[..., :half, :], turning[..., half:, :])

    def channels(self, z: Tensor, still: Tensor) -> Tensor:
        """Put planes and the channels that do not turn together again."""
        if self.interleaved:
            turning = torch.stack([z.real, z.imag], dim=-2).flatten(-3, -2)
        else:
            turning = torch.cat([z.real, z.imag], dim=-2)
        return torch.cat([turning, still], dim=-2)

    def still(self, w: Tensor) -> Tensor:
        """Return the channels that do not turn."""
        return w[..., self.turning :, :]


def _readers(queries: int, heads: int, head: int) -> range:
    size = queries // heads
    return range(head * size, (head + 1) * size)


def moment(a: Tensor, gram: Tensor, b: Tensor) -> Tensor:
    """Return E[a b^H] of two linear maps of one input."""
    return a @ gram.to(a.dtype) @ b.conj().transpose(-1, -2)


def query_metric(layer: Layer, members: list[int]) -> list[Tensor]:
    """Return, per member, the second moment of the still channels of its queries."""
    metrics: list[Tensor] = []
    for member in members:
        still = layer.still(layer.q.maps[list(layer.queries_of(member))])
        metrics.append(moment(still, layer.gram_q, still).sum(0))
    return metrics


def output_metric(layer: Layer, members: list[int]) -> list[Tensor]:
    """Return, per member, how much the output projection makes of each direction of its value."""
    return [
        sum(
            (layer.o.maps[h] @ layer.o.maps[h].T for h in layer.readers_of_value(m)),
            torch.zeros(()),
        )
        for m in members
    ]


def joint_components(
    maps: Tensor, gram: Tensor, metrics: list[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Return the best common map of several, (rank, inputs), and what decodes it for each."""
    count, width, _ = maps.shape
    if width == 0:
        return maps[0], maps.new_zeros(count, 0, 0)
    low, directions = principal(maps, gram, metrics)[1:]
    top = directions[:, -rank:]
    encoder, decoder = low @ top, torch.linalg.solve_triangular(low.T, top, upper=True)
    return encoder.T @ maps.flatten(0, 1), decoder.reshape(count, width, rank)


def principal(maps: Tensor, gram: Tensor, metrics: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the spectrum, the root of the metric and the components of stacked maps."""
    stacked = maps.flatten(0, 1)
    metric = torch.block_diag(*metrics)
    ridge = _RIDGE * metric.diagonal().mean().clamp_min(TINY)
    low = torch.linalg.cholesky(metric + ridge * torch.eye(len(metric), dtype=metric.dtype))
    spectrum, directions = torch.linalg.eigh(low.T @ moment(stacked, gram, stacked) @ low)
    # The sign of a component is free: its largest entry is made positive.
    largest = directions.abs().argmax(0, keepdim=True)
    return spectrum, low, directions * directions.gather(0, largest).sign()
