"""Where each element of a tensor comes from, found by running the layout ops on element numbers.

Every element of a *root* (a projection's output, an input, a cached state) gets a number. Views,
transposes, splits, expands and concatenations then run as they are, on numbers instead of values;
arithmetic with side operands (rotary, norms, scales) passes the numbers of what it acts on. What
arrives says which head and channel of which root every element is, in whatever way it was spelled.
"""

import math
import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.finder.contraction import Contraction, read_contraction
from attnopt.finder.evaluate import Shapes, Sizes, at_sizes, evaluate, is_size, leaves
from attnopt.finder.ops import JOINING, LAYOUT, NORMS, TRANSPARENT, args, is_tensor, kind, value
from attnopt.program import Binding, Program

ELEMENTWISE = frozenset(
    "add sub rsub mul div pow neg abs tanh sigmoid relu gelu silu mish elu leaky_relu softplus "
    "hardtanh hardswish rsqrt sqrt exp log where masked_fill maximum minimum clamp clamp_min "
    "clamp_max softmax _softmax true_divide square normalize logical_not reciprocal sin cos lerp "
    "addcmul polar fake_quantize_per_tensor_affine round relu6 prelu".split()
)

# Filled in, whatever tensor gives the shape.
CONSTANT = frozenset(
    "zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full".split()
)


_SHAPED_AS = frozenset("type_as view_as expand_as reshape_as".split())


