"""Which providers of ONNX Runtime run here: what is installed may lack its device or libraries."""

from functools import cache
from typing import Final

NAMES: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@cache
def runs_here(ep: str) -> bool:
    """Tell whether a session takes a provider; ONNX Runtime itself falls back and says nothing."""
    import onnxruntime
    from onnx import TensorProto, helper

    if NAMES[ep] not in onnxruntime.get_available_providers():
        return False
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", [x], [y])
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=[NAMES[ep]])
    return str(session.get_providers()[0]) == NAMES[ep]
