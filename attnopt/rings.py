"""Keep of a cache what a window sees: states that grow become rings of constant size.

An attention that looks back over a window reads the last keys and, if it says so, the first ones;
one that sees the chunk that a token is in reads a chunk of them at most. Where nothing else reads a
layer's cache, its state need hold no more. Some heads of a layer may have a window and others none;
then each kind gets a state of its own. Linear attention has a matrix of what left its window, too;
without a window its rings have no slots.

keys = cat(past, new); attention(q, keys, values, window=w)
-> found, ring_k, ring_v = window_attention(q, new, new, ring_k, ring_v, past_length, window=w)
attention(q, keys, values, causal=True, chunk=c)
-> found, ring_k, ring_v = window_attention(..., window=c, chunked=True)
linear_attention(q, keys, values, ..., window=w)
-> found, ring_k, ring_v, state = linear_attention_step(
       q, new, new, ..., ring_k, ring_v, state, past_length, window=w)
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnopt.finder.emit import fake_mode_of, insert_call
from attnopt.graphs import copied, drop_unused
from attnopt.inlining import unchanged
from attnopt.ops import (
    attention,
    linear_attention,
    linear_attention_step,
    window_attention,
)
from attnopt.ops.features import width
from attnopt.ops.structure import OPTIONS
from attnopt.program import Binding, Growing, Program, State

aten = torch.ops.aten
_TOKENS = 2
_HEADS = 1
_KEEPING = (attention, linear_attention)


def with_rings(program: Program) -> Program:
    """Return a program whose windows have states of constant size; itself where there are none."""
    if program.parts or program.grown is not None:
        return program
    graph, _ = copied(program.graph)
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    length = placeholders.get("past_length")
    pairs = list(_pairs(program, placeholders))
    if length is None or not any(p.ring for pair in pairs for p in pair.parts):
        return program
    folding = _Folding(program, graph, placeholders, length)
    for pair in pairs:
        if any(part.ring for part in pair.parts):
            folding.fold(pair)
    return folding.finish()


@dataclass(frozen=True)
class Ring:
    """The size of a window's state: the last tokens that it holds, and the first ones.

    Where tokens see their own chunk, `chunked`, the ring is as long as a chunk.
    """

    window: int
    first: int
    chunked: bool = False


@dataclass(frozen=True)
class _Part:
    """Attentions that read the same heads of a cache in the same way."""

    heads: tuple[tuple[int, int], tuple[int, int]]
    ring: Ring | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Pair:
    """The keys and the values of a layer: their states, where they grow, and who reads them."""

    states: tuple[State, State]
    wholes: tuple[fx.Node, fx.Node]
    parts: tuple[_Part, ...]


def _pairs(program: Program, placeholders: Mapping[str, fx.Node]) -> Iterator[_Pair]:
    """Yield every cache that attentions alone read."""
    grows = [s for s in program.states if s.grows == _TOKENS and s.role in ("key", "value")]
    by_layer: dict[tuple[int, int], dict[str, State]] = {}
    for state in grows:
        by_layer.setdefault((state.layer, state.index), {})[state.role] = state
    for found in by_layer.values():
        if set(found) != {"key", "value"}:
            continue
        states = found["key"], found["value"]
        keys, values = (_lengthened(placeholders[s.placeholder]) for s in states)
        if keys is None or values is None:
            continue
        of_keys, of_values = _readers(keys, 1), _readers(values, 2)
        if of_keys is None or of_values is None or of_keys.keys() != of_values.keys():
            continue
        parts: dict[Any, list[fx.Node]] = {}
        for node, heads in of_keys.items():
            key = (heads, of_values[node], _ring(node), node.target)
            parts.setdefault(key, []).append(node)
        yield _Pair(
            states,
            (keys, values),
            tuple(_Part((k, v), ring, tuple(nodes)) for (k, v, ring, _), nodes in parts.items()),
        )


def _lengthened(past: fx.Node) -> fx.Node | None:
    """Return the one reader of a state, which puts new tokens behind it."""
    if len(past.users) != 1:
        return None
    (whole,) = past.users
    if whole.target is not aten.cat.default or (*whole.args[1:], 0)[0] not in (_TOKENS, -2):
        return None
    parts: Any = whole.args[0]
    return whole if len(parts) == 2 and parts[0] is past else None


def _readers(whole: fx.Node, position: int) -> dict[fx.Node, tuple[int, int]] | None:
    """Return the attentions that read a cache and which heads each reads; None for other uses."""
    every = (0, int(whole.meta["val"].shape[_HEADS]))
    found: dict[fx.Node, tuple[int, int]] = {}
    todo = [(whole, user, every) for user in whole.users]
    while todo:
        source, user, heads = todo.pop()
        if user.target in _KEEPING and [a is source for a in user.args[:3]] == [
            number == position for number in range(3)
        ]:
            found[user] = heads
        elif unchanged(user) is source:
            todo += [(user, reader, heads) for reader in user.users]
        elif user.target is aten.slice.Tensor and heads == every and user.args[1] == _HEADS:
            ends: Any = user.args[2:4]
            cut = range(every[1])[slice(*ends)]
            todo += [(user, reader, (cut.start, cut.stop)) for reader in user.users]
        elif user.op != "output" or source is not whole:
            return None
    return found or None


def _ring(node: fx.Node) -> Ring | None:
    """Return the ring that an attention needs; None where it looks back without end."""
    if node.target is linear_attention:
        window: Any = node.kwargs.get("window", 0)
        return Ring(int(window), 0) if node.kwargs.get("causal") else None
    given = {name: node.kwargs.get(name) for name in OPTIONS}
    if any(given[n] is not None for n in ("right", "prefix")):
        return None
    window, chunk, first = (given[n] for n in ("window", "chunk", "first"))
    if chunk is not None:
        chunked = given["causal"] and window is None and first is None
        return Ring(int(chunk), 0, chunked=True) if chunked else None  # type: ignore[arg-type]
    return None if window is None else Ring(int(window), int(first or 0))  # type: ignore[arg-type]


def _features(node: fx.Node) -> int:
    """Return how many features a linear attention has for a key."""
    given: list[Any] = list(node.args)
    by = given[4] if len(given) > 4 and given[4] is not None else given[1]
    return width(int(by.meta["val"].shape[-1]), str(node.kwargs.get("feature", "hedgehog")))


@dataclass
class _Folding:
    """A graph on its way from growing states to rings."""

    program: Program
    graph: fx.Graph
    placeholders: dict[str, fx.Node]
    length: fx.Node

    def __post_init__(self) -> None:
        flat: Any = self.graph.output_node().args[0]
        self.outputs: list[Any] = list(flat)
        self.states: dict[str, tuple[State, ...]] = {s.name: (s,) for s in self.program.states}
        self.bindings = dict(self.program.bindings)
        self.matrices: dict[fx.Node, tuple[State, fx.Node]] = {}

    def fold(self, pair: _Pair) -> None:
        """Give each kind of heads of a layer a state of its own."""
        made: list[list[State]] = [[], []]
        for number, part in enumerate(sorted(pair.parts, key=lambda p: p.ring is not None)):
            states = [self._state(pair, side, part, number) for side in (0, 1)]
            pasts = [self._placeholder(pair, side, states[side]) for side in (0, 1)]
            news = [self._new(pair.wholes[side], part.heads[side]) for side in (0, 1)]
            linear = [n for n in part.nodes if n.target is linear_attention]
            for node in linear:
                made[1].append(self._matrix(pair, node))
            join = self._grown if part.ring is None else self._folded if linear else self._ringed
            joined = join(part, pasts, news)
            for side in (0, 1):
                self.outputs[states[side].output] = joined[side]
                made[side].append(states[side])
        for side in (0, 1):
            self.states[pair.states[side].name] = tuple(made[side])

    def _state(self, pair: _Pair, side: int, part: _Part, number: int) -> State:
        """Return the state of one kind of heads; the first takes the place of the old one."""
        old = pair.states[side]
        output = old.output
        if number:
            output = len(self.outputs)
            self.outputs.append(None)
        batch, _, tokens, *width = old.shape
        start, stop = part.heads[side]
        size = tokens if part.ring is None else part.ring.first + part.ring.window
        name = old.name if not number else f"{old.name}_{number}"
        ring = part.ring
        return replace(
            old,
            name=name,
            placeholder=name,
            output=output,
            grows=old.grows if ring is None else None,
            shape=(batch, stop - start, size, *width),
            index=old.index + number,
            first=0 if ring is None else ring.first,
        )

    def _placeholder(self, pair: _Pair, side: int, state: State) -> fx.Node:
        """Return the input of a state, in place of the old one."""
        old = self.placeholders[pair.states[side].placeholder]
        example = old.meta["val"]
        sizes = [
            own if isinstance(n, str) else n
            for n, own in zip(state.shape, example.shape, strict=True)
        ]
        if state.name == pair.states[side].name:
            made = old
        else:
            with self.graph.inserting_after(old):
                made = self.graph.placeholder(state.placeholder)
            made.name = made.target = state.placeholder
            self.bindings[state.placeholder] = Binding("state", state.name)
        with fake_mode_of((old,)):
            made.meta = {**old.meta, "val": example.new_empty(sizes)}
        return made

    def _new(self, whole: fx.Node, heads: tuple[int, int]) -> fx.Node:
        """Return the new keys or values of some heads."""
        parts: Any = whole.args[0]
        new: fx.Node = parts[1]
        if heads == (0, int(new.meta["val"].shape[_HEADS])):
            return new
        return insert_call(whole, aten.slice.Tensor, new, _HEADS, *heads)

    def _grown(self, part: _Part, pasts: list[fx.Node], news: list[fx.Node]) -> list[fx.Node]:
        """Let heads without a window read a growing state of their own."""
        first = min(part.nodes, key=list(self.graph.nodes).index)
        joined: list[fx.Node] = []
        for past, new in zip(pasts, news, strict=True):
            joined.append(insert_call(first, aten.cat.default, [past, new], _TOKENS))
        for node in part.nodes:
            node.args = (node.args[0], *joined)
        return joined

    def _ringed(self, part: _Part, pasts: list[fx.Node], news: list[fx.Node]) -> list[fx.Node]:
        """Let heads with a window read a ring; return what the rings become."""
        rings: list[fx.Node] = []
        assert part.ring is not None
        for node in part.nodes:
            options = {n: x for n, x in node.kwargs.items() if n not in OPTIONS}
            options |= {"window": part.ring.window, "first": part.ring.first}
            options |= {"chunked": True} if part.ring.chunked else {}
            args = (node.args[0], *news, *pasts, self.length)
            rings = self._replaced(node, window_attention, args, options, pasts)
        return rings

    def _folded(self, part: _Part, pasts: list[fx.Node], news: list[fx.Node]) -> list[fx.Node]:
        """Let linear attention go on from a ring and a matrix; return what the rings become."""
        rings: list[fx.Node] = []
        for node in part.nodes:
            state, past = self.matrices[node]
            options = {n: x for n, x in node.kwargs.items() if n != "causal"}
            own = (*node.args[3:], None, None, None, None)[:4]
            args = (node.args[0], *news, *own, *pasts, past, self.length)
            *rings, matrix = self._replaced(
                node, linear_attention_step, args, options, [*pasts, past]
            )
            self.outputs[state.output] = matrix
        return rings

    def _replaced(
        self, node: fx.Node, target: Any, args: Any, options: Any, pasts: list[fx.Node]
    ) -> list[fx.Node]:
        """Call an op in place of a node; return what becomes of the states that it takes."""
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args, options)
            values = (node.meta["val"], *(p.meta["val"] for p in pasts))
            made.meta = {**node.meta, "val": values}
            found, *states = (
                self.graph.call_function(operator.getitem, (made, i)) for i in range(len(values))
            )
            for item, value in zip((found, *states), values, strict=True):
                item.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(found)
        self.graph.erase_node(node)
        return states

    def _matrix(self, pair: _Pair, node: fx.Node) -> State:
        """Add the state of what a linear attention no longer holds key by key."""
        old = pair.states[1]
        others = [s for s, _ in self.matrices.values()]
        mine = (s for s in (*self.program.states, *others) if s.layer == old.layer)
        index = sum(s.role == "recurrent" for s in mine)
        queries, values = (node.args[i].meta["val"].shape for i in (0, 2))  # type: ignore[union-attr]
        shape = (int(queries[1]), _features(node), int(values[3]) + 1)
        state = replace(
            old,
            name=f"past_{old.layer}_matrix" + (f"_{index}" if index else ""),
            role="recurrent",
            output=len(self.outputs),
            grows=None,
            shape=("batch", *shape),
            dtype=torch.float32,
            index=index,
        )
        state = replace(state, placeholder=state.name)
        self.outputs.append(None)
        after = self.placeholders[old.placeholder]
        with self.graph.inserting_after(after):
            made = self.graph.placeholder(state.name)
        made.name = made.target = state.name
        self.bindings[state.name] = Binding("state", state.name)
        with fake_mode_of((after,)):
            example = after.meta["val"]
            value = example.new_empty((example.shape[0], *shape), dtype=torch.float32)
        made.meta = {**after.meta, "val": value}
        self.matrices[node] = (state, made)
        return state

    def finish(self) -> Program:
        """Return the program with its new states; the old form stays beside it."""
        self.graph.output_node().args = (tuple(self.outputs),)
        drop_unused(self.graph)
        self.graph.lint()
        program = self.program
        module = fx.GraphModule(program.graph_module, self.graph)
        states = tuple(s for old in program.states for s in self.states[old.name])
        grown = Growing(program.graph_module, program.bindings, program.states, program.form)
        made = replace(program, graph_module=module, bindings=self.bindings)
        return replace(made.with_states(states), grown=grown)
