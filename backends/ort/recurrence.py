"""Recurrences over tokens as a Scan of ONNX; onnxscript reads the source of this file.

Its subset of Python is not typed as mypy reads it. Axis letters as in `attnopt.ops`.
"""

# mypy: disable-error-code="arg-type, type-var, no-untyped-def, misc, no-any-return, has-type"

import onnxscript
from onnxscript import FLOAT, graph
from onnxscript import opset18 as op


@onnxscript.script(default_opset=op)
def linear_recurrence(decay: FLOAT, new: FLOAT, initial: FLOAT) -> FLOAT:
    """Return the states after each token of axis 1."""

    @graph()
    def step(state, factor, term):
        following = op.Add(op.Mul(factor, state), term)
        return following, op.Identity(following)

    _, states = op.Scan(
        initial,
        decay,
        new,
        body=step,
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return states


@onnxscript.script(default_opset=op)
def selective_scan(
    x: FLOAT, steps: FLOAT, rates: FLOAT, k: FLOAT, q: FLOAT, initial: FLOAT
) -> tuple[FLOAT, FLOAT]:
    """Return what each token reads (B, C, T) and the last state; one token takes no Scan."""

    @graph()
    def step(state, factor, term):
        following = op.Add(op.Mul(factor, state), term)
        return following, op.Identity(following)

    written = op.Mul(steps, x)
    length = op.Squeeze(op.Shape(x, start=2, end=3))
    if op.Equal(length, op.Constant(value_int=1)):
        # One token stands where a number of the state does: (B, C, 1) beside (C, N) and (B, 1, N).
        decay = op.Exp(op.Mul(steps, rates))
        last = op.Add(op.Mul(decay, initial), op.Mul(written, k))
        read = op.ReduceSum(op.Mul(last, q), op.Constant(value_ints=[-1]), keepdims=1)
    else:
        end = op.Constant(value_ints=[3])
        steps_BTC1 = op.Unsqueeze(op.Transpose(steps, perm=[0, 2, 1]), end)
        written_BTC1 = op.Unsqueeze(op.Transpose(written, perm=[0, 2, 1]), end)
        last, states = op.Scan(
            initial,
            op.Exp(op.Mul(steps_BTC1, rates)),
            op.Mul(written_BTC1, op.Unsqueeze(k, op.Constant(value_ints=[2]))),
            body=step,
            num_scan_inputs=2,
            scan_input_axes=[1, 1],
            scan_output_axes=[1],
        )
        read_BTC1 = op.MatMul(states, op.Unsqueeze(q, end))
        read = op.Transpose(op.Squeeze(read_BTC1, end), perm=[0, 2, 1])
    return read, last
