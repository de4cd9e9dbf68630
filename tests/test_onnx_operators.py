"""Every op of the library as ONNX Runtime computes it, beside its reference: one graph, many calls.

An export takes seconds, so each opset has one graph that makes all calls.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnopt.backends.ort.operators import Choice, Target, choose
from attnopt.ops import (
    attention,
    attention_reference,
    cached_attention,
    cached_attention_reference,
    linear_recurrence_reference,
)

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:# The axis name"
)


@dataclass(frozen=True)
class Call:
    """Sizes and options of one attention; `past` tokens lie in a cache."""

    options: dict[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    heads: tuple[int, int] = (4, 2)
    tokens: tuple[int, int] = (5, 5)
    past: int | None = None
    right: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        """Draw queries, keys, values, and the past of a cache."""
        torch.manual_seed(0)
        (heads, groups), (queries, keys) = self.heads, self.tokens
        q = torch.randn(2, heads, queries, 8)
        k, v = torch.randn(2, groups, keys, 8), torch.randn(2, groups, keys, 8)
        if self.past is None:
            return q, k, v
        return q, k, v, torch.randn(2, groups, self.past, 8), torch.randn(2, groups, self.past, 8)

    def given(self) -> dict[str, Any]:
        """Return the options with their tensors."""
        heads, (queries, keys) = self.heads[0], self.tokens
        keys += self.past or 0
        torch.manual_seed(1)
        place, rows = torch.arange(keys).view(1, 1, 1, -1), torch.tensor([0, 3]).view(2, 1, 1, 1)
        made = {
            "padding": place < keys - rows if self.right else place >= rows,
            "mask": torch.rand(2, heads, queries, keys) > 0.4,
            "bias": torch.randn(heads, queries, keys),
            "sinks": torch.randn(heads),
        }
        return {**self.options, **{name: made[name] for name in self.extra}}


CALLS = (
    Call(),
    Call({"causal": True}, heads=(4, 4)),
    Call({"causal": True}, tokens=(3, 7)),
    Call({"causal": True, "window": 3}, ("padding",)),
    Call({"window": 2, "right": 1}, heads=(4, 4)),
    Call({"causal": True, "chunk": 4}, ("mask",), heads=(4, 4)),
    Call({"causal": True, "prefix": 2}, ("bias",)),
    Call({"scale": 0.3}, ("bias", "padding"), heads=(4, 4)),
    Call({"mean_if_blind": True}, ("mask",)),
    Call({"mean_if_blind": True, "causal": True, "window": 2}, ("padding",)),
    Call({"mean_if_blind": True}, ("padding",), tokens=(3, 3)),
    Call({"softcap": 2.0, "causal": True}, ("padding",)),
    Call({"causal": True}, ("sinks", "padding")),
    Call({"k_map": [0, 1, 1, 0], "v_map": [0, 1, 1, 0], "causal": True}),
    Call({"v_map": [1, 0, 0, 1]}),
    Call({"causal": True}, past=4),
    Call({"causal": True}, past=0),
    Call({"causal": True}, ("padding",), heads=(4, 4), tokens=(1, 1), past=6),
    Call({"causal": True, "window": 4}, ("padding",), tokens=(3, 3), past=6),
    Call({"causal": True, "softcap": 3.0}, past=4),
    Call({"causal": True, "k_map": [0, 0, 1, 1], "v_map": [0, 1, 0, 1]}, past=4),
)


def node_of(call: Call) -> fx.Node:
    """Return the node of a graph that makes a call, as `choose` reads it."""
    graph = fx.Graph()
    arguments: list[Any] = []
    for number, tensor in enumerate(call.tensors()):
        arguments.append(graph.placeholder(f"x{number}"))
        arguments[-1].meta["val"] = tensor
    target = attention if call.past is None else cached_attention
    if call.past is not None:
        arguments.append(call.past)
    return graph.call_function(target, tuple(arguments), call.given())


class Everything(torch.nn.Module):
    """Makes all calls with the kernels that are chosen for a target."""

    def __init__(self, target: Target, calls: tuple[Call, ...] = CALLS) -> None:
        super().__init__()
        self.choices: tuple[Choice, ...] = tuple(choose(node_of(c), target) for c in calls)
        self.options = [call.given() for call in calls]
        self.pasts = [() if call.past is None else (call.past,) for call in calls]

    def forward(self, calls: list[list[Tensor]]) -> list[Tensor]:
        memo: dict[Any, Any] = {}
        found: list[Tensor] = []
        made = zip(self.choices, calls, self.pasts, self.options, strict=True)
        for choice, tensors, past, options in made:
            result = choice.kernel(*tensors, *past, memo=memo, **options)
            found += [result] if isinstance(result, Tensor) else result
        return found


def wanted(calls: tuple[Call, ...] = CALLS) -> list[Tensor]:
    """Return what the references give for all calls."""
    found: list[Tensor] = []
    for call in calls:
        if call.past is None:
            found.append(attention_reference(*call.tensors(), **call.given())[0])
        else:
            found += cached_attention_reference(*call.tensors(), call.past, **call.given())
    return found


def computed(module: Everything, calls: tuple[Call, ...], opset: int, place: Path) -> list[Tensor]:
    """Return what ONNX Runtime gives for all calls."""
    tensors = [list(call.tensors()) for call in calls]
    flat = [tensor for call in tensors for tensor in call]
    names = [f"x{number}" for number in range(len(flat))]
    torch.onnx.export(
        module.eval(), (tensors,), place, dynamo=True, opset_version=opset,
        input_names=names, verbose=False,
    )  # fmt: skip
    session = ort.InferenceSession(place, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: x.numpy() for n, x in zip(names, flat, strict=True)})
    return [torch.from_numpy(x) for x in found]


@pytest.mark.parametrize("opset", [23, 21])
def test_every_operator_of_attention_computes_the_reference(opset: int, tmp_path: Path):
    module = Everything(Target(opset=opset))
    found = computed(module, CALLS, opset, tmp_path / "all.onnx")
    used = {choice.operator for choice in module.choices}
    assert used == {"Attention" if opset == 23 else "MultiHeadAttention", "decomposed"}
    for number, (got, want) in enumerate(zip(found, wanted(), strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"output {number}")


GROUPED = (
    Call({"causal": True}, past=0),
    Call({"causal": True}, heads=(4, 4), tokens=(1, 1), past=6),
    Call({"causal": True, "scale": 0.2, "softcap": 1.5}, tokens=(1, 1), past=6),
    Call({"causal": True}, ("sinks",), tokens=(1, 1), past=3),
    Call({"causal": True}, ("padding",), past=0, right=True),
)


def test_grouped_query_attention_computes_the_reference_where_rows_end_in_padding(tmp_path: Path):
    module = Everything(Target(genai=True), GROUPED)
    assert {choice.operator for choice in module.choices} == {"GroupQueryAttention"}
    found = computed(module, GROUPED, 23, tmp_path / "grouped.onnx")
    want = wanted(GROUPED)
    # The last call's second row has two tokens; what stands behind them is padding.
    for results in (found, want):
        results[-3][1, :, 2:] = 0.0
    for number, (got, expected) in enumerate(zip(found, want, strict=True)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=f"output {number}")


def test_what_grouped_query_attention_counts_in_another_way_is_left_to_others():
    target = Target(genai=True)
    windowed = Call({"causal": True, "window": 4}, past=4)
    assert choose(node_of(windowed), target).operator == "Attention"
    biased = Call({"causal": True}, ("bias",), past=4)
    assert choose(node_of(biased), target).operator == "Attention"


@pytest.mark.parametrize(
    ("call", "opset", "operator", "why"),
    [
        (Call({"causal": True}), 23, "Attention", ""),
        (Call({"causal": True}), 22, "decomposed", "heads share keys"),
        (Call(heads=(4, 4)), 22, "MultiHeadAttention", "opset 22 has no Attention"),
        (Call({"softcap": 1.0}), 23, "decomposed", "a soft cap"),
        (Call(extra=("sinks",)), 23, "decomposed", "sinks"),
        (Call({"v_map": [1, 0, 0, 1]}), 23, "decomposed", "keys and values with unlike heads"),
    ],
)
def test_a_choice_says_why_nothing_better_serves(call: Call, opset: int, operator: str, why: str):
    found = choose(node_of(call), Target(opset=opset))
    assert found.operator == operator
    assert why in found.why


def test_a_target_names_what_there_is():
    with pytest.raises(ValueError, match="ep 'npu'; there is cpu and cuda"):
        Target(ep="npu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="opset 9; there is 18 to 23"):
        Target(opset=9)


def test_the_linear_recurrence_is_a_scan(tmp_path: Path):
    from attnopt.backends.ort.translations import table

    class Runs(torch.nn.Module):
        def forward(self, decay: Tensor, new: Tensor, initial: Tensor) -> Tensor:
            return torch.ops.attnopt.linear_recurrence(decay, new, initial)

    torch.manual_seed(0)
    given = torch.rand(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 3)
    length = torch.export.Dim("length")
    axes = {1: length}
    torch.onnx.export(
        Runs().eval(), given, tmp_path / "scan.onnx", dynamo=True, opset_version=21, verbose=False,
        dynamic_shapes=(axes, axes, None), input_names=["decay", "new", "initial"],
        custom_translation_table=table(),
    )  # fmt: skip
    session = ort.InferenceSession(tmp_path / "scan.onnx", providers=["CPUExecutionProvider"])
    names = ("decay", "new", "initial")
    for tokens in (1, 9):
        given = torch.rand(2, tokens, 3), torch.randn(2, tokens, 3), torch.randn(2, 3)
        (found,) = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), linear_recurrence_reference(*given))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_linear_attention"])
def test_what_runs_from_a_state_is_the_op_of_the_runtime(
    name: str, channels: int, tmp_path: Path
) -> None:
    from attnopt import ops
    from attnopt.backends.ort.linear import linear_kernel

    reference = getattr(ops, f"{name}_reference")
    kernel = linear_kernel(torch.fx.Graph().call_function(getattr(ops, name)))
    assert kernel is not None
    delta = name == "gated_delta_rule"

    class Rule(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return kernel(*given)

    def drawn(tokens: int) -> tuple[Tensor, ...]:
        # Heads of values share queries and keys where the rule has no heads of its own for these.
        sizes = (2, tokens, 6 if delta else 2, 4)
        q, k = torch.randn(sizes), torch.nn.functional.normalize(torch.randn(sizes), dim=-1)
        v, decay = torch.randn(2, tokens, 6, 5), -torch.rand(2, tokens, 6, channels)
        rates = (torch.rand(2, tokens, 6),) if delta else ()
        return q, k, v, decay, *rates, torch.randn(2, 6, 4, 5)

    torch.manual_seed(0)
    axes = {1: torch.export.Dim("length")}
    names = ["q", "k", "v", "decay", *(["beta"] if delta else []), "initial"]
    torch.onnx.export(
        Rule().eval(), drawn(6), tmp_path / "rule.onnx", dynamo=True, opset_version=21,
        dynamic_shapes=((*[axes] * (len(names) - 1), None),), input_names=names, verbose=False,
    )  # fmt: skip
    session = ort.InferenceSession(tmp_path / "rule.onnx", providers=["CPUExecutionProvider"])
    for tokens in (1, 9, 130):
        given = drawn(tokens)
        found = session.run(None, {n: x.numpy() for n, x in zip(names, given, strict=True)})
        for got, want in zip(found, reference(*given), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [c for c in CALLS if c.past is not None], ids=str)
def test_cached_attention_is_attention_over_what_it_joins(call: Call):
    q, k, v, past_k, past_v = call.tensors()
    # Of a longer past, the first tokens count.
    longer = [torch.cat([past, torch.full_like(k, 9.0)], dim=2) for past in (past_k, past_v)]
    found = cached_attention(q, k, v, *longer, call.past, **call.given())
    keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    want = attention_reference(q, keys, values, **call.given())[0]
    for got, expected in zip(found, (want, keys, values), strict=True):
        torch.testing.assert_close(got, expected)


def test_cached_attention_keeps_the_contract_of_an_op():
    q, k, v, past_k, past_v = (x.double() for x in Call(past=4).tensors())
    torch.library.opcheck(cached_attention, (q, k, v, past_k, past_v, 4), {"causal": True})
