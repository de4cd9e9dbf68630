"""The source's call, by name: its arguments become graph inputs, the graph's outputs its result."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.frontend.skeletons import Slot, put_together, take_apart

# Arguments whose omission means "every position is real".
_ONES_LIKE = {
    "attention_mask": "input_ids",
    "decoder_attention_mask": "decoder_input_ids",
}


def counted(ids: Tensor) -> Tensor:
    """Return the positions of tokens, counted from 0 in every row."""
    return torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)


@dataclass(frozen=True)
class Example:
    """A call of a source taken apart: which tensors it has, by name, and what stays constant."""

    signature: inspect.Signature
    skeleton: dict[str, Any]
    tensors: dict[str, Tensor]
    config: Any = None

    def call(self, source: nn.Module, tensors: Mapping[str, Any]) -> Any:
        """Call the source with other tensors of the same names."""
        bound = self.signature.bind_partial()
        values = put_together(self.skeleton, lambda key: tensors[str(key)])
        bound.arguments.update(_packed(self.signature, values))
        return source(*bound.args, **bound.kwargs)


def take_call_apart(source: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """Bind arguments to the source's forward and name the tensors among them."""
    signature = inspect.signature(source.forward)
    tensors: dict[str, Tensor] = {}

    def put(path: str, tensor: Any) -> Slot:
        tensors[path] = tensor
        return Slot(path)

    values = _unpacked(signature, signature.bind(*args, **kwargs).arguments)
    skeleton = {name: take_apart(value, put, name) for name, value in values.items()}
    return Example(signature, skeleton, tensors, getattr(source, "config", None))


