"""Models of one export as files: weights lie in one file beside them, each once."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# Where a tensor starts, so that it can be mapped to memory; smaller ones stay in the model, where
# shape inference reads them.
_ALIGNMENT: Final = 4096
_SMALL: Final = 1024


def save_together(models: Mapping[Path, Any], data: Path) -> None:
    """Write models and their weights; what several models hold, or one holds twice, lies once."""
    import onnx_ir as ir

    places: dict[tuple[Any, ...], tuple[int, int]] = {}
    with data.open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _SMALL:
                    continue
                content = tensor.tobytes()
                key = (hashlib.sha256(content).digest(), tensor.dtype, tuple(tensor.shape))
                if key not in places:
                    file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                    places[key] = (file.tell(), len(content))
                    file.write(content)
                value.const_value = ir.ExternalTensor(
                    data.name, *places[key], tensor.dtype,
                    shape=tensor.shape, name=value.name, base_dir=data.parent,
                )  # fmt: skip
    for path, model in models.items():
        ir.save(model, path)
