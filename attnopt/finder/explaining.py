"""Explain a site: its region of the graph as readable Python, before and after the rewrite."""

import difflib
from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from attnopt.finder.evaluate import ancestors, is_size
from attnopt.finder.finding import Explanation, Findings, find_sites
from attnopt.finder.grouping import Piece
from attnopt.finder.match import Match
from attnopt.finder.ops import args, kind, value
from attnopt.finder.prove import region_inputs
from attnopt.finder.provenance import View
from attnopt.nouns import Site
from attnopt.program import Program


def explain_site(program: Program, name: str) -> Explanation:
    """Show one site by name; an unknown name is a ValueError with the nearest one."""
    program, findings, site = _locate(program, name)
    pieces = findings.groups[findings.sites.index(site)]
    before = "\n\n".join(region(findings.view, p) for p in pieces)
    after, refusals = _after(program, {p.module for p in pieces})
    return Explanation(site, before, after, (*_reasons(site, pieces[0]), *refusals))


def _locate(program: Program, name: str) -> tuple[Program, Findings, Site]:
    known: list[str] = []
    for part in (program, *program.parts.values()):
        findings = find_sites(part)
        for site in findings.sites:
            known.append(site.name)
            if findings.groups and (site.name == name or name.endswith("." + site.name)):
                return part, findings, site
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no site {name!r}{hint} (the model has {len(set(known))})")


def region(view: View, piece: Piece) -> str:
    """Print the nodes between a site's operands and its result, one assignment a line."""
    if isinstance(piece, Match):
        inputs, results = region_inputs(view, piece), [piece.result]
    else:
        inputs, results = list(piece.inputs), [c.node for c, _ in piece.between.values]
    lines = [f"# {n.name}: {_like(n)}" for n in inputs]
    for node in ancestors(results, inputs):
        if node not in inputs and node.op == "call_function" and not is_size(node):
            lines.append(statement(node))
    return "\n".join(lines)


def statement(node: fx.Node) -> str:
    """Print one node as an assignment with the shape of its value."""
    shown = [_shown(a) for a in args(node)]
    shown += [f"{k}={_shown(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {kind(node)}({', '.join(shown)})  # {_like(node)}"


def _shown(x: object) -> str:
    if isinstance(x, fx.Node):
        return str(value(x)) if is_size(x) else x.name
    if isinstance(x, list | tuple):
        return "[" + ", ".join(_shown(y) for y in x) + "]"
    return repr(x)


def _like(node: fx.Node) -> str:
    example = value(node)
    if hasattr(example, "shape"):
        sizes = ", ".join(str(s) for s in example.shape)
        return f"{str(example.dtype).removeprefix('torch.')}[{sizes}]"
    return type(example).__name__


def _after(program: Program, modules: set[str]) -> tuple[str, tuple[str, ...]]:
    from attnopt.rewriting import apply

    alone = replace(program, refused=())
    rewritten = apply(alone, "exact")
    blocks = []
    for node in rewritten.graph.nodes:
        path = [p for p, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if node.target is _op() and modules & set(path):
            options = [n for n in node.all_input_nodes if not is_size(n)]
            blocks.append(
                "\n".join([*(f"# {n.name}: {_like(n)}" for n in options), statement(node)])
            )
    refused = tuple(
        f"the exact rewrite refuses: {no}"
        for no in rewritten.refused
        if any(no.where.startswith(f"{m} (") for m in modules)
    )
    return "\n\n".join(blocks), refused


def _op() -> object:
    from attnopt.ops import attention

    return attention


def _reasons(site: Site, first: Piece) -> tuple[str, ...]:
    """Say in words how a site was read, by its first piece."""
    if isinstance(first, Match):
        products, results = [first.contraction], [first.result]
    else:
        products = list(first.between.products)
        results = [c.node for c, _ in first.between.values]
    lines = [
        f"scores are normalised at {first.anchor.name}",
        f"queries meet keys at {_names(c.node for c in products)}: {site.heads} heads of"
        f" {site.head_dim} over {site.kv_heads} key/value heads",
        f"weights meet values at {_names(results)}",
        f"the scale is {site.scale}" if site.scale is not None else "the scale is learned per head",
        f"the mask evaluates to {site.mask}" + (" and padding" if site.padded else ""),
    ]
    if site.bias != "none":
        lines.append(f"the scores carry a bias: {site.bias}")
    if site.softcap is not None:
        lines.append(f"the scores are capped at {site.softcap:g}")
    if site.sinks:
        lines.append("each head has a learned sink")
    return (*lines, *site.notes)


def _names(nodes: Iterable[fx.Node]) -> str:
    return ", ".join(n.name for n in nodes)
