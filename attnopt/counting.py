"""How many floating-point operations one op of a graph takes: two for each multiply-add.

Masked pairs count where they are computed, as a causal mask has them computed. Of a window or of
chunks those pairs count that `attnopt.ops.bands` attends to.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

from torch import fx

from attnopt.diagnosing import estimator_flops
from attnopt.neighborhoods import Neighborhood
from attnopt.ops.bands import bands
from attnopt.ops.blocks import TILE, reads_plan, tiles_in
from attnopt.ops.chunks import CHUNK, LEAST_CHUNK
from attnopt.ops.features import width
from attnopt.ops.hidden import Hidden, Keys, Structure
from attnopt.ops.plan_blocks import STRIDE
from attnopt.ops.structure import OPTIONS

# What is just a whole number of tiles is not rounded up.
_ROUNDING: Final = 1e-6


class Sizes(Protocol):
    """The sizes of a graph's values, as numbers."""

    def __call__(self, value: Any) -> tuple[int, ...]:
        """Return the shape of a node's value."""
        ...

    def number(self, value: Any) -> int:
        """Return a whole number, or the value of a node that is one."""
        ...


Count = Callable[[fx.Node, Sizes], int]


def _product(left: int) -> Count:
    """Count a matrix product whose left operand is argument number `left`."""

    def count(node: fx.Node, sizes: Sizes) -> int:
        return 2 * math.prod(sizes(node)) * sizes(node.args[left])[-1]

    return count


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """Count every combination of labels once; an ellipsis stands for the output's leading axes."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, list | tuple)
    lengths: dict[str, int] = {}
    for labels, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        shape = sizes(operand)
        before, _, after = labels.partition("...")
        lengths.update(zip(before, shape, strict=False))
        lengths.update(zip(reversed(after), reversed(shape), strict=False))
        lengths["..."] = math.prod(shape[len(before) : len(shape) - len(after)])
    return 2 * math.prod(lengths.values())


def _convolution(node: fx.Node, sizes: Sizes) -> int:
    return 2 * math.prod(sizes(node)) * math.prod(sizes(node.args[1])[1:])


def _attention(node: fx.Node, sizes: Sizes) -> int:
    """Count scores and mixing; queries, keys and values are the first three arguments."""
    return _mixed(node, sizes, sizes(node.args[0])[-2] * sizes(node.args[1])[-2])


def _mixed(node: fx.Node, sizes: Sizes, pairs: int) -> int:
    """Count scores and mixing of so many pairs of a query and a key, in every head."""
    query, value = sizes(node.args[0]), sizes(node.args[2])
    return 2 * math.prod(query[:-2]) * pairs * (query[-1] + value[-1])


def _structured(node: fx.Node, sizes: Sizes) -> int:
    """Count the canonical attention: the pairs that its kernels do not skip."""
    queries, keys = sizes(node.args[0])[-2], sizes(node.args[1])[-2]
    structure = {name: x for name, x in node.kwargs.items() if name in OPTIONS}
    return _mixed(node, sizes, _pairs(node, queries, keys, structure))


def _pairs(node: fx.Node, queries: int, keys: int, structure: Mapping[str, Any]) -> int:
    """Return the pairs that are computed of one head, with what positions hide."""
    given = {name: x for name, x in node.kwargs.items() if isinstance(x, fx.Node)}
    if "sinks" in given or node.kwargs.get("softcap") is not None:
        return queries * keys
    needed = Structure(**structure).needed(queries, keys)
    if queries == 1:
        return Keys.of(needed, needed.first_key(keys - 1), keys).count
    sides = (given[n].meta["val"] if n in given else None for n in ("padding", "mask", "bias"))
    cut = bands(queries, keys, Hidden(needed, *sides))
    return queries * keys if cut is None else cut.scores + cut.blocks * cut.size * cut.first


def _windowed(node: fx.Node, sizes: Sizes) -> int:
    """Count attention over a ring: the keys that it holds, and those of the call."""
    queries, slots = sizes(node.args[0])[-2], sizes(node.args[3])[-2]
    window, first = (int(node.kwargs.get(name) or 0) for name in ("window", "first"))  # type: ignore[arg-type]
    held = min(sizes.number(node.args[5]), slots)
    keys = held + queries
    if queries == 1:
        return _mixed(node, sizes, min(keys, first + window))
    structure = {"causal": True, "window": window, "first": first or None}
    return _mixed(node, sizes, _pairs(node, queries, keys, structure))


def _neighborhood(node: fx.Node, sizes: Sizes) -> int:
    """Count the pairs of tokens that see each other."""
    names = ("grid", "window", "stride", "dilation", "causal", "border", "leading")
    given: dict[str, Any] = {n: node.kwargs[n] for n in names if n in node.kwargs}
    return round(_attention(node, sizes) * Neighborhood.of(**given).share)


def _routed(node: fx.Node, sizes: Sizes) -> int:
    """Count the pairs of the heads that are on, where the op that makes the gates says how many."""
    gates = node.args[3]
    if not isinstance(gates, fx.Node) or "count" not in gates.kwargs:
        return _attention(node, sizes)
    given: dict[str, Any] = dict(gates.kwargs)
    heads = sizes(node.args[0])[1]
    always = heads - sizes(gates.args[1])[0] if "heads" in given else 0
    on: int = always + given["count"] * given.get("group", 1)
    return _attention(node, sizes) * on // heads


def _fitted(node: fx.Node, sizes: Sizes) -> int:
    """Count what tells from tokens and norms of queries which heads are on."""
    return 2 * math.prod(sizes(node.args[1])[:-1]) * math.prod(sizes(node.args[2]))


def _routers(node: fx.Node, sizes: Sizes) -> int:
    """Count the routers, each row of which reads every token."""
    rows = sum(sizes(x)[0] for x in node.args[1:] if x is not None)
    return 2 * math.prod(sizes(node.args[0])) * rows


def _planned(node: fx.Node, sizes: Sizes) -> int:
    """Count the estimate that a plan of tiles is made by; a call that reads no plan has none."""
    batch, heads, queries, channels = sizes(node.args[0])
    keys, given = sizes(node.args[1])[-2], _Plan.of(node)
    if not reads_plan(queries, keys, given.q_tile, given.least_tokens):
        return 0
    told = {"tile": given.tile, "stride": given.stride, "q_tile": given.q_tile}
    return round(batch * estimator_flops(given.estimator, heads, channels, queries, keys, **told))


def _blocks(node: fx.Node, sizes: Sizes) -> int:
    """Count the tiles that a plan visits, whole; where the data decide, as many as it may."""
    queries, keys = sizes(node.args[0])[-2], sizes(node.args[1])[-2]
    getitem: Any = node.args[3]
    made = getitem.args[0] if isinstance(getitem, fx.Node) and getitem.args else None
    if not isinstance(made, fx.Node) or "rule" not in made.kwargs:
        return _structured(node, sizes)
    plan = _Plan.of(made)
    pairs = plan.pairs(queries, keys)
    return _structured(node, sizes) if pairs is None else _mixed(node, sizes, pairs)


@dataclass(frozen=True)
class _Plan:
    """What is said of a plan of tiles where it is made."""

    estimator: str
    rule: str
    amount: float
    tile: int = TILE
    causal: bool = False
    q_tile: int = TILE
    aligned: bool = True
    stride: int = STRIDE
    least_tokens: int = 0
    dense_above: float = 1.0

    @classmethod
    def of(cls, node: fx.Node) -> "_Plan":
        """Read the options of the op that makes a plan."""
        given: dict[str, Any] = {f.name: node.kwargs.get(f.name) for f in fields(cls)}
        given = {name: x for name, x in given.items() if x is not None}
        return cls(**{"q_tile": given.get("tile", TILE), **given})

    def pairs(self, queries: int, keys: int) -> int | None:
        """Return the pairs of the tiles that are visited; None where all are."""
        if not reads_plan(queries, keys, self.q_tile, self.least_tokens):
            return None
        seen: list[int] = []
        for row in range(tiles_in(queries, self.q_tile)):
            last = min((row + 1) * self.q_tile, queries) + keys - queries
            seen.append(tiles_in(last if self.causal and self.aligned else keys, self.tile))
        visited = sum(map(self._visited, seen))
        if visited > self.dense_above * sum(seen):
            return None
        return visited * self.q_tile * self.tile

    def _visited(self, tiles: int) -> int:
        """Return how many of a row's tiles are visited; the first and its own are always."""
        least = min(tiles, 2 if self.q_tile == self.tile else 1)
        match self.rule:
            case "topk":
                return max(math.ceil(tiles * self.amount - _ROUNDING), least)
            case "count":
                return min(max(int(self.amount), least), tiles)
            case _:
                return max(int(tiles * self.dense_above), least)