@dataclass(frozen=True)
class Inputs:
    """Turns a call into the graph's inputs, or says what is wrong with it.

    `counts` says that the source counts positions from 0 where position_ids is omitted.
    """

    example: Example
    shapes: dict[str, tuple[Any, ...]]
    dtypes: dict[str, torch.dtype]
    bounds: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: tuple[Any, ...] = ()
    counts: bool = False

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a tensor for each input by name; raise TypeError or ValueError for a bad call."""
        given = self.named(args, kwargs)
        tensors = self.tensors_of(given)
        self.check(tensors)
        return tensors

    def tensors_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take named arguments apart and fill in the ones that have a natural default."""
        tensors: dict[str, Any] = {}
        for name, value in given.items():
            if name in self.shapes and name not in self.example.skeleton:
                tensors[name] = value
            elif name in self.example.skeleton:
                _match(self.example.skeleton[name], value, name, tensors)
            else:
                self._refuse_unless_default(name, value)
        for name, wanted in self.example.skeleton.items():
            if name not in given and not _has_slots(wanted):
                self._refuse_unless_equal(name, wanted)
        return self._completed(tensors)

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Bind a call's arguments to their names; raise TypeError for an unknown one."""
        signature = self.example.signature
        direct = {n: v for n, v in kwargs.items() if n in self.shapes}
        kwargs = {n: v for n, v in kwargs.items() if n not in direct}
        bound = signature.bind_partial(*args, **kwargs).arguments
        named = {**_unpacked(signature, bound), **direct}
        unknown = [n for n in named if n not in signature.parameters and n not in self.shapes]
        for name in unknown:
            if name not in self.example.skeleton and not _configured(self.example.config, name):
                raise TypeError(
                    f"unknown argument {name!r}; the captured call takes "
                    f"{', '.join(self.example.skeleton)}"
                )
        return {k: v for k, v in named.items() if v is not None or k in self.example.skeleton}

    def _refuse_unless_default(self, name: str, value: Any) -> None:
        parameter = self.example.signature.parameters.get(name)
        default = None if parameter is None else parameter.default
        if default is None or default is inspect.Parameter.empty:
            default = _from_config(self.example.config, name)
        if isinstance(value, Tensor) or value != default:
            raise ValueError(
                f"argument {name}={_shown(value)} differs from the captured call, "
                f"which had {name}={_shown(default)}; capture again with it as an example"
            )

    def _refuse_unless_equal(self, name: str, wanted: Any) -> None:
        parameter = self.example.signature.parameters.get(name)
        default = None if parameter is None else parameter.default
        if wanted == default or wanted is None or default is None:
            return
        raise ValueError(
            f"argument {name} is missing; it was {_shown(wanted)} in the captured call"
        )

    def _completed(self, tensors: dict[str, Any]) -> dict[str, Any]:
        ids = tensors.get("input_ids")
        if self.counts and isinstance(ids, Tensor) and ids.dim() == 2:
            positions = tensors.get("position_ids", counted(ids))
            one_row = isinstance(positions, Tensor) and positions.shape[:1] == (1,)
            tensors["position_ids"] = positions.repeat(len(ids), 1) if one_row else positions
        for name in self.shapes:
            if name in tensors:
                continue
            like = _ONES_LIKE.get(name)
            if like not in tensors:
                raise ValueError(f"argument {name} is missing: the captured call had it")
            reference = tensors[str(like)]
            tensors[name] = torch.ones(
                reference.shape, dtype=self.dtypes[name], device=reference.device
            )
        return tensors

    def check(self, tensors: Mapping[str, Any]) -> None:
        """Raise ValueError where a tensor's dtype or shape is not one that the graph takes."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            if not isinstance(tensor, Tensor):
                raise ValueError(f"argument {name} must be a tensor, not {_shown(tensor)}")
            if tensor.is_floating_point() != self.dtypes[name].is_floating_point:
                raise ValueError(
                    f"argument {name} has dtype {tensor.dtype}; expected {self.dtypes[name]}"
                )
            if len(tensor.shape) != len(shape):
                raise ValueError(
                    f"argument {name} has shape {list(tensor.shape)}; expected {_axes(shape)}"
                )
            for axis, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
                self._check_size((name, axis), size, wanted, sizes)
        self._check_conditions(sizes)

    def _check_size(
        self, where: tuple[str, int], size: int, wanted: Any, sizes: dict[str, tuple[int, str]]
    ) -> None:
        label = f"argument {where[0]} has size {size} at axis {where[1]}"
        if isinstance(wanted, int):
            if size != wanted:
                raise ValueError(f"{label}; the captured graph takes {wanted} only")
            return
        seen = sizes.setdefault(wanted, (size, where[0]))
        if seen[0] != size:
            raise ValueError(f"{label}; {seen[1]} has {seen[0]} there, and they must be equal")
        low, high = self.bounds.get(wanted, (0, None))
        if size < low or (high is not None and size > high):
            raise ValueError(f"{label}; the captured graph takes {low} to {high or 'any size'}")

    def _check_conditions(self, sizes: Mapping[str, tuple[int, str]]) -> None:
        values = {name: size for name, (size, _) in sizes.items()}
        for condition in self.conditions:
            known = {s: values[str(s)] for s in condition.free_symbols if str(s) in values}
            if len(known) == len(condition.free_symbols) and condition.subs(known) == False:  # noqa: E712
                shown = ", ".join(f"{sizes[str(s)][1]} has {v}" for s, v in known.items())
                raise ValueError(f"the captured graph holds only where {condition}: {shown}")


@dataclass(frozen=True)
class Outputs:
    """Rebuilds the source's result from the graph's flat outputs."""

    skeleton: Any

    def unflatten(self, outputs: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
        """Return the result in the class that the source returns."""
        return put_together(self.skeleton, lambda index: outputs[int(index)])


def _axes(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"


def _configured(config: Any, name: str) -> bool:
    return name == "return_dict" or (config is not None and hasattr(config, name))


def _from_config(config: Any, name: str) -> Any:
    if name == "return_dict":
        return True
    return getattr(config, name, None)


def _has_slots(skeleton: Any) -> bool:
    found: list[object] = []
    put_together(skeleton, found.append)
    return bool(found)


def _match(wanted: Any, value: Any, name: str, tensors: dict[str, Any]) -> None:
    if isinstance(wanted, Slot) and not isinstance(value, Tensor):
        if value is None:
            return
        raise ValueError(f"argument {name} must be a tensor, not {_shown(value)}")
    mine: dict[str, Any] = {}
    actual = take_apart(value, _storing(mine), name)
    if not _has_slots(wanted) and isinstance(value, Tensor):
        raise ValueError(f"argument {name} was {_shown(wanted)} at capture, not a tensor")
    if actual != wanted:
        raise ValueError(
            f"argument {name}={_shown(value)} differs from the captured call, "
            f"which had {_shown(wanted)}; capture again with it as an example"
        )
    tensors.update(mine)


def _storing(into: dict[str, Any]) -> Callable[[str, Any], Slot]:
    def put(path: str, tensor: Any) -> Slot:
        into[path] = tensor
        return Slot(path)

    return put


def _unpacked(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    return values


def _packed(signature: inspect.Signature, values: dict[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in values.items() if k in signature.parameters}
    extra = {k: v for k, v in values.items() if k not in signature.parameters}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and extra:
            known[name] = extra
    return {name: known[name] for name in signature.parameters if name in known}
