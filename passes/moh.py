"""Let each token use only the heads that matter to it: mixture of heads, with or without training.

`dynamic` chooses by the norms of a token's queries, each head's scaled to what it gives for it, and
solves the output projection anew for what is left. `group` chooses key heads with their readers, so
that a step need not read the cache of those that are off. `trained` has routers that begin as zeros
and learn while the model is healed, beside heads that are always on.
https://arxiv.org/abs/2410.11842
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx

from attnopt.calibrating import inputs_of
from attnopt.contributing import norm_scales
from attnopt.finder.emit import Writer
from attnopt.finder.ops import args, kind, value
from attnopt.moments import Statistics
from attnopt.nouns import No, Site
from attnopt.ops import norm_gates, routed_attention, router_gates
from attnopt.refusals import unreadable
from attnopt.surgery import GraphEdit

exact = False
tier = 2

Mode = Literal["dynamic", "group", "trained"]
_MODES: Final = ("dynamic", "group", "trained")
_ROUTERS: Final = ("pair", "shared", "routed")


@dataclass(frozen=True)
class Config:
    """How many `heads` each token uses; None for half of them.

    In the mode `group` these are key heads. `shared` of them, those that give most, are always on
    in the mode `trained`. `scaled` makes the norms of different heads comparable by what
    calibration saw; `refit` solves the output projection for the heads that are on, layer after
    layer, unless the mode is `trained`.
    """

    mode: Mode = "dynamic"
    heads: int | None = None
    shared: int = 0
    scaled: bool = True
    refit: bool | None = None

    def __post_init__(self) -> None:
        if self.refit is None:
            object.__setattr__(self, "refit", self.mode != "trained")


def weightless(config: Config) -> bool:
    """Tell whether nothing is read from calibration."""
    return config.mode != "trained" and not (config.scaled or config.refit)


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the tokens of a site can choose among its heads."""
    for refusal in (*_settings(site, config), *_site(site, config)):
        if refusal is not None:
            return refusal
    return True


def _settings(site: Site, config: Config) -> Iterable[No | None]:
    if config.mode not in _MODES:
        near = difflib.get_close_matches(str(config.mode), _MODES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(_MODES)}"
        yield No(f"unknown mode {config.mode!r}; {hint}", site.name)
        return
    units, kind = _units(site, config), "key heads" if config.mode == "group" else "heads"
    if not 1 <= _count(site, config) <= units:
        yield No(f"heads {config.heads}: each token uses 1 to {units} {kind}", site.name)
    if config.mode == "trained" and not 0 <= config.shared < _count(site, config):
        yield No(
            f"shared {config.shared}: of {_count(site, config)} heads 0 to "
            f"{_count(site, config) - 1} are always on, and one at least is chosen",
            site.name,
        )
    if config.mode != "trained" and config.shared:
        yield No("heads are shared in the mode 'trained' only: without training they cost quality",
                 site.name)  # fmt: skip


def _site(site: Site, config: Config) -> Iterable[No | None]:
    yield unreadable(site)
    if config.mode == "group" and site.kv_heads == 1:
        yield No("it has one key head, which every token needs; choose the mode 'dynamic'",
                 site.name)  # fmt: skip
    if config.mode == "group" and site.heads % site.kv_heads:
        yield No("its key heads have unlike numbers of query heads", site.name)
    if config.mode != "trained" and site.qk_norm is not None:
        yield No(
            f"its queries pass a {site.qk_norm} norm, after which all are about as long; choose "
            "the mode 'trained'",
            site.name,
        )


