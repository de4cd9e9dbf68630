"""Programs that torch.export.save wrote: read only where the user trusts the file."""

import inspect
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from attnopt.frontend.calls import Example, Inputs
from attnopt.frontend.exporting import finish_exported, first_line, quiet
from attnopt.frontend.skeletons import Slot
from attnopt.program import CallForm, Program


def read_saved(place: str) -> Program:
    """Return the Program of a saved ExportedProgram; the file may run code while it is read."""
    exported = _loaded(place)
    result = finish_exported(exported)
    specification: Any = exported.call_spec.out_spec
    constants: dict[str, Any] = dict(exported.constants)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(n, kind) for n in result.shapes])
    example = Example(signature, {n: Slot(n) for n in result.shapes}, {})
    inputs = Inputs(example, result.shapes, result.dtypes, result.bounds)
    return Program(
        name=place,
        graph_module=result.graph_module,
        bindings=result.bindings,
        weights={**exported.state_dict, **constants, **result.constants},
        form=CallForm(
            inputs.flatten, lambda outputs, _: pytree.tree_unflatten(list(outputs), specification)
        ),
        history=("capture: a saved program",),
    )


def _loaded(place: str) -> torch.export.ExportedProgram:
    if not Path(place).is_file():
        raise ValueError(f"{place} does not exist")
    if not zipfile.is_zipfile(place):
        raise ValueError(f"{place} is damaged, or not what torch.export.save writes")
    try:
        with quiet():
            return torch.export.load(place)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{place} is not a program that torch {torch.__version__} can read: "
            f"{first_line(error)}; export it again with this version"
        ) from error
