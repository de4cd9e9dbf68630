"""What a run keeps on disk until it is over, so that the same command goes on where it stopped.

A directory for each program and its data holds the statistics of the calibration, the scores of a
search, and the moments of the projections that were refitted. All of it follows from the program,
the data and the plan, and each file is written in one step: what is there is whole and right.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from attnopt import debug
from attnopt.calibrating import calibrate
from attnopt.data import batches_of
from attnopt.moments import Refits, Statistics
from attnopt.nouns import Plan
from attnopt.plans import plan_text
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.resuming import BusyError, data_digest, shared_lock
from attnopt.weights import fingerprint

FORMAT: Final = 1
NAMED: Final = 16


def folder_of(work: str | os.PathLike[str], program: Program, data: Any) -> Path:
    """Return the directory inside `work` that belongs to a program and its data."""
    calls = list(batches_of(program, data))
    said = f"{FORMAT} {program.name} {fingerprint(program.weights)} {data_digest(calls)}"
    return Path(work).absolute() / hashlib.sha256(said.encode()).hexdigest()[:NAMED]


def calibrated(program: Program, data: Any, place: Path | None) -> Statistics:
    """Return the statistics of a program, gone on with or read where some are kept."""
    if place is None:
        return calibrate(program, data)
    try:
        return calibrate(program, data, place)
    except (NotImplementedError, BusyError) as error:
        debug.log(1, f"the calibration is not kept: {error}")
        return calibrate(program, data)


def refits_of(plan: Plan, place: Path | None) -> Refits:
    """Return the moments that a plan's projections are refitted with, as far as they are kept."""
    if place is None:
        return Refits()
    digest = hashlib.sha256(plan_text(replace(plan, provenance={})).encode()).hexdigest()
    return Refits(place / f"refits-{digest[:NAMED]}")


def resumed(plan: Plan, place: Path | None) -> Plan:
    """Return a plan whose refits are kept as they are made; one that has them is left alone."""
    if place is None or plan.statistics is None or len(plan.statistics.refits):
        return plan
    return replace(plan, statistics=replace(plan.statistics, refits=refits_of(plan, place)))


@contextmanager
def kept(place: Path | None, *, saved: bool = True) -> Generator[None]:
    """Use a directory of `folder_of` for a run; what is of no use afterwards goes at its end.

    An interrupted or failed run leaves everything, and so does one whose result is not `saved` or
    beside which another runs. Where there is nothing to do, nothing is left that was not there.
    """
    before = place is not None and place.exists()
    lock = None if place is None else shared_lock(place)
    try:
        yield
        if place is not None and saved and (lock is None or lock.alone()):
            _tidy(place)
    except NothingToDoError:
        if place is not None and not before and (lock is None or lock.alone()):
            shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            lock.release()
        if place is not None:
            _drop_empty(place)


def _tidy(place: Path) -> None:
    """Remove refits, and statistics that belong to no scores."""
    for left in place.glob("refits-*"):
        shutil.rmtree(left, ignore_errors=True)
    if not any(place.glob("scores-*.jsonl")):
        shutil.rmtree(place, ignore_errors=True)


def _drop_empty(place: Path) -> None:
    """Remove a directory, and the one that it lies in, where there is nothing in them."""
    for folder in (place, place.parent):
        with contextlib.suppress(OSError):  # it is not empty, or gone already
            folder.rmdir()


def moved(plan: Plan, file: Path) -> Plan:
    """Return a plan whose statistics are read from where they were saved."""
    if plan.statistics is None or not file.is_file():
        return plan
    found = Statistics.load(file, plan.statistics.weights)
    return replace(plan, statistics=replace(found, batches=plan.statistics.batches))


def is_kept(work: str | os.PathLike[str]) -> bool:
    """Tell whether an interrupted run has left anything to go on from."""
    return any(p.is_file() for p in Path(work).rglob("*"))
