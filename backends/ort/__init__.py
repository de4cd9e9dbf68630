"""ONNX Runtime: programs as ONNX files that it runs, states as inputs and outputs."""

from typing import TYPE_CHECKING, Any

from attnopt.backends.ort.exporting import Export, check_installed, export_onnx

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attnopt.program import Program

__all__ = ["Export", "check_installed", "export_onnx", "grows", "ready"]

grows = True
"""States grow: the operators have no rings, windows are masked."""


def ready(
    program: "Program", module: "nn.Module", dtype: "torch.dtype", device: "torch.device"
) -> Any:
    """Return what runs a program in ONNX Runtime, on the weights that a module has now."""
    from attnopt.backends.ort.running import ready as make

    return make(program, module, dtype, device)
