"""Bring a graph that dynamo captured to the form of the frontend's own captures, and back.

The differences are small: constants are attributes, and an empty cache is a tensor of no elements
that the first keys are joined to.
"""

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.frontend.cleanup import drop_asserts, remove_dead
from attnopt.frontend.einsums import split_einsums
from attnopt.frontend.resizes import resize_what_changes

aten = torch.ops.aten

_MADE_OF_NUMBERS = (torch.tensor, torch.as_tensor, torch.scalar_tensor, torch._refs.tensor)  # pyright: ignore[reportAttributeAccessIssue]
_PASSED_ON = (
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.detach_.default,
    aten.alias.default,
)


def normalize(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Clean a graph and make its constants inputs, in place; return the constants by name."""
    drop_asserts(graph_module)
    split_einsums(graph_module)
    resize_what_changes(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.target in _PASSED_ON:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        elif node.target is aten.cat.default:
            _drop_empty_pieces(node)
        elif node.op != "placeholder":
            _name_modules(node)
    remove_dead(graph_module)
    constants = _constants_as_inputs(graph_module)
    graph_module.recompile()
    return constants


def read_sizes(graph_module: fx.GraphModule) -> None:
    """Read sizes that went through a tensor directly, in place: torch.tensor(size).item() is size.

    To dynamo such a number is one that data decide.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_method", target="item"):
        tensor = node.args[0]
        if not isinstance(tensor, fx.Node) or tensor.op != "call_function":
            continue
        with graph.inserting_before(node):
            size = _size_in(graph, tensor)
        if size is None:
            continue
        if isinstance(size, fx.Node):
            size.meta.setdefault("example_value", node.meta.get("example_value"))
        node.replace_all_uses_with(size)
        graph.erase_node(node)
    graph_module.recompile()


def _size_in(graph: fx.Graph, tensor: fx.Node) -> Any:
    """Return the size that a tensor of one number was made of; None for any other tensor."""
    if tensor.target in _MADE_OF_NUMBERS and _is_size(tensor.args[0]):
        return tensor.args[0]
    mode = tensor.kwargs.get("rounding_mode")
    if (
        tensor.target is torch.div
        and mode in ("trunc", "floor")
        and all(map(_is_size, tensor.args))
    ):
        return graph.call_function(operator.floordiv, tensor.args)
    return None


def _is_size(x: Any) -> bool:
    if isinstance(x, fx.Node):
        return isinstance(x.meta.get("example_value"), int | torch.SymInt)
    return isinstance(x, int)


def constants_as_attributes(graph_module: fx.GraphModule, constants: dict[str, Tensor]) -> None:
    """Undo what `normalize` did to constants, in place: a single number is made where it is read.

    A compiler computes with such a number, and would take an attribute as one more input.
    """
    graph = graph_module.graph
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        if node.name not in constants:
            continue
        value = constants[node.name]
        with graph.inserting_before(first):
            if value.dim() == 0:
                kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
                made = graph.call_function(aten.full.default, ([], value.item()), kind)
            else:
                name = f"constant_{node.name}"
                graph_module.register_buffer(name, value, persistent=False)
                made = graph.get_attr(name)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph_module.recompile()


def _drop_empty_pieces(node: fx.Node) -> None:
    """Leave out of a concatenation what adds nothing: tensors of one axis and no elements."""
    pieces: Any = node.args[0]
    kept = [p for p in pieces if tuple(p.meta["val"].shape) != (0,)]
    if len(kept) == 1:
        node.replace_all_uses_with(kept[0])
    elif len(kept) < len(pieces):
        node.update_arg(0, kept)


def _constants_as_inputs(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    graph = graph_module.graph
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            continue
        with graph.inserting_before(next(iter(graph.nodes))):
            made = graph.placeholder(f"constant_{len(constants)}")
        made.meta = dict(node.meta)
        constants[made.name] = value
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return constants


def _name_modules(node: fx.Node) -> None:
    """Name modules relative to the compiled one, with dots."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (_dotted(path), cls) for key, (path, cls) in stack.items()
        }


def _dotted(path: str) -> str:
    path = re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]|\[(\d+)\]", r".\1\2\3", path)
    return re.sub(r"^L\.(self|fn|mod)\.?", "", path).strip(".")
