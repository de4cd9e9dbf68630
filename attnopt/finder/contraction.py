"""One form for every product that sums over an axis: matmul, baddbmm, einsum, mul + sum ..."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.finder.ops import args, argument, is_number, is_tensor, kind, rank, shape

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """out = factor * sum over the shared axes of lhs * rhs, + addend_factor * addend.

    Axes with one label are one axis (a size of 1 broadcasts).
    """

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_labels: Labels
    rhs_labels: Labels
    out_labels: Labels
    factor: float = 1.0
    addend: fx.Node | None = None
    addend_factor: float = 1.0

    @property
    def summed(self) -> Labels:
        """Name the axes that are summed over."""
        return tuple(
            x for x in self.lhs_labels if x in self.rhs_labels and x not in self.out_labels
        )

    def labels(self, operand: fx.Node) -> Labels:
        """Return the labels of one of the two operands."""
        return self.lhs_labels if operand is self.lhs else self.rhs_labels


def read_contraction(node: fx.Node) -> Contraction | None:
    """Read a node as a contraction of two tensors; None where it is not one."""
    reader = _READERS.get(kind(node))
    return reader(node) if reader else None


def _matmul(node: fx.Node, lhs: Any = None, rhs: Any = None, **rest: Any) -> Contraction:
    lhs = args(node)[0] if lhs is None else lhs
    rhs = args(node)[1] if rhs is None else rhs
    batch = max(rank(lhs), rank(rhs), 2) - 2
    axes = [f"b{i}" for i in range(batch)]
    left = (*axes[batch - max(rank(lhs) - 2, 0) :], "n", "k") if rank(lhs) > 1 else ("k",)
    right = (*axes[batch - max(rank(rhs) - 2, 0) :], "k", "m") if rank(rhs) > 1 else ("k",)
    out = (*axes, *("n" for _ in range(rank(lhs) > 1)), *("m" for _ in range(rank(rhs) > 1)))
    return Contraction(node, lhs, rhs, left, right, out, **rest)


def _addmm(node: fx.Node) -> Contraction:
    addend, lhs, rhs = args(node)[:3]
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    # With beta 0 the addend is not read at all.
    return _matmul(
        node,
        lhs,
        rhs,
        factor=float(alpha),
        addend=addend if beta != 0 else None,
        addend_factor=float(beta),
    )


def _linear(node: fx.Node) -> Contraction:
    x, weight = args(node)[:2]
    axes = tuple(f"b{i}" for i in range(rank(x) - 1))
    right = ("m", "k") if rank(weight) > 1 else ("k",)
    out = (*axes, "m") if rank(weight) > 1 else axes
    return Contraction(node, x, weight, (*axes, "k"), right, out, addend=argument(node, 2, "bias"))


def _inner(node: fx.Node) -> Contraction:
    lhs, rhs = args(node)[:2]
    left = tuple(f"n{i}" for i in range(rank(lhs) - 1))
    right = tuple(f"m{i}" for i in range(rank(rhs) - 1))
    return Contraction(node, lhs, rhs, (*left, "k"), (*right, "k"), (*left, *right))


def _tensordot(node: fx.Node) -> Contraction:
    lhs, rhs, left_axes, right_axes = args(node)[:4]
    left = [f"n{i}" for i in range(rank(lhs))]
    right = [f"m{i}" for i in range(rank(rhs))]
    for i, (a, b) in enumerate(zip(left_axes, right_axes, strict=True)):
        left[a] = right[b] = f"k{i}"
    out = tuple(x for x in (*left, *right) if not x.startswith("k"))
    return Contraction(node, lhs, rhs, tuple(left), tuple(right), out)


def _einsum(node: fx.Node) -> Contraction | None:
    equation, operands = args(node)[:2]
    if len(operands) != 2:
        return None
    equation = equation.replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    left, right = (_letters(t, rank(x)) for t, x in zip(inputs.split(","), operands, strict=True))
    dots = max((x for x in (left, right)), key=lambda x: sum(y.startswith(".") for y in x))
    ellipsis = [x for x in dots if x.startswith(".")]
    if arrow:
        out = _spread(output, ellipsis)
    else:
        free = sorted(x for x in {*left, *right} if x.isalpha() and [*left, *right].count(x) == 1)
        out = [*ellipsis, *free]
    if len(set(left)) < len(left) or len(set(right)) < len(right):
        return None
    return Contraction(node, operands[0], operands[1], tuple(left), tuple(right), tuple(out))


def _letters(term: str, axes: int) -> list[str]:
    count = axes - len(term.replace("...", ""))
    return _spread(term, [f".{i}" for i in range(count - 1, -1, -1)])


def _spread(term: str, ellipsis: list[str]) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(ellipsis if dots else ()), *after]


def _sum(node: fx.Node) -> Contraction | None:
    product = args(node)[0]
    axes = argument(node, 1, "dim")
    keep = argument(node, 2, "keepdim", default=False)
    if not isinstance(product, fx.Node) or kind(product) != "mul" or not axes or keep:
        return None
    lhs, rhs = args(product)[:2]
    if not all(isinstance(x, fx.Node) and is_tensor(x) for x in (lhs, rhs)):
        return None
    full = [f"b{i}" for i in range(rank(product))]
    left = tuple(full[len(full) - rank(lhs) :])
    right = tuple(full[len(full) - rank(rhs) :])
    summed = {full[a] for a in axes}
    both = all(
        shape(x)[labels.index(s)] > 1
        for x, labels in ((lhs, left), (rhs, right))
        for s in summed
        if s in labels
    )
    if not both or not all(s in left and s in right for s in summed):
        return None
    left, right = _own_axes(lhs, left, rhs, right), _own_axes(rhs, right, lhs, left)
    return Contraction(node, lhs, rhs, left, right, tuple(x for x in full if x not in summed))


def _own_axes(node: fx.Node, labels: Labels, other: fx.Node, others: Labels) -> Labels:
    """Rename the axes that a tensor only broadcasts along: they are the other's alone."""
    wide = {x for x, size in zip(others, shape(other), strict=True) if size > 1}
    return tuple(
        f"_{x}" if size == 1 and x in wide else x
        for x, size in zip(labels, shape(node), strict=True)
    )


def _convolution(node: fx.Node) -> Contraction:
    x, weight = args(node)[:2]
    space = rank(weight) - 2
    left = ("b0",) if rank(x) == rank(weight) else ()
    seen = tuple(f"x{i}" for i in range(space))
    made = tuple(f"y{i}" for i in range(space))
    taps = tuple(f"w{i}" for i in range(space))
    return Contraction(
        node, x, weight, (*left, "k", *seen), ("m", "k", *taps), (*left, "m", *made),
        addend=argument(node, 2, "bias"),
    )  # fmt: skip


_READERS = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "mv": _matmul,
    "baddbmm": _addmm,
    "addmm": _addmm,
    "linear": _linear,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "sum": _sum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "convolution": _convolution,
}


def is_scalar(x: Any) -> bool:
    """Tell whether an operand is a number or a tensor of one element."""
    return is_number(x) or (isinstance(x, fx.Node) and is_tensor(x) and _elements(x) == 1)


def _elements(node: fx.Node) -> int:
    count = 1
    for size in shape(node):
        count *= size
    return count
