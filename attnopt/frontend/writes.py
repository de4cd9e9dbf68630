"""Writes into inputs, such as a static cache's, as outputs of their own while a graph changes."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from attnopt.frontend.cleanup import remove_dead
from attnopt.graphs import is_write, schema_of
from attnopt.nouns import No

aten = torch.ops.aten
_SCATTERED: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
_PARTS = (*_SCATTERED, aten.view.default, aten.transpose.int)
"""What names a part of a tensor, or all of it by another shape."""


def take_out_writes(graph_module: fx.GraphModule) -> tuple[str, ...] | No:
    """Replace ops that write in place by ones that return; what was written is returned at the end.

    Returns the names of the inputs that were written. A refused graph computes what it did.
    """
    graph = graph_module.graph
    writes = [node for node in graph.nodes if is_write(node)]
    parts: set[fx.Node] = set()
    for node in writes:
        _pass_idle_casts(node)
        if _returning(node) is not None:
            node.replace_all_uses_with(_target(node))
    for node in writes:
        reason = _why_not(node)
        if reason is None:
            continue
        if not _is_a_part(node):
            return reason
        parts.add(node)
    latest: dict[fx.Node, fx.Node] = {}
    for node in writes:
        if node in parts:
            _scatter(node)
            continue
        target = _target(node)  # what the write before returned, if there was one
        with graph.inserting_before(node):
            made = graph.call_function(_returning(node), node.args, node.kwargs)
        made.meta = dict(node.meta)
        latest[next((old for old, new in latest.items() if new is target), target)] = made
        target.replace_all_uses_with(made, made.__lt__)
        graph.erase_node(node)
    written = [old for old in latest if old.op == "placeholder"]
    output = graph.output_node()
    output.args = ((*_listed(output), *(latest[old] for old in written)),)
    remove_dead(graph_module)
    graph.lint()
    graph_module.recompile()
    return tuple(old.name for old in written)


def put_back_writes(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Write the last outputs into the inputs of these names instead of returning them."""
    if not names:
        return
    graph = graph_module.graph
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    output = graph.output_node()
    outputs = _listed(output)
    own, new = outputs[: -len(names)], outputs[-len(names) :]
    with graph.inserting_before(output):
        for name, value in zip(names, new, strict=True):
            graph.call_function(torch.ops.aten.copy_.default, (inputs[name], value))
    output.args = (own,)
    graph.lint()
    graph_module.recompile()


def _target(write: fx.Node) -> fx.Node:
    """Return what is written, which such an op returns, too."""
    target = write.args[0]
    assert isinstance(target, fx.Node)
    return target


def _pass_idle_casts(write: fx.Node) -> None:
    """Name what is written by its own name: a cast to the dtype it has already returns itself."""
    target = write.args[0] if write.args else None
    while isinstance(target, fx.Node) and _is_idle_cast(target):
        source: Any = target.args[0]
        target.replace_all_uses_with(source)
        target = source


def _is_idle_cast(node: fx.Node) -> bool:
    if node.op != "call_function" or not str(node.target).startswith("aten.to."):
        return False
    source: Any = node.args[0]
    old, new = source.meta["val"], node.meta["val"]
    return bool(old.dtype == new.dtype and old.device == new.device) and not _copies(node)


def _copies(cast: fx.Node) -> bool:
    """Tell whether a cast was asked for a copy, whatever dtype its source has."""
    names = [a.name for a in schema_of(cast.target).arguments]  # type: ignore[arg-type]
    given = {**dict(zip(names, cast.args, strict=False)), **cast.kwargs}
    return bool(given.get("copy", False))


def _why_not(write: fx.Node) -> No | None:
    """Say why a write cannot be taken out: by its op, or because other names share the memory."""
    target = write.args[0] if write.args else None
    if not isinstance(target, fx.Node) or _returning(write) is None:
        return No("the graph changes a tensor in place", write.name)
    shared = [u for u in target.users if u < write and u.users and _is_view_of(u, target)]
    if shared or not _is_only_name(target, write):
        return No("the graph changes a tensor in place that other tensors share", write.name)
    return None


def _returning(write: fx.Node) -> Any:
    """Return the op that returns what an op writes."""
    schema = schema_of(write.target)  # type: ignore[arg-type]  # writes are overloads
    space, _, name = schema.name.partition("::")
    if space != "aten" or not name.endswith("_") or len(schema.returns) != 1:
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, schema.overload_name or "default", None)


