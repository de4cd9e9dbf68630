"""Fuse key heads and value heads so that several query heads share one, and the cache shrinks.

A key head under a rotary embedding may be multiplied by one complex number per rotary plane, and a
value head by any matrix, as long as the queries and the output projection undo it. Within that
freedom the heads of a group are replaced by their best common head: a rank-1 principal component
per plane, weighted by the energy of the queries that read it, and a joint principal component
analysis of the values in the metric of the output projection. Both are closed forms of second
moments, and neither depends on the arbitrary basis that the heads happen to be stored in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.calibrating import Statistics
from attnopt.heads import Heads, Written, first_heads, read_heads, write_heads
from attnopt.nouns import No, Site
from attnopt.refusals import cached_elsewhere, unreadable
from attnopt.surgery import GraphEdit, Kept, narrow

exact = False
tier = 0


@dataclass(frozen=True)
class Config:
    """How many key and value heads stay.

    `refit` solves the output projection anew for what the fused heads give it, layer after layer.
    """

    kv_heads: int = 1
    refit: bool = True


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the heads of a site can be fused in a way that a stock class can express."""
    for refusal in (
        unreadable(site),
        cached_elsewhere(site),
        _unlinear(site),
        _indivisible(site, config),
    ):
        if refusal is not None:
            return refusal
    return True


def candidates(site: Site) -> tuple[Config, ...]:
    """List the settings worth trying at a site that keeps a cache, the weakest first."""
    if not site.cached or site.kv_heads == 1:
        return ()
    return tuple(Config(n) for n in _divisors(site.kv_heads))


def _divisors(heads: int) -> tuple[int, ...]:
    return tuple(n for n in range(heads, 0, -1) if heads % n == 0)


def _unlinear(site: Site) -> No | None:
    if site.qk_norm is not None:
        return No(f"keys pass a {site.qk_norm} norm after their projection", site.name)
    return None


def _indivisible(site: Site, config: Config) -> No | None:
    if config.kv_heads < 1 or site.kv_heads % config.kv_heads:
        allowed = ", ".join(map(str, _divisors(site.kv_heads)))
        why = f"{config.kv_heads} does not divide {site.kv_heads} key heads; choose {allowed}"
        return No(why, site.name)
    return None


