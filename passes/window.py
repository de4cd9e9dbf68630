"""Let heads look back over a window, beside the first tokens; some may go on seeing everything.

The cache of a windowed head is a ring of constant size, so that neither memory nor the time of a
step grows with the text. Which key heads keep the whole text is decided by what a window would
spoil of their layer's output (`attnopt.streaming`), by rank and never by a threshold. They come
first in the layer then, which is an exact permutation of the weights.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.finder.emit import fake_mode_of, insert_call
from attnopt.layers import Layer
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.ops import attention
from attnopt.ops.structure import OPTIONS
from attnopt.program import Program
from attnopt.refusals import NothingToDoError, cached_elsewhere, unreadable
from attnopt.streaming import streaming
from attnopt.surgery import GraphEdit

exact = False
tier = 2
far = True
follows = ("dha", "amp", "latent")

aten = torch.ops.aten


@dataclass(frozen=True)
class Config:
    """The `window` counts a query's own key; the `first` tokens stay in sight of every query.

    The key heads listed in `full` see everything, with the query heads that read them.
    """

    window: int = 256
    first: int = 64
    full: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "full", tuple(sorted(int(h) for h in self.full)))


def weightless(config: Config) -> bool:
    """Tell whether no head has to move."""
    return config.full == tuple(range(len(config.full)))


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether the heads of a site can look back over a window."""
    for refusal in (_sizes(site, config), _mask(site, config), cached_elsewhere(site)):
        if refusal is not None:
            return refusal
    if _is_mixed(site, config):
        for refusal in (unreadable(site), _immovable(site, config)):
            if refusal is not None:
                return refusal
    return True


