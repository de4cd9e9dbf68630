"""Normalize the capture: one flat functional graph, without asserts, that follows its inputs."""

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_aggregate

from attnopt.frontend.convolutions import compute_what_is_read
from attnopt.frontend.einsums import split_einsums
from attnopt.frontend.resizes import resize_what_changes
from attnopt.frontend.views import lead_back
from attnopt.graphs import is_write, schema_of

_ASSERTS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "_functional_assert_scalar",
        "_functional_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_sym_constrain_range",
    }
)
_WRAPPERS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})


def functional(exported: ExportedProgram) -> ExportedProgram:
    """Replace in-place ops by functional ones where the graph has any."""
    return exported.run_decompositions({}) if _mutates(exported.graph_module) else exported


def clean(graph_module: fx.GraphModule) -> None:
    """Inline the regions of export, then drop asserts and dead nodes, in place."""
    inline_regions(graph_module)
    drop_asserts(graph_module)
    drop_copies(graph_module)
    lead_back(graph_module)
    compute_what_is_read(graph_module)
    split_einsums(graph_module)
    resize_what_changes(graph_module)
    name_dtypes(graph_module)
    name_sizes(graph_module)
    count_parts(graph_module)
    read_sizes_from_inputs(graph_module)
    remove_dead(graph_module)
    graph_module.recompile()


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Replace set_grad_enabled and disabled autocast regions by their bodies, in place."""
    while regions := [n for n in graph_module.graph.nodes if _is_region(n)]:
        for node in regions:
            _inline(graph_module, node)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()


def drop_asserts(graph_module: fx.GraphModule) -> None:
    """Erase metadata asserts and range constraints, in place."""
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "call_function" and _base_name(node.target) in _ASSERTS:
            if node.users:
                node.replace_all_uses_with(node.args[-1])
            graph_module.graph.erase_node(node)
        elif node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)


def drop_copies(graph_module: fx.GraphModule) -> None:
    """Read lifted constants directly: the graph is functional, so no copy is needed."""
    for node in list(graph_module.graph.nodes):
        if node.target in (
            torch.ops.aten.lift_fresh_copy.default,
            torch.ops.aten.lift_fresh.default,
        ):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def name_dtypes(graph_module: fx.GraphModule) -> None:
    """Cast to a dtype by name instead of like a tensor, whose values play no part in it."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.type_as.default):
        with graph.inserting_before(node):
            cast = graph.call_function(
                torch.ops.aten.to.dtype, (node.args[0], node.meta["val"].dtype)
            )
        cast.meta = node.meta
        node.replace_all_uses_with(cast)
        graph.erase_node(node)


def name_sizes(graph_module: fx.GraphModule) -> None:
    """Give the size that a view leaves open by name: no size follows from an empty tensor."""
    for node in graph_module.graph.nodes:
        if node.target not in (torch.ops.aten.view.default, torch.ops.aten.reshape.default):
            continue
        source, sizes = node.args
        for axis, (size, known) in enumerate(zip(sizes, node.meta["val"].shape, strict=True)):
            if isinstance(size, int) and size == -1 and isinstance(known, int):
                node.args = (source, [*sizes[:axis], known, *sizes[axis + 1 :]])


def count_parts(graph_module: fx.GraphModule) -> None:
    """Say the sizes of parts that are an input's: how many there are does not follow from them."""
    graph = graph_module.graph
    for target in (torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default):
        for node in graph.find_nodes(op="call_function", target=target):
            source, axis = node.args[0], node.args[2] if len(node.args) > 2 else 0
            parts = node.meta["val"]
            whole, part = (x.shape[axis] for x in (source.meta["val"], parts[0]))
            if isinstance(part, int) or not statically_known_true(whole == len(parts) * part):
                continue
            with graph.inserting_before(node):
                read = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
                size = graph.call_function(operator.floordiv, (read, len(parts)))
            read.meta["val"], size.meta["val"] = whole, part
            node.target = torch.ops.aten.split_with_sizes.default
            node.args = (source, [size] * len(parts), axis)


def read_sizes_from_inputs(graph_module: fx.GraphModule) -> None:
    """Let every size that is a dimension of an input be read from that input, in place."""
    graph = graph_module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    if not last:
        return
    sizes = Sizes(graph, last[0], symbol_sources(graph))
    for node in list(graph.nodes):
        expression = size_expression(node)
        if not isinstance(expression, sympy.Expr):
            continue
        if node.target is torch.ops.aten.sym_size.int and expression in sizes.sources:
            node.replace_all_uses_with(sizes.node_for(expression, node.meta["val"]))
            graph.erase_node(node)


