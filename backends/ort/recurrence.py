"""The linear recurrence over tokens as a Scan of ONNX; onnxscript reads the source of this file.

Its subset of Python is not typed as mypy reads it.
"""

import onnxscript
from onnxscript import FLOAT, graph
from onnxscript import opset18 as op


@onnxscript.script(default_opset=op)
def linear_recurrence(decay: FLOAT, new: FLOAT, initial: FLOAT) -> FLOAT:
    """Return the states after each token of axis 1."""

    @graph()
    def step(state, factor, term):  # type: ignore[no-untyped-def]
        following = op.Add(op.Mul(factor, state), term)
        return following, op.Identity(following)

    _, states = op.Scan(  # type: ignore[misc]
        initial,
        decay,
        new,
        body=step,  # type: ignore[arg-type]
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return states  # type: ignore[no-any-return, has-type]
