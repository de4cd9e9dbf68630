"""Sizes and conditions on them as JSON: a number, a symbol's name, or [operation, operands...]."""

from collections.abc import Mapping
from typing import Any, Final

import sympy
import torch
from torch.utils._sympy import functions

_KINDS: Final[dict[str, Any]] = {
    **{
        kind.__name__: kind
        for kind in (
            sympy.Add,
            sympy.Mul,
            sympy.Pow,
            sympy.Rational,
            sympy.And,
            sympy.Or,
            sympy.Not,
            sympy.Equality,
            sympy.Unequality,
            sympy.StrictGreaterThan,
            sympy.GreaterThan,
            sympy.StrictLessThan,
            sympy.LessThan,
        )
    },
    **{
        name: getattr(functions, name)
        for name in (
            "FloorDiv",
            "ModularIndexing",
            "CleanDiv",
            "CeilToInt",
            "FloorToInt",
            "IntTrueDiv",
            "FloatTrueDiv",
            "ToFloat",
            "TruncToInt",
            "Mod",
            "PythonMod",
            "Max",
            "Min",
            "PowByNatural",
            "Where",
        )
    },
}
_DEEPEST = 64


def write_expression(value: Any) -> Any:
    """Return the JSON of a size, a number, or a sympy expression; ValueError for another kind."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        value = value.node.expr
    if isinstance(value, sympy.Symbol):
        return str(value)
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Float):
        return float(value)
    if isinstance(value, sympy.Rational):
        return ["Rational", int(value.p), int(value.q)]
    if isinstance(value, sympy.logic.boolalg.BooleanAtom):
        return bool(value)
    name = type(value).__name__
    if name not in _KINDS:
        raise ValueError(f"a size of the kind {name} ({value}) has no stored form")
    return [name, *(write_expression(x) for x in value.args)]


def read_expression(content: Any, symbols: Mapping[str, sympy.Expr], depth: int = 0) -> Any:
    """Return the sympy expression that was written, over other symbols."""
    if isinstance(content, bool):
        return sympy.true if content else sympy.false
    if isinstance(content, int | float):
        return sympy.sympify(content)
    if isinstance(content, str):
        if content not in symbols:
            raise ValueError(f"unknown size {content!r}")
        return symbols[content]
    if not isinstance(content, list) or not content or content[0] not in _KINDS:
        raise ValueError(f"no size: {str(content)[:80]}")
    if depth > _DEEPEST:
        raise ValueError("a size that is nested too deeply")
    return _KINDS[content[0]](*(read_expression(x, symbols, depth + 1) for x in content[1:]))


def symbols_in(content: Any) -> set[str]:
    """List the names of the symbols in a stored expression."""
    if isinstance(content, str):
        return {content}
    if isinstance(content, list):
        return set().union(*(symbols_in(x) for x in content[1:]))
    return set()
