"""Whether a stock Transformers class can express a rewritten program, and with which config."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from attnopt.nouns import Mlp, No, Site
from attnopt.perlayer import MARK, TURN, is_marked
from attnopt.program import Program
from attnopt.tying import tie
from attnopt.weights import described

# What configs call the number of key and value heads, of query heads, and of neurons.
_KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
    "kv_heads",
)
_HEADS = ("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads")
_NEURONS = ("intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size", "mlp_dim")
# Classes that demand a form of their heads, and one of the same tensors that does not.
_FREER = {"LlamaForCausalLM": ("MistralForCausalLM", {"sliding_window": None})}


def stock_class(program: Program) -> Any | No:
    """Return the Transformers class that a program was captured from."""
    import transformers

    found = getattr(transformers, program.name, None)
    if found is None or not issubclass(found, transformers.PreTrainedModel):
        return No(f"{program.name} is no class of Transformers, so nothing stock can hold it")
    return found


def stock_form(program: Program) -> tuple[Any, Any] | No:
    """Return the stock class and the config that have the program's shapes.

    The class itself is the judge: it is built without memory from each candidate, and the shapes of
    its tensors are compared with those of the program.
    """
    first = stock_class(program)
    if isinstance(first, No):
        return first
    wanted = _shapes_by_name(program)
    differences = "its shapes"
    for cls, config in _forms(program, first):
        try:
            found = _shapes_of_class(cls, config, program.weights)
        except ValueError as error:
            differences = str(error)
            continue
        wrong = next((names for names, shape in found if not _holds(wanted, names, shape)), None)
        if wrong is None:
            return cls, config
        differences = f"{wrong[0]} would differ from {[wanted.get(n) for n in wrong]}"
    return No(f"no config makes {first.__name__} hold the program: {differences}")


def stock_config(program: Program) -> Any | No:
    """Return the config that `stock_form` finds."""
    found = stock_form(program)
    return found if isinstance(found, No) else found[1]


def _forms(program: Program, cls: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the source's class with every candidate config, then a class of the same tensors."""
    import transformers

    for config in _candidates(program):
        if config is not None:
            yield cls, config
    other, changes = _FREER.get(cls.__name__, ("", {}))
    if not other:
        return
    freer = getattr(transformers, other)
    for config in _candidates(program, freer.config_class, changes):
        if config is not None:
            yield freer, config


def shapes_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer that a program knows by name."""
    return {
        binding.name: described(part.weights, binding.name).shape
        for part in (program, *program.parts.values())
        for binding in part.bindings.values()
        if binding.kind in ("parameter", "buffer")
    }


def _shapes_by_name(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight: of those, too, that the source holds and never reads."""
    unread = {name: described(program.weights, name).shape for name in program.weights}
    return unread | shapes_of(program)


