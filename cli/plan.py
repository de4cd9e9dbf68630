"""Say what a rewrite would do and cost, without doing it.

attnopt plan examples/models/code-llama --kv-cache 50% --tier 2 -o plan.yaml

What was measured on the way is kept, so that another budget takes seconds, and `attnopt optimize`
with the same goal goes on from it. Exit status: 0 planned, 2 usage, 3 nothing to do, 5 refused for
safety, 6 resources, 130 interrupted (the same command goes on where it stopped).
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source, _wanted
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.estimating import Estimate
    from attnopt.nouns import No, Plan
    from attnopt.program import Program
    from attnopt.recipes import Recipe

_FEW = 8
_ALIKE = (
    "all layers alike, without a look at what that loses; optimize goes on to the best mixture\n"
    "where it loses more than --max-drop, and --tier 2 plans that mixture"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the goal, the data and the place of the plan."""
    _source.configure(parser)
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="where the plan goes, such as plan.yaml"
    )
    _wanted.configure(parser)


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Plan, and print what the plan would do."""
    recipe = _wanted.wanted(arguments)
    source = _source.resolve(arguments)
    with (
        _wanted.interruptible(arguments, "no plan was written"),
        output.progress() as stages,
        stages.stage("plan"),
    ):
        made = _planned(arguments, source, recipe)
    if output.json:
        output.document("attnopt.plan/1", _document(made))
    else:
        _print(output, made, verbose=arguments.verbose)
        if recipe.tier is None and made.plan.search is None:
            output.line(_ALIKE)
        if arguments.out is not None:
            output.line(f"saved as {shown(Path(arguments.out).absolute())}; carry it out with")
            output.line(f"  attnopt optimize {arguments.model} -o OUT --plan {arguments.out}")
    return Exit.ACCEPTED


@dataclass(frozen=True)
class _Made:
    """A plan, the program that it is for, what becomes of it, and what carrying it out takes."""

    program: "Program"
    after: "Program"
    plan: "Plan"
    expected: "Estimate | No"


def _planned(arguments: argparse.Namespace, source: _source.Source, recipe: "Recipe") -> _Made:
    """Say what planning takes, plan, and say what carrying it out would take."""
    from attnopt import debug
    from attnopt.data import Source, readable, split_for
    from attnopt.estimating import Estimate, TooLargeError, estimate, refuse_too_large, told_time
    from attnopt.keeping import folder_of, kept
    from attnopt.optimizing import foretold, within
    from attnopt.planning import NothingToDoError, plan
    from attnopt.rewriting import apply
    from attnopt.search.preparing import Terms, check_rules

    try:
        data = readable(Source.parse(recipe.data, seed=recipe.seed), own=source.is_own)
    except ValueError as error:
        raise CommandError("AO112", str(error)) from error
    captured = _source.capture(source)
    work = _wanted.work_of(arguments, arguments.out)
    goal, rules, devices = recipe.goal, recipe.rules, recipe.tensor_parallel
    terms = Terms(0, recipe.passes, rules, devices, recipe.tokens)
    with told(arguments.out or "the scores", "AO113"), _source.quiet_libraries():
        try:
            check_rules(captured, rules)
            program = apply(captured, "exact")
            terms, found = within(program, goal, recipe.tier, terms)
            split = split_for(captured, data, recipe.held_out)
            expected = foretold(program, split, goal, found, terms, work)
            if isinstance(expected, Estimate):
                debug.announce(f"planning takes about {told_time(expected.seconds['plan'])}")
                refuse_too_large(expected, None)
            with kept(folder_of(work, program, split)):
                made = plan(
                    program,
                    goal,
                    split,
                    recipe.passes or None,
                    tier=terms.tier,
                    provenance={"data": split.source, "data_sha256": split.digest},
                    rules=rules,
                    tensor_parallel=devices,
                    tokens=recipe.tokens,
                    work=work,
                )
                # That fills in what its statistics need to give the same weights without data.
                after = apply(program, made)
                if arguments.out is not None:
                    made.save(arguments.out)
            return _Made(program, after, made, estimate(program, split, goal, made))
        except NothingToDoError as error:
            raise CommandError("AO201", str(error), Exit.NOTHING) from error
        except TooLargeError as error:
            raise CommandError("AO603", str(error), Exit.RESOURCES) from error


def _document(made: _Made) -> dict[str, Any]:
    plan, found = made.plan, made.plan.search
    return {
        "model": made.program.name,
        "goal": dict(plan.goal),
        "provenance": dict(plan.provenance),
        "costs": _costs(made),
        "estimate": _estimate(made),
        "choices": [
            {"site": c.site, "pass": c.rewrite, "config": dict(c.config), "why": c.why}
            for c in plan.choices
        ],
        "search": None if found is None else found.content(),
    }


def _estimate(made: _Made) -> dict[str, Any]:
    """Return what carrying the plan out takes, or why that is not known."""
    from attnopt.nouns import No

    found = made.expected
    return {"unknown": str(found)} if isinstance(found, No) else found.content()


def _costs(made: _Made) -> dict[str, list[float]]:
    """Return what the source takes and what the plan leaves, by budget."""
    from attnopt.costs import Workload, default_workload
    from attnopt.search.weighing import weights_of

    usual = default_workload(made.program)
    tokens = int(made.plan.provenance.get("tokens", 0)) or usual.sequence
    workload = Workload(1, tokens if usual.sequence else 0, 0)
    both = [weights_of(p, workload) for p in (made.program, made.after)]
    return {name: [w[name] for w in both] for name in both[0]}


def _print(output: Output, made: _Made, *, verbose: bool) -> None:
    plan = made.plan
    things = {c.site for c in plan.choices}
    output.line(f"{made.program.name}: {len(things)} sites would be rewritten")
    output.line()
    rows = [
        (_NAMES[name], f"{before:,.0f}", f"{left:,.0f}", _change(before, left))
        for name, (before, left) in _costs(made).items()
        if before
    ]
    output.table(("", "before", "after", "change"), rows, foldable={""})
    output.line()
    chosen = [(c.site, _said(c.rewrite, c.config), c.why) for c in plan.choices]
    output.table(("site", "what", "why"), chosen, foldable={"what", "why"})
    output.line()
    unknown = "unknown" in _estimate(made)
    output.line(
        f"what it takes is not known: {made.expected}"
        if unknown
        else f"carrying it out takes {made.expected}"
    )
    output.line()
    if plan.search is not None:
        _print_search(output, plan.search, verbose=verbose)


_NAMES = {
    "kv_cache": "cache of the text, bytes",
    "params": "parameters",
    "memory": "weights and cache, bytes",
}


def _change(before: float, left: float) -> str:
    return f"{left / before - 1:+.1%}"


def _said(rewrite: str, config: dict[str, Any]) -> str:
    """Return a choice in few words: what its setting changes of the usual one."""
    from attnopt import passes as registry
    from attnopt.search.candidates import Step

    return Step(rewrite, registry.load(rewrite).Config(**config)).said


def _print_search(output: Output, found: Any, *, verbose: bool) -> None:
    """Print the plans that were measured whole, the front, and what was declined."""
    best = found.best
    output.line(
        f"predicted: {best.cost:+.4f} {found.unit} (loss on {_ROWS} {best.excess:+.4f} "
        f"+- {best.error:.4f}; the sum of its choices alone {best.added:+.4f})"
    )
    output.line()
    tried = found.tried if verbose else found.tried[:_FEW]
    rows = [(t.name, *_shares(found, t), f"{t.cost:+.4f}") for t in tried]
    heads = ("measured whole", *(f"{g} left" for g in found.goals), "cost")
    output.table(heads, rows, foldable={"measured whole"})
    output.line()
    front = [(f"{share:.1%}", f"{cost:+.4f}") for share, cost in found.front]
    output.table((f"{found.goals[0]} left", "predicted cost"), front, foldable=set())
    output.line()
    for line in _declined(found.refused, verbose=verbose):
        output.line(line)


_ROWS = "rows that nothing was solved on"


def _shares(found: Any, tried: Any) -> list[str]:
    if not tried.weights:
        return ["" for _ in found.goals]
    pairs = zip(found.goals, tried.weights, strict=True)
    return [f"{weight / found.weights[name]:.1%}" for name, weight in pairs]


def _declined(refused: Any, *, verbose: bool) -> Iterator[str]:
    """Say what was declined and why, each reason once with how many sites it is of."""
    sites: dict[str, list[str]] = {}
    for no in refused:
        sites.setdefault(no.why, []).append(no.where)
    reasons = list(sites.items())
    for why, where in reasons if verbose else reasons[:_FEW]:
        more = f" and {len(set(where)) - 1} more" if len(set(where)) > 1 else ""
        yield f"declined at {where[0]}{more}: {why}"
    if len(reasons) > _FEW and not verbose:
        yield f"and {len(reasons) - _FEW} more reasons (-v shows all)"