def convert(site: Site, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return new parameters of the projections; none where the heads stay as they are."""
    if config.kv_heads == site.kv_heads:
        return {}
    layer = Layer.read(site, stats)
    group = site.kv_heads // config.kv_heads
    groups = [list(range(i, i + group)) for i in range(0, site.kv_heads, group)]
    fused = _fuse_planes(layer, groups)
    return fused.write(site, stats.weights)


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Give the graph of a site its new number of key and value heads."""
    if config.kv_heads == site.kv_heads:
        return None
    whole = Kept.of(site)
    left = first_heads(site.kv_heads, 1, config.kv_heads)
    readers = [h * config.kv_heads // site.heads for h in range(site.heads)]
    kept = Kept(whole.q, whole.k & left, whole.v & left)
    return narrow(edit, site, kept, k_map=readers, v_map=readers)


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV bytes per token, in units of one element."""
    return {"kv_elements_per_token": config.kv_heads * (site.head_dim + site.v_head_dim)}


def damage(site: Site, stats: Statistics, config: Config) -> float:
    """Predict the squared error of the values, in output units, relative to their energy."""
    if config.kv_heads == site.kv_heads:
        return 0.0
    layer = Layer.read(site, stats)
    group = site.kv_heads // config.kv_heads
    lost = total = 0.0
    for start in range(0, site.kv_heads, group):
        spectrum = _value_spectrum(layer, list(range(start, start + group)))
        total += float(spectrum.sum())
        lost += float(spectrum[: -layer.v.width].sum())
    return lost / total


# ------------------------------------------------------------------------------------------- layer


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

    @property
    def readers(self) -> int:
        """How many query heads read one key head."""
        return self.q.count // self.k.count

    def queries_of(self, key_head: int) -> range:
        """List the query heads that read a key head."""
        return range(key_head * self.readers, (key_head + 1) * self.readers)

    def replaced(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> "Layer":
        """Return a layer with other projections of the same kind."""
        return Layer(
            Heads(q, self.q.biased),
            Heads(k, self.k.biased),
            Heads(v, self.v.biased),
            Heads(o, self.o.biased),
            self.gram_q,
            self.gram_kv,
            self.turning,
            self.interleaved,
        )

    def write(self, site: Site, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters, keys and values with as many heads as the layer has."""
        written: list[Written] = []
        for name, heads in (("q", self.q), ("k", self.k), ("v", self.v), ("o", self.o)):
            projection = site.projections[name]
            stays = first_heads(len(projection.rows), len(projection.rows[0]), heads.count)
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


def _moment(a: Tensor, gram: Tensor, b: Tensor) -> Tensor:
    """Return E[a b^H] of two linear maps of one input."""
    return a @ gram.to(a.dtype) @ b.conj().transpose(-1, -2)


# ------------------------------------------------------------------------------------- closed form


def _fuse_planes(layer: Layer, groups: list[list[int]]) -> Layer:
    """Fuse keys by rank-1 complex components per plane, values by joint components."""
    q, o = layer.q.maps.clone(), layer.o.maps.clone()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for members in groups:
        key, factors, decoders = _fused_key(layer, members)
        value, back = _fused_value(layer, members)
        keys.append(key)
        values.append(value)
        for i, member in enumerate(members):
            for h in layer.queries_of(member):
                q[h] = _read_fused(layer, layer.q.maps[h], factors[i], decoders[i])
                o[h] = back[i].T @ layer.o.maps[h]
    return layer.replaced(q, torch.stack(keys), torch.stack(values), o)


def _fused_key(layer: Layer, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the common key of a group, and what the queries of each member must do."""
    k = layer.k.maps[members]
    z = layer.planes(k)
    shares, factors = _plane_components(layer, members, z)
    still, decoders = _joint_components(
        layer.still(k), layer.gram_kv, _query_metric(layer, members), layer.still(k).shape[-2]
    )
    common = (shares.unsqueeze(-1) * z).sum(0)
    return layer.channels(common, still), factors, decoders


def _plane_components(layer: Layer, members: list[int], z: Tensor) -> tuple[Tensor, Tensor]:
    """Return c and a (heads, planes): the fused key is sum c k, and a times it replaces k."""
    gram = layer.gram_kv
    covariance = torch.einsum("hpi,ij,gpj->phg", z, gram.to(z.dtype), z.conj())
    weight = _query_energy(layer, members).T.unsqueeze(-1)
    spread = weight * covariance * weight.mT
    top = torch.linalg.eigh(spread)[1][..., -1]
    shares = top.conj() * weight.squeeze(-1)
    # The phase of a component is free: the share of the first head is made real and positive.
    phase = shares[:, :1] / shares[:, :1].abs().clamp_min(_TINY)
    shares = shares * phase.conj()
    cross = torch.einsum("phg,pg->ph", covariance, shares.conj())
    energy = torch.einsum("ph,ph->p", shares, cross).real.clamp_min(_TINY)
    own = covariance.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp_min(_TINY)
    size = (energy / own).sqrt()
    factors = cross / energy.unsqueeze(-1) * size.unsqueeze(-1)
    return (shares / size.unsqueeze(-1)).mT, factors.mT


def _query_energy(layer: Layer, members: list[int]) -> Tensor:
    """Return, per member and plane, the root of the energy of the queries that read it."""
    rows: list[Tensor] = []
    for member in members:
        z = layer.planes(layer.q.maps[list(layer.queries_of(member))])
        energy = torch.einsum("hpi,ij,hpj->hp", z, layer.gram_q.to(z.dtype), z.conj()).real
        rows.append(energy.sum(0).clamp_min(_TINY).sqrt())
    return torch.stack(rows)


def _query_metric(layer: Layer, members: list[int]) -> list[Tensor]:
    """Return, per member, the second moment of the still channels of its queries."""
    metrics: list[Tensor] = []
    for member in members:
        still = layer.still(layer.q.maps[list(layer.queries_of(member))])
        metrics.append(_moment(still, layer.gram_q, still).sum(0))
    return metrics


def _read_fused(layer: Layer, q: Tensor, factor: Tensor, decoder: Tensor) -> Tensor:
    """Let a query head read the fused key as it read its own."""
    turned = layer.planes(q) * factor.conj().unsqueeze(-1)
    return layer.channels(turned, decoder.T @ layer.still(q))


def _fused_value(layer: Layer, members: list[int]) -> tuple[Tensor, Tensor]:
    """Return the common value of a group, and the map from it to each member's value."""
    return _joint_components(
        layer.v.maps[members], layer.gram_kv, _output_metric(layer, members), layer.v.width
    )


def _output_metric(layer: Layer, members: list[int]) -> list[Tensor]:
    """Return, per member, how much the output projection makes of each direction of its value."""
    return [
        sum((layer.o.maps[h] @ layer.o.maps[h].T for h in layer.queries_of(m)), torch.zeros(()))
        for m in members
    ]


def _joint_components(
    maps: Tensor, gram: Tensor, metrics: list[Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Return the best common map of several, (rank, inputs), and what decodes it for each."""
    count, width, _ = maps.shape
    if width == 0:
        return maps[0], maps.new_zeros(count, 0, 0)
    low, directions = _principal(maps, gram, metrics)[1:]
    top = directions[:, -rank:]
    encoder, decoder = low @ top, torch.linalg.solve_triangular(low.T, top, upper=True)
    return encoder.T @ maps.flatten(0, 1), decoder.reshape(count, width, rank)


def _principal(maps: Tensor, gram: Tensor, metrics: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the spectrum, the root of the metric and the components of stacked maps."""
    stacked = maps.flatten(0, 1)
    metric = torch.block_diag(*metrics)
    ridge = _RIDGE * metric.diagonal().mean().clamp_min(_TINY)
    low = torch.linalg.cholesky(metric + ridge * torch.eye(len(metric), dtype=metric.dtype))
    spectrum, directions = torch.linalg.eigh(low.T @ _moment(stacked, gram, stacked) @ low)
    # The sign of a component is free: its largest entry is made positive.
    largest = directions.abs().argmax(0, keepdim=True)
    return spectrum, low, directions * directions.gather(0, largest).sign()


def _value_spectrum(layer: Layer, members: list[int]) -> Tensor:
    maps = layer.v.maps[members]
    return _principal(maps, layer.gram_kv, _output_metric(layer, members))[0]


_TINY = 1e-30
_RIDGE = 1e-9
