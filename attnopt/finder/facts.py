"""Read the facts of a site that its match does not hold: projections, rotation, norms, origins."""

from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.evaluate import ancestors, at_sizes, is_size
from attnopt.finder.layout import place
from attnopt.finder.match import Match, Operand
from attnopt.finder.numbering import canonical_numbers
from attnopt.finder.ops import (
    CONTRACTIONS,
    JOINING,
    LAYOUT,
    NORMS,
    SDPA,
    TRANSPARENT,
    args,
    is_number,
    kind,
    rank,
    shape,
    value,
)
from attnopt.finder.provenance import ELEMENTWISE, Root, View, run_layout, weight_of
from attnopt.nouns import Grid, Projection, Rope

Rows = tuple[tuple[int, ...], ...]


# ------------------------------------------------------------------------------------ projections


def projections(view: View, match: Match) -> dict[str, Projection]:
    """Find the parameter rows that make q, k and v of each head, and the columns that read o."""
    found: dict[str, Projection] = {}
    for name, operand, order in (
        ("q", match.q, "BHTD"),
        ("k", match.k, "BHSD"),
        ("v", match.v, "BHSE"),
    ):
        projection = _projection(view, operand, order)
        if projection is not None:
            found[name] = projection
    output = _output_projection(view, match)
    if output is not None:
        found["o"] = output
    return found


def _projection(view: View, operand: Operand, order: str) -> Projection | None:
    """Read which rows of which parameter make each head and channel of an operand."""
    channels: list[tuple[int, ...]] = []
    roots: set[fx.Node] = set()
    both = [
        canonical_numbers(view.provenance.numbers(operand.node, second=s), operand.layout, order)
        for s in (False, True)
    ]
    for head in range(both[0].shape[1]):
        row: list[int] = []
        # The last row of keys is new even where a cache comes first.
        numbers = [x[0, head, -1] for x in both]
        root = _learned_root(view, numbers[0])
        if root is None:
            return None
        roots.add(root.node)
        inside = [_in_root(root, n) for n in numbers]
        row = (
            inside[0] if len(set(inside[0])) == len(inside[0]) else sorted({*inside[0], *inside[1]})
        )
        channels.append(tuple(row))
    if len(roots) != 1:
        return None
    root = _learned_root(view, both[0][0, 0, -1])
    assert root is not None
    return parameter_rows(view, root, tuple(channels))


def _learned_root(view: View, numbers: Tensor) -> Root | None:
    for number in numbers.tolist():
        if number < 0:
            continue
        root = view.provenance.root_of(int(number))
        if root.contraction is not None and number < root.base + torch.tensor(root.shape).prod():
            return root
    return None


def _in_root(root: Root, numbers: Tensor) -> list[int]:
    """Return the channels of the elements that belong to a root, in order."""
    last = root.base + int(torch.tensor(root.shape).prod())
    mine = numbers[(numbers >= root.base) & (numbers < last)]
    return [int(c) for c in root.place(mine)[1]]


def parameter_rows(view: View, root: Root, channels: Rows) -> Projection | None:
    """Turn output channels of a learned contraction into indices along its parameter's axis."""
    contraction = root.contraction
    assert contraction is not None
    weight = weight_of(contraction, view.origins)
    if weight is None:
        return None
    labels = contraction.labels(weight)
    kept = [i for i, x in enumerate(labels) if x in contraction.out_labels]
    return _indexed(view, contraction, weight, kept, channels)


def _indexed(
    view: View, contraction: Contraction, weight: fx.Node, kept: list[int], channels: Rows
) -> Projection | None:
    """Follow a weight's axes back to the parameter, through transposes and views."""
    direct = _direct_axis(weight, kept[0]) if len(kept) == 1 else None
    if direct is not None:
        source, axis = direct
        binding = view.program.bindings[source.name]
        if binding.kind != "parameter":
            return None
        return _named(view, contraction, binding.name, axis, channels)
    numbers = view.provenance.numbers(weight)
    moved = numbers.movedim(kept, list(range(len(kept))))
    line = moved.reshape(-1, *moved.shape[len(kept) :]).flatten(1)[:, 0]
    root = view.provenance.root_of(int(line[0]))
    if root.node.op != "placeholder":
        return None
    binding = view.program.bindings[root.node.name]
    if binding.kind != "parameter":
        return None
    moving = _varying_axis(root, line)
    axis = moving or 0
    if moving is None:
        rows = channels
    else:
        stride = (
            int(torch.tensor(root.shape[axis + 1 :]).prod()) if axis + 1 < len(root.shape) else 1
        )
        index = (line - root.base) // stride % root.shape[axis]
        rows = tuple(tuple(int(index[c]) for c in row) for row in channels)
    return _named(view, contraction, binding.name, axis, rows)


