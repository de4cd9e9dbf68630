"""Nested values taken apart: a skeleton keeps the structure, and its tensors go in a flat list.

Tuples, lists, dicts, Transformers outputs, other dataclasses and key-value caches are structure;
every other value that is not a tensor is kept in the skeleton as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Put = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor, by its number or name in the flat form."""

    key: int | str


@dataclass(frozen=True)
class Made:
    """An object made by calling its class with keyword arguments."""

    cls: type
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CacheLayers:
    """A key-value cache: for each layer the tensors it stores, by name."""

    layers: tuple[Any, ...]
    cross: tuple[Any, ...] | None = None


def take_apart(value: Any, put: Put, path: str = "") -> Any:
    """Return the skeleton of a value; `put(path, tensor)` stores a tensor and returns its slot."""

    def inner(item: Any, key: object) -> Any:
        return take_apart(item, put, f"{path}_{key}" if path else str(key))

    if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return put(path, value)
    if is_cache(value):
        return _take_cache_apart(value, put, path)
    if is_dataclass(value) and not isinstance(value, type):
        present = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return Made(type(value), {k: inner(v, k) for k, v in present.items()})
    if isinstance(value, Mapping):
        made = {k: inner(v, k) for k, v in value.items()}
        return made if type(value) is dict else Made(type(value), made)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = {k: getattr(value, k) for k in getattr(value, "_fields")}  # noqa: B009
        return Made(type(value), {k: inner(v, k) for k, v in named.items()})
    if isinstance(value, list | tuple):
        return type(value)(inner(v, i) for i, v in enumerate(value))
    return value


def put_together(skeleton: Any, get: Callable[[int | str], Any]) -> Any:
    """Rebuild a value from its skeleton; `get(key)` gives the tensor of a slot."""
    if isinstance(skeleton, Slot):
        return get(skeleton.key)
    if isinstance(skeleton, CacheLayers):
        return _put_cache_together(skeleton, get)
    if isinstance(skeleton, Made):
        return skeleton.cls(**{k: put_together(v, get) for k, v in skeleton.arguments.items()})
    if type(skeleton) is dict:
        return {k: put_together(v, get) for k, v in skeleton.items()}
    if type(skeleton) in (list, tuple):
        return type(skeleton)(put_together(v, get) for v in skeleton)
    return skeleton


def cache_slots(skeleton: Any) -> list[int | str]:
    """List the slots of a skeleton that lie in a key-value cache."""
    if isinstance(skeleton, CacheLayers):
        held = (*skeleton.layers, *(skeleton.cross or ()))
        return [slot.key for layer in held for slot in layer.values() if isinstance(slot, Slot)]
    if isinstance(skeleton, Made):
        skeleton = skeleton.arguments
    inner = skeleton.values() if isinstance(skeleton, dict) else skeleton
    if not isinstance(inner, list | tuple) and inner is skeleton:
        return []
    return [key for value in inner for key in cache_slots(value)]


def keeps_tensors(skeleton: Any) -> str | None:
    """Name the class of an object in a skeleton that hides tensors, which are those of one call."""
    if isinstance(skeleton, Slot | CacheLayers):
        return None
    inner = skeleton.arguments if isinstance(skeleton, Made) else skeleton
    if isinstance(inner, Mapping):
        inner = tuple(inner.values())
    if isinstance(inner, list | tuple):
        return next((name for name in map(keeps_tensors, inner) if name is not None), None)
    kept = vars(inner).values() if hasattr(inner, "__dict__") else ()
    lists = [x if isinstance(x, list | tuple) else [x] for x in kept]
    hides = any(isinstance(x, Tensor) for found in lists for x in found)
    return type(inner).__name__ if hides else None


def is_cache(value: Any) -> bool:
    """Say whether a value is a cache of Transformers, without importing it."""
    return any(c.__module__ == "transformers.cache_utils" for c in type(value).__mro__[:-1])


def _take_cache_apart(cache: Any, put: Put, path: str) -> CacheLayers:
    if hasattr(cache, "cross_attention_cache"):
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return CacheLayers(
            layers=_layers_apart(own, put, path),
            cross=_layers_apart(cross, put, f"{path}_cross"),
        )
    return CacheLayers(layers=_layers_apart(cache, put, path))


def _layers_apart(cache: Any, put: Put, path: str) -> tuple[Any, ...]:
    from attnopt.frontend.caches import read_layers

    return tuple(
        {name: put(f"{path}_{index}_{name}", tensor) for name, tensor in form.tensors.items()}
        for index, form in enumerate(read_layers(cache))
    )


def _put_cache_together(skeleton: CacheLayers, get: Callable[[int | str], Any]) -> Any:
    from transformers import EncoderDecoderCache

    own = filled_cache(put_together(skeleton.layers, get))
    if skeleton.cross is None:
        return own
    return EncoderDecoderCache(own, filled_cache(put_together(skeleton.cross, get)))


def filled_cache(layers: tuple[Any, ...]) -> Any:
    """Return a cache of full layers that holds these keys and values as they are."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for tensors in layers:
        layer = DynamicLayer()
        if tensors:
            key = tensors["key"]
            layer.keys, layer.values = key, tensors["value"]
            layer.dtype, layer.device = key.dtype, key.device
            layer.is_initialized = True
        cache.layers.append(layer)
    return cache
