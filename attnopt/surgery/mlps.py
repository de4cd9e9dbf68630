"""Narrow MLPs: neurons go along with the rows that make them and the columns that read them."""

from torch import Tensor

from attnopt.calibrating import inputs_of
from attnopt.finder.mlps import made_of
from attnopt.finder.ops import shape
from attnopt.nouns import Mlp, No
from attnopt.surgery.edit import GraphEdit
from attnopt.surgery.nodes import narrow_line
from attnopt.surgery.selection import Selection


def narrow_mlp(edit: GraphEdit, mlp: Mlp, stay: Tensor) -> No | None:
    """Leave some neurons of an MLP."""
    output = inputs_of(edit.program, [mlp.down.parameter])[mlp.down.parameter]
    made = made_of(edit.view, output, len(shape(output)) - 1)
    if made is None:
        return No("its neurons are no longer found", mlp.name)
    selection = Selection(edit.view)
    for root, rows in made.items():
        selection.mark_channels(root, rows, stay)
    line = selection.line(output, ())
    refusal = narrow_line(edit, selection, line, set(), mlp.down.parameter)
    return None if refusal is None else No(refusal.why, f"{mlp.name} ({refusal.where})")
