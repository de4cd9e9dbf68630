"""What torch.onnx writes in more nodes than it takes.

GatherND(x, Unsqueeze(i, -1)) -> Gather(x, i, axis 0)
Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 4, 8)) -> Reshape(x, [0, 0, 4, 8])
Reshape(x, the sizes of x) -> x
Attention(q * c, k, v, scale s) -> Attention(q, k, v, scale c s)
Shape(x)[1] -> Shape(input)[1], where both are one size
"""

from typing import Any, Final

from attnopt.backends.ort.editing import (
    Editor,
    attribute,
    is_a,
    maker,
    number,
    numbers,
    sizes,
)

_WRAPS: Final = ("Squeeze", "Unsqueeze", "Reshape")


def shorten(model: Any) -> int:
    """Write less for the same, in place; return how often."""
    editor = Editor(model, "short")
    return sum([_RULES[n.op_type](editor, n) for n in list(model.graph) if _has_rule(n)])


def _has_rule(node: Any) -> bool:
    return node.op_type in _RULES and not node.domain


def _look_up(editor: Editor, node: Any) -> bool:
    """Take rows by a list of their numbers, not by a list of indices of one number each."""
    x, indices = node.inputs
    made = indices.producer()
    if not is_a(made, "Unsqueeze") or attribute(node, "batch_dims", 0):
        return False
    rank = None if indices.shape is None else len(indices.shape)
    if numbers(made.inputs[1]) not in [[-1.0], *([[rank - 1.0]] if rank else [])]:
        return False
    (found,) = editor.put(node, "Gather", [x, made.inputs[0]], {"axis": 0})
    editor.replace(node.outputs[0], found)
    editor.drop(node)
    return True


def _reshape(editor: Editor, node: Any) -> bool:
    """Leave out a change of sizes to what they are; or say the new ones as numbers."""
    import numpy as np

    x, result = node.inputs[0], node.outputs[0]
    if attribute(node, "allowzero", 0):
        return False
    wanted = _wanted(node.inputs[1], x)
    if wanted is None:
        return False
    if _are_its_own(wanted, x) and not result.is_graph_output():
        result.replace_all_uses_with(x)
        editor.drop(node)
        return True
    if node.inputs[1].const_value is not None:
        return False
    before = node.inputs[1].producer()
    node.replace_input_with(1, editor.constant(np.array(wanted)))
    editor.drop(before)
    return True


def _wanted(new: Any, x: Any) -> list[int] | None:
    """Return the sizes of a Reshape as numbers, where 0 is that of the same axis of x."""
    known = numbers(new)
    if known is not None:
        return [int(n) for n in known]
    joined = new.producer()
    if not is_a(joined, "Concat") or x.shape is None:
        return None
    found: list[int] = []
    for part in joined.inputs:
        constant = numbers(part)
        axis = len(found)
        if constant is not None and 0 not in constant:
            found += [int(n) for n in constant]
        elif axis < len(x.shape) and _same(_size_of(part), x.shape[axis]):
            found.append(0)
        else:
            return None
    return found


def _size_of(value: Any) -> Any:
    """Return the size that a value of one number is, where it is one of another value."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type in _WRAPS:
        if node.outputs[0].shape is not None and len(node.outputs[0].shape) > 1:
            return None
        node = node.inputs[0].producer()
    if not is_a(node, "Shape") or node.inputs[0].shape is None:
        return None
    shape = node.inputs[0].shape
    found = list(shape)[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
    return found[0] if len(found) == 1 else None


def _shape(editor: Editor, node: Any) -> bool:
    """Read a size from the first input that has it, so that all who ask share the answer."""
    size = _size_of(node.outputs[0])
    if size is None or isinstance(size, int) or size.value is None:
        return False
    inputs = editor.graph.inputs
    given = next((x for x in inputs if x.shape is not None and size in list(x.shape)), None)
    if given is None or given is node.inputs[0]:
        return False
    axis = list(given.shape).index(size)
    where = {"start": axis, "end": axis + 1}
    (found,) = editor.put(editor.graph[0], "Shape", [given], where)
    editor.replace(node.outputs[0], found)
    editor.drop(node)
    return True


def _same(size: Any, other: Any) -> bool:
    if size is None or isinstance(size, int) or isinstance(other, int):
        return False
    return size.value is not None and size.value == other.value


def _are_its_own(wanted: list[int], x: Any) -> bool:
    """Tell whether sizes are those of x: one of them may be said by the others."""
    if x.shape is None or len(wanted) != len(x.shape) or wanted.count(-1) > 1:
        return False
    return all(n in (0, -1) or n == size for n, size in zip(wanted, x.shape, strict=True))


def _attention(editor: Editor, node: Any) -> bool:
    """Take a factor of all queries into the scale."""
    import onnx_ir as ir

    scale = attribute(node, "scale", None)
    if scale is None or len(node.inputs) < 3:
        return False
    value = node.inputs[0]
    while (moved := maker(value, "Transpose") or maker(value, "Reshape")) is not None:
        value = moved.inputs[0]
    product = maker(value, "Mul") or maker(value, "Div")
    if product is None:
        return False
    x, other = product.inputs
    if product.op_type == "Mul" and number(other) is None:
        x, other = other, x
    factor = number(other)
    # A constant of several axes may have given the product its own.
    if factor is None or factor <= 0 or sizes(x) is None or sizes(x) != sizes(value):
        return False
    factor = factor if product.op_type == "Mul" else 1 / factor
    node.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
    value.replace_all_uses_with(x)
    editor.drop(product)
    return True


_RULES: Final = {
    "GatherND": _look_up,
    "Reshape": _reshape,
    "Attention": _attention,
    "Shape": _shape,
}
