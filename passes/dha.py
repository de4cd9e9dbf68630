"""Fuse key heads and value heads so that several query heads share one, and the cache shrinks.

A key head under a rotary embedding may be multiplied by one complex number per rotary plane, and a
value head by any matrix, as long as the queries and the output projection undo it. Within that
freedom the heads of a group are replaced by their best common head: a rank-1 principal component
per plane, weighted by the energy of the queries that read it, and a joint principal component
analysis of the values in the metric of the output projection. Both are closed forms of second
moments, and neither depends on the arbitrary basis that the heads happen to be stored in.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.heads import first_heads
from attnopt.layers import TINY, Layer, joint_components, output_metric, principal, query_metric
from attnopt.moments import Statistics
from attnopt.nouns import Mlp, No, Site
from attnopt.refusals import cached_elsewhere, unreadable
from attnopt.surgery import GraphEdit, Kept, narrow

exact = False
tier = 0

Grouping = Literal["adjacent", "similar"]


@dataclass(frozen=True)
class Config:
    """How many key and value heads stay: `kv_heads` of both, or other numbers of each.

    Heads that are fused are neighbours, or with `grouping` the most similar ones, which become
    neighbours. `refit` solves the output projection anew for what the fused heads give it, layer
    after layer.
    """

    kv_heads: int = 1
    k_heads: int | None = None
    v_heads: int | None = None
    grouping: Grouping = "adjacent"
    refit: bool = True

    @property
    def keys(self) -> int:
        """The number of key heads that stay."""
        return self.kv_heads if self.k_heads is None else self.k_heads

    @property
    def values(self) -> int:
        """The number of value heads that stay."""
        return self.kv_heads if self.v_heads is None else self.v_heads


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the heads of a site can be fused."""
    for refusal in (
        unreadable(site),
        cached_elsewhere(site),
        _indivisible(site, config),
        _unlinear(site, config),
        _immovable(site, config),
    ):
        if refusal is not None:
            return refusal
    return True


def tier_of(site: Site, config: Config) -> int:
    """Return the lowest tier that holds a result: 2 where keys and values differ in number."""
    return 0 if config.keys == config.values else 2


def candidates(site: Site) -> tuple[Config, ...]:
    """List the settings worth trying at a site that keeps a cache, the weakest first."""
    if not site.cached or site.kv_heads == 1:
        return ()
    return tuple(Config(n) for n in _divisors(site.kv_heads))


def decoupled(site: Site) -> tuple[Config, ...]:
    """List the settings of keys and values apart, for plans that need not fit a stock class."""
    if not site.cached or site.kv_heads == 1:
        return ()
    keys = (site.kv_heads,) if site.qk_norm else _divisors(site.kv_heads)
    return tuple(
        Config(max(k, v), k_heads=k, v_heads=v) for k in keys for v in _divisors(site.kv_heads)
    )


def proposals(site: Site, asked: Any) -> tuple[Config, ...]:
    """List the settings worth trying for a plan, those of keys and values apart where tiers allow.

    Heads are fused for what they weigh, whether a cache keeps them or not.
    """
    if isinstance(site, Mlp) or site.kv_heads == 1:
        return ()
    counts = _divisors(site.kv_heads)
    if asked.tier < tier_of(site, Config(2, v_heads=1)):
        return tuple(Config(n) for n in counts[1:])
    keys = counts[:1] if site.qk_norm else counts
    both = [(k, v) for k in keys for v in counts]
    return tuple(
        Config(k) if k == v else Config(max(k, v), k_heads=k, v_heads=v) for k, v in both[1:]
    )


def alike(config: Config) -> tuple[int, int]:
    """Return what is the same where another site is treated alike."""
    return config.keys, config.values


def _divisors(heads: int) -> tuple[int, ...]:
    return tuple(n for n in range(heads, 0, -1) if heads % n == 0)


