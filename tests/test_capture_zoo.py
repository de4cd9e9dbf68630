"""Capture over the zoo: every entry, spelling and task, at other sizes and decoded in pieces."""

from typing import Any

import pytest
import torch
import zoo

import attnopt

# A stock decode step without position_ids numbers its tokens from 0 again: give them.
NEEDS_POSITIONS = ("bamba",)
# A stock step of these forgets the past, its padding, or to return its cache: ask for all at once.
FORGETFUL = ("jamba", "minimax", "recurrent_gemma")
# Controls have another cache argument, or no states: test_capture_recurrences decodes mamba.
DECODERS = [n for n in zoo.LM if zoo.ZOO[n].family not in ("encdec", "control")]


def build(name: str, attention: str, *, task: str = "base") -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a zoo model and its call; cached decoding is tested with padding at the left."""
    model, kwargs, _ = zoo.build(
        name, attention, task=task, pad="left" if task == "lm" else "right"
    )
    return model, kwargs


def grow(name: str, kwargs: dict[str, Any], batch: int, more: int) -> dict[str, torch.Tensor]:
    """Return the call with another batch and with more (or fewer) tokens."""
    made = {}
    for key, tensor in kwargs.items():
        axes = zoo.ZOO[name].dyn.get(key, ())
        if 0 in axes:
            tensor = torch.cat([tensor] * 2)[:batch]
        if 1 in axes:
            count = tensor.shape[1] * 3 if key == "input_values" else more
            repeated = torch.cat([tensor] * 4, 1)
            tensor = repeated[:, : tensor.shape[1] + count]
        made[key] = tensor
    return made


def left_padded(kwargs: dict[str, Any], length: int) -> dict[str, torch.Tensor]:
    """Return ids, mask and positions of this length, with padding at the left of row 1."""
    ids = torch.cat([kwargs["input_ids"], kwargs["input_ids"].flip(1)], 1)[:, :length]
    mask = torch.ones_like(ids)
    mask[1, : min(3, length - 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def decode(model: Any, call: dict[str, torch.Tensor], cuts: tuple[int, ...]) -> torch.Tensor:
    """Return the logits of a decoder that gets its tokens in pieces."""
    past, at, logits = None, 0, []
    for count in cuts:
        piece = {
            "input_ids": call["input_ids"][:, at : at + count],
            "attention_mask": call["attention_mask"][:, : at + count],
        }
        if "position_ids" in call:
            piece["position_ids"] = call["position_ids"][:, at : at + count]
        result = model(**piece, **({} if past is None else {"past_key_values": past}))
        past, at = result.past_key_values, at + count
        logits.append(result.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def decode_pieces(model: Any, call: dict[str, Any], cuts: tuple[int, ...]) -> torch.Tensor:
    """Return the logits of an encoder-decoder whose decoder gets its tokens in pieces."""
    past, encoded, at, logits = None, None, 0, []
    for count in cuts:
        piece = {**call, "decoder_input_ids": call["decoder_input_ids"][:, at : at + count]}
        if past is not None:
            piece |= {"past_key_values": past, "encoder_outputs": (encoded,)}
            piece = {k: v for k, v in piece.items() if k not in ("input_ids", "input_features")}
        result = model(**piece)
        past, encoded, at = result.past_key_values, result.encoder_last_hidden_state, at + count
        logits.append(result.logits)
    return torch.cat(logits, 1)


def error_of(got: Any, want: Any) -> float:
    """Return the largest difference relative to the largest value; infinity for other shapes."""
    got, want = zoo.first_tensor(got), zoo.first_tensor(want)
    if got.shape != want.shape:
        return float("inf")
    got, want = got.float().nan_to_num(), want.float().nan_to_num()
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-6)).item()


def with_positions(call: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add explicit positions to a decoder's call."""
    positions = torch.arange(call["input_ids"].shape[1]).expand(call["input_ids"].shape[0], -1)
    return {**call, "position_ids": positions}


def _row(name: str, attention: str, task: str, program: attnopt.Program, error: float) -> str:
    kind = f"{len(program.parts)} parts" if program.uncaptured else "whole"
    return f"{name:30} {attention:5} {task:4} {kind:9} {error:8.1e} {program.history[0][:90]}"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_base_model_computes_what_its_source_does(name: str, attention: str) -> None:
    try:
        model, kwargs = build(name, attention)
    except ValueError as error:
        pytest.skip(f"the stock model has no such spelling: {error}")
    program = attnopt.capture(model, kwargs=kwargs)
    torch.manual_seed(0)
    want = model(**kwargs)
    torch.manual_seed(0)
    errors = [error_of(program(**kwargs), want)]
    if "dynamic" in program.history[0] and "except" not in program.history[0]:
        other = grow(name, kwargs, 3, 5)
        errors.append(error_of(program(**other), model(**other)))
    print(_row(name, attention, "base", program, max(errors)))
    assert max(errors) < 1e-4


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_decodes_as_its_source_does(name: str, attention: str) -> None:
    model, kwargs = build(name, attention, task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    if not program.states:
        assert program.refused or program.uncaptured or name == "openai_gpt"
        pytest.skip(f"{name} is captured without its cache: {program.history[-1][:80]}")
    errors = []
    for cuts in ((16,), (16, 1), (16, 1, 3), (1, 1, 1)):
        call = left_padded(kwargs, sum(cuts))
        call = with_positions(call) if name in NEEDS_POSITIONS else call
        seen = call["attention_mask"].bool()
        want = model(**call).logits if name in FORGETFUL else decode(model, call, cuts)
        errors.append(error_of(decode(program, call, cuts)[seen], want[seen]))
    print(_row(name, attention, "lm", program, max(errors)))
    assert max(errors) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [n for n in zoo.LM if zoo.ZOO[n].family == "encdec"])
def test_every_encoder_decoder_decodes_as_its_source_does(name: str, attention: str) -> None:
    model, kwargs = build(name, attention, task="lm")
    program = attnopt.capture(model, kwargs=kwargs)
    if "decode" not in program.parts:
        assert program.refused or program.uncaptured
        pytest.skip(f"{name} is captured without its cache: {program.history[-1][:80]}")
    errors = [
        error_of(decode_pieces(program, kwargs, cuts), decode_pieces(model, kwargs, cuts))
        for cuts in ((12,), (4, 1), (4, 1, 3))
    ]
    print(_row(name, attention, "lm", program, max(errors)))
    assert max(errors) < 1e-4
