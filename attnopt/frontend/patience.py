"""End a trace whose sizes grow without end, where torch.export would compute for hours.

Torch simplifies every quotient of two sizes by sympy. Where each layer views its tensor by a size
that is not known to divide another, the quotients nest: each layer makes them five times as long,
and sympy takes fifty times as long, to no effect. Real models need few operations a size: over the
zoo at most 13, and SEW-D, which counts what 13 convolutions leave of its samples, 64.
"""

import contextlib
import threading
from collections.abc import Generator
from typing import Any, Final

import sympy

MOST_OPERATIONS: Final = 300


class SizesTooLongError(Exception):
    """Says that a trace was given up."""


@contextlib.contextmanager
def patience() -> Generator[None]:
    """Raise SizesTooLongError where this thread would simplify a size of too many operations."""
    simplify, own = sympy.simplify, threading.get_ident()

    def bounded(expression: Any, *args: Any, **options: Any) -> Any:
        if threading.get_ident() == own and isinstance(expression, sympy.Basic):
            count = int(expression.count_ops())
            if count > MOST_OPERATIONS:
                raise SizesTooLongError(
                    f"a size of the trace takes {count} operations on the sizes of the inputs"
                )
        return simplify(expression, *args, **options)

    sympy.simplify = bounded
    try:
        yield
    finally:
        sympy.simplify = simplify
