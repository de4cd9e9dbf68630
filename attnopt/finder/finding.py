"""The finder from end to end: anchors, matches, facts, and what almost matched."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import fx

from attnopt import debug
from attnopt.finder import facts
from attnopt.finder.masks import name_masks
from attnopt.finder.match import Match
from attnopt.finder.mixers import find_mixers
from attnopt.finder.ops import module_path
from attnopt.finder.provenance import View
from attnopt.finder.reading import match_anchor, match_canonical, match_fused
from attnopt.finder.scores import Walker, find_anchors, is_canonical, is_fused
from attnopt.nouns import NearMiss, No, Site
from attnopt.program import Program


@dataclass(frozen=True)
class Findings:
    """What the finder knows of a program; `matches[i]` is a piece of `sites[owner[i]]`."""

    view: View
    matches: tuple[Match, ...]
    owner: tuple[int, ...]
    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]


@dataclass(frozen=True)
class Explanation:
    """Why a site is what it is: its region of the graph before and after, and the reasons."""

    site: Site
    before: str
    after: str
    why: tuple[str, ...]


_FOUND: "WeakKeyDictionary[fx.Graph, Findings]" = WeakKeyDictionary()


def find_sites(program: Program) -> Findings:
    """Find and read every attention in a program, each graph once."""
    if program.parts:
        return _of_parts(program)
    if program.graph not in _FOUND:
        _FOUND[program.graph] = _find(program)
    return _FOUND[program.graph]


def _find(program: Program) -> Findings:
    view = View(program)
    walker = view.scalars = Walker(view)
    matches: list[Match] = []
    misses: list[NearMiss] = []
    for node, found in _candidates(view, walker):
        if isinstance(found, Match):
            matches.append(found)
            debug.log(3, f"{found.module}: attention at {found.anchor.name} -> {found.result.name}")
        else:
            misses.append(NearMiss(module_path(node), node.name, str(found)))
            debug.log(4, f"near miss in {module_path(node)}: {found}")
    matches.sort(key=lambda m: m.anchor)
    owner = _group(view, matches)
    names = _names([matches[owner.index(i)] for i in dict.fromkeys(owner)])
    sites = tuple(
        read_site(view, [m for m, o in zip(matches, owner, strict=True) if o == i], name)
        for i, name in enumerate(names)
    )
    misses.extend(find_mixers(view, matches))
    return Findings(view, tuple(matches), tuple(owner), sites, tuple(misses))


def _candidates(view: View, walker: Walker) -> Iterator[tuple[fx.Node, Match | No]]:
    """Yield every anchor with its match or the reason why there is none."""
    taken: set[fx.Node] = set()
    for anchor in find_anchors(view.program.graph):
        if anchor.weights in taken or not anchor.weights.users:
            continue
        taken.add(anchor.weights)
        yield anchor.weights, match_anchor(view, walker, anchor)
    for node in view.program.graph.nodes:
        if is_fused(node) and node.users:
            yield node, match_fused(view, node)
        elif is_canonical(node):
            yield node, match_canonical(view, node)


def read_site(view: View, pieces: list[Match], name: str) -> Site:
    """Read the facts of a site from its match (the largest piece, where it has several)."""
    match = max(pieces, key=lambda m: m.q.layout.size("T") * m.k.layout.size("S"))
    named = name_masks(view, match)
    cached = _is_cached(view, match)
    scale = match.scale * facts.scale_before(view, match.q) * facts.scale_before(view, match.k)
    norm = facts.qk_norm(view, match)
    by_head = any(s.step.op == "multiply" and "S" not in s.own_layout().roles for s in match.sides)
    notes = [*named.notes]
    if len(pieces) > 1:
        notes.append(f"{len(pieces)} softmaxes over parts of one attention")
    if match.reused:
        notes.append("the weights are read elsewhere too")
    return Site(
        name=name,
        module=match.module,
        kind=facts.site_kind(view, match, named.mask.kind),
        heads=match.heads,
        kv_heads=max(match.k.count, match.v.count),
        head_dim=match.q.layout.size("D"),
        v_head_dim=match.v.layout.size("E"),
        scale=None if by_head else scale,
        mask=named.mask if len(pieces) == 1 else replace(named.mask, kind="dense", window=None),
        padded=named.padded,
        bias=named.bias,
        softcap=match.softcap,
        sinks=match.sinks is not None,
        rope=facts.rope(view, match, cached),
        qk_norm=norm,
        cached=cached,
        grid=facts.grid(view, match),
        projections=facts.projections(view, match),
        notes=tuple(notes),
    )


def _is_cached(view: View, match: Match) -> bool:
    """Tell whether keys or values include a state from earlier steps."""
    return any("state" in view.origins.of(x.product) for x in (match.k, match.v)) and any(
        view.program.bindings[n.name].kind == "state"
        for x in (match.k, match.v)
        for n in facts.cache_inputs(view, x.product)
    )


def _group(view: View, matches: list[Match]) -> list[int]:
    """Number the logical attentions: pieces of one share queries, keys and values of one module."""
    owner: list[int] = []
    keys: dict[object, int] = {}
    for i, match in enumerate(matches):
        key = facts.piece_key(view, match, matches)
        number = keys.setdefault(key if key is not None else ("alone", i), len(keys))
        owner.append(number)
    return owner


def _names(matches: list[Match]) -> list[str]:
    """Name sites by module; several in one module are numbered in order."""
    counts: dict[str, int] = {}
    names: list[str] = []
    for match in matches:
        base = match.module or "model"
        counts[base] = counts.get(base, 0) + 1
        names.append(base if counts[base] == 1 else f"{base}#{counts[base]}")
    return names


def _of_parts(program: Program) -> Findings:
    """Collect what was found in the parts; a site that two parts share counts once."""
    found = {name: find_sites(part) for name, part in program.parts.items()}
    sites: dict[str, Site] = {}
    misses: dict[tuple[str, str], NearMiss] = {}
    modules = set(found) != {"encode", "decode"}
    for name, findings in found.items():
        for site in findings.sites:
            full = _prefixed(site, name) if modules else site
            known = sites.get(full.name)
            # A decode step knows best whether an attention has a cache.
            if known is None or (full.cached and not known.cached):
                sites[full.name] = full
        for miss in findings.near_misses:
            misses.setdefault((miss.module, miss.node), miss)
    first = next(iter(found.values()))
    return Findings(first.view, (), (), tuple(sites.values()), tuple(misses.values()))


def _prefixed(site: Site, part: str) -> Site:
    def joined(x: str) -> str:
        return f"{part}.{x}" if x and x != "model" else part

    return replace(site, name=joined(site.name), module=joined(site.module))


def explain(program: Program, site: str) -> Explanation:
    """Show the region of one site before and after the exact rewrite, and the reasons."""
    from attnopt.finder.explaining import explain_site

    return explain_site(program, site)
