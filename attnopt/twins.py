"""A twin of a checkpoint: its class and config with two layers, few channels and random weights.

What shapes a rewrite stays: heads, key heads, vocabulary, windows, the kinds of layers. Widths
shrink together as far as the class accepts them; the class itself, captured, is the judge.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError

from attnopt.artifacts.saving import carry_over
from attnopt.artifacts.stock import unmarked
from attnopt.frontend import capture
from attnopt.frontend.checkpoints import class_of
from attnopt.nouns import No
from attnopt.program import Program

LAYERS: Final = 2
_CHANNELS: Final = 8
_NEURONS: Final = 512
_COUNTS: Final = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"),
)
_HEADS: Final = (
    *("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"),
    "decoder_attention_heads",
)
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_TURNED, _PLAIN = "qk_rope_head_dim", "qk_nope_head_dim"
_HEAD_WIDTHS: Final = ("head_dim", "d_kv", _TURNED, _PLAIN, "v_head_dim")
_RANKS: Final = ("q_lora_rank", "kv_lora_rank")
_INNER: Final = (
    *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"),
    *("mlp_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
_CHOSEN: Final = ("num_experts_per_tok", "top_k")
# Groups of experts, those that a token chooses among, and the layers before the first with experts.
_ROUTING: Final = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": LAYERS - 1}


@dataclass(frozen=True)
class Twin:
    """Where a twin lies, what was captured of it, and how far it was made smaller."""

    folder: Path
    program: Program
    layers: int
    width: int
    parameters: int


def twin(source: Path, folder: Path) -> Twin:
    """Write a twin of a checkpoint, its tokenizer beside it; ValueError where none can be made."""
    cls, config = class_of(source)
    refusals: list[No] = []
    for number, small in enumerate(_smaller(unmarked(config))):
        place = folder / f"twin-{number}"
        made = (
            No(small, str(source)) if isinstance(small, str) else _tried(cls, small, source, place)
        )
        if isinstance(made, Twin):
            return made
        refusals.append(made)
    raise ValueError(f"no small twin of {source} can be made: {refusals[-1]}")


def _tried(cls: Any, config: Any, source: Path, place: Path) -> Twin | No:
    """Build the class from a config, save it and capture it whole."""
    torch.manual_seed(0)
    try:
        model = cls._from_config(config)
    except (ValueError, TypeError, RuntimeError, AssertionError, KeyError, IndexError) as error:
        return No(f"its class refuses the sizes: {error}", place.name)
    model.save_pretrained(place)
    carry_over(source, place)
    try:
        program = capture(place)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return No(f"it cannot be captured: {error}", place.name)
    if program.uncaptured:
        return No(f"it cannot be captured whole: {program.uncaptured[0].why}", place.name)
    count = sum(p.numel() for p in model.parameters())
    inner = config.get_text_config()
    return Twin(place, program, _first(inner, _COUNTS), _first(inner, _WIDTHS), count)


def _smaller(config: Any) -> Iterator[Any]:
    """Yield smaller configs, the smallest first; a text says why one cannot be made."""
    for widths, inner in ((True, True), (False, True), (False, False)):
        made = copy.deepcopy(config)
        try:
            for part in _parts(made):
                _shrink(part, widths=widths, inner=inner)
            yield type(made).from_dict(made.to_dict())
        except (ValueError, TypeError, StrictDataclassError) as error:
            yield f"its config refuses the sizes: {' '.join(str(error).split())}"


def _parts(config: Any) -> Iterator[Any]:
    """Yield a config and those inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _shrink(config: Any, *, widths: bool, inner: bool) -> None:
    """Make one config small."""
    for name in _numbers(config, _COUNTS):
        _cut_lists(config, getattr(config, name))
    for name in _numbers(config, _COUNTS):
        setattr(config, name, min(getattr(config, name), LAYERS))
    width = max((getattr(config, n) for n in _numbers(config, _WIDTHS)), default=0)
    if widths and width:
        width = _narrow(config)
    if inner and width:
        for name in _numbers(config, _INNER):
            setattr(config, name, min(getattr(config, name), 2 * width, _NEURONS))
        for name in _numbers(config, _EXPERTS):
            setattr(config, name, min(getattr(config, name), 4))
        for name in _numbers(config, _CHOSEN):
            setattr(config, name, min(getattr(config, name), 2))
        for name in _numbers(config, tuple(_ROUTING)):
            setattr(config, name, min(getattr(config, name), _ROUTING[name]))


def _cut_lists(config: Any, layers: int) -> None:
    """Keep of lists by layer the first, and the first that differs from it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == layers > LAYERS:
            other = next((i for i, x in enumerate(value) if x != value[0]), 1)
            setattr(config, name, type(value)([value[0], value[other]]))


def _narrow(config: Any) -> int:
    """Give every head few channels, and return the width that follows."""
    heads = math.lcm(*{getattr(config, n) for n in _numbers(config, _HEADS)} or {1})
    channels = 2 * _CHANNELS if heads <= 16 else _CHANNELS if heads <= 64 else _CHANNELS // 2
    for name in _numbers(config, _HEAD_WIDTHS):
        setattr(config, name, min(getattr(config, name), channels))
    if _numbers(config, ("qk_head_dim",)):
        config.qk_head_dim = getattr(config, _TURNED) + getattr(config, _PLAIN)
    width = heads * channels
    for name in _numbers(config, _WIDTHS):
        setattr(config, name, min(getattr(config, name), width))
    for name in _numbers(config, _RANKS):
        setattr(config, name, min(getattr(config, name), width // 8))
    return width


def _numbers(config: Any, names: Sequence[str]) -> list[str]:
    """Return the names that a config has as whole numbers, each once where two mean the same."""
    aliases: Mapping[str, str] = getattr(config, "attribute_map", {})
    found = {
        aliases.get(name, name): None
        for name in names
        if isinstance(getattr(config, name, None), int)
        and not isinstance(getattr(config, name, None), bool)
    }
    return [name for name in found if getattr(config, name) > 0]


def _first(config: Any, names: Sequence[str]) -> int:
    found = _numbers(config, names)
    return int(getattr(config, found[0])) if found else 0
