"""Prove a replacement by running it: the source's region and ours on random inputs, in float64."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.evaluate import Sizes, ancestors, at_sizes, evaluate, is_size, leaves
from attnopt.finder.layout import Layout, place
from attnopt.finder.match import Match
from attnopt.finder.ops import LAYOUT, TRANSPARENT, args, kind, value
from attnopt.finder.provenance import View
from attnopt.nouns import No

# Both sides compute in float64; what differs is the order of the same few operations.
TOLERANCE = 1e-9
# Where a query sees nothing, log-sum-exp cancels numbers as large as those that hide the keys.
_ROUNDING = 4 * torch.finfo(torch.float64).eps
_MOST_ROUNDING = 1e-6
_LEAST_SEEN = 0.3
# Scores of a proof at larger sizes than those of the capture.
_MOST_SCORES = 1 << 28
_FAILURES = (RuntimeError, IndexError, TypeError, ValueError)
_SHOWN = (0.97, 0.6)


def region_inputs(view: View, match: Match) -> list[fx.Node]:
    """List the nodes that a match reads: queries, keys, values and side operands.

    A learned factor of the scores is left inside: what its true value does to a mask is part of
    the proof.
    """
    sides = [
        _before_cast(s.node)
        for s in (*match.sides, *match.after)
        if s.step.op != "multiply" or not view.origins.is_learned(s.node)
    ]
    sinks = [_before_layout(match.sinks.node)] if match.sinks else []
    padding = [match.padding.node] if match.padding else []
    operands = (match.q.node, match.k.node, match.v.node)
    return list(dict.fromkeys([*operands, *sides, *sinks, *padding]))


def _before_cast(node: fx.Node) -> fx.Node:
    """Step back over a cast of booleans or integers, which random numbers must respect."""
    source = node
    while kind(source) in TRANSPARENT and isinstance(args(source)[0], fx.Node):
        source = args(source)[0]
    example = value(source)
    return source if isinstance(example, Tensor) and not example.is_floating_point() else node


def _before_layout(node: fx.Node) -> fx.Node:
    """Step back over broadcasts: a sink is one number a head, however it was expanded."""
    while kind(node) in LAYOUT | TRANSPARENT and isinstance(args(node)[0], fx.Node):
        node = args(node)[0]
    return node


def prove(
    view: View, match: Match, rewritten: fx.Node, mapping: Mapping[fx.Node, fx.Node]
) -> No | None:
    """Return the numbers of a mismatch as a refusal; None where the two agree.

    `rewritten` is the result in a copy of the graph, `mapping` leads from the graph to the copy.
    """
    refusal = _disprove(view, match, rewritten, mapping, view.shapes.captured)
    if refusal is not None or not match.assembled:
        return refusal
    if not _varies(match.result, region_inputs(view, match)):
        return None
    count = math.prod(match.scores_layout.size(role) for role in "BHTS")
    for sizes in _other_sizes(view, count):
        refusal = _disprove(view, match, rewritten, mapping, sizes)
        if refusal is None or not isinstance(refusal, _NotRun):
            return refusal
    return No("the source runs at no other size", match.anchor.name)


class _NotRun(No):
    """Says that the source does not run on the operands that were drawn."""


def _disprove(
    view: View,
    match: Match,
    rewritten: fx.Node,
    mapping: Mapping[fx.Node, fx.Node],
    sizes: Sizes,
) -> No | None:
    """Compare the two at some sizes; None where they agree."""
    inputs = region_inputs(view, match)
    for seed in (0, 1):
        values = _random_inputs(view, match, inputs, sizes, seed)
        try:
            want = _run(view, match.result, inputs, values, sizes)
        except _FAILURES as error:
            return _NotRun(f"the source does not run: {error}", match.anchor.name)
        try:
            copies = {mapping[n]: x for n, x in values.items()}
            got = _run(view, rewritten, list(copies), copies, sizes)
        except _FAILURES as error:
            return No(f"the replacement does not run: {error}", match.anchor.name)
        refusal = _compare(want, got, match)
        if refusal is not None:
            largest = _largest_scores(view, match, inputs, values, sizes)
            if largest is not None:
                extra = (_ROUNDING * largest.abs()).clamp(max=_MOST_ROUNDING)
                refusal = _compare(want, got, match, TOLERANCE + extra)
        if refusal is not None:
            return refusal
    return None


def prove_same(
    view: View,
    result: fx.Node,
    other: fx.Node,
    inputs: list[fx.Node],
    mapping: Mapping[fx.Node, fx.Node],
) -> No | None:
    """Return how `other`, a node of a copy of the graph, differs from a result; None if nowhere.

    Both are run on random numbers in place of `inputs`.
    """
    captured = view.shapes.captured
    tried: list[Sizes] = [captured]
    varies = _varies(result, inputs)
    if varies:
        tried.extend(_other_sizes(view, math.prod(view.shapes.shape(result, captured))))
    ran = 0
    for sizes in tried:
        generator = torch.Generator().manual_seed(0)
        values = {n: _random(n, sizes, generator, _SHOWN[0]) for n in inputs}
        copies = {mapping[n]: x for n, x in values.items()}
        try:
            want = _run(view, result, inputs, values, sizes)
        except _FAILURES:
            continue
        try:
            got = _run(view, other, list(copies), copies, sizes)
        except _FAILURES as error:
            return No(f"the replacement does not run: {error}", result.name)
        ran += 1
        most = (want - got).abs().max() / want.abs().max().clamp(min=1e-30)
        if not most <= TOLERANCE:
            return No(f"differs from the source by {most:.2e} of its largest value", result.name)
    return None if ran > varies else No("the source runs at no other size", result.name)


def _varies(result: fx.Node, inputs: list[fx.Node]) -> bool:
    """Tell whether a region has sizes that vary."""
    shapes = (getattr(value(n), "shape", ()) for n in ancestors([result], inputs))
    return any(isinstance(size, torch.SymInt) for sizes in shapes for size in sizes)


def _other_sizes(view: View, count: int) -> Iterator[Sizes]:
    """Yield multiples of the sizes at capture, `count` scores there, that are not too large."""
    captured = view.shapes.captured
    for factor in (2, 3):
        # Rows, queries and keys all grow.
        if count * factor**3 <= _MOST_SCORES:
            inputs = view.shapes.sources
            yield {s: n * factor if s in inputs else n for s, n in captured.items()}


def _largest_scores(
    view: View,
    match: Match,
    inputs: list[fx.Node],
    values: Mapping[fx.Node, Tensor],
    sizes: Sizes,
) -> Tensor | None:
    """Return the largest score of the query that each number of the result belongs to.

    None where a single op makes the weights, whose rounding is as small as they are, and where it
    is not known whose the scores are.
    """
    if match.rows is None or kind(match.anchor) != "exp":
        return None
    scores = _run(view, match.rows.scores, inputs, values, sizes)
    largest = scores.amax(match.rows.axis, keepdim=True)
    rows = _queries(match, match.rows.layout, tuple(largest.shape))
    shape = tuple(at_sizes(s, sizes) for s in value(match.result).shape)
    table = torch.full((int(rows.max()) + 1,), -math.inf, dtype=largest.dtype)
    table.scatter_reduce_(0, rows.flatten(), largest.flatten(), "amax")
    return table[_queries(match, match.result_layout, shape)]


def _queries(match: Match, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """Number the queries of all rows and heads at every element of a tensor."""
    numbers = torch.zeros(shape, dtype=torch.long)
    for role in "BHT":
        numbers = numbers * match.scores_layout.size(role) + place(layout, role, shape)
    return numbers


def _run(
    view: View,
    target: fx.Node,
    inputs: list[fx.Node],
    values: Mapping[fx.Node, Tensor],
    sizes: Sizes,
) -> Tensor:
    program = view.program

    def leaf(node: fx.Node) -> Tensor:
        return values[node] if node in values else program.weights[program.bindings[node.name].name]

    (found,) = evaluate([target], leaf, sizes=sizes, stop=inputs, double=True)
    assert isinstance(found, Tensor)
    return found


def _compare(
    want: Tensor, got: Tensor, match: Match, tolerance: float | Tensor = TOLERANCE
) -> No | None:
    """Compare where the source gives numbers: blind queries may give it none."""
    where = match.anchor.name
    if want.shape != got.shape:
        return No(f"shape {tuple(got.shape)} instead of {tuple(want.shape)}", where)
    seen = torch.isfinite(want)
    if seen.double().mean() < _LEAST_SEEN:
        return No("too few queries see a key to compare the two", where)
    if not torch.isfinite(got[seen]).all():
        return No("the replacement is not finite where the source is", where)
    if not seen.any():
        return None
    scale = max(want[seen].abs().max().item(), 1e-30)
    error = (want - got).abs() / scale
    if (error > tolerance)[seen].any():
        most = error[seen].max().item()
        return No(f"differs from the source by {most:.2e} of its largest value", where)
    return None


def _random_inputs(
    view: View, match: Match, inputs: list[fx.Node], sizes: Sizes, seed: int
) -> dict[fx.Node, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Tensor] = {}
    operands = (match.q.node, match.k.node, match.v.node)
    hiding = {
        _before_cast(s.node)
        for s in (*match.sides, *match.after)
        if s.step.op in ("hide", "zero") and s.step.when
    }
    added = {s.node for s in match.sides if s.step.op == "add"}
    for node in inputs:
        if match.padding is not None and node is match.padding.node:
            shown = _random_mask(view.shapes.shape(node, sizes), generator, _SHOWN[seed])
            values[node] = (shown != match.padding.inverted).to(value(node).dtype)
            continue
        known = None if node in operands else _position_value(view, node, sizes)
        if match.assembled and known is None and value(node).is_floating_point():
            # Steps that read memory as it lies see it as they do in the source.
            drawn = _random(node, sizes, generator, _SHOWN[seed])
            if node in added and seed:
                drawn = _hiding(drawn, generator)
            values[node] = _laid_out(node, drawn, sizes)
            continue
        values[node] = known if known is not None else _random(node, sizes, generator, _SHOWN[seed])
        if known is None and node in hiding and values[node].dtype == torch.bool:
            values[node] = ~values[node]
    return values


def _hiding(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a bias that hides some keys by the least number."""
    shown = torch.rand(like.shape, generator=generator) < _SHOWN[1]
    return torch.zeros_like(like).masked_fill(~shown, torch.finfo(torch.float32).min)