def _named(
    view: View, contraction: Contraction, parameter: str, axis: int, rows: Rows
) -> Projection:
    bias = contraction.addend
    return Projection(
        parameter=parameter,
        axis=axis,
        rows=rows,
        layout=_layout_name(contraction),
        bias=_parameter_name(view, bias) if bias is not None else None,
    )


def _direct_axis(weight: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Follow an axis of a weight back to its parameter through mere transposes."""
    node = weight
    while node.op != "placeholder":
        name = kind(node)
        if name == "t":
            axis = rank(node) - 1 - axis
        elif name == "transpose":
            a, b = (x % rank(node) for x in args(node)[1:3])
            axis = b if axis == a else a if axis == b else axis
        elif name == "permute":
            axis = args(node)[1][axis] % rank(node)
        elif name not in TRANSPARENT:
            return None
        node = args(node)[0]
    return node, axis


def _varying_axis(root: Root, line: Tensor) -> int | None:
    """Return the one axis of a parameter that a line moves along; None for several."""
    moved = []
    for axis in range(len(root.shape)):
        stride = (
            int(torch.tensor(root.shape[axis + 1 :]).prod()) if axis + 1 < len(root.shape) else 1
        )
        index = (line - root.base) // stride % root.shape[axis]
        if (index != index[0]).any():
            moved.append(axis)
    return moved[0] if len(moved) == 1 else 0 if not moved else None


def _layout_name(c: Contraction) -> Literal["linear", "conv1d", "conv", "einsum"]:
    name = kind(c.node)
    if name == "linear":
        return "linear"
    return "conv" if name.startswith("conv") else "einsum" if name == "einsum" else "conv1d"


def _parameter_name(view: View, node: fx.Node) -> str | None:
    while node.op != "placeholder":
        if kind(node) not in TRANSPARENT | LAYOUT:
            return None
        node = args(node)[0]
    binding = view.program.bindings[node.name]
    return binding.name if binding.kind == "parameter" else None


def _output_projection(view: View, match: Match) -> Projection | None:
    """Follow the result to the parameter that reads it, pushing head and channel numbers along."""
    heads, width = match.heads, match.v.layout.size("E")
    sizes = shape(match.result)
    numbers = place(match.result_layout, "H", sizes) * width + place(
        match.result_layout, "E", sizes
    )
    todo: list[tuple[fx.Node, Tensor]] = [(match.result, numbers)]
    seen: set[fx.Node] = set()
    while todo and len(seen) < 60:
        node, held = todo.pop(0)
        for user in sorted(node.users):
            if user in seen or is_size(user):
                continue
            seen.add(user)
            contraction = read_contraction(user) if kind(user) in CONTRACTIONS else None
            if contraction is not None:
                found = columns(view, contraction, node, held, heads, width)
                if found is not None:
                    return found
                continue
            moved = _pushed(view, user, node, held)
            if moved is not None:
                todo.append((user, moved))
    return None


def _pushed(view: View, user: fx.Node, node: fx.Node, held: Tensor) -> Tensor | None:
    name = kind(user)
    if name in TRANSPARENT:
        return held
    if name in LAYOUT and args(user)[0] is node and name != "getitem":

        def read(n: fx.Node) -> Any:
            return held if n is node else at_sizes(value(n), view.shapes.captured)

        if any(n is not node and not is_size(n) for n in user.all_input_nodes):
            return None
        given, named = fx.map_arg(user.args, read), fx.map_arg(user.kwargs, read)
        try:
            moved = run_layout(user, given, named)
        except RuntimeError:
            return None
        return moved if isinstance(moved, Tensor) else None
    if name in NORMS | ELEMENTWISE and isinstance(value(user), Tensor):
        return held if shape(user) == tuple(held.shape) else None
    return None


def columns(
    view: View, c: Contraction, node: fx.Node, held: Tensor, heads: int, width: int
) -> Projection | None:
    """Read which indices along the summed axis of a weight meet each head and channel held."""
    weight = weight_of(c, view.origins)
    if weight is None or node is weight or node not in (c.lhs, c.rhs):
        return None
    labels = c.labels(node)
    summed = [i for i, x in enumerate(labels) if x in c.summed]
    if len(summed) != len(c.summed):
        return None
    moved = held.movedim(summed, list(range(len(summed)))).reshape(
        -1, *[s for i, s in enumerate(held.shape) if i not in summed]
    )
    line = moved.flatten(1)[:, 0]
    if len(set(line.tolist())) != heads * width:
        return None
    at = {int(x): i for i, x in enumerate(line)}
    channels = tuple(tuple(at[h * width + e] for e in range(width)) for h in range(heads))
    w_labels = c.labels(weight)
    kept = [w_labels.index(labels[i]) for i in summed]
    return _indexed(view, c, weight, kept, channels)


# ------------------------------------------------------------------------------------------ paths


def path(view: View, operand: Operand) -> list[fx.Node]:
    """List the nodes between the projection of an operand and the operand, in order."""
    roots = {r.node for r in view.provenance.roots}
    stop = {n for n in ancestors([operand.product]) if n in roots and n is not operand.product}
    stop |= {n for n in ancestors([operand.product]) if _ends_path(view, n)}
    stop.discard(operand.product)
    return [n for n in ancestors([operand.product], stop) if n not in stop]


def _ends_path(view: View, node: fx.Node) -> bool:
    contraction = read_contraction(node) if kind(node) in CONTRACTIONS else None
    return contraction is not None and weight_of(contraction, view.origins) is not None


def scale_before(view: View, operand: Operand) -> float:
    """Multiply the constants that an operand is scaled by between projection and product."""
    factor = 1.0
    node: Any = operand.product
    newest = int(view.provenance.numbers(node).max())
    while isinstance(node, fx.Node) and not _ends_path(view, node) and node.op != "placeholder":
        name = kind(node)
        if name in ("mul", "div") and len(args(node)) > 1:
            number = _constant(view, args(node)[1])
            if number is not None:
                factor *= number if name == "mul" else 1.0 / number
                node = args(node)[0]
                continue
            number = _constant(view, args(node)[0])
            if number is not None and name == "mul":
                factor *= number
                node = args(node)[1]
                continue
        if name in TRANSPARENT | LAYOUT | NORMS:
            node = args(node)[0]
        elif name in JOINING:
            node = _part_holding(view, node, newest)
        elif name in ELEMENTWISE and name not in ("pow", "rsqrt", "where"):
            if _is_norm_step(node):
                break
            node = view.provenance.carrier(node)
        else:
            break
    return factor


def _part_holding(view: View, joined: fx.Node, number: int) -> fx.Node | None:
    """Return the part of a concatenation that an element comes from."""
    for part in args(joined)[0]:
        if isinstance(part, fx.Node) and bool((view.provenance.numbers(part) == number).any()):
            return part
    return None


def _is_norm_step(node: fx.Node) -> bool:
    """Tell x * rsqrt(mean(x^2)) and x / norm(x), past which constants are not scales."""
    return any(
        kind(n) in ("rsqrt", "linalg_vector_norm", "norm", "clamp_min")
        for n in node.all_input_nodes
    )


def _constant(view: View, x: Any) -> float | None:
    if is_number(x):
        return float(x)
    if not isinstance(x, fx.Node) or not isinstance(value(x), Tensor) or value(x).numel() != 1:
        return None
    found: float | None = view.scalars.scalar(x)
    return found


# ------------------------------------------------------------------------------- rotation, norms


def rope(view: View, match: Match, cached: bool) -> Rope | None:
    """Find a rotary embedding: how channels pair, and on which side of the cache it acts."""
    nodes = path(view, match.q)
    turned = [n for n in nodes if kind(n) in ("mul", "view_as_complex") and _turns(view, n)]
    if not turned:
        return None
    style: Literal["half", "interleaved", "complex"] = "half"
    if any(kind(n) == "view_as_complex" for n in nodes):
        style = "complex"
    elif _interleaves(nodes):
        style = "interleaved"
    placement: Literal["before_cache", "after_cache", "no_cache"] = "no_cache"
    if cached:
        k_nodes = path(view, match.k)
        late = [n for n in k_nodes if kind(n) == "mul" and cache_inputs(view, n)]
        placement = "after_cache" if any(_turns(view, n) for n in late) else "before_cache"
    width = shape(turned[0])[-1]
    if kind(turned[0]) == "mul" and value(turned[0]).is_complex():
        width *= 2
    full = match.q.layout.size("D")
    halves = any(shape(n)[-1] == width for n in turned[1:]) and _in_halves(nodes, width)
    channels = min(2 * width if halves else width, full)
    return Rope(style=style, placement=placement, channels=channels)


def _turns(view: View, node: fx.Node) -> bool:
    """Tell whether a product has a side operand made of cosines and sines of positions."""
    if kind(node) != "mul":
        return False
    for side in node.all_input_nodes:
        if is_size(side) or view.origins.is_data(side):
            continue
        flags = view.origins.of(side)
        if flags and flags <= {"buffer", "constant", "position", "mask", "past_length"}:
            ops = {kind(n) for n in ancestors([side])}
            if ops & {"cos", "sin", "polar", "exp", "complex"} or _is_table(side):
                return True
        elif not flags and {kind(n) for n in ancestors([side])} & {"cos", "sin", "polar"}:
            return True
    return False


def _is_table(node: fx.Node) -> bool:
    """Tell whether a stored table is read by position."""
    ops = {kind(n) for n in ancestors([node])}
    return bool(ops & {"embedding", "index", "index_select", "gather", "slice"}) and rank(node) >= 2


def _interleaves(nodes: list[fx.Node]) -> bool:
    """Tell whether neighbours are paired: strided slices or stacked pairs."""
    for n in nodes:
        if kind(n) == "slice" and len(args(n)) > 4 and args(n)[4] == 2:
            return True
        if kind(n) == "stack" and args(n)[1:] and args(n)[1] in (-1, rank(n) - 1):
            return True
        if kind(n) == "unbind" and shape(args(n)[0])[-1] == 2:
            return True
    return False


def _in_halves(nodes: list[fx.Node], width: int) -> bool:
    """Tell whether the halves are turned apart and joined afterwards."""
    joins = [n for n in nodes if kind(n) in JOINING and isinstance(args(n)[0], list | tuple)]
    for n in joins:
        parts = [p for p in args(n)[0] if isinstance(p, fx.Node)]
        if len(parts) == 2 and all(
            kind(p) in ("add", "sub", *TRANSPARENT) and shape(p)[-1] == width for p in parts
        ):
            return True
    return False


def qk_norm(view: View, match: Match) -> Literal["head", "full", "cosine"] | None:
    """Find a norm between projection and product: per head, over all heads, or to unit length."""
    width = match.q.layout.size("D")
    for n in path(view, match.q):
        name = kind(n)
        if name in ("linalg_vector_norm", "norm", "normalize"):
            return "cosine"
        source = args(n)[0] if args(n) and isinstance(args(n)[0], fx.Node) else None
        if source is None or not isinstance(value(source), Tensor):
            continue
        if name in ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"):
            return "head" if shape(source)[-1] == width else "full"
        if name == "rsqrt" and any(kind(m) == "mean" for m in ancestors([n])[-6:]):
            mean = next(m for m in reversed(ancestors([n])) if kind(m) == "mean")
            return "head" if shape(args(mean)[0])[-1] == width else "full"
    return None


# ---------------------------------------------------------------------------------------- origins


def cache_inputs(view: View, node: fx.Node) -> list[fx.Node]:
    """List the states that an operand is made of without another projection in between."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen or is_size(n) or kind(n) in CONTRACTIONS:
            continue
        seen.add(n)
        if n.op == "placeholder":
            found.extend([n] if view.program.bindings[n.name].kind == "state" else [])
        else:
            todo.extend(n.all_input_nodes)
    return found


def piece_key(view: View, match: Match, matches: list[Match]) -> object | None:
    """Return what the pieces of one attention share: projections, and where they are joined.

    Pieces hold different queries of the same projections and are concatenated along the queries.
    """
    if sum(m.module == match.module for m in matches) < 2:
        return None
    sizes = shape(match.result)
    todo = [(match.result, place(match.result_layout, "T", sizes))]
    others = place(match.result_layout, "H", sizes) + place(match.result_layout, "E", sizes)
    channels = {match.result: others}
    seen = 0
    while todo and seen < 40:
        node, queries = todo.pop(0)
        seen += 1
        for user in sorted(node.users):
            if kind(user) in JOINING:
                axis = (args(user)[1] if len(args(user)) > 1 else 0) % rank(user)
                if not _varies(channels[node], axis):
                    return (match.module, user, projecting(view, match.q.product))
                continue
            moved = _pushed(view, user, node, queries)
            if moved is not None and kind(user) in TRANSPARENT | LAYOUT:
                other = _pushed(view, user, node, channels[node])
                assert other is not None
                channels[user] = other
                todo.append((user, moved))
    return None


def _varies(numbers: Tensor, axis: int) -> bool:
    return bool((numbers != numbers.narrow(axis, 0, 1)).any())


def projecting(view: View, node: fx.Node) -> frozenset[fx.Node]:
    """List the learned contractions that an operand comes from, the nearest ones only."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen or is_size(n):
            continue
        seen.add(n)
        if _ends_path(view, n):
            found.add(n)
        else:
            todo.extend(n.all_input_nodes)
    return frozenset(found)


def site_kind(view: View, match: Match, mask_kind: str) -> Literal["self", "cross"]:
    """Tell whether queries attend to their own tokens."""
    if mask_kind in ("causal", "sliding", "chunked", "prefix"):
        return "self"
    return kind_of(view, match.q.product, match.k.product)


def kind_of(view: View, queries: fx.Node, keys: fx.Node) -> Literal["self", "cross"]:
    """Tell whether queries and keys are made from one stream of tokens."""
    return "self" if stream(view, queries) & stream(view, keys) else "cross"


def stream(view: View, node: fx.Node) -> frozenset[fx.Node]:
    """Walk back from an operand to the token stream: a residual sum, an embedding or an input."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        step = _upstream(view, n)
        if step is None:
            found.add(n)
        else:
            todo.extend(step)
    return frozenset(found)


def _upstream(view: View, node: fx.Node) -> list[fx.Node] | None:
    """Return what a node passes on; None at a node of the token stream."""
    name = kind(node)
    origins = view.origins
    data = [n for n in node.all_input_nodes if origins.is_data(n)]
    if not data and origins.is_projected(node):
        data = [n for n in node.all_input_nodes if "parameter" in origins.of(n)][:1]
    if node.op == "placeholder" or name in ("embedding", "attention", "", *SDPA) or not data:
        return None
    if name in JOINING:
        fresh = [n for n in data if "state" not in origins.of(n) or "parameter" in origins.of(n)]
        return fresh or None
    if name in ("add", "sub") and len(data) > 1:
        return None if not _same_source(data) else data
    if name in CONTRACTIONS:
        contraction = read_contraction(node)
        if contraction is None or weight_of(contraction, origins) is None:
            return None
    return data


def _same_source(parts: list[fx.Node]) -> bool:
    """Tell two turned copies of one tensor from a residual sum: they meet within a few steps."""
    near = [_near(p) for p in parts]
    return bool(frozenset.intersection(*near))


def _near(node: fx.Node, steps: int = 8) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    layer = {node}
    for _ in range(steps):
        found |= layer
        layer = {
            m for n in layer for m in n.all_input_nodes
            if kind(n) in ELEMENTWISE | LAYOUT | JOINING | TRANSPARENT and not is_size(m)
            and isinstance(value(m), Tensor) and m.op != "placeholder"
        }  # fmt: skip
    return frozenset(n for n in found if kind(n) not in ("", "cos", "sin", "unsqueeze"))


def grid(view: View, match: Match) -> Grid | None:
    """Find the image that the queries come from: a convolution's height x width."""
    tokens = match.q.layout.size("T")
    for n in reversed(ancestors([match.q.product])):
        if kind(n) == "conv2d" and rank(n) == 4:
            height, width = shape(n)[-2:]
            leading = tokens - height * width
            if 0 <= leading < min(16, height * width) and height * width > 1:
                return Grid(height, width, leading)
    return None
