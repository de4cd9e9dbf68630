"""The finder from end to end: anchors, matches, facts, and what almost matched."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import fx

from attnopt import debug
from attnopt.finder import facts
from attnopt.finder.anchors import Anchor, find_anchors, is_fused, is_variant
from attnopt.finder.assembled import Reading, match_assembled, read_factor
from attnopt.finder.assembled_facts import read_assembled_site
from attnopt.finder.faults import guarded
from attnopt.finder.grouping import Piece, group
from attnopt.finder.masks import MaskReader, name_masks
from attnopt.finder.match import Match
from attnopt.finder.mixers import find_mixers
from attnopt.finder.mlps import find_mlps
from attnopt.finder.norms import qk_norm
from attnopt.finder.ops import module_path
from attnopt.finder.projections import projections
from attnopt.finder.provenance import View
from attnopt.finder.reading import match_anchor, match_canonical, match_fused
from attnopt.finder.rope import rope
from attnopt.finder.scale import scale_before
from attnopt.finder.scores import Walker
from attnopt.nouns import Mlp, NearMiss, No, Site
from attnopt.program import Program


@dataclass(frozen=True)
class Findings:
    """What the finder knows of a program; `groups[i]` holds the pieces of `sites[i]`."""

    view: View
    groups: tuple[tuple[Piece, ...], ...]
    sites: tuple[Site, ...]
    near_misses: tuple[NearMiss, ...]
    mlps: tuple[Mlp, ...] = ()

    @property
    def matches(self) -> tuple[Match, ...]:
        """Return the pieces that could be read element by element."""
        return tuple(p for g in self.groups for p in g if isinstance(p, Match))

    @property
    def owner(self) -> tuple[int, ...]:
        """Return the number of the site that each of the matches is a piece of."""
        owned = enumerate(self.groups)
        return tuple(i for i, g in owned for p in g if isinstance(p, Match))

    @property
    def unread(self) -> tuple[Reading, ...]:
        """Return the pieces that could be read by structure alone; `exact` may rewrite them."""
        return tuple(p for g in self.groups for p in g if isinstance(p, Reading))


@dataclass(frozen=True)
class Explanation:
    """Why a site is what it is: its region of the graph before and after, and the reasons."""

    site: Site
    before: str
    after: str
    why: tuple[str, ...]


# Findings are kept on the graph itself: they name its program, which holds the graph.
_FOUND = "_attnopt_findings"


def find_sites(program: Program) -> Findings:
    """Find and read every attention in a program, each graph once."""
    if program.parts:
        return _of_parts(program)
    program = program.growing
    kept = vars(program.graph)
    if _FOUND not in kept:
        kept[_FOUND] = _find(program)
    found: Findings = kept[_FOUND]
    return found


def _told(found: No, node: fx.Node) -> str:
    """Return the reason of a near miss, and its place where that is another."""
    return found.why if found.where == node.name else str(found)


def _find(program: Program) -> Findings:
    view = View(program)
    walker = view.scalars = Walker(view)
    pieces: list[Piece] = []
    misses: list[NearMiss] = []
    anchors: dict[fx.Node, Anchor] = {}
    for anchor in find_anchors(program.graph):
        if anchor.weights.users:
            anchors.setdefault(anchor.weights, anchor)
    for node, found in _candidates(view, walker, anchors):
        if isinstance(found, No):
            misses.append(NearMiss(module_path(node), node.name, _told(found, node)))
            debug.log(4, f"near miss in {module_path(node)}: {found}")
        else:
            pieces.append(found)
            debug.log(3, f"{found.module}: attention at {node.name}")
    groups = group(view, pieces, anchors)
    names = _names([g[0].module for g in groups])
    read = [
        (g, guarded(partial(_read, view, g, name, anchors), g[0].anchor.name))
        for g, name in zip(groups, names, strict=True)
    ]
    for (first, *_), site in read:
        if isinstance(site, No):
            misses.append(NearMiss(first.module, first.anchor.name, _told(site, first.anchor)))
    known = tuple((g, site) for g, site in read if isinstance(site, Site))
    misses.extend(find_mixers(view, {p.module for p in pieces}))
    sites = tuple(site for _, site in known)
    return Findings(view, tuple(g for g, _ in known), sites, tuple(misses), find_mlps(view, sites))


def _candidates(
    view: View, walker: Walker, anchors: Mapping[fx.Node, Anchor]
) -> Iterator[tuple[fx.Node, Piece | No]]:
    """Yield every anchor with its match or the reason why there is none."""
    for node, anchor in anchors.items():
        yield node, guarded(partial(_match, view, walker, anchor), node.name)
    for node in view.program.graph.nodes:
        if is_fused(node) and node.users:
            yield node, guarded(partial(match_fused, view, node), node.name)
        elif is_variant(node):
            yield node, guarded(partial(match_canonical, view, node), node.name)


def _match(view: View, walker: Walker, anchor: Anchor) -> Piece | No:
    found = match_anchor(view, walker, anchor)
    return match_assembled(view, anchor, found) if isinstance(found, No) else found


def _read(
    view: View, pieces: tuple[Piece, ...], name: str, anchors: Mapping[fx.Node, Anchor]
) -> Site:
    """Read a site from its pieces, by structure where any of them was."""
    readings = [p for p in pieces if isinstance(p, Reading)]
    if readings:
        return read_assembled_site(view, readings, name, softmaxes=len(pieces))
    matches = [p for p in pieces if isinstance(p, Match)]
    site = read_site(view, matches, name)
    if len(matches) == 1 and matches[0].anchor in anchors:
        anchor = anchors[matches[0].anchor]
        if site.heads == 1:
            return _with_heads(view, site, anchor)
        if site.mask.kind == "dense" and len(matches[0].scores_layout.factors("B")) > 1:
            return _with_whole_mask(view, site, matches[0], anchor)
    return site


def _with_whole_mask(view: View, site: Site, match: Match, anchor: Anchor) -> Site:
    """Name the mask of an attention over blocks of tokens by the tokens that meet in it."""
    visible = MaskReader(view, match).values.visible_scores()
    if visible is None:
        return site
    reading = read_factor(view, anchor, "blocks of tokens", visible)
    return site if isinstance(reading, No) else replace(site, mask=reading.mask)


def _with_heads(view: View, site: Site, anchor: Anchor) -> Site:
    """Tell heads from batch rows where data decide which tokens the queries and keys are."""
    reading = read_factor(view, anchor, "its heads are told apart by structure")
    if isinstance(reading, No) or reading.q.root.contraction is None or len(reading.q.heads) == 1:
        return site
    read = read_assembled_site(view, [reading], site.name, softmaxes=1)
    return replace(
        site,
        heads=read.heads,
        kv_heads=read.kv_heads,
        padded=site.padded or read.padded,
        projections=read.projections,
        notes=(*site.notes, reading.why),
    )


def read_site(view: View, pieces: list[Match], name: str) -> Site:
    """Read the facts of a site from its match (the largest piece, where it has several)."""
    match = max(pieces, key=lambda m: m.q.layout.size("T") * m.k.layout.size("S"))
    named = name_masks(view, match)
    cached = _is_cached(view, match)
    scale = match.scale * scale_before(view, match.q) * scale_before(view, match.k)
    norm = qk_norm(view, match)
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
        rope=rope(view, match, cached),
        qk_norm=norm,
        cached=cached,
        grid=facts.grid(view, match),
        projections=projections(view, match),
        notes=tuple(notes),
    )


def _is_cached(view: View, match: Match) -> bool:
    """Tell whether keys or values include a state from earlier steps."""
    return any("state" in view.origins.of(x.product) for x in (match.k, match.v)) and any(
        view.program.bindings[n.name].kind == "state"
        for x in (match.k, match.v)
        for n in facts.cache_inputs(view, x.product)
    )


def _names(modules: list[str]) -> list[str]:
    """Name sites by module; several in one module are numbered in order."""
    counts: dict[str, int] = {}
    names: list[str] = []
    for module in modules:
        base = module or "model"
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
    mlps: dict[str, Mlp] = {}
    for name, findings in found.items():
        for mlp in findings.mlps:
            full_mlp = _prefixed(mlp, name) if modules else mlp
            mlps.setdefault(full_mlp.name, full_mlp)
    return Findings(
        first.view, (), tuple(sites.values()), tuple(misses.values()), tuple(mlps.values())
    )


_Named = TypeVar("_Named", Site, Mlp)


def _prefixed(site: _Named, part: str) -> _Named:
    def joined(x: str) -> str:
        if x == part or x.startswith((f"{part}.", f"{part}#")):
            return x
        return f"{part}.{x}" if x and x != "model" else part

    return replace(site, name=joined(site.name), module=joined(site.module))


def explain(program: Program, site: str) -> Explanation:
    """Show the region of one site before and after the exact rewrite, and the reasons."""
    from attnopt.finder.explaining import explain_site

    return explain_site(program, site)
