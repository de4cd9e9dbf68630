"""What the finder knows about ATen ops: which are index maps, transparent, or norms."""

from typing import Any

import torch
from torch import fx

# Value and layout both unchanged (dropout is one of these outside training).
TRANSPARENT = frozenset(
    "to _to_copy clone contiguous alias detach lift_fresh lift_fresh_copy type_as dropout "
    "alpha_dropout feature_dropout native_dropout _assert_async float double half bfloat16 "
    "_conj_physical resolve_conj resolve_neg nan_to_num wrap_with_autocast positive".split()
)
# Pure index maps: each output element is one input element.
LAYOUT = frozenset(
    "view reshape _unsafe_view view_as reshape_as permute transpose t numpy_T mT mH adjoint "
    "unsqueeze squeeze expand expand_as broadcast_to flatten unflatten repeat tile "
    "repeat_interleave slice narrow select split split_with_sizes unsafe_split chunk "
    "unsafe_chunk tensor_split unbind movedim moveaxis swapaxes swapdims roll flip unfold "
    "index_select index gather take_along_dim constant_pad_nd pad as_strided diagonal rot90 "
    "getitem slice_copy view_copy expand_copy permute_copy transpose_copy unsqueeze_copy "
    "select_copy im2col pixel_shuffle pixel_unshuffle atleast_2d atleast_3d".split()
)
# Written into one tensor from another: the positions of the arguments whose elements are passed on.
WRITES = {
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "diagonal_scatter": (0, 1),
    "as_strided_scatter": (0, 1),
    "index_put": (0, 2),
    "masked_scatter": (0, 2),
    "scatter": (0, 3),
    "copy": (0, 1),
}
JOINING = frozenset("cat concat concatenate stack hstack vstack".split())
CONTRACTIONS = frozenset(
    "matmul bmm mm mv dot einsum linear addmm baddbmm addbmm tensordot inner bilinear outer "
    "conv1d conv2d conv3d convolution".split()
)
SOFTMAX = frozenset("softmax _softmax _safe_softmax".split())
LOG_SOFTMAX = frozenset("log_softmax _log_softmax".split())
SDPA = frozenset(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention".split()
)
NORMS = frozenset(
    "layer_norm native_layer_norm rms_norm _fused_rms_norm group_norm batch_norm".split()
)


UNKNOWN = 3


def kind(node: fx.Node) -> str:
    """Name the op of a node, without overload and in-place underscore; '' for non-calls."""
    if node.op != "call_function":
        return ""
    target = node.target
    packet = getattr(target, "overloadpacket", target)
    name = str(getattr(packet, "__name__", target))
    if name.startswith("__"):
        return name
    return name.removesuffix("_") if not name.startswith("_") or not name.endswith("__") else name


def args(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of a node, without fx's union of all their types."""
    return node.args


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Read an argument that may be given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """List the inputs of a node that hold a tensor."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def value(node: fx.Node) -> Any:
    """Return the example (fake) value of a node."""
    return node.meta.get("val")


def is_tensor(node: fx.Node) -> bool:
    """Tell whether a node holds one tensor, or a list of tensors."""
    found = value(node)
    if isinstance(found, tuple | list):
        return any(isinstance(v, torch.Tensor) for v in found)
    return isinstance(found, torch.Tensor)


def rank(node: fx.Node) -> int:
    """Return the number of axes of a node's tensor."""
    return int(value(node).dim())


def hint(size: Any) -> int:
    """Return the size that was seen at capture."""
    if isinstance(size, int):
        return size
    # A size that data decide has no value at capture; nothing is read from it but that it varies.
    found: int | None = size.node.hint
    return UNKNOWN if found is None else int(found)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node at capture, as plain integers."""
    return tuple(hint(s) for s in value(node).shape)


def is_number(x: Any) -> bool:
    """Tell whether an argument is a plain number."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that a node ran in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return next(
        (path for path, _ in reversed(stack) if path and "_empty_nn_module" not in path), ""
    )
