"""Narrow the heads of an attention: values, and keys that do not turn, of lower rank.

What a value head gives to the output is a product of two matrices, so that any basis of its
channels serves, and fewer of them serve best where they are the principal components of the values
in the metric of the output projection. Keys without a rotary embedding likewise, in the metric of
the queries that read them. The cache holds fewer channels of as many heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.heads import first_channels
from attnopt.layers import Layer, joint_components, output_metric, principal, query_metric
from attnopt.moments import Statistics
from attnopt.nouns import Mlp, No, Site
from attnopt.refusals import cached_elsewhere, unreadable
from attnopt.surgery import GraphEdit, Kept, narrow

exact = False
tier = 2
follows = ("dha", "amp")

_MULTIPLE = 8
_FEW = 8


@dataclass(frozen=True)
class Config:
    """How many channels of each value head and of each key head stay; None keeps them all.

    `refit` solves the output projection anew for what narrower heads give it, layer after layer.
    """

    v_width: int | None = None
    qk_width: int | None = None
    refit: bool = True


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the heads of a site can become narrower."""
    for refusal in (
        unreadable(site),
        cached_elsewhere(site),
        _width(site, "v_width", config.v_width, site.v_head_dim),
        _width(site, "qk_width", config.qk_width, site.head_dim),
        _keys(site, config),
    ):
        if refusal is not None:
            return refusal
    return True


def candidates(site: Site) -> tuple[Config, ...]:
    """List the settings worth trying at a site that keeps a cache, the weakest first."""
    if not site.cached:
        return ()
    return tuple(Config(width) for width in range(site.v_head_dim, 0, -_MULTIPLE))


def proposals(site: Site, asked: Any) -> tuple[Config, ...]:
    """List the widths worth trying for a plan, the widest first."""
    if isinstance(site, Mlp):
        return ()
    values = _widths_below(site.v_head_dim)
    found = [Config(v) for v in values]
    if site.rope is None and site.qk_norm is None:
        keys = _widths_below(site.head_dim)
        found += [Config(None, k) for k in keys]
        found += [Config(v, k) for v, k in zip(values, keys, strict=False)]
    return tuple(found)


def _widths_below(whole: int) -> list[int]:
    """Return narrower widths, at most so many of them."""
    step = _MULTIPLE * max(round(whole / _MULTIPLE / _FEW), 1)
    return [n for n in range(whole - step, 0, -step) if n % _MULTIPLE == 0]


def _width(site: Site, name: str, width: int | None, whole: int) -> No | None:
    if width is None or width == whole:
        return None
    if not 0 < width < whole or width % _MULTIPLE:
        return No(
            f"{name} {width}: of {whole} channels a multiple of {_MULTIPLE} can stay", site.name
        )
    return None


def _keys(site: Site, config: Config) -> No | None:
    if config.qk_width in (None, site.head_dim):
        return None
    if site.rope is not None:
        return No("keys turn with their position, which ties their channels together", site.name)
    if site.qk_norm is not None:
        return No(f"keys pass a {site.qk_norm} norm after their projection", site.name)
    return None


def convert(site: Site, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return new parameters of the projections; none where the heads stay as wide as they are."""
    wide = _widths(site, config)
    if wide == (site.head_dim, site.v_head_dim):
        return {}
    layer = _narrow_values(_narrow_keys(Layer.read(site, stats), wide[0]), wide[1])
    return layer.write(site, stats.weights)


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Give the graph of a site its new widths."""
    wide = _widths(site, config)
    if wide == (site.head_dim, site.v_head_dim):
        return None
    whole = Kept.of(site)
    keys = first_channels(site.head_dim, wide[0])
    values = first_channels(site.v_head_dim, wide[1])
    return narrow(edit, site, Kept(whole.q & keys, whole.k & keys, whole.v & values))


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV bytes per token, in units of one element."""
    return {"kv_elements_per_token": site.kv_heads * sum(_widths(site, config))}


def damage(site: Site, stats: Statistics, config: Config) -> float:
    """Predict the squared error of the values, in output units, relative to their energy."""
    layer = Layer.read(site, stats)
    width = _widths(site, config)[1]
    lost = total = 0.0
    for head in range(layer.v.count):
        metric = output_metric(layer, [head])
        spectrum = principal(layer.v.maps[[head]], layer.gram_kv, metric)[0]
        total += float(spectrum.sum())
        lost += float(spectrum[: len(spectrum) - width].sum())
    return lost / total


def _widths(site: Site, config: Config) -> tuple[int, int]:
    return config.qk_width or site.head_dim, config.v_width or site.v_head_dim


def _narrow_keys(layer: Layer, width: int) -> Layer:
    if width == layer.k.width:
        return layer
    keys, queries = _narrowed(
        layer, layer.k.maps, layer.q.maps, width, query_metric, layer.queries_of
    )
    return layer.replaced(k=keys, q=queries)


def _narrow_values(layer: Layer, width: int) -> Layer:
    if width == layer.v.width:
        return layer
    values, outputs = _narrowed(
        layer, layer.v.maps, layer.o.maps, width, output_metric, layer.readers_of_value
    )
    return layer.replaced(v=values, o=outputs)


def _narrowed(
    layer: Layer,
    made: Tensor,
    read: Tensor,
    width: int,
    metric: Callable[[Layer, list[int]], list[Tensor]],
    readers: Callable[[int], range],
) -> tuple[Tensor, Tensor]:
    """Return narrower maps of heads, and of those that read them."""
    narrow_read = read.new_empty(read.shape[0], width, read.shape[2])
    narrow_made: list[Tensor] = []
    for head in range(len(made)):
        common, back = joint_components(made[[head]], layer.gram_kv, metric(layer, [head]), width)
        narrow_made.append(common)
        for reader in readers(head):
            narrow_read[reader] = back[0].T @ read[reader]
    return torch.stack(narrow_made), narrow_read
