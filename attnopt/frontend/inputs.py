"""Which sizes of an example input may vary, and example inputs for a model that comes without."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Inputs whose size is the model's own, beyond the batch.
_IMAGES = ("pixel_values", "noise", "bool_masked_pos", "input_features", "past_values")


def dynamic_axes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the axes of each tensor that should stay dynamic: batch, and sequence where it is one."""
    return {name: _axes(name, tensor) for name, tensor in tensors.items()}


def grown(
    tensors: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
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


def _axes(name: str, tensor: Tensor) -> tuple[int, ...]:
    if tensor.dim() == 0:
        return ()
    image = name.startswith(_IMAGES) or tensor.dim() > 3
    tokens = not tensor.is_floating_point()
    if tensor.dim() == 1 or image:
        return (0,)
    if tokens or tensor.dim() == 3 or name == "input_values":
        return (0, 1)
    return (0,)
