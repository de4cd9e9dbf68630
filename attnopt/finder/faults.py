"""Mistakes of our own: the attention at which one shows stays as it is and says so.

A model has many attentions, and a finder that fails at one of them can still do the others right.
Nothing is hidden: the reason is a near miss or a refusal like any other, and debug level 1 writes
the traceback.
"""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from attnopt import debug
from attnopt.nouns import No

Found = TypeVar("Found")

FAULT: Final = "attnopt itself failed here, please report it"


class Fault(No):
    """The refusal of an attention because of a mistake of our own."""


def guarded(work: Callable[[], Found], where: str) -> Found | Fault:
    """Run a step on one attention; an error of any class becomes the reason of a refusal."""
    try:
        return work()
    # No class is known beforehand: mistakes raise what they like.
    except Exception as error:
        debug.log(1, traceback.format_exc())
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        said = next(iter(str(error).strip().splitlines()), "no message")
        return Fault(f"{FAULT} ({type(error).__name__}: {said}, {place})", where)