def convert(site: Site, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return the output projection, which is then solved anew, where it is."""
    if config.mode == "trained" or _is_whole(site, config) or not config.refit:
        return {}
    output = site.projections["o"].parameter
    return {output: stats.weights[output]}


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Make gates, and let the attention of a site have them."""
    if config.mode != "trained" and _is_whole(site, config):
        return None
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    writer = Writer(edit.graph, edit.view.shapes, node, edit.mapping)
    if config.mode == "trained":
        gates = _learned_gates(edit, writer, node, site, config)
    else:
        gates = _gates_of_norms(edit, writer, node, site, config)
    if isinstance(gates, No):
        return gates
    node.target = routed_attention
    node.args = (*node.args[:3], gates)
    return None


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV elements per token; for a workload, the operations and what gates add to them.

    In the mode `group` a step reads the share `reads` of the cache.
    """
    found = {"kv_elements_per_token": float(site.kv_heads * (site.head_dim + site.v_head_dim))}
    share = _count(site, config) / _units(site, config)
    if config.mode == "group":
        found["reads"] = share
    if workload is None:
        return found
    queries, keys = workload.sequence, workload.sequence + workload.past
    pairs = float(queries * keys)
    if site.mask.kind == "causal":
        pairs -= queries * (queries - 1) / 2
    dense = 2.0 * workload.batch * site.heads * pairs * (site.head_dim + site.v_head_dim)
    return found | {"density": share, "flops": share * dense}


def _units(site: Site, config: Config) -> int:
    return site.kv_heads if config.mode == "group" else site.heads


def _count(site: Site, config: Config) -> int:
    return max(1, _units(site, config) // 2) if config.heads is None else config.heads


def _is_whole(site: Site, config: Config) -> bool:
    return _count(site, config) == _units(site, config)


# ------------------------------------------------------------------------------------------- gates


def _gates_of_norms(
    edit: GraphEdit, writer: Writer, node: fx.Node, site: Site, config: Config
) -> fx.Node:
    options: dict[str, Any] = {"count": _count(site, config)}
    if config.scaled:
        options["scales"] = norm_scales(edit.program, edit.statistics, site).tolist()
    if config.mode == "group":
        options["group"] = site.heads // site.kv_heads
    return writer.call(norm_gates, node.args[0], **options)


def _learned_gates(
    edit: GraphEdit, writer: Writer, node: fx.Node, site: Site, config: Config
) -> fx.Node | No:
    """Insert the routers; they read what the queries are made of."""
    source = _source(edit, node, site)
    if isinstance(source, No):
        return source
    shapes = _routers(site, config, int(value(source).shape[-1]))
    like = edit.program.weights[site.projections["o"].parameter]
    made = {n: edit.parameter(_named(site, n), like.new_zeros(s)) for n, s in shapes.items()}
    options = {"count": _count(site, config) - config.shared, "heads": _order(edit, site, config)}
    routers = [made[n] for n in ("routed", "pair", "shared") if n in made]
    return writer.call(router_gates, edit.mapping[source], *routers, **options)


def _source(edit: GraphEdit, node: fx.Node, site: Site) -> fx.Node | No:
    """Return what the queries are made of, as tokens (B, T, C); some sources flatten it first."""
    name = site.projections["q"].parameter
    queries: Any = node.args[0]
    batch, _, tokens, _ = value(queries).shape
    found = inputs_of(edit.program, [name]).get(name)
    while found is not None and found.op == "call_function":
        shape = value(found).shape
        if len(shape) == 3 and shape[0] == batch and shape[1] == tokens:
            return found
        found = args(found)[0] if kind(found) in ("view", "reshape", "_unsafe_view") else None
    return No("its queries are not made of tokens in the order of a batch", site.name)


def _order(edit: GraphEdit, site: Site, config: Config) -> list[int]:
    """List the heads that are shared, then the others, those that give most first."""
    given = edit.statistics.contribution(site.projections["o"].parameter)
    found: list[int] = torch.argsort(given, descending=True, stable=True).tolist()
    return found


def _routers(site: Site, config: Config, width: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the routers."""
    rows = {"pair": 2, "shared": config.shared, "routed": site.heads - config.shared}
    return {n: (rows[n], width) for n in _ROUTERS if config.shared or n == "routed"}


def _named(site: Site, router: str) -> str:
    return f"{site.module}.router.{router}".removeprefix(".")
