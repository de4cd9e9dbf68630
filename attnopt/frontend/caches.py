"""Caches of Transformers whose layers hold a program's states, while tracing and between steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from attnopt.ops.window import ring_of
from attnopt.program import Role, State

Kind = Literal["full", "linear", "both", "empty"]


class FullLayer(DynamicLayer):
    """Keys and values of all tokens seen; its length never depends on what is stored."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, seen: Any = None):
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.seen = seen
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values."""
        if self.seen is not None:
            self.seen += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return the number of tokens seen, 0 included, without a branch."""
        return self.keys.shape[-2] if self.seen is None else self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given as a negative one."""
        super().crop(tokens_to_remove)
        if self.seen is not None:
            self.seen -= abs(tokens_to_remove)


class LinearLayer(LinearAttentionLayer):
    """Convolution and recurrent states that are always present; zeros mean nothing was seen."""

    device: Any
    dtype: Any
    conv_states: dict[int, Any]
    conv_kernel_size: dict[int, Any]

    def __init__(self, states: Mapping[str, Tensor], count: int):
        super().__init__(number_of_states=count)
        for key, tensor in states.items():
            role, index = key.rsplit("_", 1)
            getattr(self, f"{role}_states")[int(index)] = tensor
            getattr(self, f"is_{role}_states_initialized")[int(index)] = True
            self.dtype, self.device = tensor.dtype, tensor.device
            if role == "conv":
                self.conv_kernel_size[int(index)] = tensor.shape[-1]
        self.has_previous_state = dict.fromkeys(range(count), True)

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Append new columns, and keep the last ones."""
        full = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        self.conv_states[state_idx] = full[..., -self.conv_kernel_size[state_idx] :]
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Replace the state."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class StoredLayer(CacheLayerMixin):
    """What a program keeps for one layer, by name, rings among it; only the program reads it."""

    is_sliding = False

    def __init__(self, tensors: Mapping[str, Tensor], seen: int):
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers leaves it untyped
        self.tensors = dict(tensors)
        self.seen = seen
        self.is_initialized = True

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(x) for name, x in self.tensors.items()}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is to be made: a program gives what a layer holds."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the program itself goes on from a state."""
        raise TypeError("the state of a rewritten layer is read by its program, not by attention")

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the tokens that a mask covers, and where they begin."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no longest text."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._each(torch.zeros_like)
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows where beam search wants them."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._each(lambda x: x[indices, ...])


@dataclass(frozen=True)
class LayerForm:
    """What one layer of a cache stores: a name for each tensor, with its role, shape and dtype."""

    kind: Kind
    tensors: dict[str, Tensor]
    count: int = 1
    # A class that keeps recurrent states in a list of its own, not in a layer.
    listed_in: type[DynamicCache] | None = None


def empty_cache(config: Any) -> DynamicCache:
    """Return a cache with nothing in it, as generation starts with."""
    return DynamicCache(config=config)


def read_layers(cache: Any) -> list[LayerForm]:
    """Return what each layer of a filled cache stores; raise TypeError for an unknown layer."""
    forms = [_read_layer(layer) for layer in cache.layers]
    forms += [LayerForm("empty", {}) for _ in range(len(forms), len(_listed(cache)))]
    for index, stored in enumerate(_listed(cache)):
        if isinstance(stored, Tensor):
            forms[index] = LayerForm("linear", {"recurrent_0": stored}, listed_in=type(cache))
    return forms


def _listed(cache: Any) -> list[Any]:
    """Return the recurrent states that a cache keeps in a list of its own, by layer."""
    found: list[Any] = getattr(cache, "linear_cache", [])
    return found


def read_both_halves(cache: EncoderDecoderCache) -> list[LayerForm]:
    """Return what each layer stores for its own tokens and for the encoder's."""
    own = read_layers(cache.self_attention_cache)
    crossed = read_layers(cache.cross_attention_cache)
    return [
        LayerForm("full", {**o.tensors, **{f"cross_{n}": t for n, t in c.tensors.items()}})
        for o, c in zip(own, crossed, strict=True)
    ]


def _read_layer(layer: Any) -> LayerForm:
    tensors: dict[str, Tensor] = {}
    linear = hasattr(layer, "recurrent_states")
    if linear:
        for role in ("conv", "recurrent"):
            for index, tensor in getattr(layer, f"{role}_states").items():
                if tensor is not None:
                    tensors[f"{role}_{index}"] = tensor
    if isinstance(getattr(layer, "keys", None), Tensor):
        tensors |= {"key": layer.keys, "value": layer.values}
    if getattr(layer, "indexer_keys", None) is not None:
        raise TypeError("an indexed cache layer has no keys-and-values form")
    full = "key" in tensors
    kind: Kind = "both" if linear and full else "linear" if linear else "full" if full else "empty"
    return LayerForm(kind, tensors, getattr(layer, "number_of_states", 1))


def build_cache(
    forms: list[LayerForm], tensor_of: Callable[[int, str], Tensor], seen: Any = None
) -> DynamicCache:
    """Return a cache of these layers; `tensor_of(layer, name)` gives the tensors."""
    cache = next((f.listed_in for f in forms if f.listed_in), DynamicCache)()
    cache.layer_class_to_replicate = None
    for index, form in enumerate(forms):
        values = {name: tensor_of(index, name) for name in form.tensors}
        cache.layers.append(_build_layer(form, values, seen))
        if form.listed_in is not None:
            cast("Any", cache).set_linear_cache(index, values["recurrent_0"])
    return cache


