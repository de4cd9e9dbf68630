"""A program's graph as a module of its own, as `torch.export` takes it."""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from attnopt.backends.ort.folding import fold_caches
from attnopt.backends.ort.linear import linear_kernel
from attnopt.backends.ort.neighborhoods import neighbors_as_masks
from attnopt.backends.ort.operators import Choice, Target, choose
from attnopt.backends.ort.pairs import split_complex
from attnopt.backends.ort.routes import routes_as_products
from attnopt.backends.ort.signature import Signature
from attnopt.finder.ops import hint
from attnopt.frontend.cleanup import remove_dead
from attnopt.inlining import inline_attention
from attnopt.ops import attention, cached_attention
from attnopt.ops.variants import fast_copy
from attnopt.program import Program

aten = torch.ops.aten


def standalone(
    program: Program, signature: Signature, weights: nn.Module, target: Target
) -> tuple[fx.GraphModule, tuple[Choice, ...]]:
    """Return a module that takes the signature's inputs, and how each attention is called.

    It reads its weights from a module.
    """
    graph_module = program.cast(torch.float32).graph_module
    graph = graph_module.graph
    _promote_integers(graph)
    _read_in_order_of_memory(graph)
    _split_into_rows(graph)
    _keep_outputs(graph, signature.kept)
    neighbors_as_masks(graph)
    routes_as_products(graph)
    fold_caches(graph_module, signature.states)
    choices = _inline(graph_module, target)
    _read_past_length(graph, signature)
    for node in graph.find_nodes(op="placeholder"):
        binding = program.bindings[node.name]
        if binding.kind in ("parameter", "buffer", "constant"):
            with graph.inserting_before(node), warnings.catch_warnings():
                # The graph changes its owner below: only then is the weight beneath it.
                warnings.simplefilter("ignore", UserWarning)
                _replace(node, graph.get_attr(binding.name))
    made = fx.GraphModule(weights, graph)
    _order(made, [*signature.inputs, *(s.placeholder for s in signature.states)])
    split_complex(made)
    remove_dead(made)
    made.recompile()
    return made.eval(), choices


def _promote_integers(graph: fx.Graph) -> None:
    """Say `number - integers` as `-integers + number`: the exporter's own promotion fails on it."""
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        tensor, number, *more = node.args
        dtype = node.meta["val"].dtype
        if more or node.kwargs or tensor.meta["val"].dtype == dtype:
            continue
        with graph.inserting_before(node):
            promoted = graph.call_function(aten.to.dtype, (tensor, dtype))
            negative = graph.call_function(aten.neg.default, (promoted,))
            made = graph.call_function(aten.add.Tensor, (negative, number))
        promoted.meta = negative.meta = made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _read_in_order_of_memory(graph: fx.Graph) -> None:
    """Let as_strided read a tensor whose numbers lie in memory as they follow each other.

    ONNX knows no other order: what the exporter makes of it counts its strides in that.
    """
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        tensor: Any = node.args[0]
        found = tensor.meta["val"]
        strides = [hint(s) for s in found.stride()]
        order = sorted(range(found.dim()), key=lambda axis: -strides[axis])
        if order == sorted(order):
            continue
        with graph.inserting_before(node):
            moved = graph.call_function(aten.permute.default, (tensor, order))
        moved.meta = {**tensor.meta, "val": found.permute(order)}
        node.replace_input_with(tensor, moved)


def _split_into_rows(graph: fx.Graph) -> None:
    """Split into equal parts, whose size varies, by an axis of as many rows.

    The exporter counts parts by dividing sizes, and fixes what it cannot divide.
    """
    for node in graph.find_nodes(op="call_function", target=aten.split.Tensor):
        tensor, size, *dim = node.args
        axis: Any = dim[0] if dim else node.kwargs.get("dim", 0)
        parts = node.meta["val"]
        if isinstance(size, int) or any(part.shape[axis] != parts[0].shape[axis] for part in parts):
            continue
        axis %= tensor.meta["val"].dim()
        taken = [user for user in node.users if user.target is operator.getitem]
        with graph.inserting_before(node):
            rows = graph.call_function(aten.unflatten.int, (tensor, axis, [len(parts), -1]))
            rows.meta = {"val": tensor.meta["val"].unflatten(axis, (len(parts), -1))}
            for user in taken:
                part = graph.call_function(aten.select.int, (rows, axis, user.args[1]))
                part.meta = dict(user.meta)
                user.replace_all_uses_with(part)
        for user in taken:
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _keep_outputs(graph: fx.Graph, kept: tuple[int, ...]) -> None:
    output = graph.output_node()
    flat: Any = output.args[0]
    output.args = (tuple(flat[number] for number in kept),)


def _inline(graph_module: fx.GraphModule, target: Target) -> tuple[Choice, ...]:
    """Call the operator that is chosen for each attention, in place."""
    choices: list[Choice] = []

    def kernel_of(node: fx.Node) -> Callable[..., Any] | None:
        if node.target not in (attention, cached_attention):
            return linear_kernel(node) or fast_copy(node)
        choices.append(choose(node, target))
        return choices[-1].kernel

    inline_attention(graph_module, remember=True, kernel_of=kernel_of)
    return tuple(choices)


def _read_past_length(graph: fx.Graph, signature: Signature) -> None:
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    length = placeholders.get("past_length")
    if length is None:
        return
    if not length.users:
        graph.erase_node(length)
        return
    state = next(s for s in signature.states if s.grows is not None)
    with graph.inserting_after(list(placeholders.values())[-1]):
        size: Any = torch.ops.aten.sym_size.int
        _replace(length, graph.call_function(size, (placeholders[state.placeholder], state.grows)))


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _order(graph_module: fx.GraphModule, names: list[str]) -> None:
    """Put the inputs at the front, in the order of the signature."""
    graph = graph_module.graph
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    first = next(iter(graph.nodes))
    for name in names:
        if nodes[name] is not first:
            first.prepend(nodes[name])
        else:
            first = first.next
