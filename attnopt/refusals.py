"""Refusals that rewrites of projections share, and what a planner says that finds no rewrite."""

from collections import Counter

from attnopt.nouns import Mlp, No, Site
from attnopt.program import Program


class NothingToDoError(ValueError):
    """No rewrite serves the goal; the message says what stands in the way."""


class NoUniformPlanError(NothingToDoError):
    """A goal that layers which are all alike cannot meet; others might."""


def unreadable(site: Site) -> No | None:
    """Say why the projections of a site cannot be changed head by head."""
    for name in ("q", "k", "v", "o"):
        if name not in site.projections:
            return No(
                f"the {name} projection could not be mapped to rows of a parameter", site.name
            )
    if any(p.layout == "einsum" for p in site.projections.values()):
        return No("its weights have axes for heads and channels of their own", site.name)
    counts = {"q": site.heads, "k": site.kv_heads, "v": site.kv_heads, "o": site.heads}
    for name, count in counts.items():
        if len(site.projections[name].rows) != count:
            made = "key heads" if name in "kv" else "heads"
            return No(f"the {name} projection makes other {made} than attention reads", site.name)
    rows = [r for p in _sharing(site) for head in p for r in head]
    if len(rows) != len(set(rows)):
        return No("heads of q, k and v are made of the same rows", site.name)
    return None


def _sharing(site: Site) -> list[tuple[tuple[int, ...], ...]]:
    """Return the rows of q, k and v, told apart by their parameter."""
    names = [site.projections[n].parameter for n in ("q", "k", "v")]
    step = 1 + max(r for n in ("q", "k", "v") for head in site.projections[n].rows for r in head)
    return [
        tuple(
            tuple(r + step * names.index(name) for r in head) for head in site.projections[n].rows
        )
        for n, name in zip(("q", "k", "v"), names, strict=True)
    ]


def cached_elsewhere(site: Site) -> No | None:
    """Say where the keys of a site are made by another graph than the one that reads them."""
    if site.kind == "cross" and site.cached:
        return No("the keys of a cached cross-attention are made by another part", site.name)
    return None


def shared(program: Program) -> dict[str, No]:
    """Name the sites and MLPs whose parameters something else reads, with the reason."""
    uses: Counter[str] = Counter()
    owned: dict[str, set[str]] = {}
    things: tuple[Site | Mlp, ...] = (*program.sites, *program.mlps)
    for thing in things:
        if isinstance(thing, Site):
            names = {p.parameter for p in thing.projections.values()}
        else:
            names = {thing.down.parameter, *(p.parameter for p in thing.inputs)}
        owned[thing.name] = names
        uses.update(names)
    read = Counter(
        program.bindings[node.name].name
        for node in program.placeholders
        for _ in node.users
        if program.bindings[node.name].kind == "parameter"
    )
    return {
        name: No("its parameters are shared with something else", name)
        for name, names in owned.items()
        if any(uses[n] > 1 or read[n] > 1 for n in names)
    }