def _build_layer(form: LayerForm, values: dict[str, Tensor], seen: Any) -> Any:
    if form.kind == "full":
        return FullLayer(values["key"], values["value"], seen)
    if form.kind == "linear":
        return LinearLayer(values, form.count)
    if form.kind == "empty":
        return DynamicLayer()
    raise TypeError("a layer with both a recurrent state and keys has no program form")


def build_both_halves(
    forms: list[LayerForm], tensor_of: Callable[[int, str], Tensor]
) -> EncoderDecoderCache:
    """Return an encoder-decoder cache whose cross-attention half is filled already."""
    own, crossed = DynamicCache(), DynamicCache()
    for index in range(len(forms)):
        key, value = tensor_of(index, "key"), tensor_of(index, "value")
        own.layers.append(FullLayer(key, value))
        key, value = tensor_of(index, "cross_key"), tensor_of(index, "cross_value")
        crossed.layers.append(FullLayer(key, value))
    cache = EncoderDecoderCache(own, DynamicCache())
    cache.cross_attention_cache = crossed
    cache.is_updated = dict.fromkeys(range(len(forms)), True)
    return cache


class StateCache(DynamicCache):
    """The states of a program between two steps, as a cache that knows how many tokens it saw."""

    def __init__(self, states: tuple[State, ...], tensors: Mapping[str, Tensor], seen: int):
        super().__init__()
        self.layer_class_to_replicate = None
        by_layer: dict[int, dict[str, Tensor]] = {}
        for state in states:
            by_layer.setdefault(state.layer, {})[_layer_key(state)] = tensors[state.name]
        for index in range(max(by_layer, default=-1) + 1):
            self.layers.append(_stored_layer(by_layer.get(index, {}), seen))
        self.seen = seen

    @property
    def is_compileable(self) -> bool:
        """Tell generation that masks stay as they are: the graph makes its own of them."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given as a negative one."""
        if any(not layer.is_croppable for layer in self.layers):
            raise ValueError("a recurrent state cannot forget tokens: no assisted decoding")
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self.layers = []
        self.seen = 0


def cache_of_states(states: tuple[State, ...], tensors: Mapping[str, Tensor], seen: int) -> Any:
    """Return a cache that holds states, in two halves where some of them are cross-attention's."""
    own = tuple(s for s in states if not s.role.startswith("cross"))
    crossed = tuple(s for s in states if s.role.startswith("cross"))
    cache = StateCache(own, tensors, seen)
    if not crossed:
        return cache
    length = tensors[crossed[0].name].shape[2]
    return EncoderDecoderCache(cache, StateCache(crossed, tensors, length))


def _layer_key(state: State) -> str:
    if state.role in ("conv", "recurrent"):
        return f"{state.role}_{state.index}"
    if state.ring:
        return f"ring_{state.role}_{state.index}"
    return state.role.removeprefix("cross_")


def _stored_layer(tensors: dict[str, Tensor], seen: int) -> Any:
    if any(name.startswith("ring") for name in tensors):
        return StoredLayer(tensors, seen)
    if "key" in tensors:
        return FullLayer(tensors["key"], tensors["value"], seen)
    if tensors:
        return LinearLayer(tensors, 1 + max(int(k.rsplit("_", 1)[1]) for k in tensors))
    return DynamicLayer()


def cached_tensor(cache: Any, state: State) -> Tensor | None:
    """Return the tensor that a cache stores for a state, or None where it stores nothing yet."""
    if isinstance(cache, EncoderDecoderCache):
        crossed = state.role.startswith("cross")
        cache = cache.cross_attention_cache if crossed else cache.self_attention_cache
    if state.layer >= len(cache.layers):
        return None
    listed = _listed(cache)[state.layer : state.layer + 1]
    if state.role == "recurrent" and listed and isinstance(listed[0], Tensor):
        return listed[0]
    layer = cache.layers[state.layer]
    role: Role = state.role
    if isinstance(layer, StoredLayer):
        return layer.tensors.get(_layer_key(state))
    if role in ("conv", "recurrent"):
        stored: Tensor | None = getattr(layer, f"{role}_states")[state.index]
        return stored if layer.has_previous_state[state.index] else None
    if not layer.is_initialized:
        return None
    found: Tensor = layer.keys if role.endswith("key") else layer.values
    if not state.ring:
        return _unwindowed(layer, found)
    if state.shape[1] != found.shape[1]:
        raise TypeError(
            f"layer {state.layer} of the cache has {found.shape[1]} heads, and some of them have a "
            "state of their own here; start from the cache that this program returned"
        )
    slots = int(state.shape[2])
    return ring_of(found, int(layer.get_seq_length()), slots, state.first)


def _unwindowed(layer: Any, stored: Tensor) -> Tensor:
    """Lengthen what a sliding layer kept to all the tokens it saw; the window hides the rest."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return stored
    missing = layer.get_seq_length() - stored.shape[-2]
    return torch.nn.functional.pad(stored, (0, 0, missing, 0)) if missing > 0 else stored


def tokens_seen(cache: Any) -> int:
    """Return how many tokens a cache has seen."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if isinstance(cache, StateCache):
        return cache.seen
    layers = [layer for layer in cache.layers if not hasattr(layer, "recurrent_states")]
    return max((int(layer.get_seq_length()) for layer in layers), default=0)
