"""The linear recurrence over tokens as a Scan of ONNX."""

import onnxscript
from onnxscript import graph
from onnxscript import opset18 as op


# onnxscript reads the source of what follows; its annotations would have to be tensors of ONNX.
@onnxscript.script(default_opset=op)
def linear_recurrence(decay, new, initial):  # type: ignore[no-untyped-def]
    """Return the states after each token (axis 1)."""

    @graph()
    def step(state, factor, term):  # type: ignore[no-untyped-def]
        following = op.Add(op.Mul(factor, state), term)
        return following, op.Identity(following)

    _, states = op.Scan(
        initial,
        decay,
        new,
        body=step,  # type: ignore[arg-type]  # a graph, once onnxscript has read it
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return states
