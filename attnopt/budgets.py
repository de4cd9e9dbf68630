"""Budgets layer by layer: the damage of every setting measured, the best choice solved for.

Each site is rewritten alone, once for each number of key heads and once for each number of value
heads, and the loss on calibration rows says what that costs; keys and values add up, and so do
sites. What fits the budget with the least damage in sum is a knapsack.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from attnopt import debug
from attnopt import passes as registry
from attnopt.knapsack import Item, choose
from attnopt.moments import Statistics
from attnopt.nouns import Choice, No, Plan, Site
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.rewriting import apply
from attnopt.verifying import losses
from attnopt.weights import fingerprint

_TOKENS = 4096


def cache_budget(
    program: Program, statistics: Statistics, share: float, *, decoupled: bool
) -> tuple[Choice, ...]:
    """Choose key and value heads for each site so that a share of the cache is left."""
    dha: Any = registry.load("dha")
    sites = [s for s in program.sites if s.cached]
    options = {s.name: _options(dha, s, decoupled) for s in sites}
    costs = _damages(program, statistics, dha, options)
    rows = [
        [
            Item((s, c), dha.cost(s, c, None)["kv_elements_per_token"], _damage(costs, s, c))
            for c in options[s.name]
        ]
        for s in sites
    ]
    full = sum(s.kv_heads * (s.head_dim + s.v_head_dim) for s in sites)
    chosen = choose(rows, share * full)
    if chosen is None:
        least = sum(min(i.weight for i in row) for row in rows) / full
        raise NothingToDoError(
            f"no plan leaves {share:.4g} of the cache; the least is {least:.4g} "
            f"(--kv-cache {least:.4%})"
        )
    return tuple(
        Choice(
            site.name,
            "dha",
            asdict(config),
            f"leaves {item.weight:g} elements of cache a token; alone it costs {item.damage:.4f} "
            "nats a token",
        )
        for item in chosen
        for site, config in [item.what]
    )


def _options(dha: Any, site: Site, decoupled: bool) -> list[Any]:
    """List the settings that a site may have, its own among them."""
    wanted = dha.decoupled(site) if decoupled else dha.candidates(site)
    fitting = [c for c in wanted if not isinstance(dha.fits(site, c), No)]
    return fitting or [dha.Config(site.kv_heads)]


def _damage(costs: Mapping[tuple[str, str, int], float], site: Site, config: Any) -> float:
    return costs[site.name, "k", config.keys] + costs[site.name, "v", config.values]


def _damages(
    program: Program, statistics: Statistics, dha: Any, options: Mapping[str, list[Any]]
) -> dict[tuple[str, str, int], float]:
    """Measure what each number of key heads and of value heads costs at each site alone."""
    sites = {s.name: s for s in program.sites}
    wanted = sorted(
        {(n, "k", c.keys) for n, cs in options.items() for c in cs}
        | {(n, "v", c.values) for n, cs in options.items() for c in cs}
    )
    # Another budget of the same program asks for the same.
    key = f"dha/damages/{program.history}/{fingerprint(program.weights)}"
    found: dict[tuple[str, str, int], float] = statistics.memo.setdefault(key, {})
    wanted = [w for w in wanted if w not in found]
    if not wanted:
        return found
    rows = _rows(statistics.batches)
    before = float(losses(program, rows, "source").mean())
    for number, (name, what, count) in enumerate(wanted, 1):
        whole = sites[name].kv_heads
        found[name, what, count] = 0.0
        if count != whole:
            heads = {"k_heads": whole, "v_heads": whole, f"{what}_heads": count}
            choice = Choice(name, "dha", asdict(dha.Config(whole, refit=False, **heads)))
            plan = Plan((choice,), statistics=replace(statistics, weights=program.weights))
            after = losses(apply(program, plan), rows, f"{name} {what} {count}")
            found[name, what, count] = max(float(after.mean()) - before, 0.0)
        debug.advance("measure", number, len(wanted))
    return found


def _rows(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Take some rows of token ids from calibration batches."""
    found: list[Tensor] = []
    for batch in batches:
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and (not found or ids.shape[1] == found[0].shape[1]):
            found.append(ids)
    if not found:
        raise ValueError(
            "budgets by layer are measured on tokens: calibrate with token ids, or ask for tier 0"
        )
    rows = torch.cat(found)
    return rows[: max(_TOKENS // rows.shape[1], 1)]
