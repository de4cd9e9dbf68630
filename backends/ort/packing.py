"""Products of one value with several weights, as one product that is split.

    x @ a + p, x @ b, x @ c + r -> Split(x @ [a b c] + [p 0 r])

ONNX Runtime runs what is left in less time: queries, keys and values of an attention, mostly.
"""

from typing import Any

from attnopt.backends.ort.editing import Editor, is_a, only_reader, sizes


def pack_products(model: Any) -> int:
    """Pack, in place, products that are fewer nodes together; return how many were packed."""
    editor = Editor(model, "packed")
    groups: dict[Any, list[Any]] = {}
    for node in model.graph:
        if is_a(node, "MatMul") and _is_matrix(node.inputs[1]):
            depth = node.inputs[1].shape[0]
            groups.setdefault((node.inputs[0], depth), []).append(node)
    found = [group for group in groups.values() if _is_worth_it(group)]
    # Layers may share weights: then they share the packed ones, or a weight would lie there twice.
    served: dict[Any, int] = {}
    for group in found:
        for weights in _weights(group):
            served[weights] = served.get(weights, 0) + 1
    packed: dict[Any, Any] = {}
    count = 0
    for group in found:
        if all(len(w.uses()) == served[w] for w in _weights(group)):
            _pack(editor, group, packed)
            count += len(group)
    return count


def _weights(group: list[Any]) -> tuple[Any, ...]:
    return tuple(node.inputs[1] for node in group)


def _is_matrix(value: Any) -> bool:
    import onnx_ir as ir

    known = value.const_value is not None and not value.is_graph_output()
    return known and len(value.shape) == 2 and value.dtype == ir.DataType.FLOAT


def _is_worth_it(group: list[Any]) -> bool:
    """Tell whether a product and a sum for all, and what splits them, are fewer nodes."""
    shapes = [sizes(n.outputs[0]) for n in group]
    if any(n.outputs[0].is_graph_output() for n in group) or None in shapes:
        return False
    sums = sum(_bias(n) is not None for n in group)
    return len(group) + sums > 2 + bool(sums)


def _bias(node: Any) -> Any:
    """Return the sum of a product and a constant row, where nothing else reads the product."""
    reader = only_reader(node.outputs[0])
    if not is_a(reader, "Add") or reader.outputs[0].is_graph_output():
        return None
    row = _row(reader, node)
    width = node.inputs[1].shape[1]
    fits = row.const_value is not None and list(row.shape) == [width]
    return reader if fits and row.dtype == node.inputs[1].dtype else None


def _row(added: Any, product: Any) -> Any:
    left, right = added.inputs
    return right if left is product.outputs[0] else left


def _pack(editor: Editor, group: list[Any], packed: dict[Any, Any]) -> None:
    import numpy as np

    weights = _weights(group)
    if weights not in packed:
        joined = np.concatenate([w.const_value.numpy() for w in weights], axis=1)
        packed[weights] = editor.constant(joined)
    first = group[0]
    (product,) = editor.put(first, "MatMul", [first.inputs[0], packed[weights]])
    sums = [_bias(n) for n in group]
    widths = [w.shape[1] for w in weights]
    if any(added is not None for added in sums):
        rows = [
            np.zeros(width, np.float32) if added is None else _row(added, n).const_value.numpy()
            for n, added, width in zip(group, sums, widths, strict=True)
        ]
        (product,) = editor.put(first, "Add", [product, editor.constant(np.concatenate(rows))])
    parts = editor.put(
        first, "Split", [product, editor.constant(np.array(widths))], {"axis": -1},
        outputs=len(group),
    )  # fmt: skip
    for node, added, part in zip(group, sums, parts, strict=True):
        last = node if added is None else added
        editor.replace(last.outputs[0], part)
        editor.drop(last)
