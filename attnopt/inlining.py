"""Make a graph ready to run: no op without effect, masks chosen by the call, attention inlined."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.frontend.cleanup import remove_dead
from attnopt.graphs import copied_module
from attnopt.ops import attention, routed_attention
from attnopt.ops.variants import direct_calls, fast_copy

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
_SAME = (aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default)
_DROPOUT = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_END = 2**63 - 1


def drop_idle(graph_module: fx.GraphModule) -> None:
    """Remove ops that return their input as it is, in place."""
    for node in list(graph_module.graph.nodes):
        source = unchanged(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
    remove_dead(graph_module)


def unchanged(node: fx.Node) -> fx.Node | None:
    """Return the input that a node passes on unchanged, if it does."""
    args: tuple[Any, ...] = node.args
    source = args[0] if args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    same = before.dtype == after.dtype and before.device == after.device
    if node.target in _CASTS:
        return source if same else None
    if node.target in _DROPOUT:
        return source if args[2] is False else None
    if node.target is aten.slice.Tensor:
        start, stop, step = (*args[2:], *(None, None, None))[:3]
        whole = start in (None, 0) and stop in (None, _END) and step in (None, 1)
        return source if whole else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(args[1], int | float):
        return source if args[1] == 1 and same else None
    if node.target is aten.add.Tensor and isinstance(args[1], int | float):
        return source if args[1] == 0 and same and not after.is_floating_point() else None
    return source if node.target in _SAME and _is_dense(before) else None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous()


def split_paddings(graph_module: fx.GraphModule) -> tuple[fx.GraphModule | None, tuple[str, ...]]:
    """Move what makes the padding masks to a graph of its own, in place.

    The first graph takes them as inputs of the names returned, each a tensor or None. The second
    makes them from the inputs of the first; None where there are no padding masks.
    """
    graph = graph_module.graph
    called = graph.find_nodes(op="call_function", target=attention)
    nodes = [*called, *graph.find_nodes(op="call_function", target=routed_attention)]
    found = list(dict.fromkeys(n.kwargs["padding"] for n in nodes if n.kwargs.get("padding")))
    paddings = [p for p in found if isinstance(p, fx.Node) and _is_early(p)]
    if not paddings:
        return None, ()
    making = _extracted(graph_module, paddings)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    names: list[str] = []
    for number, padding in enumerate(paddings):
        with graph.inserting_after(last):
            last = graph.placeholder(f"padding_{number}")
        last.meta = dict(padding.meta)
        for node in nodes:
            if node.kwargs.get("padding") is padding:
                node.update_kwarg("padding", last)
        names.append(last.name)
    remove_dead(graph_module)
    graph_module.recompile()
    return making, tuple(names)


def _is_early(padding: fx.Node) -> bool:
    """Tell whether a mask is made from the call's inputs alone."""
    todo = [padding]
    while todo:
        node = todo.pop()
        if node.op == "placeholder" and node.name.startswith(("p_", "b_", "c_")):
            return False
        todo.extend(node.all_input_nodes)
    return True


def _extracted(graph_module: fx.GraphModule, targets: list[fx.Node]) -> fx.GraphModule:
    """Return a graph of the same inputs that computes these nodes only."""
    made = copied_module(graph_module)
    by_name = {n.name: n for n in made.graph.nodes}
    (output,) = made.graph.find_nodes(op="output")
    output.args = (tuple(by_name[t.name] for t in targets),)
    remove_dead(made)
    for node in made.graph.find_nodes(op="placeholder"):
        if not node.users:
            made.graph.erase_node(node)
    made.recompile()
    return made


def inline_attention(
    graph_module: fx.GraphModule,
    *,
    remember: bool,
    kernel_of: Callable[[fx.Node], Callable[..., Any] | None] = fast_copy,
) -> None:
    """Call the kernels directly, in place; with `remember`, layers share the masks they make."""
    graph = graph_module.graph
    called = [n for n in graph.nodes if n.op == "call_function"]
    kernels = {n: kernel for n in called if (kernel := kernel_of(n)) is not None}
    if not kernels:
        return
    memo: fx.Node | None = None
    if remember:
        for node in called:
            node.target = direct_calls().get(node.target, node.target)
        with graph.inserting_before(next(iter(kernels))):
            memo = graph.call_function(dict)
    for node, kernel in kernels.items():
        kept = {k: x for k, x in node.kwargs.items() if x is not None}
        with graph.inserting_before(node):
            made = graph.call_function(kernel, node.args, {**kept, "memo": memo})
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph_module.recompile()
