"""Attention of an exported model on rows (B, T, H D), where heads were only moved to the front.

    Attention(Transpose(q), Transpose(k), Transpose(v)) -> Transpose -> Reshape
    -> Attention(q, k, v; number of heads)

The standard op takes both forms. In this one it moves heads itself, which ONNX Runtime does in less
time on a CPU than what moves them before and after. Rotary embeddings in between take rows, too.
Axis letters as in `attnopt.ops.attention`.
"""

from typing import Any

from attnopt.backends.ort.editing import Editor, is_a, only_reader
from attnopt.backends.ort.editing import sizes as sizes_of

_SWAPPED = [0, 2, 1, 3]


def attend_in_rows(model: Any) -> int:
    """Rewrite, in place, every attention whose operands and result allow it; return how many."""
    rows = _Rows(model)
    return sum([rows.rewrite(n) for n in list(model.graph) if is_a(n, "Attention")])


class _Rows(Editor):
    """Rewrites the attentions of one model, and makes each mask once."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, "rows")
        self.masks: dict[Any, Any] = {}

    def rewrite(self, node: Any) -> bool:
        """Rewrite an attention, or leave it where a part of it is not moved rows."""
        operands = node.inputs[:3]
        sizes = [found for x in operands if (found := _heads(x)) is not None]
        readers = _readers(node.outputs[0])
        if len(sizes) < 3 or not readers or not all(map(_is_moved, operands)):
            return False
        (heads, _), (kv_heads, _), (_, width) = sizes
        rows = [self._rows(x, h * d, h) for x, (h, d) in zip(operands, sizes, strict=True)]
        attributes = {**node.attributes, "q_num_heads": heads, "kv_num_heads": kv_heads}
        made = self.put(
            node, "Attention", [*rows, *node.inputs[3:]], attributes, outputs=len(node.outputs)
        )
        made[0].type = node.outputs[0].type
        batch, _, tokens, _ = node.outputs[0].shape
        made[0].shape = _shape([batch, tokens, heads * width])
        # States stay as they are: (B, H, T, D).
        for old, new in zip(node.outputs[1:], made[1:], strict=True):
            self.replace(old, new)
        for reader in readers:
            found = made[0] if is_a(reader, "Transpose") else self._shown(reader, made[0])
            last = reader if is_a(reader, "Transpose") else only_reader(reader.outputs[0])
            self._give(last.outputs[0], found, heads, width)
        self.drop(node)
        return True

    def _rows(self, moved: Any, width: int, heads: int) -> Any:
        """Return the rows (B, T, `width`) that were moved to (B, H, T, D)."""
        node = moved.producer()
        if is_a(node, "RotaryEmbedding"):
            x, *tables = node.inputs
            attributes = {**node.attributes, "num_heads": heads}
            operands = [self._rows(x, width, heads), *tables]
            return self._typed(self.put(node, node.op_type, operands, attributes)[0], moved, width)
        before = node.inputs[0]
        source = before.producer()
        if source is not None and is_a(source, "Reshape"):
            rows, (batch, _, tokens, _) = source.inputs[0], moved.shape
            if _are(rows, [batch, tokens, width]):
                return rows
        shape = self.constant([0, 0, width])
        return self._typed(self.put(node, "Reshape", [before, shape], {})[0], moved, width)

    def _typed(self, made: Any, moved: Any, width: int) -> Any:
        batch, _, tokens, _ = moved.shape
        made.type, made.shape = moved.type, _shape([batch, tokens, width])
        return made

    def _shown(self, where: Any, rows: Any) -> Any:
        """Give the queries that see nothing zeros, in rows: Where(sees (B, 1, T, 1), rows, 0)."""
        sees, _, zeros = where.inputs
        if sees not in self.masks:
            axes = self.constant([1])
            self.masks[sees] = self.put(where, "Squeeze", [sees, axes], {})[0]
            self.masks[sees].type = sees.type
        found = self.put(where, "Where", [self.masks[sees], rows, zeros], {})[0]
        found.type, found.shape = rows.type, rows.shape
        return found

    def _give(self, result: Any, rows: Any, heads: int, width: int) -> None:
        """Let rows be read where results were moved back to (B, T, H, D), and then joined."""
        batch, tokens = rows.shape[:2]
        for node in [use.node for use in result.uses()]:
            out = node.outputs[0]
            if is_a(node, "Reshape") and _are(out, [batch, tokens, heads * width]):
                self.replace(out, rows)
                self.drop(node)
        if result.uses() or result.is_graph_output():
            shape = self.constant([0, 0, heads, width])
            whole = self.put(result.producer(), "Reshape", [rows, shape], {})[0]
            self.replace(result, whole)
            self.drop(result.producer())


def _shape(sizes: list[Any]) -> Any:
    import onnx_ir as ir

    return ir.Shape(sizes)


def _are(rows: Any, wanted: list[Any]) -> bool:
    """Tell whether a value has these sizes, all of them known: rows may be cut into others."""
    return sizes_of(rows) == wanted


def _heads(value: Any) -> tuple[int, int] | None:
    """Return how many heads of which width a value (B, H, T, D) has, where both are numbers."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    heads, width = value.shape[1], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _is_moved(value: Any) -> bool:
    """Tell whether a value (B, H, T, D) is (B, T, H, D) with its heads moved, turned or not."""
    node = value.producer()
    if is_a(node, "RotaryEmbedding"):
        alone = len(value.uses()) == 1 and len(node.inputs) == 3
        return alone and _heads(node.inputs[0]) == _heads(value) and _is_moved(node.inputs[0])
    return _is_swap(node)


def _is_swap(node: Any) -> bool:
    if not is_a(node, "Transpose"):
        return False
    return list(node.attributes["perm"].as_ints()) == _SWAPPED


def _readers(value: Any) -> list[Any]:
    """List what reads a result, where all of it moves heads back, or first hides blind queries."""
    if value.is_graph_output():
        return []
    readers = [use.node for use in value.uses()]
    for node in readers:
        hides = (
            is_a(node, "Where")
            and node.inputs[1] is value
            and _is_swap(only_reader(node.outputs[0]))
        )
        sees = node.inputs[0].shape if hides else None
        by_query = sees is not None and len(sees) == 4 and sees[1] == 1 and sees[3] == 1
        if not _is_swap(node) and not (hides and by_query and not len(node.inputs[2].shape or ())):
            return []
    return readers
