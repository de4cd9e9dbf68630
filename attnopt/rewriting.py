"""Rewriting: a program and a plan give a new program; the old one is untouched."""

import dataclasses
import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from attnopt import debug
from attnopt import passes as registry
from attnopt.calibrating import Statistics
from attnopt.compensating import refit
from attnopt.finder import find_sites
from attnopt.finder.anchors import is_fused
from attnopt.finder.assembled import Reading
from attnopt.finder.emit import Writer
from attnopt.finder.faults import Fault, guarded
from attnopt.finder.finding import Findings
from attnopt.finder.joining import join_pieces
from attnopt.finder.match import Blind, Match, Operand, Side
from attnopt.finder.prove import prove, signature
from attnopt.finder.provenance import View
from attnopt.finder.regions import match_region
from attnopt.finder.simplify import reach, simplify
from attnopt.graphs import copied, drop_unused
from attnopt.nouns import Choice, Mlp, No, Plan, Site
from attnopt.passes import exact
from attnopt.program import Program
from attnopt.refusals import shared
from attnopt.rings import with_rings
from attnopt.surgery import GraphEdit
from attnopt.weights import Spool


def apply(program: Program, plan: Plan | str) -> Program:
    """Rewrite a program as a plan says; "exact" rewrites every site that can be proved equal.

    What is declined is listed in `refused` of the result, with the reason. A choice of a plan that
    cannot be carried out is a ValueError: a plan is done whole or not at all.
    """
    if isinstance(plan, str):
        if plan != "exact":
            raise ValueError(f"cannot apply {plan!r}: it is a Plan, Plan.load(file), or 'exact'")
        return with_rings(_exact(program.growing))
    exact_form = _exact(program.growing)
    changing = [c for c in plan.choices if c.rewrite != "exact"]
    return with_rings(_carry_out(exact_form, plan, changing) if changing else exact_form)


def _exact(program: Program) -> Program:
    if any(note.startswith("exact") for note in program.history):
        return program
    if not program.parts:
        return _apply_exact(program)
    parts = {name: _exact(part) for name, part in program.parts.items()}
    refused = tuple(no for part in parts.values() for no in part.refused)
    history = (*program.history, "exact")
    return replace(program, parts=parts, history=history, refused=(*program.refused, *refused))


@torch.no_grad()
def _carry_out(program: Program, plan: Plan, choices: Sequence[Choice]) -> Program:
    """Convert the weights and edit the graphs, then refit what asks for it.

    Several choices for one site are carried out one after the other, each on what the one before
    it has left; all sites get their first choice before any gets its second.
    """
    main = program.main
    reads = _reads_statistics(choices) or _open(choices, _things(main))
    stats = statistics_of(plan, main) if reads else None
    choices = _settled(main, stats, choices)
    _must_follow(choices)
    refitted: dict[str, int] = {}
    result = program
    for turn in _turns(choices):
        seen = stats and replace(stats, weights=result.main.weights, memo={})
        result, more = _edited(result, turn, seen)
        refitted |= more
    debug.dump(40, "plan", result.graph_module)
    if not refitted:
        return result
    assert stats is not None
    solved = refit(main, result.main, refitted, stats, _digest(choices))
    return reweighted(result, solved)


