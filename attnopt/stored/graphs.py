"""A graph as JSON: nodes by name, ops from an allow-list, the shapes of its inputs.

The values of the other nodes are not stored: reading runs the ops on fake tensors.
"""

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from attnopt.finder.ops import hint, module_path
from attnopt.graphs import schema_of
from attnopt.stored.expressions import read_expression, symbols_in, write_expression

_SPACES: Final = ("aten", "attnopt")
# Ops of other libraries that captured graphs have, and those of ATen that reach beyond tensors.
_ALSO: Final = frozenset({"transformers.grouped_mm_fallback.default"})
_NEVER: Final = frozenset({"from_file", "_print", "set_data", "record_stream"})
_PLAIN: Final[dict[str, Callable[..., Any]]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "getitem add sub mul neg floordiv truediv mod pow eq ne lt le gt ge and_ or_ not_"
        ).split()
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in "sym_max sym_min sym_float sym_int sym_ite sym_not".split()
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
_PLAIN_NAMES: Final = {function: name for name, function in _PLAIN.items()}
_ENUMS: Final = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def write_graph(graph: fx.Graph) -> dict[str, Any]:
    """Return the JSON of a graph; ValueError names the first node that has no stored form."""
    nodes: list[dict[str, Any]] = []
    hints: dict[str, int] = {}
    for node in graph.nodes:
        try:
            nodes.append(_write_node(node, hints))
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
    return {"sizes": hints, "nodes": nodes}


def read_graph(content: Mapping[str, Any]) -> fx.GraphModule:
    """Return the graph that was written; ValueError where it is none."""
    reader = _Reader(content["sizes"])
    for entry in content["nodes"]:
        try:
            reader.read(entry)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            name = str(entry.get("name") if isinstance(entry, dict) else entry)[:80]
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"node {name}: {type(error).__name__}: {first}") from error
    reader.graph.lint()
    return fx.GraphModule({}, reader.graph)


def _write_node(node: fx.Node, hints: dict[str, int]) -> dict[str, Any]:
    if node.op == "placeholder":
        return {"name": node.name, "value": _write_value(node.meta["val"], hints)}
    if node.op == "output":
        return {"name": node.name, "outputs": _write_argument(node.args[0])}
    if node.op != "call_function":
        raise ValueError(f"an op of the kind {node.op} has no stored form")
    entry: dict[str, Any] = {"name": node.name, "op": _name_of(node.target)}
    entry["args"] = [_write_argument(a) for a in node.args]
    if node.kwargs:
        entry["kwargs"] = {k: _write_argument(a) for k, a in node.kwargs.items()}
    if module_path(node):
        entry["module"] = module_path(node)
    line = str(node.meta.get("stack_trace") or "").strip().splitlines()
    if line:
        entry["line"] = line[-1].strip()
    return entry


def _write_value(value: Any, hints: dict[str, int]) -> Any:
    """Describe an input: a tensor by dtype and shape, or a size."""
    if isinstance(value, Tensor):
        shape = [_write_size(s, hints) for s in value.shape]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}
    return {"size": _write_size(value, hints)}


def _write_size(size: Any, hints: dict[str, int]) -> Any:
    content = write_expression(size)
    if isinstance(size, torch.SymInt):
        known = size.node.shape_env.backed_var_to_val
        for symbol in size.node.expr.free_symbols:
            hints[str(symbol)] = int(known[symbol]) if symbol in known else hint(size)
    return content


def _name_of(target: Any) -> str:
    if isinstance(target, OpOverload):
        _refuse_unless_allowed(target)
        return str(target)
    if target in _PLAIN_NAMES:
        return _PLAIN_NAMES[target]
    raise ValueError(f"the function {target} is not on the list of what a stored program may call")