@dataclass
class Origins:
    """What each node of a program depends on: parameters, user data, states."""

    program: Program
    _flags: dict[fx.Node, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Propagate the flags once, in order of execution."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._flags[node] = self._of_placeholder(node)
            elif node.op == "call_function" and not is_size(node):
                self._flags[node] = frozenset().union(*(self.of(n) for n in _read(node)))

    def of(self, node: fx.Node) -> frozenset[str]:
        """Return what a node depends on: parameter, buffer, data, position, mask, state."""
        return self._flags.get(node, frozenset())

    def _of_placeholder(self, node: fx.Node) -> frozenset[str]:
        if not is_tensor(node):
            return frozenset()
        binding: Binding = self.program.bindings[node.name]
        if binding.kind != "input":
            return frozenset({binding.kind})
        if binding.name.split(".")[-1] in ("position_ids", "cache_position"):
            return frozenset({"position"})
        example = value(node)
        if "mask" in binding.name:
            return frozenset({"mask"})
        return frozenset(
            {"data" if example.is_floating_point() or example.is_complex() else "tokens"}
        )

    def is_learned(self, node: fx.Node) -> bool:
        """Tell whether a node is made of parameters and constants alone."""
        return "parameter" in self.of(node) and self._is_fixed(node)

    def _is_fixed(self, node: fx.Node) -> bool:
        return self.of(node) <= {"parameter", "buffer", "constant"}

    def is_data(self, node: fx.Node) -> bool:
        """Tell whether a node carries what the model computes about its inputs."""
        flags = self.of(node)
        return bool(flags & {"data", "state"}) or ("parameter" in flags and "tokens" in flags)

    def is_projected(self, node: fx.Node) -> bool:
        """Tell whether a fixed tensor went through a learned contraction, as queries do."""
        while kind(node) in TRANSPARENT | LAYOUT | ELEMENTWISE | NORMS:
            node = self._main(node)
        contraction = read_contraction(node)
        if contraction is None:
            return False
        both = (contraction.lhs, contraction.rhs)
        return all(map(self._is_fixed, both)) and any(map(self.is_learned, both))

    def _main(self, node: fx.Node) -> fx.Node:
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        return next((n for n in tensors if n.op != "placeholder"), tensors[0])


def _read(node: fx.Node) -> list[fx.Node]:
    """List the inputs whose values a node reads, not only their shape or type."""
    name = kind(node)
    if name in CONSTANT or name in _SHAPED_AS:
        rest = args(node)[:1] if name in _SHAPED_AS else args(node)[1:]
        return [n for n in rest if isinstance(n, fx.Node)]
    return node.all_input_nodes


@dataclass(frozen=True)
class Root:
    """A tensor whose elements are numbered, and its axes of channels."""

    node: fx.Node
    base: int
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    contraction: Contraction | None

    @property
    def end(self) -> int:
        """Return the number after the last element."""
        return self.base + math.prod(self.shape)

    def index(self, numbers: Tensor, axis: int) -> Tensor:
        """Return where along an axis the elements with these numbers are."""
        return (numbers - self.base) // math.prod(self.shape[axis + 1 :]) % self.shape[axis]

    def place(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Split element numbers into (row, channel), each a single running number."""
        row = torch.zeros_like(numbers)
        channel = torch.zeros_like(numbers)
        for axis, size in enumerate(self.shape):
            index = self.index(numbers, axis)
            if axis in self.channels:
                channel = channel * size + index
            else:
                row = row * size + index
        return row, channel


class Provenance:
    """Element numbers for the nodes of one program, computed on demand and remembered."""

    def __init__(self, program: Program, shapes: Shapes, origins: Origins, sizes: Sizes) -> None:
        self.program = program
        self.shapes = shapes
        self.origins = origins
        self.sizes = sizes
        self.roots: list[Root] = []
        self._next = 0
        self._numbers: dict[tuple[fx.Node, bool], Tensor | tuple[Tensor, ...]] = {}

    def numbers(self, node: fx.Node, *, second: bool = False) -> Tensor:
        """Return the numbers of a node's elements.

        Where two operands both carry data (the two halves of a rotation), the first counts, or
        with `second` the last.
        """
        found = self._trace(node, second)
        assert isinstance(found, Tensor)
        return found

    def all_numbers(self, node: fx.Node) -> list[Tensor]:
        """Return the numbers of each of a node's tensors."""
        found = self._trace(node, False)
        return [found] if isinstance(found, Tensor) else list(found)

    def root_of(self, number: int) -> Root:
        """Return the root that an element number belongs to."""
        # A root without elements starts where the next one does.
        return max((r for r in self.roots if r.base <= number), key=lambda r: (r.base, r.end))

    def _trace(self, node: fx.Node, second: bool) -> Tensor | tuple[Tensor, ...]:
        key = (node, second)
        if key not in self._numbers:
            todo = [node]
            while todo:
                top = todo[-1]
                missing = [
                    n for n in self._sources(top, second) if (n, second) not in self._numbers
                ]
                if missing:
                    todo.extend(missing)
                    continue
                todo.pop()
                if (top, second) not in self._numbers:
                    self._numbers[(top, second)] = self._step(top, second)
        return self._numbers[key]

    def _sources(self, node: fx.Node, second: bool) -> list[fx.Node]:
        """List the inputs whose numbers a node passes on; none at a root."""
        name = kind(node)
        if name in JOINING:
            return [n for n in args(node)[0] if isinstance(n, fx.Node)]
        if name in TRANSPARENT or name in NORMS or name in ("view_as_complex", "view_as_real"):
            return [args(node)[0]]
        if name in LAYOUT:
            main = args(node)[0]
            assert isinstance(main, fx.Node)
            return [main] if self._movable(node) else []
        if name in ELEMENTWISE:
            carrier = self.carrier(node, second=second)
            return [] if carrier is None else [carrier]
        return []

    def _movable(self, node: fx.Node) -> bool:
        """Tell whether a layout op's map is known: sizes and positions decide it, not data."""
        main = args(node)[0]
        assert isinstance(main, fx.Node)
        if not is_tensor(main):
            return False
        if kind(main) not in LAYOUT and isinstance(value(main), tuple | list):
            return kind(node) == "getitem" and kind(main) in (*TRANSPARENT, *NORMS)
        others = [n for n in node.all_input_nodes if n is not main and is_tensor(n)]
        return all(
            self.program.bindings[leaf.name].kind in ("buffer", "constant")
            for other in others
            for leaf in leaves([other])
        )

    def carrier(self, node: fx.Node, *, second: bool = False) -> fx.Node | None:
        """Choose the operand that an elementwise op acts on, the others being its side operands."""
        operands = [n for n in dict.fromkeys(node.all_input_nodes) if isinstance(value(n), Tensor)]
        if kind(node) == "where":
            operands = [n for n in args(node)[1:] if isinstance(n, fx.Node) and is_tensor(n)]
        if kind(node) == "masked_fill":
            operands = operands[:1]
        full = self.shapes.shape(node, self.sizes)
        for test in (self.origins.is_data, self.origins.is_learned, lambda _: True):
            fitting = [n for n in operands if test(n)]
            exact = [n for n in fitting if self.shapes.shape(n, self.sizes) == full]
            chosen = exact or fitting
            if chosen:
                return chosen[-1 if second else 0]
        return None

    def step_back(self, node: fx.Node, place: int) -> tuple[fx.Node, int] | None:
        """Return the input that an element comes from, and its place there; None at a root.

        A place is a running number over all elements, those of several outputs one after another.
        """
        found: dict[fx.Node, Tensor | tuple[Tensor, ...]] = {}
        sources: list[tuple[fx.Node, int]] = []
        start = 0
        for source in dict.fromkeys(self._sources(node, second=False)):
            sources.append((source, start))
            found[source], start = self._counted(source, start)
        if not sources:
            return None
        if kind(node) == "view_as_real":
            return sources[0][0], place // 2
        at = int(_line(self._passed(node, found))[place])
        if at < 0:
            return None
        # Of sources that start together all but the last are empty.
        source, start = max((x for x in reversed(sources) if x[1] <= at), key=lambda x: x[1])
        return source, at - start

    def _counted(self, node: fx.Node, start: int) -> tuple[Tensor | tuple[Tensor, ...], int]:
        """Number the elements of a node from `start`; return the end, too."""
        example = value(node)
        counted: list[Tensor] = []
        for one in example if isinstance(example, tuple | list) else (example,):
            sizes = tuple(at_sizes(s, self.sizes) for s in one.shape)
            end = start + math.prod(sizes)
            counted.append(torch.arange(start, end).reshape(sizes))
            start = end
        return (tuple(counted) if isinstance(example, tuple | list) else counted[0]), start

    def moved(
        self, node: fx.Node, before: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...] | None:
        """Return what an index map makes of its first argument's numbers, whatever they are."""
        main = args(node)[0]
        if kind(node) != "getitem" and not self._movable(node):
            return None
        return self._move(node, {main: before})

    def _step(self, node: fx.Node, second: bool) -> Tensor | tuple[Tensor, ...]:
        sources = self._sources(node, second)
        if not sources:
            return self._new_root(node)
        if kind(node) == "view_as_real":
            real = self.numbers(sources[0], second=second)
            return torch.stack([real, self._imaginary(sources[0], real, second)], dim=-1)
        return self._passed(node, {n: self._numbers[(n, second)] for n in sources})

    def _imaginary(self, node: fx.Node, real: Tensor, second: bool) -> Tensor:
        """Return the numbers of imaginary parts: what stood beside the real ones in pairs."""
        while kind(node) != "view_as_complex":
            sources = self._sources(node, second)
            if not sources:
                return real + 1
            node = sources[0]
        pairs = self.numbers(args(node)[0], second=second).reshape(-1, 2)
        known, at = pairs[:, 0].sort()
        if not len(known):
            return real
        place = torch.searchsorted(known, real.contiguous()).clamp(max=len(known) - 1)
        return torch.where(known[place] == real, pairs[at, 1][place], real + 1)

    def _passed(
        self, node: fx.Node, found: dict[fx.Node, Tensor | tuple[Tensor, ...]]
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the numbers of a node from those of its sources."""
        name = kind(node)
        first = next(iter(found.values()))
        if name == "view_as_complex":
            assert isinstance(first, Tensor)
            return first[..., 0]
        if name in LAYOUT or name in JOINING:
            return self._move(node, found)
        if isinstance(value(node), tuple | list):
            return (first,) * len(value(node)) if isinstance(first, Tensor) else first
        assert isinstance(first, Tensor)
        return first.expand(self.shapes.shape(node, self.sizes))

    def _move(
        self, node: fx.Node, found: dict[fx.Node, Tensor | tuple[Tensor, ...]]
    ) -> Tensor | tuple[Tensor, ...]:
        def read(n: fx.Node) -> Any:
            if n in found:
                return found[n]
            if is_size(n):
                return at_sizes(value(n), self.sizes)
            return evaluate([n], self._constant, sizes=self.sizes)[0]

        given: Any = fx.map_arg(node.args, read)
        named: Any = fx.map_arg(node.kwargs, read)
        if kind(node) == "getitem":
            picked: Tensor = operator.getitem(given[0], given[1])
            return picked
        if "pad" in kind(node):
            # Padding comes from nowhere; number 0 belongs to no root.
            return torch.ops.aten.constant_pad_nd.default(given[0], given[1], -1)  # type: ignore[no-any-return]
        return run_layout(node, given, named)  # type: ignore[no-any-return]

    def _constant(self, node: fx.Node) -> Tensor:
        return self.program.weights[self.program.bindings[node.name].name]

    def _new_root(self, node: fx.Node) -> Tensor | tuple[Tensor, ...]:
        example = value(node)
        if isinstance(example, tuple | list):
            return tuple(self._number(node, x) for x in example)
        return self._number(node, example)

    def _number(self, node: fx.Node, example: Tensor) -> Tensor:
        shape = tuple(at_sizes(s, self.sizes) for s in example.shape)
        contraction = read_contraction(node)
        channels = _channel_axes(contraction, self.origins, len(shape))
        if contraction is not None and channels is None:
            contraction = None
        if channels is None:
            channels = (len(shape) - 1,) if 0 < len(shape) < 4 else ()
        count = 1
        for size in shape:
            count *= size
        self.roots.append(Root(node, self._next, shape, channels, contraction))
        numbers = torch.arange(self._next, self._next + count).reshape(shape)
        if kind(node) in CONSTANT:
            # What is filled in comes from nowhere, whatever head it stands beside.
            numbers = torch.full_like(numbers, -1)
        self._next += count
        return numbers


def _line(numbers: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return all numbers of a node in one row."""
    return (
        numbers.flatten() if isinstance(numbers, Tensor) else torch.cat([_line(x) for x in numbers])
    )


def run_layout(node: fx.Node, given: Any, named: Any) -> Any:
    """Run a layout op on numbers; views of what is not contiguous are copies then."""
    if kind(node) in ("view", "_unsafe_view") and isinstance(given[1], list | tuple):
        return given[0].reshape(given[1])
    assert callable(node.target)
    return node.target(*given, **named)


def _channel_axes(
    contraction: Contraction | None, origins: Origins, axes: int
) -> tuple[int, ...] | None:
    """List the output axes that come from a learned operand alone; None where none is learned."""
    if contraction is None:
        return None
    weight = weight_of(contraction, origins)
    if weight is None:
        return None
    other = contraction.lhs_labels if weight is contraction.rhs else contraction.rhs_labels
    labels = contraction.labels(weight)
    return tuple(i for i, x in enumerate(contraction.out_labels) if x in labels and x not in other)


def weight_of(contraction: Contraction, origins: Origins) -> fx.Node | None:
    """Return the operand of a contraction that is a learned weight, if just one is."""
    lhs, rhs = contraction.lhs, contraction.rhs
    learned = [x for x in (lhs, rhs) if origins.is_learned(x)]
    if len(learned) == 2:
        if kind(contraction.node) in ("linear", "addmm", "conv1d", "conv2d"):
            return rhs
        # Learned queries are repeated for each row of the batch; a weight has fixed sizes.
        learned = [x for x in learned if not _varies_in_size(x) and not origins.is_projected(x)]
        return learned[0] if len(learned) == 1 else None
    return learned[0] if learned else None


def _varies_in_size(node: fx.Node) -> bool:
    return any(isinstance(size, torch.SymInt) for size in value(node).shape)


@dataclass
class View:
    """One program with everything that the finder computes about it as a whole."""

    program: Program
    scalars: Any = None
    masks: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> Shapes:
        """Return the free symbols of the program."""
        return Shapes(self.program)

    @cached_property
    def origins(self) -> Origins:
        """Return what each node depends on."""
        return Origins(self.program)

    @cached_property
    def provenance(self) -> Provenance:
        """Return the element numbers, at the sizes of the capture."""
        return Provenance(self.program, self.shapes, self.origins, self.shapes.captured)
