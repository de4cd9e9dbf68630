"""Visit only the tiles of keys that an estimate of the attention says matter, at prefill.

For each key head and tile of queries a plan lists the tiles of keys to visit; it is made anew for
every call from its queries and keys. Calls of few tokens and single queries stay dense, bit for
bit. In the mode `routed` (MoBA, LongHeads) every query chooses its tiles by itself, when decoding
too: its own and those whose mean key it likes best. The means are taken of the whole cache at every
step (`Tiling.key_means`), until a state keeps them.
https://arxiv.org/abs/2503.16428, https://arxiv.org/abs/2502.13189
"""

import difflib
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import fx

from attnopt.costs import Workload
from attnopt.diagnosing import estimator_flops
from attnopt.finder.emit import Writer
from attnopt.nouns import Mlp, No, Site
from attnopt.ops.blocks import TILE, block_attention
from attnopt.ops.estimators import CAUSAL_ONLY, ESTIMATORS, STRIDED
from attnopt.ops.plan_blocks import ALIKE, STRIDE, plan_blocks
from attnopt.ops.selecting import RULES
from attnopt.surgery import GraphEdit

exact = False
tier = 2
weightless = True
far = True

# What a kernel for tiles reaches of what a dense one does.
_KERNEL: Final = 0.75
_ALONG_KEYS: Final = ("pooled", "sub_block", "antidiagonal")
_MODES: Final = ("planned", "routed")
_COUNTED: Final = ("topk", "count")
_RATIOS: Final = (0.5, 0.3, 0.2, 0.1)
_PROPOSED: Final = (0.5, 0.3, 0.1)


@dataclass(frozen=True)
class Config:
    """How tiles are scored (`estimator`), and how many of them are visited (`rule`, `amount`).

    `amount` is a share of a row's tiles for `topk`, of its mass for `mass`, the least share of a
    tile for `threshold`, a number of tiles for `count`. `stride` are the tokens of a part of a tile
    that are scored together; `sparge` visits tiles whose tokens' mean cosine is at most `alike`
    whatever the rule. Calls of fewer keys than `least_tokens` stay dense, and so do those that
    would visit more than `dense_above` of all tiles, the break-even density unless given.
    """

    estimator: str = "sub_block"
    rule: str = "topk"
    amount: float = 0.3
    tile: int = TILE
    mode: Literal["planned", "routed"] = "planned"
    stride: int = STRIDE
    multiple: int = 1
    alike: float = ALIKE
    least_tokens: int = 4096
    dense_above: float | None = None


def fits(site: Site, config: Config) -> Literal[True] | No:
    """Say whether a site can be attended by tiles."""
    for refusal in (*_settings(site, config), *_site(site, config)):
        if refusal is not None:
            return refusal
    return True


def candidates(site: Site) -> tuple[Config, ...]:
    """List the settings worth trying, the weakest first."""
    return tuple(Config(amount=ratio) for ratio in _RATIOS)


def proposals(site: Site | Mlp, asked: Any) -> tuple[Config, ...]:
    """List a few densities where texts are so long that tiles are chosen, and less is computed."""
    if isinstance(site, Mlp) or not {"flops", "latency"} & set(asked.goals):
        return ()
    workload = Workload(sequence=max(asked.tokens, _cells(site)))
    tried = [Config(amount=ratio) for ratio in _PROPOSED]
    return tuple(c for c in tried if cost(site, c, workload)["density"] < 1)


def _cells(site: Site) -> int:
    """Return the tokens of a site whose number is fixed by an image."""
    return 0 if site.grid is None else site.grid.leading + site.grid.height * site.grid.width


def convert(site: Site, stats: Any, config: Config) -> dict[str, Any]:
    """Return no new parameters: the weights stay as they are."""
    return {}


def emit(edit: GraphEdit, site: Site, config: Config) -> No | None:
    """Make a plan of the queries and keys of a site, and attend by it."""
    match = edit.match_of(site)
    if isinstance(match, No):
        return match
    node = edit.mapping[match.anchor]
    options = {name: x for name, x in node.kwargs.items() if x is not None}
    beyond = [n for n in options if n in ("bias", "mask", "window", "prefix", "chunk", "right")]
    if beyond:
        return No(f"its {beyond[0]} is not said tile by tile", site.name)
    writer = Writer(edit.graph, edit.view.shapes, node, edit.mapping)
    made = _attended(writer, node, options, _plan(site, config, options), config)
    node.replace_all_uses_with(made)
    for old, new in list(edit.mapping.items()):
        if new is node:
            edit.mapping[old] = made
    edit.graph.erase_node(node)
    return None


def cost(site: Site, config: Config, workload: Any) -> dict[str, float]:
    """Return the KV elements per token; for a workload, what a call visits and what that costs.

    `density` is the share of the tiles that dense attention visits; where the rule leaves it to the
    data it is the break-even density, above which calls are dense.
    """
    found = {"kv_elements_per_token": float(site.kv_heads * (site.head_dim + site.v_head_dim))}
    if workload is None:
        return found
    queries, keys = workload.sequence, workload.sequence + workload.past
    pairs = float(queries * keys)
    if site.mask.kind == "causal":
        pairs -= queries * (queries - 1) / 2
    dense = 2.0 * workload.batch * site.heads * pairs * (site.head_dim + site.v_head_dim)
    density = _density(config, queries, keys)
    estimated = 0.0 if density == 1 else workload.batch * _estimate(site, config, queries, keys)
    return found | {
        "density": density,
        "break_even": break_even(config, estimated / dense),
        "estimator_flops": estimated,
        "flops": density * dense + estimated,
    }


