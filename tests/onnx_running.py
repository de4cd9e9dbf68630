"""Runs ONNX models that tests make, on a CPU."""

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray


def computed(model: Any, given: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the results of a model, as it stands in memory."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(given)))
