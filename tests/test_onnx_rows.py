"""Attention on rows in ONNX: what is rewritten computes the same, with nothing left behind."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ir = pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from onnx_running import computed  # noqa: E402

from attnopt.backends.ort.rows import attend_in_rows  # noqa: E402

B, T, PAST, D = 2, 5, 3, 8
SWAP = {"perm": [0, 2, 1, 3]}


class Graph:
    """An attention of `heads` query heads over `kv` others, as torch.onnx writes it."""

    def __init__(self, heads: int = 4, kv: int = 4) -> None:
        self.heads, self.kv = heads, kv
        self.nodes: list[Any] = []
        self.inputs: dict[str, list[Any]] = {}
        self.outputs: dict[str, list[Any]] = {}
        self.known: dict[str, list[Any]] = {}
        self.sizes: dict[str, list[int]] = {}

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def shape(self, *sizes: int) -> str:
        name = "sizes_" + "_".join(map(str, sizes))
        self.sizes[name] = list(sizes)
        return name

    def moved(self, name: str, heads: int, turned: bool = False) -> str:
        """Split the rows of an input into heads, move these, and turn them."""
        self.inputs[name] = ["b", "t", heads * D]
        self.known[f"{name}4"] = ["b", "t", heads, D]
        self.known[f"{name}h"] = ["b", heads, "t", D]
        self.node("Reshape", [name, self.shape(0, 0, heads, D)], [f"{name}4"])
        moved = self.node("Transpose", [f"{name}4"], [f"{name}h"], **SWAP)
        if not turned:
            return moved
        self.inputs |= {"cos": ["b", "t", D // 2], "sin": ["b", "t", D // 2]}
        self.known[f"{name}r"] = ["b", heads, "t", D]
        return self.node("RotaryEmbedding", [moved, "cos", "sin"], [f"{name}r"])

    def joined(self, name: str) -> None:
        """Move heads back and join them: the graph's result."""
        self.known["back"] = ["b", "t", self.heads, D]
        self.node("Transpose", [name], ["back"], **SWAP)
        self.outputs["y"] = ["b", "t", self.heads * D]
        self.node("Reshape", ["back", self.shape(0, 0, self.heads * D)], ["y"])

    def attention(self, more: list[str], outputs: list[str], *, turned: bool = False) -> str:
        q = self.moved("q", self.heads, turned)
        k, v = self.moved("k", self.kv, turned), self.moved("v", self.kv)
        self.known["a"] = ["b", self.heads, "t", D]
        return self.node("Attention", [q, k, v, *more], ["a", *outputs], scale=0.3)

    def model(self) -> Any:
        def values(given: dict[str, list[Any]]) -> list[Any]:
            kinds = {"sees": onnx.TensorProto.BOOL}
            made = onnx.helper.make_tensor_value_info
            return [made(n, kinds.get(n, onnx.TensorProto.FLOAT), s) for n, s in given.items()]

        constants = [
            onnx.helper.make_tensor(n, onnx.TensorProto.INT64, [len(s)], s)
            for n, s in self.sizes.items()
        ]
        zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0])
        graph = onnx.helper.make_graph(
            self.nodes, "g", values(self.inputs), values(self.outputs), [*constants, zero],
            value_info=values(self.known),
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", 23)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


def plain() -> Graph:
    graph = Graph()
    graph.joined(graph.attention([], []))
    return graph


def blind() -> Graph:
    """Queries that see no key get zeros."""
    graph = Graph()
    graph.inputs |= {"mask": ["b", 1, "t", "t"], "sees": ["b", 1, "t", 1]}
    found = graph.attention(["mask"], [])
    graph.known["shown"] = graph.known["a"]
    graph.joined(graph.node("Where", ["sees", found, "zero"], ["shown"]))
    return graph


def cached() -> Graph:
    """Grouped heads, turned, over a past; the cache is a result as it was."""
    graph = Graph(heads=4, kv=2)
    graph.inputs |= {"past_k": ["b", 2, "p", D], "past_v": ["b", 2, "p", D]}
    graph.outputs |= {"whole_k": ["b", 2, "s", D], "whole_v": ["b", 2, "s", D]}
    names = ["", "past_k", "past_v"]
    graph.joined(graph.attention(names, ["whole_k", "whole_v"], turned=True))
    return graph


def normalized() -> Graph:
    """Queries whose heads are changed before they are moved."""
    graph = Graph()
    found = graph.attention([], [])
    for node in graph.nodes:
        if node.op_type == "Transpose" and node.input[0] == "q4":
            node.input[0] = "q5"
    graph.known["q5"] = graph.known["q4"]
    graph.nodes.insert(1, onnx.helper.make_node("Tanh", ["q4"], ["q5"]))
    graph.joined(found)
    return graph


def cut() -> Graph:
    """Queries come of rows of another batch: (b, t, H D) is no form of what they were cut from."""
    graph = Graph()
    graph.joined(graph.attention([], []))
    graph.inputs["q"] = [1, "bt", 4 * D]
    reshape = next(n for n in graph.nodes if n.op_type == "Reshape" and n.input[0] == "q")
    reshape.input[1] = graph.shape(-1, T, 4, D)
    return graph


def heads_shown() -> Graph:
    """The result is read with its heads in front."""
    graph = Graph()
    graph.outputs["a"] = ["b", 4, "t", D]
    found = graph.attention([], [])
    del graph.known["a"]
    graph.joined(found)
    return graph


def keys_elsewhere() -> Graph:
    """Keys are no moved rows."""
    graph = Graph()
    found = graph.attention([], [])
    for node in graph.nodes:
        if node.op_type == "Attention":
            node.input[1] = "kt"
    graph.known["kt"] = graph.known["kh"]
    graph.nodes.insert(-1, onnx.helper.make_node("Tanh", ["kh"], ["kt"]))
    graph.joined(found)
    return graph


def fed(graph: Graph) -> dict[str, NDArray[Any]]:
    chance = np.random.default_rng(0)
    sizes = {"b": B, "t": T, "p": PAST, "bt": B * T}
    found = {}
    for name, shape in graph.inputs.items():
        found[name] = chance.standard_normal([sizes.get(s, s) for s in shape]).astype(np.float32)
    if "sees" in found:
        found["sees"] = found["sees"] > 0
    return found


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (plain, ["Attention"]),
        (blind, ["Attention", "Squeeze", "Where"]),
        (cached, ["Attention", "RotaryEmbedding", "RotaryEmbedding"]),
        (cut, ["Attention", "Reshape", "Reshape"]),
        (normalized, ["Attention", "Reshape", "Reshape", "Tanh"]),
    ],
)
def test_attention_on_rows_computes_the_same(make: Any, kinds: list[str]) -> None:
    graph = make()
    given = fed(graph)
    want = computed(graph.model(), given)
    model = ir.serde.deserialize_model(graph.model())
    assert attend_in_rows(model) == 1
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    assert sorted(n.op_type for n in after.graph.node) == kinds
    assert [o.name for o in after.graph.output] == list(graph.outputs)
    for got, expected in zip(computed(after, given), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [heads_shown, keys_elsewhere])
def test_what_is_no_moved_rows_stays(make: Any) -> None:
    model = ir.serde.deserialize_model(make().model())
    before = [n.op_type for n in model.graph]
    assert attend_in_rows(model) == 0
    assert [n.op_type for n in model.graph] == before
