"""Show every attention of a model, what it is, what it costs, and what could replace it.

Runs of equal layers are one row; -v prints every fact of every site. A checkpoint directory without
weights can be inspected. FLOPs count the contractions of the graph, masked pairs included, and a
site's share includes its projections. Exit status 3 means that there is no attention.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import attnopt
from attnopt.cli import _facts, _source
from attnopt.cli._errors import CommandError, Exit
from attnopt.cli._output import Output, Stages

if TYPE_CHECKING:
    from attnopt.costs import Costs
    from attnopt.nouns import Site
    from attnopt.program import Program

SCHEMA = "attnopt.inspect/1"

_LOADS_IN = {
    0: "tier 0: stock Transformers",
    1: "tier 1: import attnopt",
    2: "tier 2: import attnopt, own program",
}


_NAME_WIDTH = 30
_WHY_WIDTH = 28
_HEADINGS = ("layers", "site", "kind", "heads", "dim", "mask", "rotary", "FLOPs", "KV B/token")


@dataclass(frozen=True)
class Applicable:
    """A pass and the sites where it applies; elsewhere, why it does not."""

    name: str
    exact: bool
    tier: int
    fits: tuple[str, ...]
    refusals: dict[str, str]


@dataclass(frozen=True)
class Findings:
    """All that is known of a model."""

    model: str
    program: "Program"
    costs: "Costs"
    passes: tuple[Applicable, ...]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _source.configure(parser)
    parser.add_argument(
        "--sequence", type=_positive, metavar="N", help="tokens of the workload that is costed"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Inspect a model."""
    source = _source.resolve(arguments)
    with output.progress() as stages:
        found = _find(source, arguments, stages)
    if output.json:
        output.document(SCHEMA, as_json(found))
    else:
        _report(found, output, verbose=arguments.verbose)
    if found.program.sites:
        return Exit.ACCEPTED
    print(_nothing(found.program), file=sys.stderr)
    return Exit.NOTHING


def _find(source: _source.Source, arguments: argparse.Namespace, stages: Stages) -> Findings:
    with stages.stage("capture"):
        program = _source.capture(source)
    with stages.stage("find"), _source.quiet_libraries():
        sites = program.sites
    with stages.stage("cost"):
        from attnopt.costs import Workload, count_costs, default_workload

        workload = default_workload(program)
        if arguments.sequence:
            workload = Workload(sequence=arguments.sequence)
        costs = count_costs(program, workload)
    return Findings(arguments.model, program, costs, _applicable(sites))


def _applicable(sites: Sequence["Site"]) -> tuple[Applicable, ...]:
    """Ask every pass about every site."""
    from attnopt import passes

    found: list[Applicable] = []
    for name in passes.names():
        rewrite = passes.load(name)
        answers = {site.name: passes.answer(rewrite, site) for site in sites}
        fits = tuple(site for site, answer in answers.items() if answer)
        refusals = {site: str(answer) for site, answer in answers.items() if not answer}
        found.append(Applicable(name, rewrite.exact, rewrite.tier, fits, refusals))
    return tuple(found)


def as_json(found: Findings) -> dict[str, Any]:
    """Return the whole report for machines."""
    program, costs = found.program, found.costs
    return {
        "attnopt": attnopt.__version__,
        "model": found.model,
        "class": program.name,
        "parameters": parameters(program),
        "captured": list(program.history),
        "parts": list(program.parts),
        "workload": asdict(costs.workload),
        "flops": costs.flops,
        "kv_bytes_per_token": costs.cache_bytes,
        "sites": [_site_as_json(site, found) for site in program.sites],
        "passes": [asdict(item) for item in found.passes],
        "near_misses": [asdict(miss) for miss in program.near_misses],
        "uncaptured": [asdict(item) for item in program.uncaptured],
        "refused": [asdict(refusal) for refusal in program.refused],
    }


def _site_as_json(site: "Site", found: Findings) -> dict[str, Any]:
    cost = found.costs.sites[site.name]
    return {
        **_facts.as_json(site),
        "flops": cost.flops,
        "flops_share": cost.share,
        "kv_bytes_per_token": cost.cache_bytes,
        "passes": [item.name for item in found.passes if site.name in item.fits],
    }


def parameters(program: "Program") -> int:
    """Count the parameters, those that parts share once."""
    leaves = list(program.parts.values()) or [program]
    shapes: dict[str, int] = {}
    for leaf in leaves:
        for node in leaf.graph.nodes:
            binding = leaf.bindings.get(node.name) if node.op == "placeholder" else None
            if binding is not None and binding.kind == "parameter":
                shapes[binding.name] = node.meta["val"].numel()
    return sum(shapes.values())


