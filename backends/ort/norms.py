"""Root mean square norms without weights of an exported model, as one op each.

    x * reciprocal(sqrt(mean(x ** 2) + eps)) -> RMSNormalization(x, ones)

torch.onnx writes the op where a norm has weights, and ONNX Runtime leaves others as they are. The
sum before a norm stays: only an op of ONNX Runtime takes both, and files run elsewhere, too.
"""

from typing import Any

from attnopt.backends.ort.editing import Editor, attribute, is_a, maker, number, numbers


def fuse_norms(model: Any) -> int:
    """Fuse norms, in place, in a model of opset 23 or later; return how many were fused."""
    if model.opset_imports[""] < 23:
        return 0
    editor = Editor(model, "norm")
    return sum([_fuse(editor, n) for n in list(model.graph) if is_a(n, "Reciprocal")])


def _fuse(editor: Editor, reciprocal: Any) -> bool:
    """Fuse a norm that has no weights, from the factor that it multiplies by."""
    import numpy as np

    found = _square_root_of_mean(reciprocal)
    if found is None:
        return False
    x, epsilon = found
    uses = reciprocal.outputs[0].uses()
    products = [u.node for u in uses if is_a(u.node, "Mul") and x in u.node.inputs]
    width = x.shape[-1] if x.shape else None
    if len(products) != len(uses) or not isinstance(width, int) or not _is_float(x):
        return False
    ones = editor.constant(np.ones(width, np.float32))
    for product in products:
        (norm,) = editor.put(
            product, "RMSNormalization", [x, ones], {"axis": -1, "epsilon": epsilon}
        )
        editor.replace(product.outputs[0], norm)
        editor.drop(product)
    return True


def _square_root_of_mean(reciprocal: Any) -> tuple[Any, float] | None:
    """Read x and eps of reciprocal(sqrt(mean(x ** 2) + eps)) over the last axis."""
    root = maker(reciprocal.inputs[0], "Sqrt")
    shifted = maker(root.inputs[0], "Add") if root else None
    if shifted is None:
        return None
    mean = next((n for x in shifted.inputs if (n := maker(x, "ReduceMean"))), None)
    epsilon = next((e for x in shifted.inputs if (e := number(x)) is not None), None)
    if mean is None or epsilon is None or len(mean.inputs) != 2:
        return None
    square = maker(mean.inputs[0], "Pow")
    if square is None or number(square.inputs[1]) != 2:
        return None
    x = square.inputs[0]
    last = numbers(mean.inputs[1]) in [[-1.0], [float(len(x.shape or ())) - 1]]
    return (x, epsilon) if last and attribute(mean, "keepdims", 1) == 1 else None


def _is_float(value: Any) -> bool:
    import onnx_ir as ir

    return bool(value.dtype == ir.DataType.FLOAT)
