"""Remove heads and neurons from every model of the zoo, and compare with the masked source.

    python tests/bench/structural_zoo.py
    python tests/bench/structural_zoo.py llama bert

One line a model and unit: the relative distance from the source in which the same heads or neurons
are zeroed and the same columns solved anew, or the reason of a refusal. Exit status 1 where a
distance is over the tolerance or something fails otherwise.
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
import zoo
from narrowing import UNITS, Case, choices_of, error_of

import attnopt
from attnopt.nouns import Choice

TOLERANCE: Final = 1e-5


def main(names: list[str]) -> int:
    """Print one line a model and unit; return whether all are as they should be."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    failed = 0
    for name in names or zoo.ZOO:
        start = time.perf_counter()
        for line, good in lines(name):
            failed += not good
            print(f"{name:28s} {line}", flush=True)
        print(f"{name:28s} {time.perf_counter() - start:.0f} s", flush=True)
    return min(failed, 1)


def lines(name: str) -> list[tuple[str, bool]]:
    """Return what became of each unit of a model, and whether that is right."""
    try:
        case = Case.of_zoo(name)
    except Exception as error:  # whatever it is, it is the model's line
        return [(f"not captured: {type(error).__name__}: {str(error)[:200]}", False)]
    main = case.program.main
    found = [(f"{len(main.sites)} sites, {len(main.mlps)} MLPs", True)]
    return found + [
        (f"{unit:8s} {text}", good) for unit in UNITS for text, good in [of(case, unit)]
    ]


def of(case: Case, unit: str) -> tuple[str, bool]:
    """Return what became of a unit."""
    choices, refused = choices_of(case.program, unit)
    reasons = [no.why for no in refused]
    try:
        done = [c for c in choices if _carried_out(case, c, reasons)]
        error = error_of(case, tuple(done)) if done else 0.0
    except Exception as problem:  # as above
        return f"FAILED: {type(problem).__name__}: {str(problem)[:200]}", False
    left = "".join(f"; {reasons.count(no)} refused: {no}" for no in dict.fromkeys(reasons))
    if not done:
        return f"none{left}", True
    return f"{'ok' if error < TOLERANCE else 'WRONG'} {len(done)} {error:.1e}{left}", (
        error < TOLERANCE
    )


def _carried_out(case: Case, choice: Choice, reasons: list[str]) -> bool:
    """Tell whether a choice alone can be applied; note the reason where it cannot."""
    try:
        attnopt.apply(case.program, case.plan((choice,)))
    except ValueError as problem:
        if "cannot be carried out" not in str(problem):
            raise
        reasons.append(str(problem))
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