def _report(found: Findings, output: Output, *, verbose: bool) -> None:
    program = found.program
    how = f"in {_counted(len(program.parts), 'part')}" if program.parts else "whole"
    output.line(
        f"{found.model}: {program.name}, {_amount(parameters(program)).strip()} parameters, "
        f"captured {how}"
    )
    output.note(f"{_counted(len(program.sites), 'attention')} found")
    if program.sites:
        output.line()
        _site_table(found, output)
        output.note(_total(found))
    if verbose:
        _every_fact(found, output)
    if found.passes and program.sites:
        output.line()
        _pass_table(found, output)
    _leftovers(program, output)
    if program.sites:
        output.note(f"\nNext: attnopt explain {found.model} {program.sites[0].name}")


def _site_table(found: Findings, output: Output) -> None:
    groups = _facts.groups(found.program.sites)
    wide = any(_facts.extras(group.sites[0]) for group in groups)
    headings = [*_HEADINGS, *(["also"] if wide else [])]
    rows = [_row(group, found.costs)[: len(headings)] for group in groups]
    output.table(headings, rows, foldable={"also"})


def _row(group: _facts.Group, costs: "Costs") -> list[str]:
    site = group.sites[0]
    own = [costs.sites[member.name] for member in group.sites]
    return [
        _facts.layers(group.layers),
        _facts.folded(group.pattern, _NAME_WIDTH),
        _facts.sharing(site),
        _facts.heads(site),
        _facts.dims(site),
        _facts.mask(site),
        _facts.rope(site.rope, site.head_dim),
        f"{sum(cost.share for cost in own):.1%}",
        f"{sum(cost.cache_bytes for cost in own):,}" if site.cached else "-",
        _facts.extras(site),
    ]


def _total(found: Findings) -> str:
    costs = found.costs
    share = sum(site.share for site in costs.sites.values())
    kept = f", {costs.cache_bytes:,} bytes of cache per token" if costs.cache_bytes else ""
    return f"\nTogether {share:.1%} of {_amount(costs.flops)}FLOP ({costs.workload}){kept}."


def _every_fact(found: Findings, output: Output) -> None:
    for site in found.program.sites:
        cost = found.costs.sites[site.name]
        output.line(f"\n{site.name}")
        facts = _facts.sentences(site)
        facts.append(("FLOPs", f"{_amount(cost.flops)}FLOP, {cost.share:.2%}"))
        facts.append(("KV cache", f"{cost.cache_bytes:,} bytes per token"))
        for name, text in facts:
            output.line(f"  {name:<9} {text}")


def _pass_table(found: Findings, output: Output) -> None:
    total = len(found.program.sites)
    output.table(
        ["pass", "result", "loads in", "sites", "why not elsewhere"],
        [
            [
                item.name,
                "exact" if item.exact else "approximate",
                # What is no model of Transformers is stored as itself.
                _LOADS_IN[item.tier if found.program.config is not None else 2],
                f"{len(item.fits)} of {total}",
                _refusal(item),
            ]
            for item in found.passes
        ],
        foldable={"why not elsewhere"},
    )


def _refusal(item: Applicable) -> str:
    """Return the first refusal of a pass, with the name of its site broken after its dots."""
    for site, why in item.refusals.items():
        return why.replace(site, _facts.folded(site, _WHY_WIDTH), 1)
    return ""


def _leftovers(program: "Program", output: Output) -> None:
    """Print what was not found, not captured and not proved, or that there is no such thing."""
    lists: tuple[tuple[str, list[str]], ...] = (
        (
            "Almost attention",
            [f"{_at(m.module)} ({m.node}): {m.why}" for m in program.near_misses],
        ),
        ("Not captured", [f"{_at(u.module)}: {u.why} ({u.where})" for u in program.uncaptured]),
        ("Refused", [str(refusal) for refusal in program.refused]),
    )
    for heading, items in lists:
        if items:
            output.line(f"\n{heading}:")
        for item in items:
            output.line(f"  {item}")
    none = [heading.lower() for heading, items in lists if not items]
    if none:
        output.note(f"\nNothing {', '.join(none[:-1])}{' or ' if none[1:] else ''}{none[-1]}.")


def _at(module: str) -> str:
    return module or "the model itself"


def _nothing(program: "Program") -> CommandError:
    """Say that nothing was found, and what came closest."""
    losses: list[Any] = [*program.refused, *program.uncaptured]
    if program.near_misses:
        miss = program.near_misses[0]
        closest = f"; closest: {_at(miss.module)} ({miss.node}): {miss.why}"
    elif losses:
        closest = f"; {_counted(len(losses), 'part')} of it could not be read"
    else:
        closest = "; nothing in it looks like one"
    return CommandError("AO201", f"{program.name} has no attention{closest}", Exit.NOTHING)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _amount(number: int) -> str:
    """Write a number with three digits and its unit."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)
