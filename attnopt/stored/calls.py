"""How a source is called and what it returns, as JSON."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Final

import sympy
import torch

from attnopt.frontend.calls import Example, Inputs, Outputs
from attnopt.frontend.skeletons import CacheLayers, Made, Slot
from attnopt.frontend.stateful import StatefulCalls
from attnopt.program import CallForm, State
from attnopt.stored.expressions import read_expression, symbols_in, write_expression

_KINDS: Final = {
    kind.name: kind
    for kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    )
}
_CLASSES: Final = ("transformers.",)


def write_call(form: CallForm) -> dict[str, Any]:
    """Return the JSON of a call form; ValueError for one that is code."""
    made = form.made_of
    if isinstance(made, StatefulCalls):
        return {
            **_write_pair(made.inputs, made.outputs),
            "cache": made.argument,
            "tokens": made.tokens,
            "positions_from_mask": made.positions_from_mask,
        }
    if isinstance(made, tuple):
        inputs, outputs = made
        return _write_pair(inputs, outputs)
    raise ValueError("how its source is called is code of the source")


def read_call(content: Mapping[str, Any], states: tuple[State, ...], config: Any) -> CallForm:
    """Return the call form that was written."""
    inputs, outputs = _read_inputs(content, config), Outputs(_read_skeleton(content["returns"]))
    if "cache" not in content:
        return CallForm(inputs.flatten, outputs.unflatten, made_of=(inputs, outputs))
    return StatefulCalls(
        inputs,
        outputs,
        states,
        str(content["cache"]),
        bool(content["positions_from_mask"]),
        str(content["tokens"]),
    ).form()


def _write_pair(inputs: Inputs, outputs: Outputs) -> dict[str, Any]:
    parameters = [
        {"name": p.name, "kind": p.kind.name, **_write_default(p.default)}
        for p in inputs.example.signature.parameters.values()
    ]
    tensors = {
        name: {
            "shape": [_write_wanted(s) for s in shape],
            "dtype": str(inputs.dtypes[name]).removeprefix("torch."),
        }
        for name, shape in inputs.shapes.items()
    }
    return {
        "parameters": parameters,
        "call": _write_skeleton(inputs.example.skeleton),
        "tensors": tensors,
        "bounds": {str(k): list(v) for k, v in inputs.bounds.items()},
        "conditions": [write_expression(c) for c in inputs.conditions],
        "returns": _write_skeleton(outputs.skeleton),
        **({"counts": True} if inputs.counts else {}),
    }


def _read_inputs(content: Mapping[str, Any], config: Any) -> Inputs:
    parameters = [
        inspect.Parameter(
            str(p["name"]), _KINDS[p["kind"]], default=p.get("default", inspect.Parameter.empty)
        )
        for p in content["parameters"]
    ]
    signature = inspect.Signature(parameters)
    example = Example(signature, _read_skeleton(content["call"]), {}, config)
    tensors = content["tensors"]
    conditions = tuple(_read_condition(c) for c in content["conditions"])
    return Inputs(
        example,
        {name: tuple(t["shape"]) for name, t in tensors.items()},
        {name: _dtype(t["dtype"]) for name, t in tensors.items()},
        {name: (int(low), high) for name, (low, high) in content["bounds"].items()},
        conditions,
        counts=content.get("counts") is True,
    )


def _read_condition(content: Any) -> Any:
    symbols = {name: sympy.Symbol(name, integer=True) for name in symbols_in(content)}
    return read_expression(content, symbols)


def _write_wanted(size: Any) -> Any:
    if isinstance(size, int | str):
        return size
    raise ValueError(f"an input of the size {size} has no stored form")


def _write_default(default: Any) -> dict[str, Any]:
    if default is None or isinstance(default, bool | int | float | str):
        return {"default": default}
    return {}


def _write_skeleton(value: Any) -> Any:
    """Return the JSON of nested values; a place for a tensor is {"tensor": its key}."""
    if isinstance(value, Slot):
        return {"tensor": value.key}
    if isinstance(value, Made):
        arguments = {k: _write_skeleton(v) for k, v in value.arguments.items()}
        return {"class": _class_name(value.cls), "arguments": arguments}
    if isinstance(value, CacheLayers):
        cross = None if value.cross is None else _write_skeleton(list(value.cross))
        return {"layers": _write_skeleton(list(value.layers)), "cross": cross}
    if isinstance(value, dict):
        return {"mapping": {str(k): _write_skeleton(v) for k, v in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_write_skeleton(v) for v in value]}
    if isinstance(value, list):
        return [_write_skeleton(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a {type(value).__name__} in the call or the result has no stored form")


def _read_skeleton(content: Any) -> Any:
    if isinstance(content, list):
        return [_read_skeleton(x) for x in content]
    if not isinstance(content, dict):
        return content
    match content:
        case {"tensor": key}:
            return Slot(key)
        case {"class": name, "arguments": arguments}:
            made = {str(k): _read_skeleton(v) for k, v in arguments.items()}
            return Made(_class(str(name)), made)
        case {"layers": layers, "cross": cross}:
            crossed = None if cross is None else tuple(_read_skeleton(cross))
            return CacheLayers(tuple(_read_skeleton(layers)), crossed)
        case {"mapping": mapping}:
            return {str(k): _read_skeleton(v) for k, v in mapping.items()}
        case {"tuple": values}:
            return tuple(_read_skeleton(v) for v in values)
        case _:
            raise ValueError(f"no part of a call: {str(content)[:80]}")


def _class_name(cls: type) -> str:
    if not cls.__module__.startswith(_CLASSES):
        raise ValueError(
            f"its source returns {cls.__module__}.{cls.__qualname__}; a stored program can name "
            "classes of Transformers only: return a tuple or a dict"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def _class(name: str) -> Any:
    """Import an output class of Transformers; nothing else can be named."""
    from transformers.utils.generic import ModelOutput

    module, _, qualname = name.partition(":")
    if module.startswith(_CLASSES) and qualname.isidentifier():
        found = getattr(importlib.import_module(module), qualname, None)
        if isinstance(found, type) and issubclass(found, ModelOutput):
            return found
    raise ValueError(f"{name[:120]!r} is no output class of Transformers")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {name!r} is not known")
    return found
