"""Let each token use only the heads that matter to it: mixture of heads, with or without training.

`dynamic` chooses by what each head is expected to give to a token, which a router fitted on
calibration rows tells from the token and the norms of its queries, and solves the output projection
anew for what is left. `group` chooses key heads with their readers, so that a step need not read
the cache of those that are off. `trained` has routers that begin as zeros and learn while the model
is healed, beside heads that are always on. A number of heads on average is spread over the
attentions by what each of them loses (`attnopt.spreading`).
https://arxiv.org/abs/2410.11842
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx

from attnopt.contributing import fitted_router, norm_scales, tokens_of
from attnopt.finder.emit import Writer
from attnopt.finder.ops import value
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.ops import fitted_gates, norm_gates, routed_attention, router_gates
from attnopt.program import Program
from attnopt.refusals import unreadable
from attnopt.spreading import numbers, spread
from attnopt.surgery import GraphEdit

exact = False
tier = 2

Mode = Literal["dynamic", "group", "trained"]
Score = Literal["fitted", "scaled", "norm"]
_MODES: Final = ("dynamic", "group", "trained")
_SCORES: Final = ("fitted", "scaled", "norm")
_SHARES: Final = (0.75, 0.5, 0.25)
_ROUTERS: Final = ("pair", "shared", "routed")


@dataclass(frozen=True)
class Config:
    """How many `heads` each token uses, at this site or on `average`; None for half of them.

    In the mode `group` these are key heads. `shared` of them, those that give most, are always on
    in the mode `trained`. Unless it is, `score` says by what heads are chosen: a `fitted` router,
    the norms of queries, each head's `scaled` to what it gives for it, or the bare `norm`; and
    `refit` solves the output projection for the heads that are on, layer after layer.
    """

    mode: Mode = "dynamic"
    heads: int | None = None
    shared: int = 0
    score: Score = "fitted"
    refit: bool | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        if self.refit is None:
            object.__setattr__(self, "refit", self.mode != "trained")


def proposals(site: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List a few numbers of heads, and of key heads where several heads read each."""
    if isinstance(site, Mlp) or set(asked.goals) <= {"params", "memory"}:
        return ()
    found = [Config(heads=n) for n in _shares(site.heads)]
    if 1 < site.kv_heads < site.heads:
        found += [Config("group", n) for n in _shares(site.kv_heads)[:2]]
    return tuple(found)


def _shares(units: int) -> list[int]:
    """Return how many units are on, the most first."""
    counts = dict.fromkeys(max(1, round(units * share)) for share in _SHARES)
    return [n for n in counts if n < units]


def weightless(config: Config) -> bool:
    """Tell whether nothing is read from calibration."""
    return config.mode != "trained" and config.score == "norm" and not config.refit


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the tokens of a site can choose among its heads."""
    for refusal in (*_settings(site, config), *_site(site, config)):
        if refusal is not None:
            return refusal
    return True


def _settings(site: Site, config: Config) -> Iterable[No | None]:
    for name, allowed in (("mode", _MODES), ("score", _SCORES)):
        given = getattr(config, name)
        if given not in allowed:
            near = difflib.get_close_matches(str(given), allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(allowed)}"
            yield No(f"unknown {name} {given!r}; {hint}", site.name)
            return
    units, kind = _units(site, config), "key heads" if config.mode == "group" else "heads"
    if config.average is not None and config.heads is not None:
        yield No("either `heads` of this site, or an `average` over sites", site.name)
    if config.average is not None and not 1 <= config.average <= units:
        yield No(f"average {config.average}: each token uses 1 to {units} {kind}", site.name)
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
    if config.mode != "trained" and config.score != "fitted" and site.qk_norm is not None:
        yield No(
            f"its queries pass a {site.qk_norm} norm, after which all are about as long; choose "
            "the score 'fitted'",
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
    if is_open(config):
        return No(f"{config.average} heads on average have to be spread over all sites", site.name)
    if config.mode != "trained" and _is_whole(site, config):
        return None
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    writer = Writer(edit.graph, edit.view.shapes, node, edit.mapping)
    gates = _gates(edit, writer, match.anchor, site, config)
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
    if config.average is not None:
        return round(config.average)
    return max(1, _units(site, config) // 2) if config.heads is None else config.heads


def _is_whole(site: Site, config: Config) -> bool:
    return _count(site, config) == _units(site, config)


# ---------------------------------------------------------------------------------------- spreading


def is_open(config: Config) -> bool:
    """Tell whether a site's own number of heads is left to the calibration data."""
    return config.average is not None


