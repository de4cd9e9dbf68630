"""What is shortened in ONNX computes the same in fewer nodes, and what only looks alike stays."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ir = pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from onnx_running import computed  # noqa: E402

from attnopt.backends.ort.packing import pack_products  # noqa: E402
from attnopt.backends.ort.shortening import shorten  # noqa: E402

SIZES = {"b": 2, "t": 5, "n": 3}
INTEGERS = ("i", "pairs")

LOOKED_UP = """(float[b,t,8] x, int64[n] i) => (float[n,t,8] y)
  <int64[1] last = {-1}, int64[n,1] u> { u = Unsqueeze(i, last) y = GatherND(x, u) }"""
BY_PAIRS = """(float[b,t,8] x, int64[n,2] pairs) => (float[n,8] y) { y = GatherND(x, pairs) }"""
IN_FRONT = """(float[b,t,8] x, int64[2] i) => (float[1,8] y)
  <int64[1] first = {0}, int64[1,2] u> { u = Unsqueeze(i, first) y = GatherND(x, u) }"""

SPLIT_HEADS = """(float[b,t,8] x) => (float[b,t,2,4] y)
  <int64[1] two = {2}, int64[1] four = {4}, int64[1] b0, int64[1] t0, int64[4] s> {
  b0 = Shape<start=0, end=1>(x)  t0 = Shape<start=1, end=2>(x)
  s = Concat<axis=0>(b0, t0, two, four)  y = Reshape(x, s) }"""
SWAPPED_SIZES = """(float[b,t,8] x) => (float[t,b,2,4] y)
  <int64[1] two = {2}, int64[1] four = {4}, int64[1] b0, int64[1] t0, int64[4] s> {
  b0 = Shape<start=0, end=1>(x)  t0 = Shape<start=1, end=2>(x)
  s = Concat<axis=0>(t0, b0, two, four)  y = Reshape(x, s) }"""
AS_IT_IS = """(float[b,t,8] x) => (float[b,t,8] y)
  <int64[3] s = {-1, 5, 8}, float[b,5,8] h, float[b,5,8] r, float[b,5,8] z> {
  h = Tanh(x)  r = Reshape(h, s)  y = Tanh(r) }"""
ANOTHER_WAY = """(float[b,t,8] x) => (float[b,8,5] y)
  <int64[3] s = {-1, 8, 5}, float[b,5,8] h, float[b,8,5] r> {
  h = Tanh(x)  r = Reshape(h, s)  y = Tanh(r) }"""

ATTENDS = """(float[b,2,t,4] q, float[b,2,t,4] k, float[b,2,t,4] v) => (float[b,2,t,4] y)
  <float half = {0.5}, float[b,2,t,4] p> {
  p = %s  y = Attention<scale=0.3>(p, k, v) }"""
TIMES = ATTENDS % "Mul(half, q)"
OVER = ATTENDS % "Div(q, half)"
HALF_OVER = ATTENDS % "Div(half, q)"
BY_DATA = ATTENDS % "Mul(q, k)"
READ_TWICE = """(float[b,2,t,4] q, float[b,2,t,4] k, float[b,2,t,4] v)
  => (float[b,2,t,4] y, float[b,2,t,4] z) <float half = {0.5}, float[b,2,t,4] p> {
  p = Mul(q, half)  y = Attention<scale=0.3>(p, k, v)  z = Tanh(p) }"""

ASKED = """(float[b,t,8] x) => (int64[1] y)
  <float[b,t,8] h> { h = Tanh(x)  y = Shape<start=1, end=2>(h) }"""


def parsed(text: str) -> Any:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> g {text}')


def run(model: Any) -> list[NDArray[Any]]:
    chance = np.random.default_rng(0)
    given = {}
    for value in model.graph.input:
        shape = [d.dim_value or SIZES[d.dim_param] for d in value.type.tensor_type.shape.dim]
        found: Any = chance.standard_normal(shape).astype(np.float32)
        given[value.name] = chance.integers(0, 2, shape) if value.name in INTEGERS else found
    return computed(model, given)


def changed(text: str, change: Any) -> tuple[int, list[str]]:
    """Change a model, check that it computes what it did, and return how often and its ops."""
    model = ir.serde.deserialize_model(parsed(text))
    count = change(model)
    after = ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    for got, want in zip(run(after), run(parsed(text)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    return count, [n.op_type for n in after.graph.node]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (LOOKED_UP, ["Gather"]),
        (SPLIT_HEADS, ["Reshape"]),
        (AS_IT_IS, ["Tanh", "Tanh"]),
        (TIMES, ["Attention"]),
        (OVER, ["Attention"]),
        (ASKED, ["Shape"]),
    ],
)
def test_what_is_shortened_computes_the_same(text: str, kinds: list[str]) -> None:
    assert changed(text, shorten) == (1, kinds)


@pytest.mark.parametrize(
    "text", [BY_PAIRS, IN_FRONT, SWAPPED_SIZES, ANOTHER_WAY, HALF_OVER, BY_DATA, READ_TWICE]
)
def test_what_only_looks_alike_stays(text: str) -> None:
    kinds = [n.op_type for n in parsed(text).graph.node]
    assert changed(text, shorten) == (0, kinds)


# ---------------------------------------------------------------------------------- packed products


def products(body: str, outputs: int = 3) -> str:
    """Return a model of products of x (b, t, 4) with weights of 2, 3 and 2 columns."""
    named = ", ".join(f"float[b,t,{w}] y{n}" for n, w in list(enumerate((2, 3, 2)))[:outputs])

    def weight(name: str, columns: int) -> str:
        numbers = ", ".join(str((7 * n + len(name)) % 5 - 2) for n in range(4 * columns))
        return f"float[4,{columns}] {name} = {{{numbers}}}"

    constants = [weight("w0", 2), weight("w01", 3), weight("w012", 2)]
    constants += ["float[2] p0 = {1, 2}", "float[2] p2 = {-3, 4}", "float one = {1}"]
    known = [f"float[b,t,{w}] m{n}" for n, w in enumerate((2, 3, 2))]
    return (
        f"(float[b,t,4] x, float[2] data) => ({named}) <{', '.join(constants + known)}> {{{body}}}"
    )


BARE = products("y0 = MatMul(x, w0) y1 = MatMul(x, w01) y2 = MatMul(x, w012)")
READ = products(
    "m0 = MatMul(x, w0) m1 = MatMul(x, w01) m2 = MatMul(x, w012)"
    "y0 = Tanh(m0) y1 = Tanh(m1) y2 = Tanh(m2)"
)
BIASED = products(
    "m0 = MatMul(x, w0) a0 = Add(m0, p0) y0 = Tanh(a0) m1 = MatMul(x, w01) y1 = Tanh(m1)"
    "m2 = MatMul(x, w012) a2 = Add(p2, m2) y2 = Tanh(a2)"
)
MOVED = products(
    "m0 = MatMul(x, w0) a0 = Add(m0, data) y0 = Tanh(a0) m1 = MatMul(x, w01) y1 = Tanh(m1)"
    "m2 = MatMul(x, w012) y2 = Tanh(m2)"
)
TWO = products("m0 = MatMul(x, w0) m1 = MatMul(x, w01) y0 = Tanh(m0) y1 = Tanh(m1)", outputs=2)
SHARED = products(
    "m0 = MatMul(x, w0) m1 = MatMul(x, w01) m2 = MatMul(x, w012) z = Tanh(x) m3 = MatMul(z, w0)"
    "s = Add(m0, m3) y0 = Tanh(s) y1 = Tanh(m1) y2 = Tanh(m2)"
)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (READ, ["MatMul", "Split", "Tanh", "Tanh", "Tanh"]),
        (BIASED, ["MatMul", "Add", "Split", "Tanh", "Tanh", "Tanh"]),
        (MOVED, ["MatMul", "Split", "Add", "Tanh", "Tanh", "Tanh"]),
    ],
)
def test_products_of_one_value_are_one(text: str, kinds: list[str]) -> None:
    assert changed(text, pack_products) == (3, kinds)


@pytest.mark.parametrize("text", [BARE, TWO, SHARED])
def test_products_that_gain_nothing_or_share_a_weight_stay(text: str) -> None:
    kinds = [n.op_type for n in parsed(text).graph.node]
    assert changed(text, pack_products) == (0, kinds)


def test_names_that_a_model_has_are_not_taken_again() -> None:
    text = LOOKED_UP.replace(" u", " short_0").replace("(x, u", "(x, short_0")
    text = text.replace("(float[b,t,8] x,", "(float[b,t,8] packed_0,").replace("(x,", "(packed_0,")
    assert changed(text, shorten) == (1, ["Gather"])
    text = BIASED.replace("m1", "packed_0").replace("a0", "packed_constant_0")
    kinds = ["MatMul", "Add", "Split", "Tanh", "Tanh", "Tanh"]
    assert changed(text, pack_products) == (3, kinds)
