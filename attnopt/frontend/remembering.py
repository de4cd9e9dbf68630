"""States that a source keeps in its modules from call to call, beside or instead of its cache."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """A tensor that a call leaves in an attribute of a module; `name` says what it is."""

    module: str
    attribute: str
    layer: int
    name: str


def observed(source: nn.Module, call: Callable[[], Any]) -> tuple[Any, dict[Kept, Tensor]]:
    """Call a source, and return the result with the tensors that its modules keep of the call."""
    before = {path: dict(vars(module)) for path, module in source.named_modules()}
    result = call()
    found: dict[Kept, Tensor] = {}
    for path, module in source.named_modules():
        for attribute, value in vars(module).items():
            layer = _layer(path)
            if isinstance(value, Tensor) and value is not before[path].get(attribute) and layer:
                name = _name(attribute, [k for k in found if k.layer == int(layer)])
                found[Kept(path, attribute, int(layer), name)] = value
    return result, found


def _layer(path: str) -> str:
    return next((part for part in path.split(".") if part.isdigit()), "")


def _name(attribute: str, others: list[Kept]) -> str:
    role = "conv" if "conv" in attribute else "recurrent"
    return f"{role}_{sum(k.name.startswith(role) for k in others)}"


def with_kept(forms: list[Any], kept: Mapping[Kept, Tensor]) -> list[Any]:
    """Return the layers of a cache as if they also stored what the modules keep."""
    made: list[Any] = []
    for index, form in enumerate(forms):
        own = {k.name: t for k, t in kept.items() if k.layer == index}
        kind = "linear" if own and not form.tensors else form.kind
        count = max(form.count, len(own))
        made.append(replace(form, kind=kind, count=count, tensors={**form.tensors, **own}))
    return made


def remembering(
    source: nn.Module, cache: Any, kept: tuple[Kept, ...], call: Callable[[], Any]
) -> Any:
    """Call a source whose modules keep states, with those of the cache; return it with the cache.

    The modules get back what they kept before.
    """
    before = list(_attributes(source, kept))
    for one in kept:
        setattr(source.get_submodule(one.module), one.attribute, _stored(cache, one))
    result = call()
    for one, value in zip(kept, before, strict=True):
        module = source.get_submodule(one.module)
        _store(cache, one, getattr(module, one.attribute))
        setattr(module, one.attribute, value)
    return with_cache(result, cache)


def _attributes(source: nn.Module, kept: tuple[Kept, ...]) -> Iterator[Any]:
    for one in kept:
        yield getattr(source.get_submodule(one.module), one.attribute)


def _stored(cache: Any, one: Kept) -> Tensor:
    role, index = one.name.split("_")
    stored: Tensor = getattr(cache.layers[one.layer], f"{role}_states")[int(index)]
    return stored


def _store(cache: Any, one: Kept, value: Tensor) -> None:
    role, index = one.name.split("_")
    getattr(cache.layers[one.layer], f"{role}_states")[int(index)] = value


def with_cache(result: Any, cache: Any) -> Any:
    """Return a result in the class of Transformers that has a place for the cache, too."""
    from transformers import modeling_outputs

    cls = getattr(modeling_outputs, f"{type(result).__name__}WithPast")
    return cls(**{**result, "past_key_values": cache})
