"""Tiny decoders whose heads can be turned, repeated and fused, and what they compute."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import attnopt
from attnopt.artifacts.saving import Result
from attnopt.calibrating import Statistics
from attnopt.program import Program

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 127,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_gqa": ("LlamaConfig", "LlamaForCausalLM", {"num_attention_heads": 8}),
    # Two key heads of 16 channels.
    "llama_wide": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 64, "num_key_value_heads": 2},
    ),
    # Biases on q, k and v.
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    # Neighbouring channels turn together, and half of them do not turn.
    "glm": ("GlmConfig", "GlmForCausalLM", {"partial_rotary_factor": 0.5}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    # One parameter for q, k and v, with biases everywhere; nothing turns.
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"hidden_size": 64}),
}


def decoder(family: str, seed: int = 0) -> torch.nn.Module:
    """Return a tiny decoder with large random weights, so that errors show."""
    config, model, changes = FAMILIES[family]
    sizes = {**SIZES, **changes}
    sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    torch.manual_seed(seed)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "proj" in name or "c_attn.weight" in name:
                parameter.normal_(0, 0.3)
    return made.requires_grad_(False)


def ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    """Return random tokens."""
    return torch.randint(2, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


_EXACT: dict[str, Program] = {}


def exactly(model: torch.nn.Module) -> Program:
    """Bring a decoder to its exact form; it is captured once for all weights of its shapes."""
    dtype = next(model.parameters()).dtype
    key = f"{type(model).__name__} {dtype} {model.config.to_json_string()}"
    if key not in _EXACT:
        program = attnopt.capture(model, (), {"input_ids": ids(2, 11)})
        _EXACT[key] = attnopt.apply(program, "exact")
    found = _EXACT[key]
    own = {name: tensor for name, tensor in model.state_dict().items() if name in found.weights}
    return found.with_weights(own)


def uneven(source: Path) -> Result:
    """Give the second layer of a checkpoint half the key and value heads of the first: tier 1."""
    program = attnopt.apply(attnopt.capture(source), "exact")
    plan = attnopt.plan(program, {"kv_cache": "50%"}, data=ids(16, 24))
    plan = replace(plan, choices=plan.choices[1:], goal={})
    return attnopt.optimize(program, plan=plan, data=ids(16, 24))


def captured(model: torch.nn.Module, rows: int = 8) -> tuple[Program, Statistics]:
    """Capture a decoder and calibrate it on some rows."""
    program = exactly(model)
    return program, attnopt.calibrate(program, ids(rows, 24, seed=3))


@cache
def known(family: str) -> tuple[Program, Statistics]:
    """Capture and calibrate a decoder that no test changes, once."""
    return captured(decoder(family))


def logits(program: Any, rows: int = 3, tokens: int = 17) -> Tensor:
    """Return what a model or program says of random tokens."""
    found: Tensor = program(input_ids=ids(rows, tokens, seed=5)).logits.double()
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, relative to b."""
    return float((a - b).norm() / b.norm())


def turn_heads(model: torch.nn.Module, seed: int = 2, *, rigid: bool = False) -> None:
    """Change the basis of every head: the model computes the same, in another gauge.

    A rigid change keeps the length of every key.
    """
    torch.manual_seed(seed)
    config = model.config
    heads, kept = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    for layer in model.model.layers:
        attention = layer.self_attn
        for h in range(kept):
            factor = torch.complex(*torch.randn(2, width // 2).double().mul(0.5).add(0.7))
            factor = factor / factor.abs() if rigid else factor
            rotation = torch.linalg.qr(torch.randn(width, width).double())[0]
            _turn_keys(attention.k_proj.weight, h, width, factor)
            _rotate(attention.v_proj.weight, h, width, rotation)
            for q in range(h * heads // kept, (h + 1) * heads // kept):
                _turn_keys(attention.q_proj.weight, q, width, 1 / factor.conj())
                _rotate(attention.o_proj.weight.T, q, width, rotation)


def repeat_heads(model: torch.nn.Module, group: int) -> None:
    """Make the key and value heads of each group equal, so that fusing them loses nothing."""
    width = model.config.hidden_size // model.config.num_attention_heads
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            by_head = projection.weight.view(-1, width, projection.weight.shape[1])
            by_head.copy_(by_head[::group].repeat_interleave(group, 0))
            if projection.bias is not None:
                bias = projection.bias.view(-1, width)
                bias.copy_(bias[::group].repeat_interleave(group, 0))


def _turn_keys(weight: Tensor, head: int, width: int, factor: Tensor) -> None:
    rows = weight[head * width : (head + 1) * width]
    z = torch.complex(rows[: width // 2].double(), rows[width // 2 :].double())
    z = z * factor.unsqueeze(1)
    rows.copy_(torch.cat([z.real, z.imag]))


def _rotate(weight: Tensor, head: int, width: int, rotation: Tensor) -> None:
    rows = weight[head * width : (head + 1) * width]
    rows.copy_(rotation.T @ rows.double())
