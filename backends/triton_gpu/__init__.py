"""The graph run op by op, with attention by Triton kernels where its tensors are on a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

__all__ = ["prepare"]


def prepare(graph_module: "fx.GraphModule") -> Callable[..., Any]:
    """Return the graph with its attention by the kernels; a machine that has none is refused."""
    if find_spec("triton") is None:
        raise ValueError("triton_gpu: Triton is not installed; run pip install 'attnopt[triton]'")
    from attnopt.backends.triton_gpu.attending import kernel_of
    from attnopt.backends.triton_gpu.routing import available
    from attnopt.inlining import inline_attention

    able = available()
    if not able:
        raise ValueError(str(able))
    inline_attention(graph_module, remember=True, kernel_of=kernel_of)
    return graph_module.forward
