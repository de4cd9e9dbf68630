"""Causal attention of an exported model part by part, where many tokens come at once.

    Attention(q, k, v, mask, past) -> If(many tokens): Attention of each part of the tokens, whose
                                          past is what the part before it leaves
                                      else: the same Attention

On a CPU, ONNX Runtime computes all scores and holds them at once, those among them that the mask
hides. A part of the tokens has no scores with the parts after it. Masks are recognised as
`attnopt.backends.ort.attention` writes them.
"""

from collections.abc import Sequence
from typing import Any, Final

from attnopt.backends.ort.attention import HIDDEN
from attnopt.backends.ort.editing import Editor, is_a, number

LEAST: Final = 256
"""Tokens of a call from which on it goes part by part."""

PARTS: Final = 8


def attend_in_parts(model: Any) -> int:
    """Rewrite, in place, every attention that is known to be causal; return how many."""
    parts = _Parts(model)
    return sum([parts.rewrite(n) for n in list(model.graph) if is_a(n, "Attention")])


class _Parts(Editor):
    """Rewrites the attentions of one model, and computes the sizes of parts once."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "parts")
        self.cut: dict[str, tuple[Any, Any, Any]] = {}

    def rewrite(self, node: Any) -> bool:
        """Rewrite an attention, or leave it where more than causal order may decide its result."""
        queries, _, _, mask, *past = [*node.inputs, *[None] * 6][:6]
        if None in past or mask is None or len(node.inputs) > 6 or len(node.outputs) != 3:
            return False
        if queries.shape is None:
            return False
        axis = 1 if len(queries.shape) == 3 else 2
        tokens = queries.shape[axis]
        if isinstance(tokens, int) or tokens.value is None or not _has_rows(mask, tokens):
            return False
        seen = _seen(mask)
        if seen is None or not _is_chosen_from(node.outputs[0], seen):
            return False
        many, size, sizes = self._cut(node, queries, axis)
        then, results = self._in_parts(node, axis, past, size, sizes)
        otherwise = self._copied(node, node.inputs)
        branches = {
            "then_branch": self._branch(then, results),
            "else_branch": self._branch([otherwise], otherwise.outputs),
        }
        made = self.put(node, "If", [many], branches, outputs=3)
        for old, new in zip(node.outputs, made, strict=True):
            self.replace(old, new)
        self.graph.remove(node, safe=True)
        return True

    def _cut(self, node: Any, queries: Any, axis: int) -> tuple[Any, Any, Any]:
        """Return whether tokens are many, how many a part has, and how many each part has."""
        name = queries.shape[axis].value
        if name not in self.cut:
            where = {"start": axis, "end": axis + 1}
            count = self.put(node, "Shape", [queries], where)[0]
            size = self.put(node, "Div", [count, self.constant([PARTS])])[0]
            others = self.put(node, "Mul", [size, self.constant([PARTS - 1])])[0]
            last = self.put(node, "Sub", [count, others])[0]
            pieces = [*[size] * (PARTS - 1), last]
            sizes = self.put(node, "Concat", pieces, {"axis": 0})[0]
            many = self.put(node, "GreaterOrEqual", [count, self.constant([LEAST])])[0]
            self.cut[name] = self.put(node, "Squeeze", [many])[0], size, sizes
        return self.cut[name]

    def _in_parts(
        self, node: Any, axis: int, past: Sequence[Any], size: Any, sizes: Any
    ) -> tuple[list[Any], list[Any]]:
        """Return the nodes that attend part by part, and what they give."""
        queries, keys, values, mask = node.inputs[:4]
        made: list[Any] = []

        def put(kind: str, inputs: Sequence[Any], outputs: int = 1, **attributes: Any) -> list[Any]:
            made.append(self.loose(kind, inputs, attributes, outputs=outputs))
            return list(made[-1].outputs)

        pieces = [put("Split", [x, sizes], PARTS, axis=axis) for x in (queries, keys, values)]
        rows = put("Split", [mask, sizes], PARTS, axis=-2)
        stop = put("Shape", [past[0]], start=2, end=3)[0]
        zero, last_axis = self.constant([0]), self.constant([-1])
        found: list[Any] = []
        for part, (q, k, v, seen) in enumerate(zip(*pieces, rows, strict=True)):
            if part < PARTS - 1:
                stop = put("Add", [stop, size])[0]
                seen = put("Slice", [seen, zero, stop, last_axis])[0]
            made.append(self._copied(node, [q, k, v, seen, *past]))
            result, *past = made[-1].outputs
            found.append(result)
        return made, [*put("Concat", found, axis=axis), *past]

    def _copied(self, node: Any, inputs: Sequence[Any]) -> Any:
        """Return the same attention of other operands."""
        return self.loose(node.op_type, inputs, node.attributes, outputs=3)

    def _branch(self, nodes: Sequence[Any], results: Sequence[Any]) -> Any:
        import onnx_ir as ir

        return ir.Graph([], list(results), nodes=list(nodes), name=self.free("parts_branch"))


def _has_rows(mask: Any, tokens: Any) -> bool:
    """Tell whether a mask has a row for each token of the call."""
    shape = mask.shape
    return shape is not None and len(shape) == 4 and shape[2] == tokens


def _seen(mask: Any) -> Any:
    """Return the truths behind a mask of numbers, if they hide from each token what comes later."""
    node = mask.producer()
    if is_a(node, "Expand"):
        return _seen(node.inputs[0])
    if is_a(node, "Add"):
        return next((x for x in map(_seen, node.inputs) if x is not None), None)
    if not is_a(node, "Where"):
        return None
    sees, _, hidden = node.inputs
    least = number(hidden)
    return sees if least is not None and least <= HIDDEN and _sees_no_later(sees) else None


def _sees_no_later(sees: Any) -> bool:
    """Tell whether a mask of truths is one of causal order and maybe others."""
    node = sees.producer()
    return (is_a(node, "And") and any(map(_sees_no_later, node.inputs))) or _is_order(node)


def _is_order(node: Any) -> bool:
    """Tell whether a node is: number of the key (S) <= number of the query (T, 1) + past."""
    if not is_a(node, "LessOrEqual"):
        return False
    keys, queries = (x.producer() for x in node.inputs)
    if not is_a(keys, "Range") or not is_a(queries, "Add"):
        return False
    whole = keys.inputs[1].producer()
    if number(keys.inputs[0]) != 0 or number(keys.inputs[2]) != 1 or not is_a(whole, "Add"):
        return False
    for column, past in (queries.inputs, reversed(queries.inputs)):
        made = column.producer()
        if not is_a(made, "Unsqueeze") or number(made.inputs[1]) not in (1, -1):
            continue
        counted = made.inputs[0].producer()
        if not is_a(counted, "Range") or number(counted.inputs[0]) != 0:
            continue
        if number(counted.inputs[2]) == 1 and {*whole.inputs} == {counted.inputs[1], past}:
            return True
    return False


def _is_chosen_from(result: Any, seen: Any) -> bool:
    """Tell whether another value takes the place of what a token that sees nothing gets.

    That would be the mean of all values, and is another one of a part's.
    """
    readers = [use.node for use in result.uses()]
    chosen = all(
        is_a(n, "Where") and n.inputs[1] is result and _is_any(n.inputs[0], seen) for n in readers
    )
    return chosen and bool(readers) and not result.is_graph_output()


def _is_any(truth: Any, seen: Any) -> bool:
    """Tell whether a value says of each token whether it sees any key."""
    node = truth.producer()
    if is_a(node, "Squeeze"):
        node = node.inputs[0].producer()
    for kind in ("Cast", "ReduceMax", "Cast"):
        if not is_a(node, kind):
            return False
        truth = node.inputs[0]
        node = truth.producer()
    return truth is seen
