"""Causal language models with recurrent layers carry their states in the program."""

from typing import Any

import pytest
import torch
import transformers
from test_capture_zoo import build, decode, error_of, left_padded, with_positions
from torch import fx

import attnopt
from attnopt.frontend.recurrences import go_on
from attnopt.ops import linear_recurrence

Call = dict[str, torch.Tensor]


@torch.no_grad()
def stepped(model: Any, call: Call, prompt: int) -> torch.Tensor:
    """Return the logits of a stock model that is given one cache, and then one token at a time."""
    cache = transformers.DynamicCache(config=model.config)
    logits, at, length = [], 0, call["input_ids"].shape[1]
    for end in range(prompt, length + 1):
        piece = {
            "input_ids": call["input_ids"][:, at:end],
            "attention_mask": call["attention_mask"][:, :end],
        }
        logits.append(model(**piece, past_key_values=cache).logits)
        at = end
    return torch.cat(logits, 1)


def gemma() -> Any:
    """Return a small model of recurrent blocks and one attention."""
    config = transformers.RecurrentGemmaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2, lru_width=16,
        num_hidden_layers=3, num_key_value_heads=1, head_dim=8, attention_window_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.RecurrentGemmaForCausalLM(config).eval()


# Over a second: it captures a model.
def test_states_that_modules_keep_are_carried_and_left_alone() -> None:
    model = gemma()
    ids = torch.randint(1, 32, (2, 16), generator=torch.Generator().manual_seed(0))
    call = left_padded({"input_ids": ids}, 16)
    block = model.model.layers[0].temporal_block
    block.conv1d_state = before = torch.zeros(1, 16, 3)
    program = attnopt.capture(model, kwargs=call)
    assert block.conv1d_state is before
    assert block.rg_lru.recurrent_states is None
    assert [s.role for s in program.states] == ["conv", "recurrent"] * 2 + ["key", "value"]
    assert all(site.cached for site in program.sites)
    seen = call["attention_mask"].bool()
    want = stepped(model, call, 13)[seen]
    for cuts in ((13, 1, 1, 1), (5, 1, 10), (16,)):
        assert error_of(decode(program, call, cuts)[seen], want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jamba", "minimax"])
def test_a_step_of_one_token_is_that_of_the_source(name: str) -> None:
    model, kwargs = build(name, "eager", task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    assert "whole, dynamic," in program.history[0]
    assert "recurrent" in {s.role for s in program.states}
    call = with_positions(left_padded(kwargs, 16))
    if name == "minimax":
        call["attention_mask"][:] = 1
    seen = call["attention_mask"].bool()
    want = decode(model, call, (13, 1, 1, 1))
    for cuts in ((13, 1, 1, 1), (5, 1, 10)):
        assert error_of(decode(program, call, cuts)[seen], want[seen]) < 1e-5


@pytest.mark.slow
def test_a_model_of_recurrences_alone_carries_its_states() -> None:
    model, kwargs = build("mamba", "eager", task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    assert {s.role for s in program.states} == {"conv", "recurrent"}
    ids, cache, logits = kwargs["input_ids"], None, []
    for piece in ids.split((9, 1, 1, 5), dim=1):
        result = program(input_ids=piece, cache_params=cache)
        cache = result.cache_params
        logits.append(result.logits)
    assert error_of(torch.cat(logits, 1), model(input_ids=ids).logits) < 1e-5


@pytest.mark.slow
def test_a_stock_cache_with_a_list_of_states_is_taken_over() -> None:
    model, kwargs = build("minimax", "eager", task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    ids = kwargs["input_ids"]
    stock = model(input_ids=ids[:, :7]).past_key_values
    result = program(input_ids=ids[:, 7:8], past_key_values=stock)
    assert result.past_key_values.get_seq_length() == 8
    assert error_of(result.logits, model(input_ids=ids[:, :8]).logits[:, 7:]) < 1e-5


# Over a second: it captures a model.
def test_a_state_space_with_groups_takes_any_number_of_chunks_and_steps() -> None:
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2, head_dim=8,
        num_heads=8, n_groups=2, chunk_size=16, time_step_limit=(0.01, 0.5),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(3, 64, (2, 150), generator=torch.Generator().manual_seed(0))
    program = attnopt.capture(model, kwargs={"input_ids": ids[:, :9]})
    assert {s.role for s in program.states} == {"conv", "recurrent"}
    with torch.no_grad():
        want = model(input_ids=ids).logits
    for cuts in ((150,), (70, 1, 1, 78)):
        cache, found = None, []
        for piece in ids.split(cuts, dim=1):
            result = program(input_ids=piece, cache_params=cache)
            cache = result.cache_params
            found.append(result.logits)
        assert error_of(torch.cat(found, 1), want) < 1e-5


DELTA = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WIDTHS = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}


def delta_rules(name: str) -> Any:
    """Return a model of one layer that runs a gated delta rule, and one of attention."""
    if name == "kimi":
        config: Any = transformers.KimiLinearConfig(
            **DELTA, linear_num_heads=4, linear_head_dim=8, moe_intermediate_size=16,
            num_local_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        )  # fmt: skip
        kind: Any = transformers.KimiLinearForCausalLM
    elif name == "olmo":
        config = transformers.OlmoHybridConfig(**DELTA, **WIDTHS, linear_num_value_heads=2)
        kind = transformers.OlmoHybridForCausalLM
    else:
        config = transformers.Qwen3_5TextConfig(
            **DELTA, **WIDTHS, linear_num_value_heads=4, head_dim=8
        )
        kind = transformers.Qwen3_5ForCausalLM
    torch.manual_seed(0)
    model = kind(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


# Over a second: it captures a model.
@pytest.mark.parametrize(
    "name", ["olmo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen", "kimi"))]
)
def test_gated_delta_rules_take_any_number_of_chunks_and_steps(name: str) -> None:
    model = delta_rules(name)
    ids = torch.randint(3, 64, (2, 150), generator=torch.Generator().manual_seed(0))
    call = left_padded({"input_ids": ids[:, :16]}, 16)
    program = attnopt.capture(model, kwargs=call)
    assert [s.role for s in program.states] == ["conv", "recurrent", "key", "value"]
    assert len(program.sites) == 1
    assert {m.node for m in program.near_misses} == {"gated_delta_rule"}
    call = with_positions(left_padded({"input_ids": ids}, 150))
    seen = call["attention_mask"].bool()
    want = decode(model, call, (150,))[seen]
    for cuts in ((150,), (100, 1, 1, 48)):
        assert error_of(decode(program, call, cuts)[seen], want) < 2e-5


def test_a_recurrence_from_zeros_goes_on_from_a_state_that_is_not_read() -> None:
    graph = fx.Graph()
    decay, new, state = (graph.placeholder(n) for n in ("decay", "new", "state"))
    first = graph.call_function(torch.ops.aten.select.int, (new, 1, 0))
    zeros = graph.call_function(torch.ops.aten.zeros_like.default, (first,))
    states = graph.call_function(linear_recurrence, (decay, new, zeros))
    graph.output((graph.call_function(torch.ops.aten.select.int, (states, 1, -1)),))
    zeros.meta["val"] = state.meta["val"] = torch.zeros(2, 3)
    module = fx.GraphModule({}, graph)
    go_on(module, {"state": 0})
    ones = torch.ones(2, 5, 3)
    assert torch.equal(module(ones, ones, 2 * ones[:, 0])[0], 7 * ones[:, 0])
    assert states.args == (decay, new, state)