def _laid_out(node: fx.Node, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Lay a tensor out in memory as a node's is."""
    strides = tuple(at_sizes(s, sizes) for s in value(node).stride())
    if strides == tensor.stride() or 0 in strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _position_value(view: View, node: fx.Node, sizes: Sizes) -> Tensor | None:
    """Evaluate a side operand that only positions and constants decide, such as a causal mask."""
    program = view.program
    found = leaves([node])
    if any(program.bindings[n.name].kind not in ("buffer", "constant") for n in found):
        return None
    try:
        (tensor,) = evaluate(
            [node], lambda n: program.weights[program.bindings[n.name].name], sizes=sizes
        )
    except (RuntimeError, KeyError):
        return None
    return tensor if isinstance(tensor, Tensor) else None


def _random(node: fx.Node, sizes: Sizes, generator: torch.Generator, shown: float) -> Tensor:
    """Draw a tensor like a node's."""
    example = value(node)
    shape = tuple(at_sizes(s, sizes) for s in example.shape)
    if example.dtype == torch.bool:
        return _random_mask(shape, generator, shown)
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if example.is_complex():
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    return torch.randint(0, 2, shape, generator=generator)


def _random_mask(size: tuple[int, ...], generator: torch.Generator, shown: float) -> Tensor:
    """Draw which keys are seen: the first one, but by the first row of the batch.

    There a query of many sees nothing, and without queries of its own the mask hides the first
    keys, which leaves the first queries of a causal attention blind.
    """
    drawn = torch.rand(size, generator=generator) < shown
    if not drawn.dim() or not drawn.numel():
        return drawn
    drawn[..., 0] = True
    if drawn.dim() >= 2 and size[0] > 1:
        first = drawn[0]
        if first.dim() >= 2 and size[-2] > 1:
            first[..., 0, :] = False
        else:
            first[..., : size[-1] // 3] = False
            first[..., -1] = True
    return drawn


def signature(view: View, match: Match) -> str:
    """Return a digest that structurally equal regions share: they are proved once."""
    inputs = region_inputs(view, match)
    order = [n for n in ancestors([match.result], inputs) if not is_size(n)]
    number = {n: i for i, n in enumerate(order)}

    def show(x: Any) -> str:
        if isinstance(x, fx.Node):
            return f"%{number[x]}" if x in number else str(value(x))
        if isinstance(x, list | tuple):
            return "[" + ",".join(show(y) for y in x) + "]"
        return repr(x)

    lines = []
    for node in order:
        example = value(node)
        like = f"{example.dtype}{tuple(example.shape)}" if isinstance(example, Tensor) else ""
        if node in inputs or node.op == "placeholder":
            name = inputs.index(node) if node in inputs else _content(view, node)
            lines.append(f"{name} {like}")
        else:
            keywords = sorted((k, show(v)) for k, v in node.kwargs.items())
            lines.append(f"{node.target} {show(args(node))} {keywords} {like}")
    facts = (
        match.q.heads,
        match.k.heads,
        match.v.heads,
        match.scale,
        match.softcap,
        match.structure,
        match.blind,
    )
    operands = (match.q.layout, match.k.layout, match.v.layout, match.result_layout)
    inverted = match.padding.inverted if match.padding else None
    text = "\n".join([*lines, repr(facts), repr(operands), repr(inverted)])
    return hashlib.sha256(text.encode()).hexdigest()


def _content(view: View, node: fx.Node) -> str:
    """Name a weight that a region reads by what it holds."""
    stored = view.program.weights[view.program.bindings[node.name].name]
    numbers = stored.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