class Sizes:
    """Makes the nodes that compute a size from the sizes of inputs, each of them once."""

    def __init__(
        self,
        graph: fx.Graph,
        after: fx.Node,
        sources: dict[sympy.Basic, tuple[fx.Node, int]],
        known: dict[sympy.Basic, fx.Node] | None = None,
    ):
        self.graph = graph
        self.after = after
        self.sources = sources
        self.made: dict[sympy.Basic, Any] = dict(known or {})

    def node_for(self, expression: sympy.Expr, value: Any) -> Any:
        """Return the node, or the integer, that computes an expression in sizes of inputs."""
        if expression.is_Integer:
            return int(expression)
        if expression.is_Float:
            return float(expression)
        if expression in self.made:
            return self.made[expression]
        if isinstance(expression, sympy.Symbol):
            target, operands = torch.ops.aten.sym_size.int, self.sources[expression]
        else:
            target, operands = self._operation(expression)
        with self.graph.inserting_after(self.after):
            node = self.graph.call_function(target, tuple(operands))
        node.meta["val"] = _value_like(value, expression)
        self.after = node
        self.made[expression] = node
        return node

    def _operation(self, expression: sympy.Expr) -> tuple[Any, Any]:
        target = SIZE_OPERATIONS.get(type(expression).__name__)
        if target is None:
            raise NotImplementedError(f"a size with {type(expression).__name__}: {expression}")
        first, *rest = expression.args
        if len(rest) > 1:
            rest = [expression.func(*rest)]
        return target, [self._inner(x) for x in (first, *rest)]

    def _inner(self, expression: Any) -> Any:
        return self.node_for(expression, None)


SIZE_OPERATIONS: Final[dict[str, Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "PythonMod": operator.mod,
    "Mod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": torch.sym_float,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "TruncToInt": math.trunc,
}
"""What computes each kind of expression in sizes; those of one operand follow those of two."""


def _value_like(value: Any, expression: sympy.Expr) -> Any:
    if value is not None:
        return value
    return expression


def remove_dead(graph_module: fx.GraphModule) -> None:
    """Remove nodes whose value nobody reads, in place; inputs and writes into tensors stay."""
    graph_module.graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or is_write(n)
    )


def drop_unread(graph_module: fx.GraphModule, keep: Callable[[str], bool]) -> list[str]:
    """Erase the placeholders that nobody reads and `keep` does not hold, and return their names."""
    gone = [n for n in graph_module.graph.nodes if n.op == "placeholder" and not n.users]
    names = [n.name for n in gone if not keep(n.name)]
    for node in gone:
        if not keep(node.name):
            graph_module.graph.erase_node(node)
    graph_module.recompile()
    return names


def at_device(graph_module: fx.GraphModule, device: torch.device | str) -> fx.GraphModule:
    """Return a copy of the graph whose constants and casts live on `device`."""
    target = torch.device(device)
    return _with_arguments(graph_module, lambda a: target if isinstance(a, torch.device) else a)


def at_dtype(
    graph_module: fx.GraphModule, source: torch.dtype, target: torch.dtype
) -> fx.GraphModule:
    """Return a copy of the graph that makes and casts to `target` where it said `source`."""
    return _with_arguments(graph_module, lambda a: target if a is source else a)


def _with_arguments(graph_module: fx.GraphModule, change: Callable[[Any], Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        node.args = map_aggregate(node.args, change)
        node.kwargs = map_aggregate(node.kwargs, change)
    changed = fx.GraphModule(graph_module, graph)
    changed.meta = dict(graph_module.meta)
    return changed


def size_expression(node: fx.Node) -> sympy.Expr | int | None:
    """Return the size that a node computes, in the symbols of the inputs."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return value if isinstance(value, int) else None


def _mutates(graph_module: fx.GraphModule) -> bool:
    return any(
        is_write(node)
        for module in graph_module.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _base_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(schema_of(target).name).split("::")[1]
    return getattr(target, "__name__", "")


def _is_region(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in _WRAPPERS:
        return False
    return name == "wrap_with_set_grad_enabled" or not node.args[2]


def _inline(graph_module: fx.GraphModule, node: fx.Node) -> None:
    arguments: tuple[Any, ...] = node.args
    first = next(i for i, a in enumerate(arguments) if _is_attribute(a))
    name = str(arguments[first].target)
    body = graph_module.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    values = dict(zip(_inputs(body), arguments[first + 1 :], strict=True))
    _adopt(graph_module, body, name)
    with graph_module.graph.inserting_before(node):
        result: Any = graph_module.graph.graph_copy(body.graph, values)
    results = result if isinstance(result, list | tuple) else [result]
    for user in list(node.users):
        if user.target is operator.getitem:
            position: Any = user.args[1]
            user.replace_all_uses_with(results[position])
            graph_module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results[0])
    graph_module.graph.erase_node(node)


def _is_attribute(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _inputs(body: fx.GraphModule) -> list[fx.Node]:
    return [n for n in body.graph.nodes if n.op == "placeholder"]


def _adopt(graph_module: fx.GraphModule, body: fx.GraphModule, prefix: str) -> None:
    """Let the attributes that a body reads be read through the graph that adopts it."""
    for node in body.graph.nodes:
        if node.op == "get_attr" and not str(node.target).startswith(f"{prefix}_"):
            name = f"{prefix}_{node.target}".replace(".", "_")
            graph_module.add_submodule(name, body.get_submodule(str(node.target)))
            node.target = name


def symbol_sources(
    graph: fx.Graph, without: set[str] | frozenset[str] = frozenset()
) -> dict[sympy.Basic, tuple[fx.Node, int]]:
    """Return the input and axis where each symbol can be read, states (`without`) left out."""
    sources: dict[sympy.Basic, tuple[fx.Node, int]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor) or node.name in without:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                sources.setdefault(size.node.expr, (node, axis))
    return sources
