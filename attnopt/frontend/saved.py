"""Programs that torch.export.save wrote: read only where the user trusts the file."""

import inspect

import torch
from torch.utils import _pytree as pytree

from attnopt.frontend.calls import Example, Inputs
from attnopt.frontend.exporting import finish_exported
from attnopt.frontend.skeletons import Slot
from attnopt.program import CallForm, Program


def read_saved(place: str) -> Program:
    """Return the Program of a saved ExportedProgram; the file may run code while it is read."""
    exported = torch.export.load(place)
    result = finish_exported(exported)
    specification = exported.call_spec.out_spec
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(n, kind) for n in result.shapes])
    example = Example(signature, {n: Slot(n) for n in result.shapes}, {})
    inputs = Inputs(example, result.shapes, result.dtypes, result.bounds)
    return Program(
        name=place,
        graph_module=result.graph_module,
        bindings=result.bindings,
        weights={**exported.state_dict, **exported.constants, **result.constants},
        form=CallForm(
            inputs.flatten, lambda outputs, _: pytree.tree_unflatten(list(outputs), specification)
        ),
        history=("capture: a saved program",),
    )
