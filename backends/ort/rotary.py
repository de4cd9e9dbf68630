"""Rotary embeddings of an exported model, whose tables ONNX Runtime wants for every row.

torch.onnx writes RotaryEmbedding (opset 23) for what it finds, also where one table serves all
rows: there the op of ONNX Runtime refuses to run.
"""

from typing import Any


def give_every_row_its_table(model: Any) -> None:
    """Repeat, in place, tables of sines and cosines that have one row, or may have one."""
    import onnx_ir as ir

    repeated: dict[Any, Any] = {}
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) != 3:
            continue
        x = node.inputs[0]
        for number in (1, 2):
            table = node.inputs[number]
            if _rows(table) is not None and _rows(table) == _rows(x):
                continue
            if table not in repeated:
                made = _repeated(ir, table, x, f"rotary_table_{len(repeated)}")
                model.graph.insert_before(node, made)
                repeated[table] = made[-1].outputs[0]
            node.replace_input_with(number, repeated[table])


def _rows(value: Any) -> str | None:
    """Return the size of the first axis; the exporter does not say it of sines and cosines."""
    maker = value.producer()
    if value.shape is None and maker is not None and maker.op_type in ("Cos", "Sin"):
        value = maker.inputs[0]
    return None if value.shape is None else str(value.shape[0])


def _repeated(ir: Any, table: Any, x: Any, name: str) -> list[Any]:
    """Return the nodes that repeat a table (1 or rows, T, D) for the rows of x."""
    rows = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    rest = ir.node("Shape", [table], attributes={"start": 1})
    shape = ir.node("Concat", [rows.outputs[0], rest.outputs[0]], attributes={"axis": 0})
    whole = ir.node("Expand", [table, shape.outputs[0]])
    made = [rows, rest, shape, whole]
    for number, node in enumerate(made):
        node.outputs[0].name = f"{name}_{number}"
    if table.dtype is not None:
        whole.outputs[0].dtype = table.dtype
    return made