def _function(name: str) -> Callable[..., Any]:
    if name in _PLAIN:
        return _PLAIN[name]
    space, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if name in _ALSO:
        importlib.import_module("transformers.integrations.moe")  # registers the op
    if space not in _SPACES and name not in _ALSO:
        raise ValueError(f"op {name[:80]!r} is not on the list of what a stored program may call")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    if not isinstance(found, OpOverload):
        raise ValueError(f"{name[:80]!r} is no op")
    _refuse_unless_allowed(found)
    return found


def _refuse_unless_allowed(op: OpOverload[Any, Any]) -> None:
    space, _, name = str(schema_of(op).name).partition("::")
    known = (space in _SPACES and name not in _NEVER) or str(op) in _ALSO
    if not known or schema_of(op).is_mutable:
        raise ValueError(f"op {op} is not on the list of what a stored program may call")


def _write_argument(value: Any) -> Any:
    """Return the JSON of an argument; what JSON has no word for is {kind: name}."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_write_argument(x) for x in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    for name, kind in _ENUMS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ValueError(f"an argument of the kind {type(value).__name__} has no stored form")


class _Reader:
    """Builds a graph node by node, with the value of each on fake tensors."""

    def __init__(self, hints: Mapping[str, int]) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=False)
        self.hints = {name: int(value) for name, value in hints.items()}
        self.symbols: dict[str, Any] = {}

    def read(self, entry: Mapping[str, Any]) -> None:
        """Append one node."""
        name = str(entry["name"])
        if not name.isidentifier() or name in self.nodes:
            raise ValueError(f"node {name[:80]!r} has no name of its own")
        if "outputs" in entry:
            self.graph.output(tuple(self._argument(entry["outputs"])))
            return
        node = self._input(name, entry) if "value" in entry else self._call(name, entry)
        self.nodes[name] = node

    def _input(self, name: str, entry: Mapping[str, Any]) -> fx.Node:
        node = self.graph.placeholder(name)
        described = entry["value"]
        if "size" in described:
            node.meta["val"] = self._size(described["size"])
            return node
        shape = [self._size(s) for s in described["shape"]]
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=_dtype(described["dtype"]))
        return node

    def _call(self, name: str, entry: Mapping[str, Any]) -> fx.Node:
        function = _function(str(entry["op"]))
        args = tuple(self._argument(a) for a in entry["args"])
        kwargs = {str(k): self._argument(a) for k, a in entry.get("kwargs", {}).items()}
        node = self.graph.create_node("call_function", function, args, kwargs, name=name)
        if node.name != name:
            raise ValueError(f"{name!r} is a reserved name")
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with enable_python_dispatcher(), self.mode, torch.no_grad():
            node.meta["val"] = function(*given[0], **given[1])
        if "module" in entry:
            node.meta["nn_module_stack"] = {"": (str(entry["module"]), "")}
        if "line" in entry:
            node.meta["stack_trace"] = str(entry["line"])
        return node

    def _size(self, content: Any) -> Any:
        if isinstance(content, int):
            return content
        for name in sorted(symbols_in(content) - self.symbols.keys()):
            self.symbols[name] = self.environment.create_symbol(
                self.hints[name], source=ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC
            )
        expression = read_expression(content, self.symbols)
        own = {self.symbols[n]: self.hints[n] for n in symbols_in(content)}
        seen = int(expression.subs(own))
        return self.environment.create_symintnode(expression, hint=seen)

    def _argument(self, content: Any) -> Any:
        if isinstance(content, list):
            return [self._argument(x) for x in content]
        if not isinstance(content, dict):
            return content
        ((kind, value),) = content.items()
        match kind:
            case "node":
                return self.nodes[value]
            case "float":
                return float(value)
            case "complex":
                return complex(*value)
            case "device":
                return torch.device(value)
            case _:
                return _constant(kind, value)


def _constant(kind: str, name: str) -> Any:
    found = getattr(torch, str(name), None)
    if kind not in _ENUMS or not isinstance(found, _ENUMS[kind]):
        raise ValueError(f"{kind} {name!r} is not known")
    return found


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = _constant("dtype", name)
    return found
