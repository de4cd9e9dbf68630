"""Norms in ONNX: what is fused computes the same, and what is no such norm stays."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ir = pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from onnx_running import computed  # noqa: E402

from attnopt.backends.ort.norms import fuse_norms  # noqa: E402

SIZES = ["b", "t", 8]


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs, [output], **attributes)


def model(nodes: list[Any], outputs: list[str], opset: int = 23) -> Any:
    """Make a model of inputs a and b, whose values are all (b, t, 8) or (b, t, 1)."""

    def value(name: str) -> Any:
        narrow = name in ("mean", "shifted", "root", "factor")
        sizes = [*SIZES[:2], 1] if narrow else SIZES
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

    chance = np.random.default_rng(1)
    constants = {
        "two": np.float32(2), "three": np.float32(3), "eps": np.float32(1e-5),
        "last": np.array([-1]), "first": np.array([1]),
        "scale": chance.standard_normal(8).astype(np.float32),
    }  # fmt: skip
    made = {x for n in nodes for x in n.output if x}
    graph = onnx.helper.make_graph(
        nodes, "g", [value("a"), value("b")], [value(n) for n in outputs],
        [onnx.numpy_helper.from_array(np.asarray(x), n) for n, x in constants.items()],
        value_info=[value(n) for n in made - set(outputs)],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def factor(x: str = "a", power: str = "two", axis: str = "last") -> list[Any]:
    return [
        node("Pow", [x, power], "square"),
        node("ReduceMean", ["square", axis], "mean", keepdims=1),
        node("Add", ["mean", "eps"], "shifted"),
        node("Sqrt", ["shifted"], "root"),
        node("Reciprocal", ["root"], "factor"),
    ]


WEIGHTLESS = [*factor(), node("Mul", ["a", "factor"], "y")]
SUMMED = [node("Add", ["a", "b"], "x"), *factor("x"), node("Mul", ["x", "factor"], "y")]
WEIGHTED = [
    node("Add", ["a", "b"], "x"),
    node("Tanh", ["x"], "z"),
    node("RMSNormalization", ["x", "scale"], "y", axis=-1, epsilon=1e-5),
]
CUBED = [*factor(power="three"), node("Mul", ["a", "factor"], "y")]
OF_ANOTHER = [*factor(), node("Mul", ["b", "factor"], "y")]
SHOWN = [*WEIGHTLESS, node("Sub", ["a", "factor"], "z")]
ALONG_TOKENS = [
    node("Pow", ["a", "two"], "square"),
    node("ReduceMean", ["square", "first"], "wide", keepdims=1),
    node("Add", ["wide", "eps"], "wide_shifted"),
    node("Sqrt", ["wide_shifted"], "wide_root"),
    node("Reciprocal", ["wide_root"], "wide_factor"),
    node("Mul", ["a", "wide_factor"], "y"),
]


def run(made: Any) -> list[NDArray[Any]]:
    chance = np.random.default_rng(0)
    given = {n: chance.standard_normal((2, 5, 8)).astype(np.float32) for n in "ab"}
    return computed(made, given)


@pytest.mark.parametrize(
    ("nodes", "outputs", "kinds"),
    [
        (WEIGHTLESS, ["y"], ["RMSNormalization"]),
        (SUMMED, ["y"], ["Add", "RMSNormalization"]),
        (SUMMED, ["x", "y"], ["Add", "RMSNormalization"]),
    ],
)
def test_a_norm_is_one_op(nodes: list[Any], outputs: list[str], kinds: list[str]) -> None:
    want = run(model(nodes, outputs))
    found = ir.serde.deserialize_model(model(nodes, outputs))
    assert fuse_norms(found) >= 1
    after = ir.serde.serialize_model(found)
    onnx.checker.check_model(after, full_check=True)
    assert sorted(n.op_type for n in after.graph.node) == kinds
    assert [o.name for o in after.graph.output] == outputs
    for got, expected in zip(run(after), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "outputs", "opset"),
    [
        (CUBED, ["y"], 23),
        (OF_ANOTHER, ["y"], 23),
        (SHOWN, ["y", "z"], 23),
        (WEIGHTED, ["z", "y"], 23),
        (ALONG_TOKENS, ["y"], 23),
        (WEIGHTLESS, ["y"], 22),
    ],
)
def test_what_is_no_such_norm_stays(nodes: list[Any], outputs: list[str], opset: int) -> None:
    made = model(nodes, outputs, opset)
    if nodes is ALONG_TOKENS:
        del made.graph.value_info[:]
    found = ir.serde.deserialize_model(made)
    assert fuse_norms(found) == 0
    assert [n.op_type for n in found.graph] == [n.op_type for n in nodes]
