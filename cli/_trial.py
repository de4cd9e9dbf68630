"""`attnopt optimize --test`: the whole pipeline on a small random twin, before hours are spent.

Whatever depends on the kind of model and not on its weights goes wrong here: capture, the search
for the goal, the rewrite, the judging, saving, loading, the data. OUT is not touched.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result
    from attnopt.data import Source
    from attnopt.recipes import Recipe
    from attnopt.twins import Twin

SCHEMA: Final = "attnopt.optimize-test/1"
_ROWS: Final = 16
_TOKENS: Final = 64
_HELD_OUT: Final = 8
_CLOSE: Final = 1e-3


def run(
    arguments: argparse.Namespace, output: Output, source: _source.Source, recipe: "Recipe"
) -> int:
    """Make the twin, optimize it, load the result, and say how long that took."""
    if arguments.plan is not None:
        raise CommandError(
            "AO111", "--test and --plan exclude each other: a plan names layers of the whole model"
        )
    started = time.perf_counter()
    with (
        output.progress() as stages,
        tempfile.TemporaryDirectory(prefix="attnopt-") as folder,
        told(folder, "AO113"),
        _source.quiet_libraries(),
        stages.stage("test"),
    ):
        made, result, call = _tried(source, recipe, Path(folder))
        apart = _distance(Path(folder) / "out", result, call)
        spent = time.perf_counter() - started
        # Weights are read from the folder as long as it is there.
        document = _document(made, result, apart, spent)
    if output.json:
        output.document(SCHEMA, document)
    else:
        _summary(output, made, result, apart, spent)
    return Exit.ACCEPTED


def _tried(
    source: _source.Source, recipe: "Recipe", folder: Path
) -> "tuple[Twin, Result, dict[str, Any]]":
    from attnopt.data import batches_of, split_for
    from attnopt.optimizing import optimize
    from attnopt.planning import NothingToDoError
    from attnopt.twins import twin

    if source.kind not in ("directory", "hub"):
        raise CommandError(
            "AO114", f"--test makes a small twin from config.json, which {source.text} has none of"
        )
    made = twin(_folder_of(source), folder)
    split = split_for(made.program, _few(recipe), min(recipe.held_out, _HELD_OUT))
    try:
        result = optimize(
            made.program,
            _reachable(recipe.goal, made.program),
            data=split,
            out=folder / "out",
            tier=recipe.tier,
            passes=recipe.passes or None,
            rules=recipe.rules,
            tensor_parallel=recipe.tensor_parallel,
        )
    except NothingToDoError as error:
        raise CommandError("AO201", f"on a small twin: {error}", Exit.NOTHING) from error
    return made, result, next(batches_of(result.program, split.held_out))


def _reachable(goal: Mapping[str, Any], program: Any) -> dict[str, Any]:
    """Return a goal that a twin can reach: most of its parameters may be its vocabulary."""
    from attnopt.costs import parameters
    from attnopt.heads import removable
    from attnopt.planning import fraction

    kept = {name: value for name, value in goal.items() if name != "max_drop"}
    if "params" not in kept:
        return kept
    main = program.main
    sizes = [removable(thing, main.weights) for thing in (*main.sites, *main.mlps)]
    within = sum(unit * (count - 1) for unit, count in sizes)
    least = 1 - within / sum(p.numel() for p in parameters(main))
    return {**kept, "params": max(fraction(kept["params"], "params"), (1 + least) / 2)}


def _folder_of(source: _source.Source) -> Path:
    """Return the directory of config.json; of a hub id that of its cache."""
    if source.kind == "directory":
        return Path(source.text)
    from attnopt.frontend.hub import fetched

    try:
        return fetched(source.text, weights=False)
    except ValueError as error:
        raise _source.explained(error, source) from error


def _few(recipe: "Recipe") -> "Source":
    """Return the user's data, little of it."""
    from attnopt.data import Source, readable

    data = readable(Source.parse(recipe.data, seed=recipe.seed))
    return replace(data, rows=min(data.rows, _ROWS), length=min(data.length, _TOKENS))


def _distance(out: Path, result: "Result", call: dict[str, Any]) -> float:
    """Load the artifact, and return how far it is from the program that was saved."""
    import torch

    import attnopt

    with torch.no_grad():
        both = (result.program.cast(torch.float32), attnopt.load(out).to(torch.float32))
        want, got = (_tensor(run(**call)).double() for run in both)
    apart = float((got - want).norm() / want.norm())
    if not apart <= _CLOSE:
        raise RuntimeError(f"the artifact computes something else than the program: {apart:.2g}")
    return apart


def _tensor(output: Any) -> Any:
    """Return the first tensor of a model's result."""
    import torch

    return output if isinstance(output, torch.Tensor) else output[0]


def _document(made: "Twin", result: "Result", apart: float, spent: float) -> dict[str, Any]:
    from attnopt.artifacts.saving import report_of

    kept = {k: v for k, v in report_of(result).items() if k in ("changed", "measured", "refused")}
    return {
        "model": made.program.name,
        "layers": made.layers,
        "width": made.width,
        "parameters": made.parameters,
        "seconds": round(spent, 2),
        "loaded_error": apart,
        **kept,
    }


def _summary(output: Output, made: "Twin", result: "Result", apart: float, spent: float) -> None:
    passes = ", ".join(sorted({c.rewrite for c in result.plan.choices})) or "exact"
    tier = int((result.measured or {}).get("tier", 0))
    output.line(
        f"{made.program.name}: a random twin of {made.layers} layers, {made.width} channels, "
        f"{made.parameters:,} parameters"
    )
    output.line(
        f"captured, rewritten at {len(result.plan.choices)} places ({passes}), judged, saved "
        f"(tier {tier}), loaded again (relative error {apart:.1e}): {spent:.1f} s"
    )
    output.line("nothing of this is kept; without --test, the same command does it to the model")