def _turns(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Deal choices so that each site has one a turn, in the order in which they are said."""
    seen: Counter[str] = Counter()
    turns: list[list[Choice]] = []
    for choice in choices:
        number = seen[choice.site]
        seen[choice.site] += 1
        if number == len(turns):
            turns.append([])
        turns[number].append(choice)
    return turns


def _edited(
    program: Program, choices: Sequence[Choice], stats: Statistics | None
) -> tuple[Program, dict[str, int]]:
    """Carry out one choice a site; return what asks to be refitted, too."""
    main = program.main
    known = _things(main)
    not_alone = shared(main)
    edits = {n: GraphEdit.of(p, stats) for n, p in (program.parts or {"": program}).items()}
    changed = Spool()
    refitted: dict[str, int] = {}
    for choice in choices:
        site, module, config = _resolved(choice, known)
        _must(module.fits(site, config))
        new = module.convert(site, stats, config)
        if any(name in main.weights for name in new):
            _must(not_alone.get(site.name))
        changed.update(new)
        for edit in edits.values():
            here: tuple[Site | Mlp, ...] = (*edit.program.mlps, *edit.program.sites)
            for same in (t for t in here if t.name == site.name):
                _must(module.emit(edit, same, config))
        if new and getattr(config, "refit", False):
            refitted |= _reader(site)
    note = f"{', '.join(sorted({c.rewrite for c in choices}))}: {len(choices)} sites"
    lowest = max(program.tier, *(_tier(c, known) for c in choices))
    for edit in edits.values():
        edit.reshape_weights(changed)
    made = {n: edit.finish(changed, note=note) for n, edit in edits.items()}
    return replace(_joined(program, made, changed, note), tier=lowest), refitted


def reweighted(program: Program, weights: Mapping[str, Tensor]) -> Program:
    """Return a program, and all of its parts, with other weights."""
    parts = {n: part.with_weights(weights) for n, part in program.parts.items()}
    return replace(program.with_weights(weights), parts=parts)


def _joined(
    program: Program, made: Mapping[str, Program], changed: Mapping[str, Tensor], note: str
) -> Program:
    """Return the edited graph, or the program of the edited parts."""
    if not program.parts:
        return made[""]
    history = (*program.history, note)
    states = next((p.states for p in made.values() if p.states), ())
    joined = replace(program.with_weights(changed), parts=dict(made), history=history)
    return replace(joined, states=states)


def _tier(choice: Choice, sites: Mapping[str, Site | Mlp]) -> int:
    """Return the lowest tier that can hold a choice."""
    site, module, config = _resolved(choice, sites)
    return registry.tier_of(module, site, config)


def statistics_of(plan: Plan, program: Program) -> Statistics:
    """Return a plan's statistics, from memory or from the file beside the plan."""
    if plan.statistics is not None:
        known: Statistics = replace(plan.statistics, weights=program.weights, memo={})
        return known
    if plan.source is None:
        raise ValueError(
            "the plan has no statistics: keep statistics.safetensors beside the plan file, or set "
            "them with dataclasses.replace(plan, statistics=attnopt.calibrate(program, data))"
        )
    return Statistics.load(plan.source, program.weights)


def _reads_statistics(choices: Sequence[Choice]) -> bool:
    """Tell whether a pass needs what calibration saw; those that change no weight do not."""
    for choice in choices:
        module: Any = registry.load(choice.rewrite)
        weightless = getattr(module, "weightless", False)
        if callable(weightless):
            weightless = weightless(module.Config(**choice.config))
        if not weightless:
            return True
    return False


def settled(program: Program, plan: Plan) -> Plan:
    """Return a plan that says what its choices leave to the calibration data."""
    main = program.main
    if not _open(plan.choices, _things(main)):
        return plan
    choices = _settled(main, statistics_of(plan, main), plan.choices)
    return replace(plan, choices=tuple(choices))


def _things(program: Program) -> dict[str, Site | Mlp]:
    """Return all that a choice can name."""
    things: tuple[Site | Mlp, ...] = (*program.mlps, *program.sites)
    return {x.name: x for x in things}


def _settled(program: Program, stats: Any, choices: Sequence[Choice]) -> list[Choice]:
    """Let every pass that fits settings to data fit those of its choices."""
    found = list(choices)
    for name in dict.fromkeys(c.rewrite for c in _open(choices, _things(program))):
        own = [i for i, c in enumerate(found) if c.rewrite == name]
        module: Any = registry.load(name)
        made = module.settle(program, stats, [found[i] for i in own])
        for i, choice in zip(own, made, strict=True):
            found[i] = choice
    return found


def _open(choices: Sequence[Choice], known: Mapping[str, Site | Mlp]) -> list[Choice]:
    """List the choices that leave something to the calibration data."""
    found: list[Choice] = []
    for choice in choices:
        site, module, config = _resolved(choice, known)
        if hasattr(module, "settle") and module.is_open(config) and module.fits(site, config):
            found.append(choice)
    return found


def _reader(site: Site | Mlp) -> dict[str, int]:
    """Return the parameter that reads the heads or neurons of a site, and its axis of inputs."""
    reader = site.down if isinstance(site, Mlp) else site.projections["o"]
    return {reader.parameter: reader.axis}


def _resolved(choice: Choice, sites: Mapping[str, Site | Mlp]) -> tuple[Site | Mlp, Any, Any]:
    """Return the site, the pass and its settings that a choice names."""
    if choice.site not in sites:
        near = difflib.get_close_matches(choice.site, sites, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the plan names site {choice.site!r}, which is not there{hint}")
    module = registry.load(choice.rewrite)
    allowed = [f.name for f in dataclasses.fields(module.Config)]
    for name in choice.config:
        if name not in allowed:
            raise ValueError(
                f"{choice.site}: pass {choice.rewrite!r} has no setting {name!r}; "
                f"it has {', '.join(allowed)}"
            )
    return sites[choice.site], module, module.Config(**choice.config)


def _must(answer: Any) -> None:
    if isinstance(answer, No):
        raise ValueError(f"the plan cannot be carried out: {answer}")


def _must_follow(choices: Sequence[Choice]) -> None:
    """Refuse a second choice for a site whose pass does not say that it may follow the first's."""
    before: dict[str, list[str]] = {}
    for choice in choices:
        done = before.setdefault(choice.site, [])
        allowed = getattr(registry.load(choice.rewrite), "follows", ())
        beside = next((name for name in done if name not in allowed), None)
        done.append(choice.rewrite)
        if beside is not None:
            raise ValueError(
                f"the plan has {len(done)} choices for site {choice.site!r}, and pass "
                f"{choice.rewrite!r} cannot follow {beside!r} there; keep one of them"
            )


def _digest(choices: Sequence[Choice]) -> str:
    """Name a set of choices by its content."""
    plain = [(c.site, c.rewrite, sorted(c.config.items())) for c in choices]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]


@dataclass
class _Copy:
    """A copy of a program's graph in which sites are replaced one by one."""

    graph: fx.Graph
    mapping: dict[fx.Node, fx.Node]
    shared: dict[Any, fx.Node] = field(default_factory=dict)


def _apply_exact(program: Program) -> Program:
    return rewrite_exactly(program, {})[0]


def rewrite_exactly(
    program: Program,
    proved: dict[str, No | None],
    *,
    largest_proof: int | None = None,
    only: Collection[str] | None = None,
) -> tuple[Program, frozenset[str]]:
    """Rewrite every site that can be proved equal; return the names of those done whole, too.

    `proved` holds what is known of structures and takes what is found out. A proof on more scores
    than `largest_proof` is not made, and the site is refused. `only` names the sites to rewrite.
    """
    findings = _side_by_side(find_sites(program), only)
    named = list(zip(findings.sites, findings.groups, strict=True))
    others = {p.anchor for s, g in named for p in g if only is not None and s.name not in only}
    unread = [r for r in findings.unread if r.anchor not in others]
    refused: list[No] = []
    left = set(others)
    rewritten = _Copy(*copied(findings.view.program.graph))
    for reading in unread:
        assemble = partial(_rewrite_assembled, findings.view, rewritten, reading, proved)
        refusal = guarded(partial(assemble, largest_proof), reading.anchor.name)
        if refusal is not None:
            left.add(reading.anchor)
            why = refusal.why if isinstance(refusal, Fault) else reading.why
            refused.append(No(why, f"{reading.module} ({reading.anchor.name})"))
            debug.log(4, f"exact refuses {reading.module}: {reading.why}: {refusal}")
    for number, match in enumerate(findings.matches, 1):
        if match.anchor in others:
            continue
        debug.advance("prove", number, len(findings.matches))
        refusal = exact.refuse(match)
        if refusal is None:
            refusal = _too_large(match, largest_proof)
        if refusal is None:
            rewrite = partial(_rewrite, findings.view, rewritten, match, proved)
            refusal = guarded(rewrite, match.anchor.name)
        if refusal is not None:
            left.add(match.anchor)
            refused.append(No(refusal.why, f"{match.module} ({refusal.where})"))
            debug.log(4, f"exact refuses {match.module}: {refusal}")
    _loosen_views(rewritten.graph)
    drop_unused(rewritten.graph)
    rewritten.graph.lint()
    module = fx.GraphModule(program.graph_module, rewritten.graph)
    debug.dump(30, "exact", module)
    count = len(findings.matches) + len(findings.unread) - len(left)
    result = program.with_graph(module, note=f"exact: {count} sites")
    whole = (site.name for site, pieces in named if not any(p.anchor in left for p in pieces))
    return replace(result, refused=(*program.refused, *refused)), frozenset(whole)


def _side_by_side(findings: Findings, only: Collection[str] | None) -> Findings:
    """Return what is found where scores that stand side by side are joined, if all is found."""
    named = zip(findings.sites, findings.groups, strict=True)
    wanted = {p.anchor for s, g in named for p in g if only is None or s.name in only}
    joined = join_pieces(findings.view, [r for r in findings.unread if r.anchor in wanted])
    if isinstance(joined, No):
        return findings
    found = find_sites(joined)
    same = [s.name for s in found.sites] == [s.name for s in findings.sites]
    pieces = [sum(map(len, f.groups)) for f in (findings, found)]
    return found if same and pieces[0] == pieces[1] else findings


def _rewrite_assembled(
    view: View,
    rewritten: _Copy,
    reading: Reading,
    proved: dict[str, No | None],
    most: int | None,
) -> No | None:
    """Rewrite an attention that is assembled from pieces, where it can be matched and proved."""
    match = match_region(view, reading)
    if isinstance(match, No):
        return match
    refusal = _too_large(match, most)
    return refusal if refusal is not None else _replace(view, rewritten, match, proved)


def _too_large(match: Match, most: int | None) -> No | None:
    """Refuse a proof on more scores than allowed."""
    count = math.prod(match.scores_layout.size(role) for role in "BHTS")
    if most is None or count <= most:
        return None
    return No(f"a proof on {count:,} scores would take too long", match.anchor.name)


def _loosen_views(graph: fx.Graph) -> None:
    """Turn views into reshapes: the canonical op's result may lie in memory another way."""
    aten = torch.ops.aten
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default


def _rewrite(view: View, rewritten: _Copy, match: Match, proved: dict[str, No | None]) -> No | None:
    """Rewrite a site by the first reading that is proved; return the last one's refusal."""
    refusal: No | None = None
    for reading in _readings(view, match):
        refusal = _replace(view, rewritten, reading, proved)
        if refusal is None:
            break
        debug.log(4, f"{match.module}: a reading of the mask is refused: {refusal}")
    return refusal


def _readings(view: View, match: Match) -> list[Match]:
    """List how a match may be said: its masks by name or as they are, blind queries either way."""
    simple = simplify(view, match)
    found = [simple] if simple is match else [simple, match]
    if not any(s.step.op in ("hide", "add") for s in match.sides) or match.blind != "zeros":
        return found
    said = [replace(m, blind=blind) for m in found for blind in _likely(match, m)]
    return [*said, replace(match, blind="least")]


def _likely(match: Match, said: Match) -> tuple[Blind, ...]:
    """Order what blind queries may give, so that few proofs fail: most sources hide by a number."""
    by_infinity = is_fused(match.anchor) or any(
        s.step.op == "hide" and s.step.number == -math.inf for s in match.sides
    )
    sees_all = said.padding is None or said.structure.kind == "none"
    return ("zeros", "mean") if by_infinity or sees_all else ("mean", "zeros")


def _replace(view: View, rewritten: _Copy, match: Match, proved: dict[str, No | None]) -> No | None:
    """Put the canonical op at a site, proving it first; a refusal leaves the site as it was."""
    moved = _moved(match, rewritten.mapping)
    before = rewritten.mapping[match.result]
    writer = Writer(rewritten.graph, view.shapes, before, rewritten.mapping, rewritten.shared)
    try:
        result = exact.emit(writer, moved)
    except (NotImplementedError, RuntimeError) as error:
        return No(f"cannot be written: {error}", match.anchor.name)
    key = signature(view, match)
    if key not in proved:
        proved[key] = prove(view, match, result, rewritten.mapping)
    if proved[key] is not None:
        return proved[key]
    made = writer.made
    if made is not None and moved.structure.kind == "none" and "mask" in made.kwargs:
        exact.narrow(made, reach(view, match))
    before.replace_all_uses_with(result)
    rewritten.mapping[match.result] = result
    return None


def _moved(match: Match, mapping: dict[fx.Node, fx.Node]) -> Match:
    """Return a match whose nodes are those of the copy."""

    def side(s: Side) -> Side:
        step = replace(s.step, node=mapping[s.step.node], side=mapping[s.node])
        return replace(s, step=step)

    def operand(o: Operand) -> Operand:
        return replace(o, node=mapping[o.node], product=mapping[o.product])

    padding = match.padding
    return replace(
        match,
        anchor=mapping[match.anchor],
        result=mapping[match.result],
        q=operand(match.q),
        k=operand(match.k),
        v=operand(match.v),
        sides=tuple(side(s) for s in match.sides),
        after=tuple(side(s) for s in match.after),
        sinks=None if match.sinks is None else side(match.sinks),
        padding=padding and replace(padding, node=mapping[padding.node]),
    )
