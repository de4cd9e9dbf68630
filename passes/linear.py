"""Attend by way of a matrix that holds what was seen: linear attention, behind a window or alone.

`hybrid` takes the softmax over a window, and learned features for everything older, under one
denominator; with a window as long as the text it is softmax attention. `pure` has no window,
`gated` none either, but a decay for each head. The cache is the window and a matrix of constant
size. Without healing the features stand for little: `heal=True` says that it follows, and lets
`pure` and `gated` replace a softmax. The state is a matrix for each query head. A window slides key
by key, so that padding on the left changes nothing.
https://arxiv.org/abs/2410.10254, https://arxiv.org/abs/2405.17381, https://arxiv.org/abs/2510.05901
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from attnopt.finder.emit import insert_call
from attnopt.nouns import No, Site
from attnopt.ops import linear_attention
from attnopt.ops.features import FEATURES, width
from attnopt.refusals import cached_elsewhere
from attnopt.surgery import GraphEdit

exact = False
tier = 2
weightless = True

KINDS: Final = ("hybrid", "pure", "gated")
_PARAMETERS: Final = ("map_q", "map_k", "gate", "decay")
# What a hybrid gives the window at first, and how much of its state a head keeps over a token.
_GATE: Final = 0.1
_DECAYS: Final = (0.9, 0.999)
_KEPT: Final = ("padding", "scale", "k_map", "v_map")

aten = torch.ops.aten


@dataclass(frozen=True)
class Config:
    """The `window` of a hybrid counts a query's own key; `features` are the columns of a map.

    None of them is as many as a head has channels; `hedgehog` makes two of each.
    """

    kind: Literal["hybrid", "pure", "gated"] = "hybrid"
    window: int = 64
    feature: str = "hedgehog"
    features: int | None = None
    heal: bool = False

    @property
    def near(self) -> int:
        """The keys that a softmax is taken over."""
        return self.window if self.kind == "hybrid" else 0


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether a site can attend by way of a matrix."""
    for refusal in (
        _settings(site, config),
        _mask(site, config),
        _scores(site),
        cached_elsewhere(site),
        _unhealed(site, config),
    ):
        if refusal is not None:
            return refusal
    return True


def _settings(site: Site, config: Config) -> No | None:
    if config.kind not in KINDS:
        return No(f"kind {config.kind!r}: it is {', '.join(KINDS)}", site.name)
    if config.feature not in FEATURES or config.feature == "identity":
        named = ", ".join(n for n in FEATURES if n != "identity")
        return No(f"feature {config.feature!r}: it is {named}", site.name)
    if config.kind == "hybrid" and config.window < 1:
        return No(f"window {config.window}: it has the query's own key at least", site.name)
    if config.features is not None and config.features < 1:
        return No(f"features {config.features}: a map has one column at least", site.name)
    return None


def _mask(site: Site, config: Config) -> No | None:
    if site.kind != "self":
        return No("cross-attention has no order of queries and keys", site.name)
    if site.mask.kind == "none":
        if config.kind == "pure":
            return None
        why = f"kind {config.kind!r} needs a causal mask, and it has none; kind 'pure' needs none"
        return No(why, site.name)
    if site.mask.kind != "causal":
        return No(f"its mask is {site.mask}; a matrix holds all that was seen before", site.name)
    return None


def _scores(site: Site) -> No | None:
    """Say what a product of features cannot stand for."""
    if site.bias != "none":
        return No(f"its scores have a bias ({site.bias}), which features do not know of", site.name)
    if site.sinks:
        return No("its heads have sinks, which belong to a softmax over all keys", site.name)
    if site.softcap is not None:
        return No("its scores have a soft cap, which features do not know of", site.name)
    return None


def _unhealed(site: Site, config: Config) -> No | None:
    if config.kind == "hybrid" or config.heal:
        return None
    return No(
        f"kind {config.kind!r} has no setting at which it is the softmax that the weights were "
        "made for; say heal=True, and heal the result",
        site.name,
    )


def convert(site: Site, stats: Any, config: Config) -> dict[str, Tensor]:
    """Return the feature maps and factors of the heads; the projections stay as they are."""
    return {_name(site, name): x for name, x in _initial(site, config).items()}


def _initial(site: Site, config: Config) -> dict[str, Tensor]:
    """Return the parameters as they begin: maps that leave channels as they are, scaled."""
    count = site.head_dim if config.features is None else config.features
    eye = torch.eye(site.head_dim, count).repeat(site.heads, 1, 1)
    scale = site.head_dim**-0.5 if site.scale is None else site.scale
    eye = eye * math.sqrt(abs(scale))
    found = {"map_q": eye, "map_k": eye.clone()}
    if config.kind == "hybrid":
        found["gate"] = torch.full((site.heads,), _GATE).logit()
    if config.kind == "gated":
        found["decay"] = torch.linspace(*_DECAYS, site.heads).logit()
    return found


def _name(site: Site, parameter: str) -> str:
    return f"{site.name.replace('#', '_')}.linear.{parameter}"


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Put the op at a site, with its new parameters."""
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    given = {n: x for n, x in node.kwargs.items() if x is not None}
    if "mask" in given:
        return No("a mask hides some of its keys from some queries only", site.name)
    made = {n: edit.parameter(_name(site, n), x) for n, x in _initial(site, config).items()}
    for name in ("gate", "decay"):
        if name in made:
            made[name] = insert_call(node, aten.sigmoid.default, made[name])
    node.target = linear_attention
    node.args = (*node.args[:3], *(made.get(name) for name in _PARAMETERS))
    node.kwargs = {
        "feature": config.feature,
        "window": config.near,
        "causal": site.mask.kind == "causal",
        **{n: x for n, x in given.items() if n in _KEPT},
    }
    return None


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the elements that a cache keeps once; for a workload, the operations of a call."""
    count = width(site.head_dim if config.features is None else config.features, config.feature)
    matrix = count * (site.v_head_dim + 1)
    window = config.near * site.kv_heads * (site.head_dim + site.v_head_dim)
    found = {"kv_elements_per_token": 0.0, "kv_elements": float(window + site.heads * matrix)}
    if workload is None:
        return found
    near = 2.0 * (site.head_dim + site.v_head_dim) * (config.near + _CHUNK)
    tokens = workload.batch * workload.sequence
    return found | {"flops": tokens * site.heads * (near + 4.0 * matrix)}


# A chunk of queries weighs its own keys one by one.
_CHUNK: Final = 64
