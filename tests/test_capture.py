"""Capture keeps what the model computes: whole graphs, explicit state, and clear refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_capture_zoo import (
    build,
    decode,
    decode_pieces,
    error_of,
    grow,
    left_padded,
    with_positions,
)

import attnopt
from attnopt.frontend.exporting import dry_run
from attnopt.program import Program


@pytest.fixture(scope="module")
def llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor], Program]:
    model, kwargs = build("llama", "sdpa", task="lm")
    return model, kwargs, attnopt.capture(model, kwargs=kwargs)


@pytest.mark.parametrize(
    "name", ["bert", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom", "gemma3"))]
)
def test_a_base_model_is_one_graph_for_other_sizes(name: str) -> None:
    model, kwargs = build(name, "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert "whole, dynamic" in program.history[0]
    for batch, more in ((3, 5), (1, -9)):
        other = grow(name, kwargs, batch, more)
        assert error_of(program(**other), model(**other)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("cuts", [(19,), (16, 1), (16, 1, 3), (1, 1, 1)])
def test_one_graph_serves_prefill_and_decode(
    name: str, cuts: tuple[int, ...], llama: tuple[torch.nn.Module, dict, Program]
) -> None:
    model, kwargs = build(name, "sdpa", task="lm") if name != "llama" else llama[:2]
    program = llama[2] if name == "llama" else _captured(name)
    call = left_padded(kwargs, sum(cuts))
    seen = call["attention_mask"].bool()
    assert error_of(decode(program, call, cuts)[seen], decode(model, call, cuts)[seen]) < 1e-4


_PROGRAMS: dict[str, Program] = {}


def _captured(name: str) -> Program:
    if name not in _PROGRAMS:
        model, kwargs = build(name, "sdpa", task="lm")
        _PROGRAMS[name] = attnopt.capture(model, kwargs=kwargs)
    return _PROGRAMS[name]


def test_only_concatenations_read_a_growing_state(
    llama: tuple[torch.nn.Module, dict, Program],
) -> None:
    program = llama[2]
    states = {s.placeholder for s in program.states}
    assert len(states) == 4
    for node in program.graph.nodes:
        if any(i.name in states for i in node.all_input_nodes):
            assert node.target is torch.ops.aten.cat.default
    kinds = {b.kind for b in program.bindings.values()}
    assert {"parameter", "input", "state", "past_length"} <= kinds


def test_steps_hand_their_state_on(llama: tuple[torch.nn.Module, dict, Program]) -> None:
    model, kwargs, program = llama
    ids = kwargs["input_ids"]
    _, carry = program.step({"input_ids": ids[:, :7]})
    outputs, carry = program.step({"input_ids": ids[:, 7:9]}, carry)
    assert carry.past_length == 9
    assert error_of(outputs[0], model(input_ids=ids[:, :9]).logits[:, 7:9]) < 1e-4


def test_a_stock_cache_is_taken_over(llama: tuple[torch.nn.Module, dict, Program]) -> None:
    model, kwargs, program = llama
    ids = kwargs["input_ids"]
    stock = model(input_ids=ids[:, :7]).past_key_values
    result = program(input_ids=ids[:, 7:8], past_key_values=stock)
    assert isinstance(result, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert error_of(result.logits, model(input_ids=ids[:, :8]).logits[:, 7:]) < 1e-4
    assert result.past_key_values.get_seq_length() == 8


def test_a_cast_program_is_called_in_its_new_dtype(
    llama: tuple[torch.nn.Module, dict, Program],
) -> None:
    model, call, _ = llama
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        wanted = copy.deepcopy(narrow).float()(**call).logits
    found = attnopt.capture(narrow, (), call).cast(torch.float32)(**call).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_source_is_left_alone() -> None:
    model, kwargs = build("llama", "eager", task="lm")
    model.train()
    before = copy.deepcopy(model.config.to_dict())
    program = attnopt.capture(model, kwargs=kwargs)
    assert model.training
    assert model.config.to_dict() == before
    name = "model.embed_tokens.weight"
    assert program.weights[name] is model.get_parameter(name)


class _Remembering(torch.nn.Module):
    """A layer that keeps its last input for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        return self.linear(x)


def test_what_a_source_remembers_of_a_dry_run_is_forgotten() -> None:
    model = _Remembering()
    dry_run(model, lambda m, tensors: m(**tensors), {"x": torch.ones(2, 4)})
    assert model.last is None
    assert model.training


