"""Rewriting: a program and a plan give a new program; the old one is untouched."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import fx

from attnopt import debug
from attnopt.finder import find_sites
from attnopt.finder.emit import Writer
from attnopt.finder.match import Match, Operand, Side
from attnopt.finder.prove import prove, signature
from attnopt.finder.provenance import View
from attnopt.nouns import No, Plan
from attnopt.passes import exact
from attnopt.program import Program


def apply(program: Program, plan: Plan | str) -> Program:
    """Rewrite a program as a plan says; "exact" rewrites every site that can be proved equal.

    What is declined is listed in `refused` of the result, with the reason.
    """
    if plan != "exact":
        known = "'exact'"
        raise ValueError(f"cannot apply {plan!r}: the plans known so far are {known}")
    if program.parts:
        parts = {name: apply(part, plan) for name, part in program.parts.items()}
        refused = tuple(no for part in parts.values() for no in part.refused)
        history = (*program.history, "exact")
        return replace(program, parts=parts, history=history, refused=(*program.refused, *refused))
    return _apply_exact(program)


@dataclass
class _Copy:
    """A copy of a program's graph in which sites are replaced one by one."""

    graph: fx.Graph
    mapping: dict[fx.Node, fx.Node]


def _apply_exact(program: Program) -> Program:
    findings = find_sites(program)
    view = findings.view
    proved: dict[str, No | None] = {}
    refused: list[No] = []
    rewritten = _copy(program)
    for number, match in enumerate(findings.matches, 1):
        debug.advance("prove", number, len(findings.matches))
        refusal = exact.refuse(match)
        if refusal is None:
            refusal = _replace(view, rewritten, match, proved)
        if refusal is not None:
            refused.append(No(refusal.why, f"{match.module} ({refusal.where})"))
            debug.log(4, f"exact refuses {match.module}: {refusal}")
    _loosen_views(rewritten.graph)
    rewritten.graph.eliminate_dead_code()
    rewritten.graph.lint()
    module = fx.GraphModule(program.graph_module, rewritten.graph)
    debug.dump(30, "exact", module)
    result = program.with_graph(module, note=f"exact: {len(findings.matches) - len(refused)} sites")
    return replace(result, refused=(*program.refused, *refused))


def _loosen_views(graph: fx.Graph) -> None:
    """Turn views into reshapes: the canonical op's result may lie in memory another way."""
    aten = torch.ops.aten
    for target in (aten.view.default, aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=target):
            node.target = aten.reshape.default


def _copy(program: Program) -> _Copy:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(program.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    return _Copy(graph, mapping)


def _replace(view: View, rewritten: _Copy, match: Match, proved: dict[str, No | None]) -> No | None:
    """Put the canonical op at a site, proving it first; a refusal leaves the site as it was."""
    moved = _moved(match, rewritten.mapping)
    before = rewritten.mapping[match.result]
    writer = Writer(rewritten.graph, view.shapes, before, rewritten.mapping)
    try:
        result = exact.emit(writer, moved)
    except (NotImplementedError, RuntimeError) as error:
        return No(f"cannot be written: {error}", match.anchor.name)
    key = signature(view, match)
    if key not in proved:
        proved[key] = prove(view, match, result, rewritten.mapping)
    if proved[key] is not None:
        return proved[key]
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
    )
