"""How kernels are cut for a chip: chosen so that nothing spills, by what the assembler says.

`tests/triton_compiling.py` prints what each shape takes. Chips stand for their kin: 80 for all that
multiply by warps and may have 99 KB of shared memory, 90 for Hopper, 100 for data-center Blackwell.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Queries and keys at a time, warps, and stages of loads ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


WIDTHS: Final = (64, 128, 256)

FORWARD: Final = {
    (80, 64): Shape(128, 64, 8, 3),
    (80, 128): Shape(64, 64, 4, 3),
    (80, 256): Shape(64, 32, 8, 2),
    (90, 64): Shape(128, 64, 8, 3),
    (90, 128): Shape(128, 64, 8, 3),
    (90, 256): Shape(64, 32, 8, 2),
    (100, 64): Shape(128, 64, 8, 2),
    (100, 128): Shape(128, 64, 8, 3),
    (100, 256): Shape(64, 32, 4, 2),
}

WITH_BIAS: Final = {(80, 128): Shape(64, 64, 4, 2)}
"""For attention under a bias, which is loaded ahead as keys are."""

ROUTED: Final = FORWARD | {(80, 64): Shape(128, 64, 8, 2), (80, 128): Shape(64, 32, 8, 3)}
"""For packed rows, each of which has a place of its own to be read from."""

QUERIES: Final = {
    (chip, width): shape
    for chip in (80, 90, 100)
    for width, shape in zip(
        WIDTHS, (Shape(128, 32, 8, 2), Shape(64, 64, 8, 2), Shape(32, 32, 4, 1)), strict=True
    )
}
"""For the gradients of queries."""

KEYS: Final = {
    (80, 64): Shape(64, 32, 4, 2),
    (80, 128): Shape(32, 64, 8, 2),
    (80, 256): Shape(32, 32, 8, 1),
    (90, 64): Shape(32, 128, 8, 2),
    (90, 128): Shape(32, 64, 8, 2),
    (90, 256): Shape(32, 32, 8, 1),
    (100, 64): Shape(64, 32, 4, 2),
    (100, 128): Shape(32, 64, 8, 2),
    (100, 256): Shape(32, 32, 8, 1),
}
"""For the gradients of keys and values."""

WITH_TENSORS: Final = {(90, 128): Shape(32, 32, 4, 2)}
"""For the gradients of keys under a mask or bias of tensors, whose addresses take registers."""

IN_FLOAT32: Final = {
    "forward": (Shape(64, 32, 4, 2), Shape(64, 32, 4, 2), Shape(32, 16, 4, 2)),
    "backward": (Shape(32, 32, 4, 1), Shape(32, 32, 4, 1), Shape(16, 16, 4, 1)),
}


def forward_shape(width: int, dtype: torch.dtype, chip: int, *, biased: bool = False) -> Shape:
    """Return the shape of attention for heads so wide; `biased` where a bias is loaded, too."""
    table = FORWARD | WITH_BIAS if biased else FORWARD
    return _chosen(table, "forward", width, dtype, chip)


def routed_shape(width: int, dtype: torch.dtype, chip: int) -> Shape:
    """Return the shape of routed attention."""
    return _chosen(ROUTED, "forward", width, dtype, chip)


def query_shape(width: int, dtype: torch.dtype, chip: int) -> Shape:
    """Return the shape for gradients of queries."""
    return _chosen(QUERIES, "backward", width, dtype, chip)


def key_shape(width: int, dtype: torch.dtype, chip: int, *, tensors: bool) -> Shape:
    """Return the shape for gradients of keys and values; `tensors` where a mask or bias is read."""
    table = KEYS | WITH_TENSORS if tensors else KEYS
    return _chosen(table, "backward", width, dtype, chip)


def chip_of(x: Tensor) -> int:
    """Return the chip whose shapes serve a tensor's device; the interpreter has those of Hopper."""
    if not x.is_cuda:
        return 90
    major = torch.cuda.get_device_capability(x.device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def _chosen(
    table: dict[tuple[int, int], Shape], kernel: str, width: int, dtype: torch.dtype, chip: int
) -> Shape:
    """Look a shape up by the next larger width."""
    place = next(n for n, widest in enumerate(WIDTHS) if width <= widest)
    return IN_FLOAT32[kernel][place] if dtype == torch.float32 else table[chip, WIDTHS[place]]
