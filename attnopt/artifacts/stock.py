"""Whether a stock Transformers class can express a rewritten program, and with which config."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from attnopt.nouns import No
from attnopt.perlayer import MARK, TURN, is_marked
from attnopt.program import Program
from attnopt.weights import described

# What configs call the number of key and value heads.
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
    "kv_heads",
)


def stock_class(program: Program) -> Any | No:
    """Return the Transformers class that a program was captured from."""
    import transformers

    found = getattr(transformers, program.name, None)
    if found is None or not issubclass(found, transformers.PreTrainedModel):
        return No(f"{program.name} is no class of Transformers, so nothing stock can hold it")
    return found


def stock_config(program: Program) -> Any | No:
    """Return the source's config, changed so that its class has the program's shapes.

    The class itself is the judge: it is built without memory from each candidate, and the shapes of
    its tensors are compared with those of the program.
    """
    cls = stock_class(program)
    if isinstance(cls, No):
        return cls
    wanted = shapes_of(program)
    differences = ""
    for config in _candidates(program):
        found = _shapes_of_class(cls, config)
        wrong = next((names for names, shape in found if not _holds(wanted, names, shape)), None)
        if wrong is None:
            return config
        differences = f"{wrong[0]} would differ from {[wanted.get(n) for n in wrong]}"
    return No(f"no config makes {cls.__name__} hold the program: {differences}")


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer that a program knows by name."""
    return {
        binding.name: described(program.weights, binding.name).shape
        for binding in program.bindings.values()
        if binding.kind in ("parameter", "buffer")
    }


def build(cls: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model of a stock class that holds the given weights."""
    from transformers import initialization

    config.dtype = _usual_dtype(weights)
    with TURN, initialization.no_init_weights():
        model: Any = cls._from_config(config)
    model.tie_weights()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in weights:
                tensor.copy_(weights[name])
    made: nn.Module = model.eval()
    return made


def hollow(cls: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model of a stock class in the form of the given weights, without memory."""
    config.dtype = _usual_dtype(weights)
    with TURN, torch.device("meta"):
        model: Any = cls._from_config(config)
    model.tie_weights()
    made: nn.Module = model.eval()
    return made


def _usual_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return the type that most of the weights have."""
    found = [described(weights, name).dtype for name in weights]
    dtypes = [dtype for dtype in found if dtype.is_floating_point]
    return max(set(dtypes), key=dtypes.count)


def tier_of(config: Any) -> int:
    """Return the tier of an artifact with a config: 1 where its layers differ, else 0."""
    return 1 if is_marked(config) else 0


def _candidates(program: Program) -> Iterator[Any]:
    """Yield the config as it is, then with the key and value heads that it may need."""
    config = unmarked(program.config)
    yield copy.deepcopy(config)
    heads = {site.kv_heads for site in program.sites}
    layers = _layers(program)
    for name in _KV_HEADS:
        changed = copy.deepcopy(config)
        inner = changed.get_text_config()
        if not isinstance(getattr(inner, name, None), int):
            continue
        if len(heads) == 1:
            setattr(inner, name, next(iter(heads)))
            yield changed
        elif layers is not None and inner is changed:
            setattr(changed, name, max(heads))
            yield _per_layer(changed, name, layers)


def unmarked(config: Any) -> Any:
    """Return a copy of a config with all layers alike, where attnopt wrote how they differ."""
    found = copy.deepcopy(config)
    if is_marked(found):
        found.per_layer_config = None
    vars(found).pop(MARK, None)
    return found


def kv_heads_of(config: Any) -> str | None:
    """Return what a config calls its number of key and value heads, if it has one."""
    return next((n for n in _KV_HEADS if isinstance(getattr(config, n, None), int)), None)


def _layers(program: Program) -> dict[int, int] | None:
    """Return the key and value heads of each layer; None where not every layer has one site."""
    found: dict[int, int] = {}
    for site in program.sites:
        numbers = [int(part) for part in site.module.split(".") if part.isdigit()]
        if len(numbers) != 1 or numbers[0] in found:
            return None
        found[numbers[0]] = site.kv_heads
    return found


def _per_layer(config: Any, name: str, layers: Mapping[int, int]) -> Any:
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {layer: {name: heads} for layer, heads in layers.items()}
    setattr(config, MARK, {"format": 1, "min_reader": 1, "tier": 1})
    return config


def _holds(
    wanted: Mapping[str, tuple[int, ...]], names: tuple[str, ...], shape: tuple[int, ...]
) -> bool:
    """Tell whether a tensor of the class, by any of its names, is one of the program."""
    held = [wanted[name] for name in names if name in wanted]
    return bool(held) and all(found == shape for found in held)


def _shapes_of_class(cls: Any, config: Any) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the names (several where weights are tied) and the shape of every stored tensor."""
    with TURN, torch.device("meta"):
        model = cls._from_config(config)
    model.tie_weights()
    names: dict[int, tuple[str, ...]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
        shapes[id(tensor)] = tuple(tensor.shape)
    return [(names[key], shapes[key]) for key in names]
