"""ONNX Runtime: programs as ONNX files that it runs, states as inputs and outputs."""

from attnopt.backends.ort.exporting import Export, check_installed, export_onnx

__all__ = ["Export", "check_installed", "export_onnx"]
