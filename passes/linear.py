"""Attend by way of a matrix that holds what was seen: linear attention, behind a window or alone.

`hybrid` takes the softmax over a window, and features for everything older, under one denominator;
with a window as long as the text it is softmax attention. `pure` has no window, `gated` none
either, but a decay for each head; `heal=True` says that healing follows, and lets these two replace
a softmax. The cache is the window and a matrix of constant size for each query head. Features are
centres of the keys that calibration saw (`attnopt.centroids`), or maps that are to be learned. A
window slides key by key, so that padding on the left changes nothing.
https://arxiv.org/abs/2410.10254, https://arxiv.org/abs/2405.17381, https://arxiv.org/abs/2510.05901
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from attnopt.centroids import centroid_maps, sampled
from attnopt.finder.emit import insert_call
from attnopt.finder.match import Match
from attnopt.moments import Refits, Statistics
from attnopt.nouns import Choice, Mlp, No, Plan, Site
from attnopt.ops import linear_attention
from attnopt.ops.chunks import CHUNK
from attnopt.ops.features import CENTROIDS, FEATURES
from attnopt.program import Program
from attnopt.refusals import NothingToDoError, cached_elsewhere
from attnopt.surgery import GraphEdit

exact = False
tier = 2
far = True

KINDS: Final = ("hybrid", "pure", "gated")
_PARAMETERS: Final = ("map_q", "map_k", "gate", "decay")
# How much of its state a head keeps over a token, at first.
_DECAYS: Final = (0.9, 0.999)
_KEPT: Final = ("padding", "scale", "k_map", "v_map")

aten = torch.ops.aten


@dataclass(frozen=True)
class Config:
    """The `window` of a hybrid counts a query's own key; `features` are those of a head.

    None of them is twice as many as it has channels.
    """

    kind: Literal["hybrid", "pure", "gated"] = "hybrid"
    window: int = 64
    feature: str = CENTROIDS
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
    if config.features is not None and (config.features < 2 or config.features % 2):
        return No(f"features {config.features}: an even number from 2", site.name)
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


def proposals(site: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List hybrids of two windows and two numbers of features that hold less than the cache would.

    Where nothing is hidden a matrix is no softmax without healing, and is declined as that.
    """
    goals = set(asked.goals)
    if isinstance(site, Mlp) or site.kind != "self" or goals <= {"params"}:
        return ()
    if site.mask.kind == "none":
        return (Config("pure"),) if goals & {"flops", "latency"} else ()
    if not asked.tokens or (goals <= {"kv_cache", "memory"} and not site.cached):
        return ()
    even = max(site.head_dim // 2, 1) * 2
    windows = dict.fromkeys(max(asked.tokens // part, _LEAST) for part in _PARTS)
    tried = [Config(window=w, features=f) for w in windows for f in (even, 2 * even)]
    width = next((s.dtype.itemsize for s in asked.program.states if s.role == "key"), _MATRIX)
    whole = site.kv_heads * (site.head_dim + site.v_head_dim) * asked.tokens * width
    return tuple(c for c in tried if _held(site, c, width) < whole)


def _held(site: Site, config: Config, width: int) -> float:
    """Return the bytes of a state whose keys and values have so many each."""
    elements = cost(site, config, None)["kv_elements"]
    matrix = site.heads * _features(site, config) * (site.v_head_dim + 1)
    return elements * width + matrix * (_MATRIX - width)


# Windows are these parts of the text; a matrix is kept in float32.
_PARTS: Final = (16, 4)
_LEAST: Final = 4
_MATRIX: Final = 4


def weightless(config: Config) -> bool:
    """Tell whether the features come without calibration."""
    return config.feature != CENTROIDS


def convert(site: Site, stats: Any, config: Config) -> dict[str, Tensor]:
    """Return no other projections; what is added is made where the graph is at hand."""
    return {}


def _initial(edit: GraphEdit, site: Site, config: Config, match: Match) -> dict[str, Tensor]:
    """Return the new parameters as they begin."""
    count = _features(site, config)
    causal = site.mask.kind == "causal"
    found: dict[str, Tensor] = {}
    if config.feature == CENTROIDS:
        key, kept = _kept(site, config), edit.statistics.refits
        if key not in kept:
            sample = sampled(edit.program, match.anchor, edit.statistics.batches, match.scale)
            made = centroid_maps(sample, count, window=config.near, causal=causal)
            kept[key] = made["map_q"], made["map_k"]
        found |= dict(zip(("map_q", "map_k"), kept[key], strict=True))
    else:
        columns = count // 2 if config.feature == "hedgehog" else count
        eye = torch.eye(site.head_dim, columns).repeat(site.heads, 1, 1)
        eye = eye * math.sqrt(abs(match.scale))
        found |= {"map_q": eye, "map_k": eye.clone()}
        if config.kind == "hybrid":
            found["gate"] = torch.full((site.heads,), math.log(count))
    if config.kind == "gated":
        found["decay"] = torch.linspace(*_DECAYS, site.heads).logit()
    return found


def _features(site: Site, config: Config) -> int:
    return 2 * site.head_dim if config.features is None else config.features


def _kept(site: Site, config: Config) -> str:
    """Name the centres of a site among what a plan's statistics keep for a replay."""
    return f"centres/{site.name}/{site.heads}/{config.near}/{_features(site, config)}"


def _known(stats: Any, site: Site, config: Config) -> bool:
    """Tell whether the centres of a site are kept, or can be found."""
    return stats is not None and (bool(stats.batches) or _kept(site, config) in stats.refits)


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
    if config.feature == CENTROIDS and not _known(edit.statistics, site, config):
        return No(
            "its centres are those of keys on calibration rows, and the statistics came without "
            "their rows; calibrate again, or choose another feature",
            site.name,
        )
    initial = _initial(edit, site, config, match)
    made = {n: edit.parameter(_name(site, n), x) for n, x in initial.items()}
    for name, function in (("gate", aten.exp.default), ("decay", aten.sigmoid.default)):
        if name in made:
            made[name] = insert_call(node, function, made[name])
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
    matrix = _features(site, config) * (site.v_head_dim + 1)
    window = config.near * site.kv_heads * (site.head_dim + site.v_head_dim)
    found = {"kv_elements_per_token": 0.0, "kv_elements": float(window + site.heads * matrix)}
    if workload is None:
        return found
    near = 2.0 * (site.head_dim + site.v_head_dim) * (config.near + CHUNK)
    tokens = workload.batch * workload.sequence
    return found | {"flops": tokens * site.heads * (near + 4.0 * matrix)}


# ------------------------------------------------------------------------------------- allocation


def allocate(
    program: Program, stats: Statistics, share: float, *, tokens: int, **settings: Any
) -> tuple[Choice, ...]:
    """Convert the layers that lose least, as few as leave the cache its `share`.

    The cache is that of a text of so many `tokens`.
    """
    base = Config(**settings)
    cached = [s for s in program.main.sites if s.cached]
    able = _able(program, base)
    sizes = {s.name: float(s.kv_heads * (s.head_dim + s.v_head_dim) * tokens) for s in cached}
    saved = {s.name: sizes[s.name] - cost(s, base, None)["kv_elements"] for s in able}
    goal = (1 - share) * sum(sizes.values())
    order = _order(program, stats, base, [s for s in able if saved[s.name] > 0])
    chosen: list[tuple[str, float]] = []
    for name, lost in order:
        if goal > 1e-9:
            goal -= saved[name]
            chosen.append((name, lost))
    if goal > 1e-9 or not chosen:
        least = 1 - sum(max(x, 0.0) for x in saved.values()) / sum(sizes.values())
        raise NothingToDoError(
            f"windows of {base.near} and matrices leave {least:.4g} of a cache of {tokens:,} "
            f"tokens, not {share:.4g}; ask for more, or set a smaller window or fewer features"
        )
    return _choices(base, chosen)


def choose(
    program: Program,
    stats: Statistics,
    layers: float,
    *,
    over_window: bool = False,
    **settings: Any,
) -> tuple[Choice, ...]:
    """Convert so many layers, or a share of all below 1, those that lose least.

    With `over_window` what a layer loses is told by the loss of texts, and layers in which a window
    of as many bytes would lose less come last.
    """
    base = Config(**settings)
    able = _able(program, base)
    count = round(layers * len(program.main.sites)) if 0 < layers < 1 else int(layers)
    if not 0 <= count <= len(able):
        raise NothingToDoError(f"layers {layers!r}: {len(able)} attentions can be linear")
    if not count:
        return ()
    if not over_window:
        return _choices(base, _order(program, stats, base, able)[:count])
    ours, windows = ([make(s, base) for s in able] for make in (_hybrid, as_window))
    pairs = zip(_raised(program, stats, ours), _raised(program, stats, windows), strict=True)
    lost = dict(zip((c.site for c in ours), pairs, strict=True))
    order = sorted(ours, key=lambda c: (lost[c.site][0] >= lost[c.site][1], lost[c.site]))[:count]
    told = "costs {:.5f} nats alone, a window of as many bytes {:.5f}"
    chosen = [replace(c, why=told.format(*lost[c.site])) for c in order]
    return tuple(sorted(chosen, key=lambda c: c.site))


def _hybrid(site: Site, config: Config) -> Choice:
    return Choice(site.name, "linear", dataclasses.asdict(config))


def as_window(site: Site, config: Config) -> Choice:
    """Return a window alone whose cache has as many elements as that of this config, or more."""
    slots = cost(site, config, None)["kv_elements"] / (
        site.kv_heads * (site.head_dim + site.v_head_dim)
    )
    return Choice(site.name, "window", {"window": math.ceil(slots), "first": 0})


def _able(program: Program, base: Config) -> list[Site]:
    """List the attentions that can be linear; the reasons why none can are an error."""
    answers = {s.name: fits(s, base) for s in program.main.sites}
    found = [s for s in program.main.sites if answers[s.name] is True]
    if not found:
        why = next((str(no) for no in answers.values()), "there is no attention")
        raise NothingToDoError(f"no attention can be linear: {why}")
    return found


def _order(
    program: Program, stats: Statistics, base: Config, able: list[Site]
) -> list[tuple[str, float]]:
    """Return the attentions with what each loses of its output alone, the least first."""
    from attnopt.healing.comparing import site_losses
    from attnopt.rewriting import apply

    if not able:
        return []
    stats = replace(stats, refits=Refits())  # of those that are chosen only
    plan = Plan(_choices(base, [(s.name, 0.0) for s in able]), statistics=stats)
    exact_form = apply(program.main, "exact").growing
    converted = apply(exact_form, plan).growing
    batch = {n: x[:_ROWS] for n, x in stats.batches[-1].items()}
    lost = site_losses(converted, exact_form, batch)
    return sorted(((s.name, lost[s.name]) for s in able), key=lambda item: (item[1], item[0]))


def _raised(program: Program, stats: Statistics, made: Sequence[Choice]) -> list[float]:
    """Return by how much each choice alone raises the loss, nats a token."""
    from attnopt.rewriting import apply
    from attnopt.verifying import losses

    stats = replace(stats, refits=Refits())
    batches = stats.batches[1:] or stats.batches  # centres are those of the first
    texts = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    if not texts:
        raise NothingToDoError("over_window compares losses of texts, and there are none")
    rows = torch.cat(texts)[:_JUDGED]
    exact_form = apply(program.main, "exact").growing
    base = losses(exact_form, rows, "linear")
    found: list[float] = []
    for choice in made:
        student = apply(exact_form, Plan((choice,), statistics=stats)).growing
        found.append(float((losses(student, rows, "linear") - base).mean()))
    return found


def _choices(base: Config, chosen: list[tuple[str, float]]) -> tuple[Choice, ...]:
    settings = dataclasses.asdict(base)
    return tuple(
        Choice(name, "linear", settings, f"loses {lost:.2%} of its output before healing")
        for name, lost in sorted(chosen)
    )


_JUDGED: Final = 32
_ROWS: Final = 8
