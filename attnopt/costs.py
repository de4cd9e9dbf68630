"""What a program costs: floating-point operations and cache bytes at a stated workload.

Every contraction of the graph counts (`attnopt.counting`); all else is free. Symbolic sizes are
read off the graph: the first axis of an input is the batch, what grows with a cache is the past,
and every other free size is the sequence.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.counting import COUNTS
from attnopt.nouns import Site
from attnopt.program import Program

_LONGEST_DEFAULT = 1024


@dataclass(frozen=True)
class Workload:
    """How much a program is given: `sequence` new tokens per row after `past` cached ones.

    A sequence of 0 is that of a program whose inputs have no free length, such as an image model.
    """

    batch: int = 1
    sequence: int = _LONGEST_DEFAULT
    past: int = 0

    def __str__(self) -> str:
        sequence = f", sequence {self.sequence:,}" if self.sequence else ""
        past = f", past {self.past:,}" if self.past else ""
        return f"batch {self.batch}{sequence}{past}"


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site, its projections included.

    `cache_bytes` are the bytes per token of keys and values that a cached site keeps.
    """

    flops: int
    share: float
    cache_bytes: int


@dataclass(frozen=True)
class Costs:
    """The cost of a program and of each of its sites by name."""

    workload: Workload
    flops: int
    sites: Mapping[str, SiteCost]

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values per token, all sites together."""
        return sum(site.cache_bytes for site in self.sites.values())


def default_workload(program: Program) -> Workload:
    """Return batch 1 and 1,024 tokens, or as many as the model has positions for."""
    if not any(_has_sequence(leaf) for leaf in _leaves(program)):
        return Workload(sequence=0)
    limit = getattr(program.config, "max_position_embeddings", None)
    longest = limit if isinstance(limit, int) and limit > 0 else _LONGEST_DEFAULT
    return Workload(sequence=min(longest, _LONGEST_DEFAULT))


def count_costs(program: Program, workload: Workload) -> Costs:
    """Count the operations of a program and of its sites."""
    by_module: dict[str, int] = {}
    for leaf in _leaves(program):
        for module, flops in _contractions(leaf, workload):
            by_module[module] = by_module.get(module, 0) + flops
    total = sum(by_module.values())
    width = _element_size(program)
    return Costs(
        workload, total, {s.name: _site_cost(s, program, by_module, width) for s in program.sites}
    )


def cache_bytes(site: Site, element_size: int) -> int:
    """Return the bytes per token that a site's cache keeps."""
    if not site.cached:
        return 0
    return site.kv_heads * (site.head_dim + site.v_head_dim) * element_size


def uncounted(program: Program) -> Iterator[str]:
    """Name attnopt's own ops in a program whose operations are not counted.

    What reads one tensor only moves it, and is free.
    """
    for leaf in _leaves(program):
        for node in leaf.graph.nodes:
            ours = node.op == "call_function" and str(node.target).startswith("attnopt.")
            if ours and len(node.all_input_nodes) > 1 and _op_name(node) not in COUNTS:
                yield _op_name(node)


def _leaves(program: Program) -> Iterator[Program]:
    """Yield the graphs that one pass over the input runs."""
    if not program.parts:
        yield program.growing
    for name, part in program.parts.items():
        # The later steps of an encoder-decoder repeat the modules of its first.
        if name != "decode":
            yield from _leaves(part)


def _site_cost(
    site: Site, program: Program, by_module: Mapping[str, int], element_size: int
) -> SiteCost:
    """Sum what runs inside the site's module; sites of the same module share it equally."""
    inside = sum(n for module, n in by_module.items() if _is_within(module, site.module))
    sharing = sum(other.module == site.module for other in program.sites)
    flops = inside // max(sharing, 1)
    share = flops / max(sum(by_module.values()), 1)
    return SiteCost(flops, share, cache_bytes(site, element_size))


def _is_within(module: str, parent: str) -> bool:
    return not parent or module == parent or module.startswith(f"{parent}.")


def _element_size(program: Program) -> int:
    """Return the bytes per element of most weights, which the cache follows."""
    stored = [weight.element_size() for leaf in _leaves(program) for weight in parameters(leaf)]
    return max(set(stored), key=stored.count) if stored else 4


def parameters(program: Program) -> list[torch.Tensor]:
    """Return the parameters of one graph as it knows them: without their values, tied ones once."""
    return [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and program.bindings[node.name].kind == "parameter"
    ]


def _contractions(program: Program, workload: Workload) -> Iterator[tuple[str, int]]:
    """Yield the module and the operations of every contraction."""
    sizes = _Sizes(program, workload)
    for node in program.graph.nodes:
        count = COUNTS.get(_op_name(node)) if node.op == "call_function" else None
        if count is not None:
            yield module_path(node), count(node, sizes)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node comes from."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(list(stack.values())))[0]) if stack else ""
    return path.removeprefix("L['self']").removeprefix(".")


def _op_name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


class _Sizes:
    """The sizes of a graph's values, with numbers in place of the symbols."""

    def __init__(self, program: Program, workload: Workload) -> None:
        self._numbers = _symbol_values(program, workload)
        self._sequence = workload.sequence
        self._known: dict[Any, int] = {}

    def __call__(self, value: Any) -> tuple[int, ...]:
        """Return the shape of a node's value."""
        tensor = value.meta["val"] if isinstance(value, fx.Node) else value
        return tuple(self._size(size) for size in tensor.shape)

    def number(self, value: Any) -> int:
        """Return a whole number, or the value of a node that is one."""
        return self._size(value.meta["val"] if isinstance(value, fx.Node) else value)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._known:
            numbers = {s: self._numbers.get(s, self._sequence) for s in _symbols(size)}
            self._known[expression] = int(expression.subs(numbers))
        return self._known[expression]


def _symbol_values(program: Program, workload: Workload) -> dict[Any, int]:
    """Say which symbol is the past and which the batch; the others are the sequence."""
    found: dict[Any, int] = {}
    shapes = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for state in program.states:
        shape = _shape(shapes.get(state.placeholder))
        if state.grows is not None and shape:
            _note(found, shape[state.grows], workload.past)
    for name, binding in program.bindings.items():
        shape = _shape(shapes.get(name))
        if binding.kind in {"input", "state"} and shape:
            _note(found, shape[0], workload.batch)
        if binding.kind == "past_length":
            _note(found, shapes.get(name), workload.past)
    return found


def _has_sequence(program: Program) -> bool:
    """Whether an input has a free size besides the batch and the past."""
    known = _symbol_values(program, Workload())
    inputs = {name for name, binding in program.bindings.items() if binding.kind == "input"}
    return any(
        symbol not in known
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs
        for size in _shape(node.meta.get("val"))
        for symbol in _symbols(size)
    )


def _symbols(size: Any) -> set[Any]:
    """Return the symbols of a size."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _note(found: dict[Any, int], size: Any, number: int) -> None:
    """Remember the number of a size that is one symbol by itself."""
    if len(_symbols(size)) == 1:
        found.setdefault(_symbols(size).pop(), number)
