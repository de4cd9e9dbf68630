"""What each attention and MLP of a program computes, beside the same one of its reference.

The error is E|y - y'|^2 / E|y|^2 of the result of its output projection, over the real tokens of a
few rows, each program running on its own activations. Sites are matched by name.
"""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import read_contraction
from attnopt.finder.ops import CONTRACTIONS, LAYOUT, TRANSPARENT, args, kind
from attnopt.nouns import No
from attnopt.program import Program
from attnopt.running import Run
from attnopt.verifying.calling import Call, valid, without_labels

ROWS: Final = 4
TOKENS: Final = 128


def site_errors(program: Any, reference: Any, call: Call) -> dict[str, float | No]:
    """Return the error of each site of the reference, or why it has none."""
    if not (isinstance(program, Program) and isinstance(reference, Program)):
        return {}
    if program.parts or reference.parts:
        return {}
    given = _few(without_labels(call))
    before, after = dict(_outputs(reference)), dict(_outputs(program))
    found: dict[str, float | No] = {}
    wanted: dict[str, tuple[str, str]] = {}
    for name, parameter in before.items():
        if parameter is None or after.get(name) is None:
            found[name] = No("its output projection is not known in both programs")
        else:
            wanted[name] = (parameter, str(after[name]))
    old = _results(reference, {n: p for n, (p, _) in wanted.items()}, given)
    new = _results(program, {n: p for n, (_, p) in wanted.items()}, given)
    return {**found, **{name: _error(old.get(name), new.get(name), given) for name in wanted}}


def _outputs(program: Program) -> Iterator[tuple[str, str | None]]:
    """Yield the sites, and the parameter of each one's output projection."""
    for site in (*program.sites, *getattr(program, "mlps", ())):
        projections = getattr(site, "projections", {})
        last = projections.get("o") or projections.get("down")
        yield site.name, getattr(last, "parameter", None)


def _few(call: Call) -> dict[str, Any]:
    """Return a few rows, and of rows of tokens the first ones."""
    return {
        name: (v[:ROWS, :TOKENS] if v.dim() == 2 and not v.is_floating_point() else v[:ROWS])
        if isinstance(v, Tensor) and v.dim()
        else v
        for name, v in call.items()
    }


def _results(program: Program, wanted: dict[str, str], given: Call) -> dict[str, Tensor]:
    wide = program.cast(torch.float32)
    products = {name: _product_of(wide, parameter) for name, parameter in wanted.items()}
    names = {node: name for name, node in products.items() if node is not None}
    return {names[node]: value for node, value in Run(wide, given).seen(names)}


def _product_of(program: Program, parameter: str) -> fx.Node | None:
    """Follow a weight through transposes and views to its product."""
    todo = [
        n
        for n in program.placeholders
        if program.bindings[n.name].kind == "parameter"
        and program.bindings[n.name].name == parameter
    ]
    while todo:
        node = todo.pop()
        for user in node.users:
            if kind(user) in CONTRACTIONS and read_contraction(user) is not None:
                return user
            if kind(user) in TRANSPARENT | LAYOUT and args(user)[0] is node:
                todo.append(user)
    return None


def _error(old: Tensor | None, new: Tensor | None, given: Call) -> float | No:
    if old is None or new is None:
        return No("no product with its output projection was found")
    if old.numel() != new.numel():
        return No(f"results have shapes {list(old.shape)} and {list(new.shape)}")
    old, new = old.double(), new.double().reshape(old.shape)
    real = valid(given)
    if real is not None and old.shape[: real.dim()] == real.shape:
        old, new = old[real], new[real]
    return float((new - old).square().sum() / old.square().sum())
