"""What is wanted, on the command line: a recipe, or flags, or a recipe that flags change."""

import argparse
import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli._errors import CommandError, Exit
from attnopt.cli._output import shown

if TYPE_CHECKING:
    from attnopt.recipes import Recipe

BUDGETS = {
    "kv_cache": "how much of the cache may stay",
    "params": "how many of the parameters may stay",
    "flops": "how many of the operations may stay",
    "latency": "how much of the time may stay, by the times of the ops on this machine",
    "memory": "how much may stay of weights and cache together",
}
WORK = ".attnopt-work"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the goal, what is allowed, and the data."""
    parser.add_argument(
        "--recipe", metavar="NAME", help="a recipe, of `attnopt recipes` or a file; flags change it"
    )
    for name, what in BUDGETS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar="SHARE", help=f"{what}, such as 50%%")
    parser.add_argument(
        "--tier",
        type=int,
        choices=(0, 1, 2),
        help="what may hold the result: 0 a stock checkpoint, all layers alike; 1 one whose layers "
        "differ, 2 a saved program; both load after `import attnopt`. Above 0 every pass is "
        "measured at every site, and the best mixture is taken (default: 0 where that stays within "
        "--max-drop, or else 2)",
    )
    parser.add_argument(
        "--passes",
        metavar="NAME",
        nargs="+",
        help="choose among these rewrites only; `--passes window` keeps some heads whole and gives "
        "the others a window (tier 2); `attnopt passes` lists all",
    )
    parser.add_argument(
        "--keep",
        metavar="SITES",
        nargs="+",
        help="sites that stay as they are: patterns of names, such as '*.layers.0.*'",
    )
    parser.add_argument(
        "--tensor-parallel",
        metavar="N",
        type=int,
        help="heads and neurons that stay must divide among so many devices",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        help="the length of text that the plan is for (default: that of the rows)",
    )
    parser.add_argument(
        "--max-drop",
        metavar="SHARE",
        help="how much the held-out loss may rise, such as 1%%; the upper bound of its 95 %% "
        "confidence interval is compared",
    )
    parser.add_argument(
        "--data",
        metavar="NAME[:ROWSxTOKENS]",
        help="text to calibrate with and to judge by: stdlib (Python's own library), a file, a "
        "folder, or a .safetensors of input_ids (default stdlib:48x256)",
    )
    parser.add_argument("--held-out", metavar="ROWS", type=int, help="held-out rows (default 96)")
    parser.add_argument("--seed", type=int, help="order of the text (default 0)")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help=f"where statistics and scores are kept, so that the same command goes on where it "
        f"stopped and another budget takes seconds (default {WORK} beside the result)",
    )


def wanted(arguments: argparse.Namespace, *, planned: bool = False) -> "Recipe":
    """Return what is wanted; `planned` where a plan takes the place of a goal."""
    from attnopt.goals import checked_goal
    from attnopt.recipes import Recipe, recipe_of
    from attnopt.search.rules import Rule

    if arguments.held_out is not None and arguments.held_out < 2:
        raise CommandError("AO111", "--held-out needs at least 2 rows for a confidence interval")
    for name in ("tensor_parallel", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CommandError("AO111", f"--{name.replace('_', '-')} {value}: at least 1")
    given = {name: getattr(arguments, name) for name in (*BUDGETS, "max_drop")}
    try:
        recipe = Recipe() if arguments.recipe is None else recipe_of(arguments.recipe)
        goal = checked_goal({n: v for n, v in given.items() if v is not None})
    except ValueError as error:
        raise CommandError("AO111", str(error)) from error
    if set(goal) & set(BUDGETS):
        goal = {**{n: v for n, v in recipe.goal.items() if n not in BUDGETS}, **goal}
    else:
        goal = {**recipe.goal, **goal}
    if not planned and not set(goal) & set(BUDGETS):
        raise CommandError(
            "AO111", "nothing to reach: name a goal, such as --kv-cache 50% or --params 80%"
        )
    tier = recipe.tier if arguments.tier is None else arguments.tier
    several = [f"--{n.replace('_', '-')}" for n in BUDGETS if n in goal]
    if len(several) > 1 and not tier and not planned:
        raise CommandError(
            "AO111",
            f"{' and '.join(several)} exclude each other in tier 0, where all layers are alike: "
            "one at a time, or --tier 1 or 2",
        )
    named = ("tier", "tensor_parallel", "tokens", "data", "held_out", "seed")
    changes: dict[str, Any] = {n: getattr(arguments, n) for n in named}
    changes["passes"] = None if arguments.passes is None else tuple(arguments.passes)
    kept = {n: v for n, v in changes.items() if v is not None}
    rules = (*(Rule(pattern, keep=True) for pattern in arguments.keep or ()), *recipe.rules)
    return dataclasses.replace(recipe, goal=goal, rules=rules, **kept)


def work_of(arguments: argparse.Namespace, out: str | None) -> Path:
    """Return where statistics and scores are kept."""
    if arguments.work is not None:
        return Path(arguments.work)
    return (Path(out).absolute().parent if out else Path.cwd()) / WORK


@contextmanager
def interruptible(arguments: argparse.Namespace, left: str) -> Generator[None]:
    """Say what an interruption leaves, and how to go on; `left` says what the result is."""
    try:
        yield
    except KeyboardInterrupt as error:
        from attnopt.keeping import is_kept

        work = work_of(arguments, arguments.out)
        more = "the same command starts again: nothing was finished yet"
        if is_kept(work):
            more = f"what was finished is kept in {shown(work)}, "
            more += "and the same command goes on from there"
        raise CommandError("AO130", f"interrupted; {left}; {more}", Exit.INTERRUPTED) from error


def words(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Return the flags that were given, as they are typed."""
    listed = ("recipe", *BUDGETS, "max_drop", *names, "tier", "tensor_parallel", "tokens")
    found: list[str] = []
    for name in listed:
        value = getattr(arguments, name)
        found += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    for name in ("passes", "keep"):
        value = getattr(arguments, name)
        found += [f"--{name}", *value] if value else []
    return found
