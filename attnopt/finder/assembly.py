"""Assemble a match from what the walks found: name the axes, collect the operands."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.anchors import Step
from attnopt.finder.contraction import Labels
from attnopt.finder.evaluate import at_sizes, is_size
from attnopt.finder.layout import Factor, Layout, place, read_layout
from attnopt.finder.match import Match, Operand, Parts, Rows, Side
from attnopt.finder.numbering import canonical_numbers, count, head_groups, line_of, moved_axes
from attnopt.finder.ops import (
    JOINING,
    LAYOUT,
    TRANSPARENT,
    args,
    argument,
    kind,
    module_path,
    shape,
    value,
)
from attnopt.finder.provenance import Root, View, run_layout
from attnopt.nouns import No

Factors = tuple[Factor, ...]


class _RefusalError(Exception):
    """Carries a refusal out of nested reading code to `assemble`."""

    def __init__(self, no: No) -> None:
        super().__init__(no.why)
        self.no = no


def _refuse(why: str, node: fx.Node) -> _RefusalError:
    return _RefusalError(No(why, node.name))


def assemble(view: View, parts: Parts) -> Match | No:
    """Assemble a match, or say what does not fit."""
    try:
        return _Assembly(view, parts).match()
    except _RefusalError as refused:
        return refused.no


@dataclass(frozen=True)
class _Held:
    """An operand of the product of queries and keys, with the labels of its axes."""

    node: fx.Node
    labels: Labels


class _Assembly:
    """Names the axes of one attention and collects its operands."""

    def __init__(self, view: View, parts: Parts) -> None:
        self.view = view
        self.parts = parts
        self.sizes = view.shapes.captured
        self.qk = parts.query_key
        self.out_sizes = self._label_sizes()

    def match(self) -> Match:
        """Read everything, raising `_RefusalError` where something does not fit."""
        parts = self.parts
        key_labels = self._softmax_labels()
        self.q_side, self.k_side = self._orient(key_labels)
        factors = self._factors(key_labels)
        out = Layout(tuple(factors[x] for x in self.qk.out_labels))
        scale, softcap, sides, sinks, coordinates = self._score_steps(out)
        weights_layout, after, after_scale = self._after(out, coordinates)
        v_labels, result_layout = self._value_layouts(weights_layout)
        if parts.moved:
            sizes = shape(parts.values.node)
            held = {role: place(result_layout, role, sizes) for role in "BHTE"}
            for step in parts.moved:
                held = {role: self._push(step, x) for role, x in held.items()}
            result_layout = self._read(held, parts.result)
        heads = max(out.size("H"), 1)
        q, k = (
            replace(
                self._operand(side.node, self._layout_of(side, factors), order, heads),
                labels=side.labels,
            )
            for side, order in ((self.q_side, "BHTD"), (self.k_side, "BHSD"))
        )
        values = parts.values
        v_node = values.rhs if self._weights_are_lhs() else values.lhs
        v = self._operand(v_node, v_labels, "BHSE", heads)
        return Match(
            module=module_path(parts.anchor),
            anchor=parts.anchor,
            result=parts.result,
            result_layout=result_layout,
            q=q,
            k=k,
            v=v,
            scale=scale,
            softcap=softcap,
            sides=tuple(sides),
            sinks=sinks,
            after=tuple(after),
            after_scale=after_scale,
            structure=parts.structure,
            reused=parts.reused,
            scores_layout=out,
            contraction=self.qk,
            rows=self._rows(out, coordinates),
        )

    def _rows(self, out: Layout, coordinates: dict[str, Tensor] | None) -> Rows | None:
        """Say which query each row of the normalised scores belongs to, sink or none."""
        axis = self.parts.axis
        layout: Layout | None = Layout(
            tuple(() if i == axis else x for i, x in enumerate(out.axes))
        )
        if coordinates is not None:
            layout = read_layout({r: coordinates[r].amax(axis, keepdim=True) for r in "BHT"})
        return None if layout is None else Rows(self.parts.scores, axis, layout)

    def _label_sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for node, labels in ((self.qk.lhs, self.qk.lhs_labels), (self.qk.rhs, self.qk.rhs_labels)):
            for label, size in zip(labels, shape(node), strict=True):
                sizes[label] = max(sizes.get(label, 1), size)
        return sizes

    def _size_in(self, side: "_Held", label: str) -> int:
        return shape(side.node)[side.labels.index(label)] if label in side.labels else 0

    def _softmax_labels(self) -> tuple[str, ...]:
        """Name the axes of the product that the softmax runs over."""
        parts = self.parts
        moves = [s for s in parts.steps if s.op in ("layout", "sink", "drop") and not _beside(s)]
        if not moves:
            return (self.qk.out_labels[parts.axis],)
        full = tuple(self.out_sizes[x] for x in self.qk.out_labels)
        lines = {
            x: torch.arange(full[i])
            .view([-1 if j == i else 1 for j in range(len(full))])
            .expand(full)
            for i, x in enumerate(self.qk.out_labels)
        }
        for step in moves:
            lines = {x: self._push(step, line) for x, line in lines.items()}
        found = []
        for x, line in lines.items():
            moved = line.movedim(parts.axis, -1).reshape(-1, line.shape[parts.axis])[0]
            moved = moved[moved >= 0]
            if len(moved) > 1 and (moved != moved[0]).any():
                found.append(x)
        if not found:
            raise _refuse("the softmax does not run over an axis of the product", parts.anchor)
        return tuple(found)

    def _push(self, step: Step, numbers: Tensor) -> Tensor:
        """Run one layout step on numbers instead of values."""
        node = step.node
        if step.op == "sink":
            axis = argument(node, 1, "dim", 0)
            column = torch.full_like(numbers.narrow(axis, 0, 1), -1)
            pieces = [column, numbers] if not step.when else [numbers, column]
            return torch.cat(pieces, dim=axis)

        def read(n: fx.Node) -> Any:
            if is_size(n):
                return at_sizes(value(n), self.sizes)
            if n is args(node)[0]:
                return numbers
            raise _refuse("a layout op reads data", node)

        given: Any = fx.map_arg(node.args, read)
        named: Any = fx.map_arg(node.kwargs, read)
        if "pad" in kind(node):
            return torch.ops.aten.constant_pad_nd.default(given[0], given[1], -1)  # type: ignore[no-any-return]
        try:
            return run_layout(node, given, named)  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise _refuse(f"a layout op cannot be followed: {error}", node) from error

    def _orient(self, key_labels: Labels) -> tuple["_Held", "_Held"]:
        """Tell which operand holds the keys: the softmax axis is theirs alone."""
        lhs = _Held(self.qk.lhs, self.qk.lhs_labels)
        rhs = _Held(self.qk.rhs, self.qk.rhs_labels)
        for q, k in ((lhs, rhs), (rhs, lhs)):
            if all(x in k.labels and x not in q.labels for x in key_labels):
                return q, k
        raise _refuse("the softmax axis belongs to both queries and keys", self.qk.node)

    def _factors(self, key_labels: Labels) -> dict[str, Factors]:
        """Give every axis of the product its roles."""
        local: dict[str, list[tuple[str, int, int]]] = {}
        batches = [
            x for x in self.qk.out_labels if x in self.qk.lhs_labels and x in self.qk.rhs_labels
        ]
        for label in self.qk.out_labels:
            local[label] = self._roles_of(label, key_labels, batches)
        for label in self.qk.summed:
            local[label] = [("D", self.out_sizes[label], 0)]
        return _with_strides(local, (*self.qk.out_labels, *self.qk.summed))

    def _roles_of(
        self, label: str, key_labels: Labels, batches: list[str]
    ) -> list[tuple[str, int, int]]:
        """List (role, size, order) of an axis, the slowest first."""
        size = self.out_sizes[label]
        if size == 1:
            return []
        if label in key_labels:
            return [("S", size, 0)]
        in_q, in_k = self._size_in(self.q_side, label), self._size_in(self.k_side, label)
        if in_q <= 1 and label not in self.q_side.labels:
            raise _refuse(
                "an axis of the keys is neither batch, head nor softmax axis", self.qk.node
            )
        rows = "B" if label in batches else "T"
        found = self._split_line(self.q_side if in_q > 1 else self.k_side, label, rows)
        if found is None and in_q > 1 and in_k > 1:
            found = self._split_line(self.k_side, label, rows)
        if found is not None:
            return found
        # Nothing is known of where the operand comes from: the first shared axis is the batch.
        is_head = label in batches and len(batches) > 1 and label == batches[-1]
        return [("H" if is_head else rows, size, 0)]

    def _split_line(
        self, side: "_Held", label: str, rows: str
    ) -> list[tuple[str, int, int]] | None:
        """Tell batch or query steps from head steps along an axis of an operand."""
        provenance = self.view.provenance
        numbers = provenance.numbers(side.node)
        line = line_of(numbers, side.labels.index(label))
        if line is None:
            return None
        root = provenance.root_of(int(line[0]))
        if int(line.max()) >= root.base + count(root.shape) or int(line.min()) < root.base:
            return None
        if not root.channels:
            root = self._guess_channels(root, numbers, side)
            if not root.channels:
                return None
        row, channel = root.place(line)
        lines = {
            role: torch.unique(x, return_inverse=True)[1]
            for role, x in ((rows, row), ("H", channel))
            if (x != x[0]).any()
        }
        if not lines:
            return None
        layout = read_layout(lines)
        if layout is None:
            return None
        step = {f.role: 0 for f in layout.axes[0]}
        if "H" in step:
            changes = (channel[1:] - channel[:-1])[channel[1:] != channel[:-1]]
            step["H"] = int(changes[0])
        return [(f.role, f.size, abs(step[f.role])) for f in layout.axes[0]]

    def _guess_channels(self, root: Root, numbers: Tensor, side: "_Held") -> Root:
        """For a raw input: axes that are not batch (the first) nor query or key hold the heads."""
        lines = {x: line_of(numbers, i) for i, x in enumerate(side.labels)}
        moves = {
            x: moved_axes(root, at) for x, at in lines.items() if at is not None and len(at) > 1
        }
        taken = {a for moved in moves.values() for a in moved}
        channels = {a for x in moves.keys() & set(self.qk.summed) for a in moves[x]}
        inside = {a for x in moves.keys() - set(self.qk.summed) for a in moves[x]}
        common = {x for x in moves if x in self.qk.lhs_labels and x in self.qk.rhs_labels}
        shared = {a for x in common - set(self.qk.summed) for a in moves[x]}
        varying = _varying_axes(root.node)
        # Where queries have more than their own axis, or share it with heads, only their number
        # varies; a group of heads shares its axis with the heads of keys.
        own = [moves[x] for x in moves.keys() - common]
        rows = {a for axes in own for a in axes & varying}
        rows = rows or {a for axes in own for a in axes - shared}
        other = self.k_side if side is self.q_side else self.q_side
        first = int(self.view.provenance.numbers(other.node).max())
        tokens = self.view.provenance.root_of(first).node is root.node
        if channels & inside or tokens or root.node.op != "placeholder":
            # Heads lie within the axis of the channels.
            return replace(root, channels=tuple(sorted(channels)))
        outer = sorted(taken - rows - channels)
        # The batch comes first; where the length does, it comes next, if two axes are left.
        batch = outer[0] if 0 in outer or len(outer) > 1 else 0
        free = [i for i in sorted(taken - rows) if i != batch]
        return replace(root, channels=tuple(free)) if free else root

    # ------------------------------------------------------------------------------- scores

    def _score_steps(
        self, out: Layout
    ) -> tuple[float, float | None, list[Side], Side | None, dict[str, Tensor] | None]:
        """Fold the score arithmetic into scale, soft cap and sides."""
        scale, softcap = 1.0, None
        sides: list[Side] = []
        sinks: Side | None = None
        layout = out
        coordinates: dict[str, Tensor] | None = None
        for step in self.parts.steps:
            if step.op == "scale":
                if step.number < 0 and any(s.step.op == "hide" for s in sides):
                    raise _refuse("masked scores are negated", step.node)
                scale *= step.number
                softcap = None if softcap is None else softcap * step.number
                sides = [replace(s, factor=s.factor * step.number) for s in sides]
            elif step.op == "tanh":
                if softcap is not None or not all(_scales_queries(s) for s in sides):
                    raise _refuse("tanh of scores that are already biased or masked", step.node)
                softcap = 1.0
            elif step.op in ("add", "multiply", "hide"):
                side = Side(step, layout)
                if softcap is not None and _scales_queries(side):
                    raise _refuse("scores are multiplied after the soft cap", step.node)
                sides.append(Side(step, layout, step.number if step.op == "add" else 1.0))
            elif step.op == "sink":
                if sinks is not None:
                    raise _refuse("two sink columns", step.node)
                sinks = Side(step, layout)
            if step.op in ("layout", "sink", "drop") and not _beside(step):
                coordinates = self._start(out) if coordinates is None else coordinates
                coordinates = {r: self._push(step, c) for r, c in coordinates.items()}
                if step.op == "layout":
                    layout = self._read(coordinates, step.node)
        return scale, softcap, sides, sinks, coordinates

    def _start(self, out: Layout) -> dict[str, Tensor]:
        full = tuple(self.out_sizes[x] for x in self.qk.out_labels)
        return {role: place(out, role, full) for role in "BHTS"}

    def _read(self, coordinates: dict[str, Tensor], node: fx.Node) -> Layout:
        layout = read_layout(coordinates)
        if layout is None:
            raise _refuse("an op moves scores in a way that is not a product of axes", node)
        return layout

    def _after(
        self, out: Layout, coordinates: dict[str, Tensor] | None
    ) -> tuple[Layout, list[Side], float]:
        """Follow the weights to the product with the values."""
        layout = out if coordinates is None else None
        scale = 1.0
        after: list[Side] = []
        open_sink = any(s.op == "sink" and not _beside(s) for s in self.parts.steps) and not any(
            s.op == "drop" for s in self.parts.steps
        )
        if coordinates is not None and not open_sink:
            layout = self._read(coordinates, self.parts.anchor)
        for step in self.parts.after:
            if step.op == "scale":
                scale *= step.number
            elif step.op in ("layout", "drop"):
                coordinates = self._start(out) if coordinates is None else coordinates
                coordinates = {r: self._push(step, c) for r, c in coordinates.items()}
                layout = self._read(coordinates, step.node)
            else:
                if layout is None:
                    raise _refuse("the sink column is changed before it is dropped", step.node)
                after.append(Side(step, layout))
        if layout is None:
            raise _refuse("the sink column meets the values", self.parts.anchor)
        return layout, after, scale

    def _weights_are_lhs(self) -> bool:
        weights, values = self.parts.weights, self.parts.values
        if weights is None or values.lhs is weights:
            return True
        # In a mul + sum product the weights may arrive by another node of the same value.
        return values.rhs is not weights

    def _value_layouts(self, weights: Layout) -> tuple[Layout, Layout]:
        """Give the axes of the values and of the result their roles."""
        values = self.parts.values
        lhs = self._weights_are_lhs()
        w_labels = values.lhs_labels if lhs else values.rhs_labels
        v_labels = values.rhs_labels if lhs else values.lhs_labels
        v_node = values.rhs if lhs else values.lhs
        if len(w_labels) != len(weights.axes):
            raise _refuse("weights and values do not line up", values.node)
        of_label = dict(zip(w_labels, weights.axes, strict=True))
        sizes = dict(zip(v_labels, shape(v_node), strict=True))
        for x in values.summed:
            if any(f.role != "S" for f in of_label[x]):
                raise _refuse(
                    "the product with the values sums over more than the keys", values.node
                )
        if sum(f.role == "S" for x in values.summed for f in of_label[x]) != len(
            weights.factors("S")
        ):
            raise _refuse(
                "the product with the values does not sum over the softmax axis", values.node
            )
        own = [x for x in v_labels if x not in w_labels and sizes[x] > 1]
        strides = _with_strides({x: [("E", sizes[x], 0)] for x in own}, tuple(own))
        v_layout = Layout(
            tuple((_fitted(of_label[x], sizes[x]) if x in of_label else strides.get(x, ()))
                  if sizes[x] > 1 else () for x in v_labels)
        )  # fmt: skip
        result = Layout(
            tuple(of_label[x] if x in of_label else strides.get(x, ()) for x in values.out_labels)
        )
        if "S" in result.roles:
            raise _refuse("the result still has an axis of keys", values.node)
        return v_layout, result

    # ----------------------------------------------------------------------------- operands

    def _layout_of(self, side: "_Held", factors: dict[str, Factors]) -> Layout:
        pairs = zip(side.labels, shape(side.node), strict=True)
        return Layout(tuple(_fitted(factors[x], size) if size > 1 else () for x, size in pairs))

    def _operand(self, node: fx.Node, layout: Layout, order: str, heads: int) -> Operand:
        """Step back over repeated heads and mere rearrangements to the plainest spelling."""
        numbers = self.view.provenance.numbers(node)
        canonical = canonical_numbers(numbers, layout, order)
        own = canonical.shape[1]
        if own not in (1, heads):
            # Grouped heads of a fused op: query head h reads head h // (heads / own).
            return Operand(
                node, layout, tuple(h // (heads // own) for h in range(heads)), node, own
            )
        if own == 1:
            plain = self._plainest(node, canonical, order)
            return Operand(*(plain or (node, layout)), (0,) * heads, node, 1)
        groups, first = head_groups(canonical)
        distinct = canonical[:, first]
        plain = None
        if torch.equal(distinct[:, list(groups)], canonical):
            plain = self._plainest(node, distinct, order)
        if plain is None:
            # The repeated spelling stays, but which heads are equal is known.
            # A cache may hold repeated heads as if they were distinct; the newest row knows better.
            newest = head_groups(canonical[:, :, -1:])[1]
            return Operand(node, layout, tuple(range(heads)), node, len(newest))
        return Operand(*plain, tuple(groups), node, len(first))

    def _plainest(
        self, node: fx.Node, numbers: Tensor, order: str
    ) -> tuple[fx.Node, Layout] | None:
        """Find the nearest source that holds just these elements, best in plain order."""
        flat = numbers.flatten()
        ranked, at = flat.sort()
        if len(ranked) == 0 or int(ranked[0]) < 0 or (ranked[1:] == ranked[:-1]).any():
            return None
        best: tuple[fx.Node, Layout] | None = None
        current: Any = node
        while isinstance(current, fx.Node) and isinstance(value(current), Tensor):
            layout = self._layout_by_numbers(current, numbers, ranked, at, order)
            if layout is not None:
                if layout.is_plain(order):
                    return current, layout
                best = best or (current, layout)
            movable = kind(current) in LAYOUT - {"gather", "index", "getitem"} or (
                kind(current) in TRANSPARENT and _same_dtype(current)
            )
            joined = kind(current) in JOINING and isinstance(args(current)[0], list | tuple)
            current = args(current)[0][0] if joined else args(current)[0] if movable else None
        return best

    def _layout_by_numbers(
        self, node: fx.Node, numbers: Tensor, ranked: Tensor, at: Tensor, order: str
    ) -> Layout | None:
        found = self.view.provenance.numbers(node)
        if found.numel() != ranked.numel():
            return None
        where = torch.searchsorted(ranked, found.flatten()).clamp(max=len(ranked) - 1)
        if not torch.equal(ranked[where], found.flatten()):
            return None
        index = at[where]
        coordinates: dict[str, Tensor] = {}
        stride = numbers.numel()
        for role, size in zip(order, numbers.shape, strict=True):
            stride //= size
            coordinates[role] = ((index // stride) % size).view(found.shape)
        return read_layout(coordinates)


def _varying_axes(node: fx.Node) -> set[int]:
    """List the axes of an input whose size is not fixed."""
    sizes: tuple[Any, ...] = value(node).shape if node.op == "placeholder" else ()
    return {i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)}


def _fitted(factors: Factors, size: int) -> Factors:
    """Return the factors of an axis; one of fewer heads than queries have holds groups of heads."""
    if len(factors) == 1 and factors[0].role == "H" and factors[0].size != size:
        return (Factor("H", size, 1),)
    return factors


def _scales_queries(side: Side) -> bool:
    """Tell whether a side operand multiplies all keys of a query alike, as a scale does."""
    return side.step.op == "multiply" and "S" not in side.own_layout().roles


def _beside(step: Step) -> bool:
    """Tell a sink that is added to the sum of a softmax from one that is a column of the scores."""
    return step.op == "sink" and kind(step.node) == "add"


def _same_dtype(node: fx.Node) -> bool:
    source = args(node)[0]
    return isinstance(source, fx.Node) and value(source).dtype == value(node).dtype


def _with_strides(
    local: dict[str, list[tuple[str, int, int]]], labels: tuple[str, ...]
) -> dict[str, Factors]:
    """Number each role over all axes: heads by their place among the channels, others in order."""
    slots = [(x, i, *part) for x in labels for i, part in enumerate(local[x])]
    strides: dict[tuple[str, int], int] = {}
    for role in dict.fromkeys(role for _, _, role, _, _ in slots):
        mine = [s for s in slots if s[2] == role]
        mine = sorted(mine, key=lambda s: -s[4]) if role == "H" else mine
        stride = 1
        for x, i, _, size, _ in reversed(mine):
            strides[(x, i)] = stride
            stride *= size
    return {
        x: tuple(Factor(role, size, strides[(x, i)]) for i, (role, size, _) in enumerate(local[x]))
        for x in labels
    }
