"""What passes over an exported model share: reading its nodes, and putting others in their place.

Passes work in place on onnx_ir's model. What they make is in the standard domain, so that files run
elsewhere, too.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_MOST: Final = 8
"""Numbers of a constant that is read: of sizes, axes and the like."""


class Editor:
    """Puts nodes and constants into a model, whose names begin with the `prefix` of a pass."""

    def __init__(self, model: Any, prefix: str) -> None:
        self.graph = model.graph
        self.prefix = prefix
        self._constants: dict[Any, Any] = {}
        self._taken = _names(model.graph)
        self._numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)

    def put(
        self,
        before: Any,
        kind: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
    ) -> list[Any]:
        """Put a node before another one, and return its results, whose types are not known."""
        made = self.loose(kind, inputs, attributes, outputs=outputs)
        self.graph.insert_before(before, made)
        return list(made.outputs)

    def loose(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
    ) -> Any:
        """Return a node that is in no graph yet, such as one of a branch."""
        import onnx_ir as ir

        made = ir.node(kind, inputs, attributes=attributes, num_outputs=outputs)
        for value in made.outputs:
            value.name = self.free(self.prefix)
        return made

    def constant(self, content: Any) -> Any:
        """Return a constant with the numbers of an array; equal ones are one."""
        import numpy as np
        import onnx_ir as ir

        array = np.asarray(content)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.free(f"{self.prefix}_constant")
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor)
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def free(self, kind: str) -> str:
        """Return the next name of a kind that no value of the model has."""
        numbered = (f"{kind}_{n}" for n in self._numbers[kind])
        return next(name for name in numbered if name not in self._taken)

    def replace(self, old: Any, new: Any) -> None:
        """Let a new value be read instead of an old one, under its name where it is a result."""
        if old.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(old)] = new
            name, old.name = old.name, f"{old.name}_before"
            new.name = name
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new)

    def drop(self, node: Any) -> None:
        """Remove a node that nobody reads, and what only it read."""
        if node.graph is None or any(x.uses() or x.is_graph_output() for x in node.outputs):
            return
        before = [x.producer() for x in node.inputs if x is not None and x.producer() is not None]
        self.graph.remove(node, safe=True)
        for other in dict.fromkeys(before):
            self.drop(other)


def _names(graph: Any) -> set[str | None]:
    """Return the names of all values, those within branches and loops among them."""
    from onnx_ir.traversal import RecursiveGraphIterator

    found = {x.name for x in (*graph.inputs, *graph.initializers.values())}
    for node in RecursiveGraphIterator(graph):
        found |= {x.name for x in node.outputs}
    return found


def is_a(node: Any, kind: str) -> bool:
    """Tell whether there is a node, and it is of a kind of the standard domain."""
    return node is not None and node.op_type == kind and not node.domain


def maker(value: Any, kind: str) -> Any:
    """Return the node of a kind that makes a value, where one other node reads it."""
    node = value.producer()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return node if alone and is_a(node, kind) else None


def only_reader(value: Any) -> Any:
    """Return the one node that reads a value."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def numbers(value: Any) -> list[float] | None:
    """Return the numbers of a small constant."""
    constant = value.const_value if value is not None else None
    if constant is None or constant.size > _MOST:
        return None
    return [float(x) for x in constant.numpy().reshape(-1)]


def number(value: Any) -> float | None:
    """Return the one number of a constant."""
    found = numbers(value)
    return found[0] if found is not None and len(found) == 1 else None


def attribute(node: Any, name: str, otherwise: Any) -> Any:
    """Return what a node says of itself, or what it means where it says nothing."""
    return node.attributes[name].value if name in node.attributes else otherwise


def sizes(value: Any) -> list[Any] | None:
    """Return the sizes of a value where all of them are numbers or have names."""
    if value is None or value.shape is None:
        return None
    known = all(isinstance(x, int) or x.value is not None for x in value.shape)
    return list(value.shape) if known else None