def build(cls: Any, config: Any, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a model of a stock class that holds the given weights."""
    from transformers import initialization

    config.dtype = _usual_dtype(weights)
    with TURN, initialization.no_init_weights():
        model: Any = cls._from_config(config)
    tie(model, _alike_in(weights))
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
    tie(model, _alike_in(weights))
    made: nn.Module = model.eval()
    return made


def _alike_in(weights: Mapping[str, torch.Tensor]) -> Callable[[str, str], bool]:
    """Tell whether two names may be one weight: those that are both known have the same values."""

    def alike(one: str, other: str) -> bool:
        return not {one, other} <= weights.keys() or torch.equal(weights[one], weights[other])

    return alike


def _usual_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return the type that most of the weights have."""
    found = [described(weights, name).dtype for name in weights]
    dtypes = [dtype for dtype in found if dtype.is_floating_point]
    return max(set(dtypes), key=dtypes.count)


def tier_of(config: Any) -> int:
    """Return the tier of an artifact with a config: 1 where its layers differ, else 0."""
    return 1 if is_marked(config) else 0


def _candidates(
    program: Program, kind: Any = None, changes: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Yield the config as it is, then with the heads and neurons that the program has.

    With `kind` it becomes a config of that class. None stands for one that its class refuses.
    """
    plain = unmarked(program.config)
    if kind is None:
        yield copy.deepcopy(plain)
    inner = plain.get_text_config()
    layers = _layers(program, inner)
    if layers is None or (inner is not plain and not _alike(layers)):
        return
    yield _changed(plain, layers, kind, changes or {})


def _changed(
    plain: Any, layers: Mapping[int, Mapping[str, int]], kind: Any, changes: Mapping[str, Any]
) -> Any | None:
    """Return a config with the numbers of each layer, as its class takes them."""
    named = next(iter(layers.values()))
    first = {name: max(of[name] for of in layers.values()) for name in named}
    try:
        if kind is not None:
            held = {k: v for k, v in plain.to_dict().items() if k not in _OF_A_CLASS}
            made = kind(**{**held, **first, **changes})
        else:
            made = copy.deepcopy(plain)
            inner = made.get_text_config()
            for name, number in first.items():
                setattr(inner, name, number)
            made = type(made).from_dict(made.to_dict())
    except (ValueError, TypeError, StrictDataclassError):
        return None
    if _alike(layers):
        return made
    differing = [n for n in first if len({of[n] for of in layers.values()}) > 1]
    made.allow_global_per_layer_attribute_access = True
    made.per_layer_config = {
        layer: {name: of[name] for name in differing} for layer, of in layers.items()
    }
    setattr(made, MARK, {"format": 1, "min_reader": 1, "tier": 1})
    return made


_OF_A_CLASS = ("model_type", "architectures", "transformers_version", "auto_map")


def _alike(layers: Mapping[int, Mapping[str, int]]) -> bool:
    return len({tuple(sorted(of.items())) for of in layers.values()}) == 1


def _layers(program: Program, config: Any) -> dict[int, dict[str, int]] | None:
    """Return what the config says of each layer, of all at once where layers cannot be told apart.

    None where they cannot, and differ.
    """
    named = {n: next((x for x in known if _is_number(config, x)), None) for n, known in _NAMES}
    if hasattr(config, "head_dim"):
        named["head_dim"] = "head_dim"
    found: dict[int, dict[str, int]] = {}
    for layer, numbers in _numbers(program):
        known = found.setdefault(layer, {})
        for what, number in numbers.items():
            name = named.get(what)
            if name is not None and known.setdefault(name, number) != number:
                return None
    if not found or len({tuple(sorted(of)) for of in found.values()}) > 1:
        return None
    return dict(sorted(found.items()))


def _numbers(program: Program) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield what each site and MLP says of its layer; of layer 0 where not all are numbered."""
    things: tuple[Site | Mlp, ...] = (*program.sites, *program.mlps)
    layers = [_number(t.module) for t in things]
    numbered = None not in layers
    for thing, layer in zip(things, layers, strict=True):
        place = layer if numbered and layer is not None else 0
        if isinstance(thing, Mlp):
            yield place, {"neurons": thing.neurons}
        else:
            told = {"heads": thing.heads, "kv_heads": thing.kv_heads, "head_dim": thing.head_dim}
            yield place, told


_NAMES = (("heads", _HEADS), ("kv_heads", _KV_HEADS), ("neurons", _NEURONS))


def _is_number(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name, None), int)


def _number(module: str) -> int | None:
    """Return the number of the layer that a module lies in, where it lies in one."""
    numbers = [int(part) for part in module.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


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


def _holds(
    wanted: Mapping[str, tuple[int, ...]], names: tuple[str, ...], shape: tuple[int, ...]
) -> bool:
    """Tell whether a tensor of the class, by any of its names, is one of the program."""
    held = [wanted[name] for name in names if name in wanted]
    return bool(held) and all(found == shape for found in held)


def _shapes_of_class(
    cls: Any, config: Any, weights: Mapping[str, torch.Tensor]
) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the names (several where weights are tied) and the shape of every stored tensor."""
    with TURN, torch.device("meta"):
        model = cls._from_config(config)
    tie(model, _alike_in(weights))
    names: dict[int, tuple[str, ...]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)] = (*names.get(id(tensor), ()), name)
        shapes[id(tensor)] = tuple(tensor.shape)
    return [(names[key], shapes[key]) for key in names]