class _Buckets:
    """A cache of a source's own kind."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = [states]


class _Caching(_Remembering):
    """A layer that returns such a cache beside its result."""

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> Any:  # type: ignore[override]
        made = self.linear(x)
        return {"made": made, "cache": None if use_cache is False else _Buckets(made)}


def test_a_cache_of_another_kind_is_left_out_and_not_kept_from_the_capture() -> None:
    model, x = _Caching(), torch.ones(2, 4)
    program = attnopt.capture(model, (x,))
    assert program(x)["cache"] is None
    assert torch.equal(program(x)["made"], model(x)["made"])
    assert program.history[-1].startswith("captured without its cache: a _Buckets")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "whisper")]
)
def test_an_encoder_decoder_is_two_programs(name: str) -> None:
    model, kwargs = build(name, "eager", task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    assert set(program.parts) == {"encode", "decode"}
    for cuts in ((5,), (4, 1, 3)):
        want = decode_pieces(model, kwargs, cuts)
        assert error_of(decode_pieces(program, kwargs, cuts), want) < 1e-4


@pytest.mark.slow
def test_a_hybrid_carries_its_recurrent_states() -> None:
    model, kwargs = build("bamba", "eager", task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    assert {s.role for s in program.states} == {"conv", "recurrent", "key", "value"}
    call = with_positions(left_padded(kwargs, 19))
    seen = call["attention_mask"].bool()
    whole = decode(model, call, (19,))
    assert error_of(decode(program, call, (11, 1, 7))[seen], whole[seen]) < 1e-4


def test_a_call_that_differs_from_the_captured_one_is_refused(
    llama: tuple[torch.nn.Module, dict, Program],
) -> None:
    _, kwargs, program = llama
    ids = kwargs["input_ids"]
    with pytest.raises(ValueError, match="use_cache=False"):
        program(input_ids=ids, use_cache=False)
    with pytest.raises(TypeError, match="unknown argument 'colour'"):
        program(input_ids=ids, colour=1)
    with pytest.raises(ValueError, match="output_attentions=True"):
        program(input_ids=ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask has length 3; expected 16"):
        program(input_ids=ids, attention_mask=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position_ids has shape"):
        program(input_ids=ids, position_ids=torch.zeros(2, 16, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids is missing"):
        program()


class _Branching(torch.nn.Module):
    """An encoder with a branch on values between its two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e6:
            x = x * 2
        return self.last(x)


def test_a_branch_on_values_is_captured_module_by_module() -> None:
    model = _Branching().eval()
    program = attnopt.capture(model, (torch.randn(2, 9, 16),))
    assert set(program.parts) == {"first", "last"}
    assert [u.module for u in program.uncaptured] == [""]
    assert "test_capture.py:" in program.uncaptured[0].where
    x = torch.randn(3, 6, 16)
    assert error_of(program(x), model(x)) < 1e-4


def _config(directory: Path, **more: object) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
    ).to_dict()
    (directory / "config.json").write_text(json.dumps({**config, **more}))
    return directory


def test_a_checkpoint_is_captured_without_loading_it(tmp_path: Path) -> None:
    model, kwargs = build("llama", "sdpa", task="lm")
    model.bfloat16().save_pretrained(tmp_path)
    program = attnopt.capture(str(tmp_path))
    assert program.weights["lm_head.weight"].dtype is torch.bfloat16
    stock = type(model).from_pretrained(tmp_path).eval()
    assert error_of(program(**kwargs).logits, stock(**kwargs).logits) < 1e-4


def test_a_config_alone_can_be_inspected(tmp_path: Path) -> None:
    program = attnopt.capture(str(_config(tmp_path)))
    assert len(program.states) == 4
    with pytest.raises(ValueError, match="has no weights"):
        program.weights["lm_head.weight"]


@pytest.mark.parametrize(
    ("more", "file", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, None, "quantised"),
        ({"auto_map": {"AutoModel": "x.Y"}}, None, "trust_remote_code"),
        ({"architectures": ["NoSuchModel"]}, None, "NoSuchModel"),
        ({}, ("pytorch_model.bin", "x"), "pickles only"),
        (
            {},
            ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
            "leaves the directory",
        ),
    ],
)
def test_a_directory_that_is_not_safe_or_whole_is_refused(
    tmp_path: Path, more: dict, file: tuple[str, str] | None, message: str
) -> None:
    _config(tmp_path, **more)
    if file is not None:
        (tmp_path / file[0]).write_text(file[1])
    with pytest.raises(ValueError, match=message):
        attnopt.capture(str(tmp_path))


def test_a_pickle_needs_trust() -> None:
    with pytest.raises(ValueError, match="trust_pickle"):
        attnopt.capture("program.pt2")