def proposals(site: Site, asked: Any) -> tuple[Config, ...]:
    """List windows of two sizes, each with more and more heads that have one.

    Heads get a window in the order of what it would spoil, the least first.
    """
    if isinstance(site, Mlp) or not site.cached or site.kind != "self" or not asked.tokens:
        return ()
    found: list[Config] = []
    for part in _PARTS:
        window = max(asked.tokens // part, _LEAST)
        base = Config(window, window // 4)
        if window + base.first >= asked.tokens or fits(site, base) is not True:
            continue
        found += [dataclasses.replace(base, full=full) for full in _whole(site, base, asked)]
    return tuple(found)


def _whole(site: Site, base: Config, asked: Any) -> list[tuple[int, ...]]:
    """Return the heads that stay whole: fewer and fewer, at last none."""
    if isinstance(_may_choose(site, base), No):
        return [()]
    order = _ranked(site, base, asked)
    if order is None:
        return [()]
    step = max(site.kv_heads / _STEPS, 1)
    counts = {round(step * i) for i in range(_STEPS) if round(step * i) < site.kv_heads}
    return [tuple(sorted(order[:n])) for n in sorted(counts, reverse=True)]


def _ranked(site: Site, base: Config, asked: Any) -> list[int] | None:
    """Return the heads in the order of what a window would spoil, the most first.

    As they come where nothing is known of the data yet; None where that cannot be told.
    """
    if asked.statistics is None:
        return list(range(site.kv_heads))
    key = f"window/streaming/{base.window}/{base.first}"
    if key not in asked.statistics.memo:
        names = {site.name} if asked.before else None
        rows = dataclasses.replace(asked.statistics, batches=_few_rows(asked.statistics.batches))
        asked.statistics.memo[key] = streaming(
            asked.program, rows, base.window, base.first, names=names
        )
    known = asked.statistics.memo[key].get(site.name)
    if known is None:
        return None
    order: list[int] = known.damage.argsort(descending=True, stable=True).tolist()
    return order


def _few_rows(batches: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    """Return as many batches as heads are told apart by."""
    found: list[Mapping[str, Any]] = []
    tokens = 0
    for batch in batches:
        found.append(batch)
        tokens += batch["input_ids"].numel()
        if tokens >= _ROWS:
            break
    return tuple(found)


def alike(config: Config) -> tuple[int, int, int]:
    """Return what is the same where another site is treated alike: how many heads stay whole."""
    return config.window, config.first, len(config.full)


# Windows are these parts of the text; heads are told apart in at most so many steps.
_PARTS = (16, 4)
_LEAST = 8
_STEPS = 4
_ROWS = 4096


def _sizes(site: Site, config: Config) -> No | None:
    if config.window < 1 or config.first < 0:
        return No(
            f"window {config.window}, first {config.first}: a window has at least the query's own "
            "key, and first is 0 or more",
            site.name,
        )
    outside = [h for h in config.full if not 0 <= h < site.kv_heads]
    if outside or len(set(config.full)) != len(config.full):
        return No(
            f"full {list(config.full)}: there are key heads 0 to {site.kv_heads - 1}", site.name
        )
    return None


def _mask(site: Site, config: Config) -> No | None:
    if site.kind != "self":
        return No("cross-attention has no order of queries and keys", site.name)
    if site.mask.kind not in ("causal", "sliding") or site.mask.right is not None:
        return No(f"its mask is {site.mask}; a window needs a causal one", site.name)
    if site.mask.window is not None and site.mask.window <= config.window + config.first:
        return No(f"it has a window of {site.mask.window} already", site.name)
    return None


def _immovable(site: Site, config: Config) -> No | None:
    if _order(site, config) != list(range(site.kv_heads)) and (site.sinks or site.bias != "none"):
        return No(
            "its heads have biases or sinks of their own, so they keep their order: heads that "
            "stay full must be the first ones",
            site.name,
        )
    return None


def _is_mixed(site: Site, config: Config) -> bool:
    return 0 < len(config.full) < site.kv_heads


def _order(site: Site, config: Config) -> list[int]:
    return [*config.full, *(h for h in range(site.kv_heads) if h not in config.full)]


def convert(site: Site, stats: Statistics, config: Config) -> dict[str, Tensor]:
    """Return the projections with the full heads first; none where no head has to move."""
    order = _order(site, config)
    if not _is_mixed(site, config) or order == list(range(site.kv_heads)):
        return {}
    return Layer.read(site, stats).permuted(order).write(site, stats.weights)


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Say the window in the site's op, or make two ops of it where some heads have none."""
    if len(config.full) == site.kv_heads:
        return None
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    structure = {"causal": True, "window": config.window, "first": config.first or None}
    options = {n: x for n, x in node.kwargs.items() if n not in OPTIONS}
    options |= {n: x for n, x in structure.items() if x is not None}
    if not config.full:
        node.kwargs = options
        return None
    if "k_map" in node.kwargs or "v_map" in node.kwargs:
        return No("its keys and values have other numbers of heads", site.name)
    _split(edit, node, site, len(config.full), options)
    return None


def _split(
    edit: GraphEdit, node: fx.Node, site: Site, full: int, windowed: Mapping[str, Any]
) -> None:
    """Replace an op by one for the first key heads, and a windowed one for the others."""
    queries = full * (site.heads // site.kv_heads)
    cuts = (queries, full, full)
    parts: list[fx.Node] = []
    for which, options in enumerate((node.kwargs, windowed)):
        args = [
            _heads(node, x, slice(cut, None) if which else slice(0, cut))
            for x, cut in zip(node.args, cuts, strict=True)
        ]
        rows = slice(queries, None) if which else slice(0, queries)
        own = {n: _side(node, n, x, rows) for n, x in options.items()}
        with edit.graph.inserting_before(node), fake_mode_of((node,)):
            part = edit.graph.call_function(attention, tuple(args), own)
            sizes = (*args[0].meta["val"].shape[:3], args[2].meta["val"].shape[-1])
            part.meta = {**node.meta, "val": node.meta["val"].new_empty(sizes)}
        parts.append(part)
    joined = insert_call(node, aten.cat.default, parts, 1)
    node.replace_all_uses_with(joined)
    edit.graph.erase_node(node)


def _heads(before: fx.Node, x: Any, heads: slice) -> fx.Node:
    stop = x.meta["val"].shape[1] if heads.stop is None else heads.stop
    return insert_call(before, aten.slice.Tensor, x, 1, heads.start, stop)


def _side(before: fx.Node, name: str, x: Any, heads: slice) -> Any:
    """Return the part of a side operand that belongs to some query heads."""
    if not isinstance(x, fx.Node) or name == "padding":
        return x
    example, axis = x.meta["val"], 0 if name == "sinks" else 1
    if example.dim() <= axis or example.shape[axis] == 1:
        return x
    stop = example.shape[axis] if heads.stop is None else heads.stop
    return insert_call(before, aten.slice.Tensor, x, axis, heads.start, stop)


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the elements that a cache keeps for each token, and those that it keeps once."""
    width = site.head_dim + site.v_head_dim
    streaming_heads = site.kv_heads - len(config.full)
    return {
        "kv_elements_per_token": len(config.full) * width,
        "kv_elements": streaming_heads * (config.first + config.window) * width,
    }


# ------------------------------------------------------------------------------------- allocation


def allocate(
    program: Program, stats: Statistics, share: float, *, tokens: int, **settings: Any
) -> tuple[Choice, ...]:
    """Keep whole the key heads that a window would spoil most, so many that the cache has `share`.

    The cache is that of a text of so many `tokens`. Without a setting, the window is a sixteenth of
    it and a quarter of that is the first tokens.
    """
    window = int(settings.pop("window", max(8, tokens // 16)))
    base = Config(window, int(settings.pop("first", window // 4)), **settings)
    cached = [s for s in program.main.sites if s.cached]
    answers = {s.name: _may_choose(s, base) for s in cached}
    able = [s for s in cached if answers[s.name] is True]
    if not able:
        why = next((str(no) for no in answers.values()), "no attention keeps a cache")
        raise NothingToDoError(f"no head can have a window: {why}")
    whole = _affordable(program, able, base, share, tokens)
    known = streaming(program, stats, base.window, base.first)
    ranked = sorted(
        ((float(known[s.name].damage[h]), s.name, h) for s in able for h in range(s.kv_heads)),
        key=lambda item: (-item[0], item[1], item[2]),
    )
    kept = {(name, head) for _, name, head in ranked[:whole]}
    return tuple(_choice(s, kept, base, known[s.name]) for s in able)


def _may_choose(site: Site, base: Config) -> Literal[True] | No:
    """Say whether any heads of a site may stay whole and the others have a window."""
    some = () if site.kv_heads == 1 else (site.kv_heads - 1,)
    return fits(site, dataclasses.replace(base, full=some))


def _affordable(program: Program, able: list[Site], base: Config, share: float, tokens: int) -> int:
    """Return how many key heads of these sites may stay whole."""
    cached = [s for s in program.main.sites if s.cached]
    sizes = {s.name: s.kv_heads * (s.head_dim + s.v_head_dim) for s in cached}
    total, ours = sum(sizes.values()), sum(sizes[s.name] for s in able)
    heads = sum(s.kv_heads for s in able)
    windowed = min(1.0, (base.window + base.first) / tokens)
    least = 1 - ours / total * (1 - windowed)
    if share < least:
        raise NothingToDoError(
            f"windows of {base.window} beside the first {base.first} leave {least:.4g} of a cache "
            f"of {tokens:,} tokens; ask for that at least, or set a smaller window"
        )
    gained = (1 - least) / heads
    return min(heads, int((share - least) / gained + 1e-9)) if gained else heads


def _choice(site: Site, kept: set[tuple[str, int]], base: Config, known: Any) -> Choice:
    full = tuple(h for h in range(site.kv_heads) if (site.name, h) in kept)
    config = dataclasses.replace(base, full=full)
    others = [h for h in range(site.kv_heads) if h not in full]
    lost = float(known.damage[others].sum()), float(known.mass[others].mean()) if others else 0.0
    why = (
        f"{len(full)} of {site.kv_heads} key heads stay whole; predicted error {lost[0]:.4f}, "
        f"attention left out {lost[1]:.1%}"
    )
    settings = {**dataclasses.asdict(config), "full": list(full)}
    return Choice(site.name, "window", settings, why)
