"""Compare the exact program of a zoo entry with float64, and its mutants, too.

Weights stay, inputs are drawn anew: eight draws, padded at the left and at the right in turn.
Language models run a prefill and decode steps with their cache. Only valid positions count.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
import zoo
from parity import Gap, Verdict, exactly, judge
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, MoeModelOutputWithPast
from zoo_table import V

import attnopt
from attnopt.program import Program

DRAWS: Final = 8
MUTANT_DRAWS: Final = 2
PREFILL_AND_STEPS: Final = (12, 1, 1, 2)
DECODER_STEPS: Final = (8, 1, 1, 2)
PADDED: Final = 3
OUTPUTS: Final = (
    "logits", "last_hidden_state", "encoder_last_hidden_state", "pooler_output", "text_embeds",
    "image_embeds",
)  # fmt: skip
NEEDS_POSITIONS: Final = ("bamba",)
"""A stock decode step of these numbers its tokens from 0 where no positions are given."""

STEPS: Final = {"prophetnet": (9, 1, 1, 1), "jamba": (13, 1, 1, 1)}
"""The stock models of these step by one token only; jamba forgets its past in longer steps."""
FORGETFUL: Final = ("minimax",)
"""A stock step of these masks as if it had no past: only the programs run in pieces."""
ENCODED: Final = {"switch_transformers": MoeModelOutputWithPast}
"""What the stock model takes as encoder_outputs."""

Call = dict[str, Any]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A zoo entry with its call."""

    name: str
    task: str
    model: Any
    kwargs: Call

    @property
    def family(self) -> str:
        return zoo.ZOO[self.name].family


def subject(name: str, attention: str = "eager", task: str = "base", **options: Any) -> Subject:
    """Build an entry."""
    pad = "left" if task == "lm" else "right"
    model, kwargs, _ = zoo.build(name, attention, task=task, pad=pad, **options)
    return Subject(name, task, model, kwargs)


@lru_cache(maxsize=16)
def captured(
    name: str, attention: str = "eager", task: str = "base", **options: Any
) -> tuple[Subject, Program]:
    """Build an entry and capture it, once for tests that follow each other; nobody changes it."""
    made = subject(name, attention, task, **options)
    return made, attnopt.capture(made.model, (), made.kwargs)


def drawn(subject: Subject, draw: int) -> Call:
    """Draw other inputs of the same shapes; even draws are padded at the left."""
    generator = torch.Generator().manual_seed(1000 + draw)
    made = {key: _like(key, t, generator) for key, t in subject.kwargs.items()}
    mask = made.get("attention_mask")
    if mask is None:
        return made
    mask = torch.ones_like(mask)
    mask[1, slice(0, PADDED) if draw % 2 == 0 else slice(-PADDED, None)] = 0
    pad = getattr(subject.model.config, "pad_token_id", None)
    ids = made.get("input_ids")
    if ids is not None and pad is not None:
        made["input_ids"] = torch.where(mask.bool(), ids, pad)
    return {**made, "attention_mask": mask}


def _like(key: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if key.endswith("input_ids"):
        return torch.randint(5, V, tensor.shape, generator=generator)
    if key == "noise":
        return torch.rand(tensor.shape, generator=generator)
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=generator)
    return tensor


@torch.no_grad()
def run(subject: Subject, model: Callable[..., Any], call: Call) -> Named:
    """Call a model, or feed it in pieces, and name the outputs that are compared."""
    torch.manual_seed(0)
    whole = subject.name in FORGETFUL and not isinstance(model, attnopt.Program)
    if subject.task == "base" or whole:
        return compared(model(**call))
    if subject.family == "encdec":
        return _decoder_pieces(subject, model, call)
    return _pieces(subject, model, call)


def compared(output: Any) -> Named:
    """Name an output's tensors that are compared."""
    found = {
        name: output[name]
        for name in OUTPUTS
        if hasattr(output, "keys") and isinstance(output.get(name), Tensor)
    }
    return found or {"first": zoo.first_tensor(output)}