def _is_view(node: fx.Node) -> bool:
    """Tell whether a node may share its memory with an operand."""
    if node.op != "call_function" or is_write(node):
        return False
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        # One of several results shares memory as the op says that its results do.
        return not isinstance(node.args[0].target, OpOverload) or _is_view(node.args[0])
    if not isinstance(node.target, OpOverload):
        return True
    return any(r.alias_info is not None for r in schema_of(node.target).returns)


def _is_view_of(node: fx.Node, operand: fx.Node) -> bool:
    """Tell whether a node may share the memory of this operand, and does not only read its size."""
    return _is_view(node) and operand in _shared_by(node)


def _shared_by(view: fx.Node) -> list[fx.Node]:
    """List the operands whose memory a view may share."""
    if not isinstance(view.target, OpOverload):
        return view.all_input_nodes
    arguments = schema_of(view.target).arguments
    given = {**dict(zip((a.name for a in arguments), view.args, strict=False)), **view.kwargs}
    shared = [given.get(a.name) for a in arguments if a.alias_info is not None]
    held = [y for x in shared for y in (x if isinstance(x, list | tuple) else (x,))]
    return [x for x in held if isinstance(x, fx.Node)]


def _is_only_name(target: fx.Node, write: fx.Node) -> bool:
    """Tell whether nothing sees a write through what `target` is a view of, if it is one.

    That is so where the graph made that tensor itself, and reads it no more, nor another view.
    """
    view = target
    while _is_view(view):
        bases = _shared_by(view)
        if len(bases) != 1:
            return False
        for user in bases[0].users.keys() - {view}:
            named = is_write(user) or (_is_view_of(user, bases[0]) and user.users)
            if named or user > write:
                return False
        view = bases[0]
    return view is target or view.op == "call_function"


def _parts(target: Any) -> tuple[list[fx.Node], fx.Node]:
    """Return the views that lead to a target, innermost first, and what they are views of."""
    found: list[fx.Node] = []
    while target.target in _PARTS:
        found.append(target)
        target = target.args[0]
    return found, target


def _is_a_part(write: fx.Node) -> bool:
    """Tell whether a write goes to a part of a tensor of the graph that no other name shows.

    Views from before the write must not be read after it.
    """
    target: Any = write.args[0] if write.args else None
    if not isinstance(target, fx.Node) or _returning(write) is None:
        return False
    slices, base = _parts(target)
    if torch.Tag.inplace_view in write.target.tags:  # type: ignore[union-attr]  # an overload
        return False
    if not slices or base.op != "call_function" or is_write(base):
        return False
    if not _is_only_name(base, write):
        return False
    held = {base, *slices}
    return not any(
        _is_view_of(user, node) and _is_read_after(user, write)
        for node in held
        for user in node.users.keys() - held
        if user < write
    )


def _is_read_after(name: fx.Node, write: fx.Node) -> bool:
    """Tell whether a name of some memory, or another that is made of it, is read after a write."""
    return any(
        user > write or (_is_view_of(user, name) and _is_read_after(user, write))
        for user in name.users
    )


def _scatter(write: fx.Node) -> None:
    """Return what a write changes as a new whole, of which later readers see the same parts."""
    parts, base = _parts(_target(write))
    graph = write.graph
    with graph.inserting_before(write):
        value = graph.call_function(_returning(write), write.args, write.kwargs)
        value.meta = dict(write.meta)
        for part in parts:
            value = _put_back(part, value)
        new = {base: value}
        for part in parts[::-1]:
            whole: Any = part.args[0]
            view: Any = part.target
            new[part] = graph.call_function(view, (new[whole], *part.args[1:]), part.kwargs)
            new[part].meta = dict(part.meta)
    for old, made in new.items():
        old.replace_all_uses_with(made, lambda user: user > write)
    graph.erase_node(write)
    for part in parts:
        if not new[part].users:
            graph.erase_node(new[part])


def _put_back(part: fx.Node, value: fx.Node) -> fx.Node:
    """Return the whole that a part is of, with another value of the part."""
    whole: Any = part.args[0]
    if part.target in _SCATTERED:
        arguments = (whole, value, *part.args[1:])
        made = part.graph.call_function(_SCATTERED[part.target], arguments, part.kwargs)
    elif part.target is aten.transpose.int:
        made = part.graph.call_function(aten.transpose.int, (value, *part.args[1:]))
    else:
        made = part.graph.call_function(aten.reshape_as.default, (value, whole))
    made.meta = dict(whole.meta)
    return made


def _listed(output: fx.Node) -> tuple[Any, ...]:
    outputs = output.args[0]
    return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)