def _unlinear(site: Site, config: Config) -> No | None:
    if site.qk_norm is not None and config.keys != site.kv_heads:
        return No(
            f"keys pass a {site.qk_norm} norm after their projection, so only values can be fused "
            f"(k_heads {site.kv_heads})",
            site.name,
        )
    return None


def _indivisible(site: Site, config: Config) -> No | None:
    for count in (config.keys, config.values):
        if count < 1 or site.kv_heads % count:
            allowed = ", ".join(map(str, _divisors(site.kv_heads)))
            why = f"{count} does not divide {site.kv_heads} key heads; choose {allowed}"
            return No(why, site.name)
    return None


def _immovable(site: Site, config: Config) -> No | None:
    if config.grouping == "similar" and (site.sinks or site.bias != "none"):
        return No("heads have biases or sinks of their own, so they keep their order", site.name)
    return None


def _is_idle(site: Site, config: Config) -> bool:
    return config.keys == config.values == site.kv_heads


def convert(site: Site, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return new parameters of the projections; none where the heads stay as they are."""
    if _is_idle(site, config):
        return {}
    layer = Layer.read(site, stats)
    if config.grouping == "similar":
        layer = layer.permuted(_similar_first(layer, min(config.keys, config.values)))
    fused = _fuse_values(_fuse_keys(layer, config.keys), config.values)
    return fused.write(site, stats.weights)


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Give the graph of a site its new number of key and value heads."""
    if _is_idle(site, config):
        return None
    whole = Kept.of(site)
    kept = Kept(
        whole.q,
        whole.k & first_heads(site.kv_heads, 1, config.keys),
        whole.v & first_heads(site.kv_heads, 1, config.values),
    )
    maps = ([h * n // site.heads for h in range(site.heads)] for n in (config.keys, config.values))
    return narrow(edit, site, kept, k_map=next(maps), v_map=next(maps))


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV bytes per token, in units of one element."""
    elements = config.keys * site.head_dim + config.values * site.v_head_dim
    return {"kv_elements_per_token": elements}


def damage(site: Site, stats: Statistics, config: Config) -> float:
    """Predict the squared error of the values, in output units, relative to their energy."""
    if _is_idle(site, config):
        return 0.0
    layer = Layer.read(site, stats)
    lost = total = 0.0
    for members in _groups(site.kv_heads, config.values):
        spectrum = _value_spectrum(layer, members)
        total += float(spectrum.sum())
        lost += float(spectrum[: -layer.v.width].sum())
    return lost / total


def _groups(heads: int, count: int) -> list[list[int]]:
    """Deal neighbouring heads to so many groups."""
    size = heads // count
    return [list(range(i, i + size)) for i in range(0, heads, size)]


# ------------------------------------------------------------------------------------- closed form


def _fuse_keys(layer: Layer, count: int) -> Layer:
    """Fuse the keys of each group, by planes where they turn and jointly where they do not."""
    if count == layer.k.count:
        return layer
    q = layer.q.maps.clone()
    keys: list[Tensor] = []
    for members in _groups(layer.k.count, count):
        key, factors, decoders = _fused_key(layer, members)
        keys.append(key)
        for i, member in enumerate(members):
            for h in layer.queries_of(member):
                q[h] = _read_fused(layer, layer.q.maps[h], factors[i], decoders[i])
    return layer.replaced(q=q, k=torch.stack(keys))


def _fuse_values(layer: Layer, count: int) -> Layer:
    """Fuse the values of each group by joint components."""
    if count == layer.v.count:
        return layer
    o = layer.o.maps.clone()
    values: list[Tensor] = []
    for members in _groups(layer.v.count, count):
        value, back = joint_components(
            layer.v.maps[members], layer.gram_kv, output_metric(layer, members), layer.v.width
        )
        values.append(value)
        for i, member in enumerate(members):
            for h in layer.readers_of_value(member):
                o[h] = back[i].T @ layer.o.maps[h]
    return layer.replaced(o=o, v=torch.stack(values))


def _fused_key(layer: Layer, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the common key of a group, and what the queries of each member must do."""
    k = layer.k.maps[members]
    z = layer.planes(k)
    shares, factors = _plane_components(layer, members, z)
    still, decoders = joint_components(
        layer.still(k), layer.gram_kv, query_metric(layer, members), layer.still(k).shape[-2]
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
    phase = shares[:, :1] / shares[:, :1].abs().clamp_min(TINY)
    shares = shares * phase.conj()
    cross = torch.einsum("phg,pg->ph", covariance, shares.conj())
    energy = torch.einsum("ph,ph->p", shares, cross).real.clamp_min(TINY)
    own = covariance.diagonal(dim1=-2, dim2=-1).real.mean(-1).clamp_min(TINY)
    size = (energy / own).sqrt()
    factors = cross / energy.unsqueeze(-1) * size.unsqueeze(-1)
    return (shares / size.unsqueeze(-1)).mT, factors.mT


def _query_energy(layer: Layer, members: list[int]) -> Tensor:
    """Return, per member and plane, the root of the energy of the queries that read it."""
    rows: list[Tensor] = []
    for member in members:
        z = layer.planes(layer.q.maps[list(layer.queries_of(member))])
        energy = torch.einsum("hpi,ij,hpj->hp", z, layer.gram_q.to(z.dtype), z.conj()).real
        rows.append(energy.sum(0).clamp_min(TINY).sqrt())
    return torch.stack(rows)


def _read_fused(layer: Layer, q: Tensor, factor: Tensor, decoder: Tensor) -> Tensor:
    """Let a query head read the fused key as it read its own."""
    turned = layer.planes(q) * factor.conj().unsqueeze(-1)
    return layer.channels(turned, decoder.T @ layer.still(q))


def _value_spectrum(layer: Layer, members: list[int]) -> Tensor:
    maps = layer.v.maps[members]
    return principal(maps, layer.gram_kv, output_metric(layer, members))[0]


# ---------------------------------------------------------------------------------------- grouping


def _similar_first(layer: Layer, count: int) -> list[int]:
    """Order the heads so that the members of each group are alike: the nearest groups join."""
    groups = [[h] for h in range(layer.k.count)]
    likeness = _likeness(layer)
    while len(groups) > count:
        groups = _paired(groups, likeness)
    return [h for group in groups for h in group]


def _paired(groups: list[list[int]], likeness: Tensor) -> list[list[int]]:
    """Join groups two by two, the most similar pair first."""
    size = _smallest_factor(len(groups))
    left = list(groups)
    joined: list[list[int]] = []
    while left:
        first = left.pop(0)
        while len(first) < size * len(groups[0]):
            best = max(left, key=lambda g: float(likeness[first][:, g].mean()))
            left.remove(best)
            first = [*first, *best]
        joined.append(first)
    return joined


def _smallest_factor(count: int) -> int:
    return next(n for n in range(2, count + 1) if count % n == 0)


def _likeness(layer: Layer) -> Tensor:
    """Return how alike heads are, whatever their bases: overlaps of keys and of values."""
    k, v = layer.k.maps, layer.v.maps
    gram = layer.gram_kv
    planes = layer.planes(k)
    overlap = torch.einsum("hpi,ij,gpj->hgp", planes, gram.to(planes.dtype), planes.conj()).abs()
    likeness = overlap.sum(-1)
    for maps in (layer.still(k), v):
        moments = torch.einsum("hci,ij,gdj->hgcd", maps, gram, maps)
        sizes = torch.linalg.matrix_norm(moments, ord="nuc")
        likeness = likeness + sizes if maps is not v else _scaled(likeness) + _scaled(sizes)
    return likeness


def _scaled(overlap: Tensor) -> Tensor:
    size = overlap.diagonal().clamp_min(TINY).sqrt()
    return overlap / (size.unsqueeze(0) * size.unsqueeze(1))
