"""What hides keys from queries, inside the kernels: rules of position, windows, masks, padding.

Rows and columns come with the axes that the scores have in a kernel, so that the same functions
serve scores and their transpose. Scores are in base two.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.backends.triton_gpu.tiles import LOG2_E
from attnopt.ops.options import Options


class Rules(NamedTuple):
    """What positions hide; None where there is no such rule.

    `ends` is 1 where no query sees a later key; `left` counts the keys before a query's own.
    """

    ends: int | None = None
    left: int | None = None
    right: int | None = None
    prefix: int | None = None
    chunk: int | None = None
    first: int | None = None

    @classmethod
    def of(
        cls,
        *,
        causal: bool = False,
        window: int | None = None,
        right: int | None = None,
        prefix: int | None = None,
        chunk: int | None = None,
        first: int | None = None,
    ) -> "Rules":
        """Return the rules that the options of an op mean."""
        ends = causal or (window is not None and right is None)
        left = window if window is None or right is not None else window - 1
        return cls(
            ends=1 if ends else None,
            left=left,
            right=right,
            prefix=prefix if ends else None,
            chunk=chunk,
            first=first if window is not None else None,
        )


class Hidden(NamedTuple):
    """Tensors that hide keys or weigh them; strides go with each, None where there is none.

    `start` and `stop` are (T, axes), `place` is (S, axes): windows over coordinates.
    """

    padding: Any = None
    padding_strides: Any = None
    mask: Any = None
    mask_strides: Any = None
    bias: Any = None
    bias_strides: Any = None
    start: Any = None
    stop: Any = None
    place: Any = None

    @classmethod
    def of(cls, given: Options, shape: tuple[int, ...]) -> "Hidden":
        """Return the tensors of a call whose scores are (B, H, T, S)."""
        padding, mask = (_bytes(x, shape) for x in (given.padding, given.mask))
        bias = None if given.bias is None else given.bias.expand(shape)
        return cls(
            padding,
            None if padding is None else (padding.stride(0), padding.stride(3)),
            mask,
            None if mask is None else mask.stride(),
            bias,
            None if bias is None else bias.stride(),
        )


def _bytes(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return a boolean mask as bytes with all axes; nothing is copied."""
    return None if mask is None else mask.view(torch.uint8).expand(shape)


@triton.jit
def follows(rules, row, column):
    """Tell which keys the rules show; `row` and `column` are positions, negative ones are empty."""
    seen = (column >= 0) & (row == row)
    if rules.ends is not None:
        past = column <= row
        if rules.prefix is not None:
            past = past | (column < rules.prefix)
        seen = seen & past
    if rules.left is not None:
        near = row - column <= rules.left
        if rules.first is not None:
            near = near | (column < rules.first)
        seen = seen & near
    if rules.right is not None:
        seen = seen & (column - row <= rules.right)
    if rules.chunk is not None:
        seen = seen & (row >= 0) & (row // rules.chunk == column // rules.chunk)
    return seen


@triton.jit
def within(hidden, row, column, queries, keys, AXES: tl.constexpr):
    """Tell which keys lie in the windows over coordinates."""
    inside = (row < queries) & (column < keys)
    extra = row < 0
    near = inside
    for axis in tl.static_range(AXES):
        start = tl.load(hidden.start + row * AXES + axis, mask=row < queries, other=0)
        stop = tl.load(hidden.stop + row * AXES + axis, mask=row < queries, other=0)
        place = tl.load(hidden.place + column * AXES + axis, mask=column < keys, other=0)
        near = near & (start <= place) & (place < stop)
        extra = extra | (place < 0)
    return near | (inside & extra)


@triton.jit
def hide(
    x, hidden, rules, b, h, row, column, row_place, column_place, queries, keys,
    AXES: tl.constexpr, MASKED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add the bias, and hide what is hidden; `CUT` where some keys do not exist.

    A place is where a row or column stands for the rules. Rules, windows and the mask are left out
    where `MASKED` is false, as full tiles have it.
    """
    inside = (row < queries) & (column < keys)
    nothing = float("-inf")
    if hidden.bias is not None:
        strides = hidden.bias_strides
        place = b * strides[0] + h * strides[1] + row.to(tl.int64) * strides[2]
        bias = tl.load(hidden.bias + place + column * strides[3], mask=inside, other=0.0)
        x += bias.to(tl.float32) * LOG2_E
    if CUT:
        x = tl.where(column < keys, x, nothing)
    if hidden.padding is not None:
        strides = hidden.padding_strides
        shown = hidden.padding + b * strides[0] + column * strides[1]
        x = tl.where(tl.load(shown, mask=column < keys, other=0) != 0, x, nothing)
    if MASKED:
        x = tl.where(follows(rules, row_place, column_place), x, nothing)
        if AXES > 0:
            x = tl.where(within(hidden, row, column, queries, keys, AXES), x, nothing)
    if MASKED and hidden.mask is not None:
        strides = hidden.mask_strides
        place = b * strides[0] + h * strides[1] + row.to(tl.int64) * strides[2]
        seen = tl.load(hidden.mask + place + column * strides[3], mask=inside, other=0)
        x = tl.where(seen != 0, x, nothing)
    return x
