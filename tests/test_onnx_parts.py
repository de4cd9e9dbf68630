"""Causal attention of many tokens goes part by part in ONNX; what only looks causal does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dha_models import decoder
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
ir = pytest.importorskip("onnx_ir", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from onnx_running import computed  # noqa: E402

from attnopt.backends.ort.parts import LEAST, PARTS, attend_in_parts  # noqa: E402

# Libraries of the exporter warn of their own ways.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROWS = "q_num_heads=4, kv_num_heads=2, scale=0.3"
MODEL = """<ir_version: 10, opset_import: ["": 23]> g
(float[b,t,32] q, float[b,t,16] k, float[b,t,16] v, int64[b,s] seen, float[1,4,t,s] bias,
 float[b,2,p,8] pk, float[b,2,p,8] pv)
=> (float[b,t,32] y, float[b,2,s,8] nk, float[b,2,s,8] nv)
<int64 zero = {0}, int64 one = {1}, int64[1] last = {1}, int64[2] middle = {1, 2},
 float nothing = {0}, float least = {%(least)s}, int64[1] rows = {-1},
 bool[b,1,1,s] padding, float[b,1,t,s] numbers, float[b,h,t,s] mask, float[b,t,32] found> {
  t1 = Shape<start=1, end=2>(q)
  p1 = Shape<start=2, end=3>(pk)
  t0 = Squeeze(t1)
  p0 = Squeeze(p1)
  s0 = Add(p0, t0)
  keys = Range(zero, s0, one)
  counted = Range(%(first)s, t0, one)
  column = Unsqueeze(counted, last)
  queries = Add(column, %(offset)s)
  order = %(order)s(keys, queries)
  real = Cast<to=9>(seen)
  padding = Unsqueeze(real, middle)
  sees = And(order, padding)
  numbers = Where(sees, nothing, least)
  mask = %(mask)s
  found, nk, nv = Attention<%(rows)s>(q, k, v, mask, pk, pv)
  some = Cast<to=7>(sees)
  most = ReduceMax<keepdims=1>(some, rows)
  any = Cast<to=9>(most)
  by_row = Squeeze(any, last)
  token = Cast<to=9>(column)
  bare = And(token, token)
  y = %(result)s
}"""
CAUSAL = {
    "least": "-1e30", "first": "zero", "offset": "p0", "order": "LessOrEqual",
    "mask": "Identity(numbers)", "rows": ROWS, "result": "Where(by_row, found, nothing)",
}  # fmt: skip


def made(**changes: str) -> tuple[Any, Any, int]:
    """Return a model, the same one rewritten, and how many attentions were."""
    text = MODEL % {**CAUSAL, **changes}
    if changes.get("mask", CAUSAL["mask"]) == "Identity(numbers)":
        text = text.replace("  mask = Identity(numbers)\n", "").replace("v, mask,", "v, numbers,")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    before = ir.to_proto(model)
    count = attend_in_parts(model)
    return before, ir.to_proto(model), count


def drawn(tokens: int, past: int, padded: int = 0) -> dict[str, NDArray[Any]]:
    chance = np.random.default_rng(0)
    sizes = {
        "q": (2, tokens, 32), "k": (2, tokens, 16), "v": (2, tokens, 16),
        "bias": (1, 4, tokens, past + tokens), "pk": (2, 2, past, 8), "pv": (2, 2, past, 8),
    }  # fmt: skip
    given: dict[str, NDArray[Any]] = {
        n: chance.standard_normal(s, dtype=np.float32) for n, s in sizes.items()
    }
    given["seen"] = np.ones((2, past + tokens), np.int64)
    given["seen"][-1, :padded] = 0
    return given


BIASED = {"mask": "Add(bias, numbers)"}


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize(
    ("tokens", "past", "padded"),
    [
        (LEAST + 5, 0, 3),
        (LEAST, 7, 0),
        (LEAST + 1, 9, 20),
        (LEAST - 1, 4, 2),
        (1, 6, 3),
        (12, 0, 4),
    ],
)
def test_calls_of_any_length_give_what_they_gave(
    changes: dict[str, str], tokens: int, past: int, padded: int
) -> None:
    before, after, count = made(**changes)
    assert count == 1
    onnx.checker.check_model(after, full_check=True)
    given = drawn(tokens, past, padded)
    for want, got in zip(computed(before, given), computed(after, given), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_many_tokens_take_smaller_attentions() -> None:
    _, after, _ = made()
    (choice,) = (n for n in after.graph.node if n.op_type == "If")
    kinds = {
        part.name: sum(n.op_type == "Attention" for n in part.g.node) for part in choice.attribute
    }
    assert kinds == {"then_branch": PARTS, "else_branch": 1}
    assert not [n for n in after.graph.node if n.op_type == "Attention"]


@pytest.mark.parametrize(
    "changes",
    [
        {"order": "GreaterOrEqual"},
        {"order": "Less"},
        {"offset": "one"},
        {"first": "one"},
        {"least": "-1e4"},
        {"result": "Identity(found)"},
        {"result": "Where(by_row, nothing, found)"},
        {"result": "Where(bare, found, nothing)"},
        {"mask": "Mul(bias, numbers)"},
    ],
    ids=str,
)
def test_what_is_not_known_to_be_causal_stays(changes: dict[str, str]) -> None:
    before, after, count = made(**changes)
    assert count == 0
    assert before == after


def test_a_mask_of_one_row_stays() -> None:
    assert made(mask="ReduceMax<keepdims=1>(numbers, rows)")[2] == 0


def test_an_export_compares_a_call_that_goes_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    found = attnopt.export_onnx(attnopt.capture(model), tmp_path / "out", steps=2)
    graph = onnx.load(found.path, load_external_data=False).graph
    assert sum(n.op_type == "If" for n in graph.node) == 2
    (long,) = (c for c in found.parity.cases if "long" in c.case)
    assert found.accepted
    assert (long.equal, long.tokens) == (2, 2)
    assert not found.parity.left_out


def test_a_model_of_few_positions_is_exported_without_parts(tmp_path: Path) -> None:
    found = attnopt.export_onnx(attnopt.capture(decoder("llama_gqa")), tmp_path / "out", steps=2)
    graph = onnx.load(found.path, load_external_data=False).graph
    assert sum(n.op_type == "Attention" for n in graph.node) == 2
    assert found.accepted
    assert [told.partition(":")[0] for told in found.parity.left_out] == ["longer calls"]