def settle(program: Program, stats: Statistics, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Say how many heads each site uses, where a number is given on average.

    Choices of the same settings share what is on.
    """
    found = list(choices)
    sites = {s.name: s for s in program.sites}
    asked = [Config(**c.config) for c in choices]
    for config in dict.fromkeys(c for c in asked if is_open(c)):
        own = {c.site: i for i, c in enumerate(choices) if asked[i] == config}
        own = {name: i for name, i in own.items() if fits(sites[name], config) is True}
        assert config.average is not None
        ways = {name: _ways(sites[name], config) for name in own}
        for name, count in spread(program, stats, ways, config.average).items() if ways else ():
            settings = asdict(replace(config, heads=count, average=None))
            why = f"{count} heads; {config.average:.4g} on average over {len(own)} sites"
            found[own[name]] = replace(found[own[name]], config=settings, why=why)
    return tuple(found)


def _ways(site: Site, config: Config) -> dict[int, Choice | None]:
    """Return how a site has each number of heads, before its output projection is refitted."""
    units = _units(site, config)
    least = config.shared + 1 if config.mode == "trained" else 1
    found: dict[int, Choice | None] = {}
    for count in numbers(units):
        alone = replace(config, heads=count, average=None, refit=False)
        if count >= least:
            found[count] = None if count == units else Choice(site.name, "moh", asdict(alone))
    return found


# ------------------------------------------------------------------------------------------- gates


def _gates(
    edit: GraphEdit, writer: Writer, anchor: fx.Node, site: Site, config: Config
) -> fx.Node | No:
    """Insert what chooses heads; routers read what the queries are made of."""
    read: Any = anchor.args[0]
    queries = edit.mapping[read]
    if config.mode != "trained" and config.score != "fitted":
        return _gates_of_norms(edit, writer, queries, site, config)
    source = tokens_of(edit.program, read, site)
    if isinstance(source, No):
        return source
    if config.mode == "trained":
        return _learned_gates(edit, writer, source, site, config)
    options = _options(site, config)
    router = fitted_router(edit.program, edit.statistics, site, group="group" in options)
    router = router.to(edit.program.weights[site.projections["o"].parameter].dtype)
    made = edit.parameter(_named(site, "fitted"), router.contiguous())
    return writer.call(fitted_gates, queries, edit.mapping[source], made, **options)


def _options(site: Site, config: Config) -> dict[str, Any]:
    """Say how many heads are on, and how many go together."""
    found = {"count": _count(site, config)}
    return found | ({"group": site.heads // site.kv_heads} if config.mode == "group" else {})


def _gates_of_norms(
    edit: GraphEdit, writer: Writer, queries: fx.Node, site: Site, config: Config
) -> fx.Node:
    options = _options(site, config)
    if config.score == "scaled":
        options["scales"] = norm_scales(edit.program, edit.statistics, site).tolist()
    return writer.call(norm_gates, queries, **options)


def _learned_gates(
    edit: GraphEdit, writer: Writer, source: fx.Node, site: Site, config: Config
) -> fx.Node:
    """Insert routers of zeros."""
    shapes = _routers(site, config, int(value(source).shape[-1]))
    like = edit.program.weights[site.projections["o"].parameter]
    made = {n: edit.parameter(_named(site, n), like.new_zeros(s)) for n, s in shapes.items()}
    options = {"count": _count(site, config) - config.shared, "heads": _order(edit, site, config)}
    routers = [made.get(n) for n in ("routed", "pair", "shared")]
    while routers[-1] is None:
        routers.pop()
    return writer.call(router_gates, edit.mapping[source], *routers, **options)


def _order(edit: GraphEdit, site: Site, config: Config) -> list[int]:
    """List the heads that are shared, then the others, those that give most first."""
    given = edit.statistics.contribution(site.projections["o"].parameter)
    found: list[int] = torch.argsort(given, descending=True, stable=True).tolist()
    return found


def _routers(site: Site, config: Config, width: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the routers; one shared head has nothing to share, and none."""
    rows = {"pair": 2, "shared": config.shared, "routed": site.heads - config.shared}
    least = {"pair": 1, "shared": 2, "routed": 0}
    return {n: (rows[n], width) for n in _ROUTERS if config.shared >= least[n]}


def _named(site: Site, router: str) -> str:
    return f"{site.module}.router.{router}".removeprefix(".")