def break_even(config: Config, estimator_share: float = 0.0) -> float:
    """Return the density above which a plan is slower than dense attention."""
    if config.dense_above is not None:
        return config.dense_above
    return _KERNEL * (1 - estimator_share)


def _estimate(site: Site, config: Config, queries: int, keys: int) -> float:
    """Return the operations that estimating takes for one row of a batch."""
    tiles = {"tile": config.tile, "stride": config.stride}
    sizes = (site.heads, site.head_dim, queries, keys)
    if config.mode == "routed":
        return estimator_flops("pooled", *sizes, **tiles, q_tile=1)
    return estimator_flops(config.estimator, *sizes, **tiles)


def _density(config: Config, queries: int, keys: int) -> float:
    """Predict the share of the tiles that a call visits."""
    least_queries = 1 if config.mode == "routed" else config.tile
    if queries < least_queries or keys < config.least_tokens:
        return 1.0
    match config.rule:
        case "topk":
            share = config.amount
        case "count":
            share = config.amount * config.tile / max(keys - queries / 2, 1)
        case _:
            share = break_even(config)
    return share if share <= break_even(config) else 1.0


def _plan(site: Site, config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the op that makes the plan."""
    routed = config.mode == "routed"
    found: dict[str, Any] = {
        "estimator": "pooled" if routed else config.estimator,
        "rule": config.rule,
        "amount": float(config.amount),
        "tile": config.tile,
        "causal": bool(options.get("causal", False)),
        "least_tokens": config.least_tokens,
        "dense_above": break_even(config),
    }
    found |= {n: options[n] for n in ("padding", "scale", "k_map") if n in options}
    if routed:
        found["q_tile"] = 1
    if site.kind == "cross":
        found["aligned"] = False
    if config.estimator in STRIDED and config.stride != STRIDE:
        found["stride"] = config.stride
    if config.alike != ALIKE:
        found["alike"] = float(config.alike)
    if config.multiple != 1:
        found["multiple"] = config.multiple
    return found


def _attended(
    writer: Writer, node: fx.Node, options: dict[str, Any], plan: dict[str, Any], config: Config
) -> fx.Node:
    """Insert both ops; return the attention."""
    q, k, v = node.args[:3]
    planned = writer.call(plan_blocks, q, k, **plan)
    lists = [writer.call(operator.getitem, planned, number) for number in range(4)]
    tiles = {"q_tile": plan.get("q_tile", config.tile), "k_tile": config.tile}
    return writer.call(
        block_attention, q, k, v, *lists, **tiles, least_tokens=config.least_tokens, **options
    )


def _settings(site: Site, config: Config) -> Iterable[No | None]:
    """Say what is wrong with the settings themselves."""
    for name, allowed in (("estimator", ESTIMATORS), ("rule", RULES), ("mode", _MODES)):
        yield _unknown(site, name, getattr(config, name), list(allowed))
    yield _amount(site, config)
    whole = {"tile": config.tile, "stride": config.stride, "multiple": config.multiple}
    for name, number in whole.items():
        if not isinstance(number, int) or number < 1:
            yield No(f"{name} {number}: a whole number from 1", site.name)
    if config.mode == "routed" and config.rule not in _COUNTED:
        yield No(
            f"rule {config.rule!r} weighs a query's own tile, which holds keys to come; routed "
            f"queries choose by {' or '.join(_COUNTED)}",
            site.name,
        )
    if config.least_tokens < 1:
        yield No(f"least_tokens {config.least_tokens}: from 1", site.name)
    if config.mode == "planned" and config.estimator in STRIDED and config.tile % config.stride:
        yield No(
            f"a tile of {config.tile} is not made of parts of {config.stride}; choose a stride "
            "that divides it",
            site.name,
        )
    if config.dense_above is not None and not 0 < config.dense_above <= 1:
        yield No(f"dense_above {config.dense_above}: above 0, at most 1", site.name)


def _unknown(site: Site, name: str, given: str, allowed: list[str]) -> No | None:
    if given in allowed:
        return None
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(allowed)}"
    return No(f"unknown {name} {given!r}; {hint}", site.name)


def _amount(site: Site, config: Config) -> No | None:
    if config.rule == "count":
        if config.amount >= 1 and config.amount == int(config.amount):
            return None
        return No(f"amount {config.amount}: with count a whole number of tiles from 1", site.name)
    if config.rule == "threshold" and 0 <= config.amount < 1:
        return None
    if 0 < config.amount <= 1:
        return None
    return No(f"amount {config.amount}: with {config.rule} above 0, at most 1", site.name)


def _site(site: Site, config: Config) -> Iterable[No | None]:
    """Say what about the site stands in the way."""
    kind = site.mask.kind
    if kind not in ("none", "causal"):
        shown = "is a tensor of all pairs" if kind == "dense" else f"is {site.mask}"
        yield No(f"its mask {shown}; tiles are chosen where it is causal or none", site.name)
    if site.bias != "none":
        yield No(f"its {site.bias} bias depends on the pair, which no estimate sees", site.name)
    causal = kind == "causal" and site.kind == "self"
    if config.mode == "routed" and not causal:
        yield No("routed queries have a tile of their own in causal self-attention only", site.name)
    if config.estimator in CAUSAL_ONLY and not causal:
        yield No(f"{config.estimator} reads the last queries, which see all keys only if causal; "
                 f"choose {', '.join(_ALONG_KEYS)}", site.name)  # fmt: skip
    if site.kind == "cross" and config.estimator not in _ALONG_KEYS:
        yield No(f"{config.estimator} is for self-attention; choose {', '.join(_ALONG_KEYS)}",
                 site.name)  # fmt: skip
