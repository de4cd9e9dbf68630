"""Which sizes of an example input may vary, and example inputs for a model that comes without."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Inputs whose size is the model's own, beyond the batch.
_IMAGES = ("pixel_values", "noise", "bool_masked_pos", "input_features", "past_values")


def dynamic_axes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the axes of each tensor that should stay dynamic: batch, and sequence if any."""
    return {name: _axes(name, tensor) for name, tensor in tensors.items()}


def grown(tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Repeat the examples up to odd prime sizes, which are no multiple of anything in a model."""
    return {name: _grown(tensor, axes.get(name, ())) for name, tensor in tensors.items()}


def _grown(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        size = tensor.shape[axis]
        index = torch.arange(_prime_above(size), device=tensor.device) % size
        tensor = tensor.index_select(axis, index)
    return tensor


def _prime_above(size: int) -> int:
    candidate = size + 1
    while any(candidate % d == 0 for d in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return max(candidate, 3)


def is_fixed_by_name(name: str) -> bool:
    """Say whether an input's sizes beyond the batch are the model's own."""
    return name.startswith(_IMAGES)


def _axes(name: str, tensor: Tensor) -> tuple[int, ...]:
    if tensor.dim() == 0:
        return ()
    image = is_fixed_by_name(name) or tensor.dim() > 3
    tokens = not tensor.is_floating_point()
    if tensor.dim() == 1 or image:
        return (0,)
    if tokens or tensor.dim() == 3 or name == "input_values":
        return (0, 1)
    return (0,)


# The size of made-up examples: rows and tokens, and tokens of a decoder.
_ROWS = 2
_TOKENS = 16
_DECODED = 12


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Make up a call for a Transformers model from its configuration and forward signature."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} comes without an example call: give args or kwargs"
        )
    names = inspect.signature(model.forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    made = _main_input(main, config, names)
    if "attention_mask" in names and "input_ids" in made:
        made["attention_mask"] = torch.ones_like(made["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        made["decoder_input_ids"] = _tokens(config, _DECODED)
    if _two_towers(config) and "pixel_values" in names and "input_ids" in made:
        made["pixel_values"] = _image(config)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in made.items()}


def _main_input(main: str, config: Any, names: Mapping[str, Any]) -> dict[str, Tensor]:
    if main == "pixel_values" and "input_ids" not in names:
        return {main: _image(config)}
    if main == "input_values":
        return {main: _waveform(config)}
    if main == "input_features":
        return {main: _spectrogram(config)}
    if main == "input_ids" or "input_ids" in names:
        return {"input_ids": _tokens(config, _TOKENS)}
    if main == "pixel_values":
        return {main: _image(config)}
    raise ValueError(f"cannot make up the input {main!r}: give args or kwargs as an example call")


def _tokens(config: Any, count: int) -> Tensor:
    text = config.get_text_config(decoder=False)
    vocabulary = int(getattr(text, "vocab_size", 0) or 32)
    return torch.randint(
        min(4, vocabulary - 1),
        vocabulary,
        (_ROWS, count),
        generator=torch.Generator().manual_seed(0),
    )


def _two_towers(config: Any) -> bool:
    return hasattr(config, "text_config") and hasattr(config, "projection_dim")


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return default


def _image(config: Any) -> Tensor:
    config = _first(config, ("vision_config", "encoder", "backbone_config"), config)
    size = _first(config, ("image_size", "pretrain_image_size"), 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = int(_first(config, ("num_channels", "in_channels"), 3))
    frames = getattr(config, "num_frames", None)
    lead = (_ROWS,) if frames is None else (_ROWS, int(frames))
    return torch.zeros(*lead, channels, int(height), int(width))


def _waveform(config: Any) -> Tensor:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.zeros(_ROWS, config.max_length, config.num_mel_bins)
    return torch.zeros(_ROWS, 16000)


def _spectrogram(config: Any) -> Tensor:
    bins = int(_first(config, ("num_mel_bins", "input_feat_per_channel"), 80))
    if hasattr(config, "max_source_positions") and hasattr(config, "input_feat_per_channel"):
        return torch.zeros(_ROWS, 64, bins)
    return torch.zeros(_ROWS, bins, 2 * int(getattr(config, "max_source_positions", 1500)))
