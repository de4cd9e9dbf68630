"""Root mean square norms without weights of an exported model, as one op each.

    x * reciprocal(sqrt(mean(x ** 2) + eps)) -> RMSNormalization(x, ones)

torch.onnx writes the op where a norm has weights, and ONNX Runtime leaves others as they are. The
sum before a norm stays: only an op of ONNX Runtime takes both, and files run elsewhere, too.
"""

from typing import Any


def fuse_norms(model: Any) -> int:
    """Fuse norms, in place, in a model of opset 23 or later; return how many were fused."""
    if model.opset_imports[""] < 23:
        return 0
    norms = _Norms(model)
    return sum([norms.fuse(n) for n in list(model.graph) if _is(n, "Reciprocal")])


class _Norms:
    """Fuses the norms of one model, and makes each constant once."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.ones: dict[int, Any] = {}
        self.count = 0

    def fuse(self, reciprocal: Any) -> bool:
        """Fuse a norm that has no weights, from the factor that it multiplies by."""
        found = _square_root_of_mean(reciprocal)
        if found is None:
            return False
        x, epsilon, between = found
        uses = reciprocal.outputs[0].uses()
        products = [u.node for u in uses if _is(u.node, "Mul") and x in u.node.inputs]
        width = x.shape[-1] if x.shape else None
        if len(products) != len(uses) or not isinstance(width, int) or not _is_float(x):
            return False
        for product in products:
            made = self._put(
                product,
                "RMSNormalization",
                [x, self._ones(width)],
                {"axis": -1, "epsilon": epsilon},
            )
            self._replace(product, made.outputs[0])
        for node in (reciprocal, *between):
            self.graph.remove(node, safe=True)
        return True

    # --- the graph

    def _put(self, before: Any, kind: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes=attributes)
        made.outputs[0].name = f"norm_{self.count}"
        self.count += 1
        self.graph.insert_before(before, made)
        return made

    def _replace(self, node: Any, new: Any) -> None:
        old = node.outputs[0]
        new.type, new.shape = old.type, old.shape
        if old.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
            name, old.name = old.name, f"{old.name}_before"
            new.name = name
        old.replace_all_uses_with(new)
        self.graph.remove(node, safe=True)

    def _ones(self, width: int) -> Any:
        import numpy as np
        import onnx_ir as ir

        if width not in self.ones:
            name = f"norm_ones_{width}"
            value = ir.Value(
                name=name, const_value=ir.tensor(np.ones(width, np.float32), name=name)
            )
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([width])
            self.graph.register_initializer(value)
            self.ones[width] = value
        return self.ones[width]


def _square_root_of_mean(reciprocal: Any) -> tuple[Any, float, tuple[Any, ...]] | None:
    """Read reciprocal(sqrt(mean(x ** 2) + eps)) over the last axis: x, eps, the nodes between."""
    root = _alone(reciprocal.inputs[0], "Sqrt")
    shifted = _alone(root.inputs[0], "Add") if root else None
    if shifted is None:
        return None
    mean = next((n for x in shifted.inputs if (n := _alone(x, "ReduceMean"))), None)
    epsilon = next((e for x in shifted.inputs if (e := _number(x)) is not None), None)
    if mean is None or epsilon is None or len(mean.inputs) != 2:
        return None
    square = _alone(mean.inputs[0], "Pow")
    if square is None or _number(square.inputs[1]) != 2:
        return None
    x = square.inputs[0]
    keeps = "keepdims" not in mean.attributes or mean.attributes["keepdims"].as_int() == 1
    last = _numbers(mean.inputs[1]) in [[-1.0], [float(len(x.shape or ())) - 1]]
    return (x, epsilon, (root, shifted, mean, square)) if keeps and last else None


def _is(node: Any, kind: str) -> bool:
    return node is not None and node.op_type == kind and not node.domain


def _alone(value: Any, kind: str) -> Any:
    """Return the node of a kind that makes a value, where one other node reads it."""
    node = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return node if alone and _is(node, kind) else None


def _numbers(value: Any) -> list[float] | None:
    """Return the numbers of a small constant."""
    constant = value.const_value if value is not None else None
    if constant is None or constant.size > 8:
        return None
    return [float(x) for x in constant.numpy().reshape(-1)]


def _number(value: Any) -> float | None:
    found = _numbers(value)
    return found[0] if found is not None and len(found) == 1 else None


def _is_float(value: Any) -> bool:
    import onnx_ir as ir

    return bool(value.dtype == ir.DataType.FLOAT)