def _linear(node: fx.Node, sizes: Sizes) -> int:
    """Count attention by way of a matrix, as `attnopt.ops.chunks` computes it."""
    (batch, heads, tokens, channels), keys = sizes(node.args[0]), sizes(node.args[1])[-2]
    given: list[Any] = [*node.args, None, None]
    by = [channels if x is None else sizes(x)[-1] for x in given[3:5]]
    features = width(by[1], str(node.kwargs.get("feature", "hedgehog")))
    window: Any = node.kwargs.get("window") or 0
    shape = _Matrix(channels, sizes(node.args[2])[-1] + 1, features, int(window))
    causal = bool(node.kwargs.get("causal")) or "linear_attention_step" in str(node.target)
    mapped = 0 if given[4] is None else channels * (tokens * by[0] + keys * by[1])
    if tokens == 1 and causal:
        mapped = min(mapped, channels * (by[0] + by[1]))
        pairs = shape.one(keys)
    else:
        pairs = shape.chunks(tokens, keys) if causal else (tokens + keys) * shape.size
    return 2 * batch * heads * (mapped + pairs)


@dataclass(frozen=True)
class _Matrix:
    """The sizes of one head of linear attention; its values have a one behind them."""

    channels: int
    values: int
    features: int
    window: int

    @property
    def size(self) -> int:
        """The numbers that hold what was seen."""
        return self.features * self.values

    def one(self, keys: int) -> int:
        """Count a step: its window, the matrix, and the key that goes into it."""
        return min(keys, self.window) * (self.channels + self.values) + 2 * self.size

    def chunks(self, tokens: int, keys: int) -> int:
        """Count chunks of queries: keys near them one by one, what lies before by the matrix."""
        chunk = min(CHUNK, max(LEAST_CHUNK, tokens))
        count, reach = -(-tokens // chunk), -(-self.window // chunk) * chunk
        read = reach + chunk
        near = read * (self.channels + self.values) if self.window else 0
        far = (reach if self.window >= chunk else read) * (self.features + self.values)
        before = max(keys - tokens - reach, 0) * self.size
        return before + count * chunk * (near + far + 2 * self.size)


def _agents(node: fx.Node, sizes: Sizes) -> int:
    """Count the pairs of tokens and agents; rows that are dense at a time step are left out."""
    given: dict[str, Any] = dict(node.kwargs)
    cells, agents = (int(math.prod(given[n])) for n in ("grid", "agents"))
    leading = int(given.get("leading", 0))
    tokens = leading + cells
    pairs = (leading + agents) * tokens + cells * agents
    return _attention(node, sizes) * pairs // (tokens * tokens)


COUNTS: Mapping[str, Count] = {
    "mm": _product(0),
    "bmm": _product(0),
    "mv": _product(0),
    "dot": _product(0),
    "matmul": _product(0),
    "linear": _product(0),
    "_grouped_mm": _product(0),
    "addmm": _product(1),
    "baddbmm": _product(1),
    "einsum": _einsum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
    "flex_attention": _attention,
    "attention": _structured,
    "window_attention": _windowed,
    "neighborhood_attention": _neighborhood,
    "routed_attention": _routed,
    "agent_attention": _agents,
    "block_attention": _blocks,
    "plan_blocks": _planned,
    "fitted_gates": _fitted,
    "router_gates": _routers,
    "linear_attention": _linear,
    "linear_attention_step": _linear,
}
