"""Encoder-decoders with a language-model head: two programs that share weights and states.

"encode" runs the encoder and the decoder's first tokens from an empty cache; "decode" runs
further tokens from the cache. Whether the cross-attention cache is filled is a branch of the
source's Python, so no single graph does both.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.frontend.calls import Example
from attnopt.frontend.exporting import Attempt, Trace, dry_run, trace
from attnopt.frontend.skeletons import Slot
from attnopt.frontend.stateful import Stateful, state_name, with_states
from attnopt.nouns import No
from attnopt.program import Program

# Long enough to be no special case, and unlike common sizes of models.
_PAST = 5
_NEW = 3
_ENCODED = "encoder_outputs"
_ENCODER_ONLY = ("input_ids", "input_features", "input_values", "inputs_embeds", "pixel_values")


def has_two_steps(source: nn.Module, example: Example) -> bool:
    """Say whether a call is the first step of cached encoder-decoder generation.

    Where it leaves that to the config, so do the calls that are traced: some sources hand an
    argument `use_cache` to their encoder, which refuses it.
    """
    config = getattr(source, "config", None)
    if config is None or not getattr(config, "is_encoder_decoder", False):
        return False
    wanted = example.skeleton.get("use_cache")
    used = getattr(config, "use_cache", False) if wanted is None else wanted
    return bool(used) and "decoder_input_ids" in example.tensors


def trace_encode(
    source: nn.Module,
    example: Example,
    axes: Mapping[str, tuple[int, ...]],
    attempts: tuple[Attempt, ...] = (),
) -> Trace | No:
    """Trace the first call: the encoder, and the decoder from an empty cache."""
    return trace(source, example.call, example.tensors, axes, attempts)


def trace_decode(
    source: nn.Module,
    example: Example,
    axes: Mapping[str, tuple[int, ...]],
    attempts: tuple[Attempt, ...] = (),
    *,
    new: int = _NEW,
) -> Stateful | No:
    """Trace a later call of so many tokens: the decoder from its cache and the encoder's result."""
    probe = _first_call(source, example)
    if isinstance(probe, No):
        return probe
    encoded, forms, output = probe
    given = _decode_tensors(example, encoded, new)
    states, state_axes = _decode_states(forms)
    skeleton = _decode_skeleton(example)
    dynamic = {n: _axes(t) for n, t in given.items()} | state_axes if axes else {}
    if dynamic and new == 1:
        dynamic["decoder_input_ids"] = (0,)

    def call(module: nn.Module, tensors: Mapping[str, Any]) -> Any:
        from attnopt.frontend.caches import build_both_halves

        cache = build_both_halves(forms, lambda layer, name: tensors[state_name(layer, name)])
        values = {
            **skeleton,
            _ENCODED: output(last_hidden_state=tensors[f"{_ENCODED}_last_hidden_state"]),
            "past_key_values": cache,
        }
        return replace(example, skeleton=values).call(module, tensors)

    result = trace(source, call, {**given, **states}, dynamic, attempts)
    return result if isinstance(result, No) else with_states(result, forms, "past_key_values")


def _axes(tensor: Tensor) -> tuple[int, ...]:
    return (0, 1) if tensor.dim() > 1 else (0,)


def _first_call(source: nn.Module, example: Example) -> tuple[Tensor, list[Any], type[Any]] | No:
    """Run the first call; return the encoder's states, the caches and the encoder's output class.

    A source may read attributes of its encoder's result that only its own class has.
    """
    from transformers.modeling_outputs import BaseModelOutput
    from transformers.utils.generic import ModelOutput

    from attnopt.frontend.caches import read_both_halves

    seen: list[type[Any]] = []
    find: Any = getattr(source, "get_encoder", None)
    encoder = find() if find is not None else None
    with contextlib.ExitStack() as hooks:
        if isinstance(encoder, nn.Module):
            handle = encoder.register_forward_hook(lambda m, args, out: seen.append(type(out)))
            hooks.callback(handle.remove)
        result = dry_run(source, example.call, example.tensors)
    if isinstance(result, No):
        return result
    hidden = result.encoder_last_hidden_state
    encoded = torch.zeros(tuple(map(int, hidden.shape)), dtype=hidden.dtype)
    output = next((c for c in seen if issubclass(c, ModelOutput)), BaseModelOutput)
    return encoded, read_both_halves(result.past_key_values), output


def _decode_tensors(example: Example, encoded: Tensor, new: int) -> dict[str, Tensor]:
    kept = {n: t for n, t in example.tensors.items() if n not in _ENCODER_ONLY}
    ids = example.tensors["decoder_input_ids"]
    kept["decoder_input_ids"] = ids[:, :1].repeat(1, new)
    if "decoder_attention_mask" in kept:
        mask = kept["decoder_attention_mask"]
        kept["decoder_attention_mask"] = mask.new_ones(mask.shape[0], _PAST + new)
    kept[f"{_ENCODED}_last_hidden_state"] = encoded
    return kept


def _decode_skeleton(example: Example) -> dict[str, Any]:
    return {n: v for n, v in example.skeleton.items() if n not in _ENCODER_ONLY}


def _decode_states(
    forms: list[Any],
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    tensors: dict[str, Tensor] = {}
    axes: dict[str, tuple[int, ...]] = {}
    for layer, form in enumerate(forms):
        for name, stored in form.tensors.items():
            shape = [int(s) for s in stored.shape]
            if not name.startswith("cross"):
                shape[2] = _PAST
            tensors[state_name(layer, name)] = torch.zeros(shape, dtype=stored.dtype)
            axes[state_name(layer, name)] = (0, 2)
    return tensors, axes


def decode_example(example: Example, result: Trace) -> Example:
    """Return the call of the "decode" part, whose encoder result is an argument."""
    slots = {n: Slot(n) for n in result.shapes if not n.startswith(_ENCODED)}
    return replace(example, skeleton={**_decode_skeleton(example), **slots})


def route(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call "decode" where the call brings a filled cache, else "encode"."""
    cache = kwargs.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        call = {k: v for k, v in kwargs.items() if k not in ("past_key_values", _ENCODED)}
        if kwargs.get(_ENCODED) is not None:
            raise ValueError(
                "argument encoder_outputs without past_key_values: give encoder inputs"
            )
        return program.parts["encode"](*args, **call)
    if args:
        raise TypeError("give the arguments of a decoding step by name")
    call = {k: v for k, v in kwargs.items() if k not in _ENCODER_ONLY}
    encoded = call.pop(_ENCODED, None)
    if encoded is None:
        raise ValueError("argument encoder_outputs is missing: the captured call had it")
    hidden: Tensor = encoded if isinstance(encoded, Tensor) else encoded[0]
    if call.get("attention_mask") is None and _takes_mask(program.parts["decode"]):
        call["attention_mask"] = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
    return program.parts["decode"](**call, **{f"{_ENCODED}_last_hidden_state": hidden})


def _takes_mask(part: Any) -> bool:
    """Tell whether a part reads the mask of the encoder's tokens."""
    calls = part.form.made_of
    return calls is not None and "attention_mask" in calls.inputs.shapes