def _pieces(subject: Subject, model: Callable[..., Any], call: Call) -> Named:
    """Run a prefill and steps; a model without a cache runs in one piece."""
    ids, mask = call["input_ids"], call["attention_mask"]
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    past: dict[str, Any] = {}
    at, logits = 0, []
    for count in STEPS.get(subject.name, PREFILL_AND_STEPS):
        piece = {"input_ids": ids[:, at : at + count], "attention_mask": mask[:, : at + count]}
        if subject.name in NEEDS_POSITIONS:
            piece["position_ids"] = positions[:, at : at + count]
        result = model(**piece, **past)
        logits.append(result.logits)
        at += count
        if "past_key_values" not in result:
            return compared(model(**call))
        past = {"past_key_values": result.past_key_values}
    return {"logits": torch.cat(logits, 1)}


def _decoder_pieces(subject: Subject, model: Callable[..., Any], call: Call) -> Named:
    """Run the encoder with the decoder's first tokens, then the decoder in steps."""
    ids, at, past, logits = call["decoder_input_ids"], 0, {}, []
    encoder = {"input_ids", "input_features"}
    encoded: dict[str, Tensor] = {}
    for count in STEPS.get(subject.name, DECODER_STEPS):
        rest = {k: v for k, v in call.items() if not past or k not in encoder}
        result = model(**{**rest, "decoder_input_ids": ids[:, at : at + count]}, **past)
        if not encoded:
            encoded = {"encoder_last_hidden_state": result.encoder_last_hidden_state}
        logits.append(result.logits)
        at += count
        kind = ENCODED.get(subject.name, BaseModelOutput)
        hidden = kind(last_hidden_state=encoded["encoder_last_hidden_state"])
        past = {"past_key_values": result.past_key_values, "encoder_outputs": hidden}
    return {"logits": torch.cat(logits, 1), **encoded}


def valid(subject: Subject, call: Call, name: str, tensor: Tensor) -> Tensor | None:
    """Mark the positions of an output that count; None for all."""
    mask = call.get("attention_mask")
    if mask is None or tensor.dim() < 3 or tensor.shape[:2] != mask.shape:
        return None
    if subject.family == "encdec" and not name.startswith("encoder"):
        return None
    return mask.bool()


@dataclass
class Distances:
    """Pooled distances from float64 of several models on the same draws."""

    gaps: dict[str, Gap] = field(default_factory=dict)

    def add(self, subject: Subject, call: Call, label: str, got: Named, want: Named) -> None:
        gap = self.gaps.setdefault(label, Gap())
        for name, tensor in want.items():
            gap.add(got[name], tensor, valid(subject, call, name, tensor))


def in_float64(subject: Subject) -> Callable[..., Any]:
    """Return the model in float64, called with the inputs of the float32 one."""
    call = exactly(_able_in_float64(copy.deepcopy(subject.model).double()))

    def run_wide(**kwargs: Any) -> Any:
        return call(**{key: _wide(value) for key, value in kwargs.items()})

    return run_wide


def _able_in_float64(model: Any) -> Any:
    """Choose the spellings of the same function that the stock code allows in float64."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    return model


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def parity(subject: Subject, programs: Mapping[str, Callable[..., Any]]) -> dict[str, Verdict]:
    """Judge programs by their distance from float64, over all draws."""
    reference, distances = in_float64(subject), Distances()
    for draw in range(DRAWS):
        call = drawn(subject, draw)
        want = run(subject, reference, call)
        for label, model in {"stock": subject.model, **programs}.items():
            distances.add(subject, call, label, run(subject, model, call), want)
    stock = distances.gaps["stock"]
    return {label: judge(distances.gaps[label], stock) for label in programs}


def mutant_verdicts(subject: Subject) -> Iterator[tuple[str, Verdict]]:
    """Judge the stock model with each mutation that finds something to break."""
    reference, distances = in_float64(subject), Distances()
    calls = [drawn(subject, draw) for draw in range(MUTANT_DRAWS)]
    wanted = [run(subject, reference, call) for call in calls]
    for call, want in zip(calls, wanted, strict=True):
        distances.add(subject, call, "stock", run(subject, subject.model, call), want)
    for label, broken in zoo.mutants(subject.model):
        with broken as hits:
            for call, want in zip(calls, wanted, strict=True):
                distances.add(subject, call, label, run(subject, subject.model, call), want)
        if hits:
            yield label, judge(distances.gaps[label], distances.gaps["stock"])
