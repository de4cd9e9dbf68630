"""Attention as operators of ONNX and of ONNX Runtime, and which of them serves a call.

Axis letters as in `attnopt.ops.attention`. Every mask is added as numbers: those of the standard
op are applied at the top left where keys are concatenated, ours stand at the end of the keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx

from attnopt.backends.ort.attention import Memo, attend, blind_as_zeros, hidden_keys
from attnopt.ops import cached_attention
from attnopt.ops.options import Options

Provider = Literal["cpu", "cuda"]
OPSETS: Final = range(18, 24)
_ATTENTION_SINCE: Final = 23


@dataclass(frozen=True)
class Target:
    """What a file is made for: a provider of ONNX Runtime, and an opset of ONNX.

    The same operators serve both providers; what differs is which of them the file is compared on.
    ONNX Runtime GenAI (`genai`) promises that rows
    end in their padding and that rows of a batch begin together: what GroupQueryAttention needs.
    """

    ep: Provider = "cpu"
    opset: int = 23
    genai: bool = False

    def __post_init__(self) -> None:
        if self.ep not in ("cpu", "cuda"):
            raise ValueError(f"ep {self.ep!r}; there is cpu and cuda")
        if self.opset not in OPSETS:
            raise ValueError(f"opset {self.opset}; there is {OPSETS[0]} to {OPSETS[-1]}")


@dataclass(frozen=True)
class Choice:
    """The operator that serves an attention, what calls it, and why no better one does."""

    operator: str
    kernel: Callable[..., Any]
    why: str = ""


def choose(node: fx.Node, target: Target) -> Choice:
    """Return the operator for an attention of a graph, cached or not."""
    cached = node.target is cached_attention
    given = Options.read({k: x for k, x in node.kwargs.items() if x is not None})
    q, k, v = (_shape(x) for x in node.args[:3])
    kernels = _CACHED if cached else _PLAIN
    if target.genai and cached and _is_grouped_query(given, k, v):
        return Choice("GroupQueryAttention", _grouped_query)
    why = _beyond(given, k, v)
    if why:
        return Choice("decomposed", kernels["decomposed"], why)
    if target.opset >= _ATTENTION_SINCE:
        return Choice("Attention", kernels["Attention"])
    why = f"opset {target.opset} has no Attention"
    # Maps give every query head its own keys and values.
    if (given.k_map is not None or k[1] == q[1]) and k[3] == v[3]:
        return Choice("MultiHeadAttention", kernels["MultiHeadAttention"], why)
    unfit = "keys and values are of unlike widths" if k[3] != v[3] else "heads share keys"
    return Choice("decomposed", kernels["decomposed"], f"{why}; for MultiHeadAttention, {unfit}")


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _beyond(given: Options, k: tuple[Any, ...], v: tuple[Any, ...]) -> str:
    """Say what the operators cannot."""
    if given.softcap is not None:
        return "a soft cap (the standard op's order of cap and mask differs between runtimes)"
    if given.sinks is not None:
        return "sinks"
    if (given.k_map is None) != (given.v_map is None) or (given.k_map is None and k[1] != v[1]):
        return "keys and values with unlike heads"
    return ""


def _is_grouped_query(given: Options, k: tuple[Any, ...], v: tuple[Any, ...]) -> bool:
    """Tell whether a call is causal and nothing more.

    The op has windows, too, but counts a row's tokens where sources count places, padding included.
    """
    masks = (given.bias, given.mask, given.k_map, given.v_map)
    plain = given.structure == {"causal": True}
    return plain and all(m is None for m in masks) and (k[1], k[3]) == (v[1], v[3])


def _grouped_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past: Any,
    memo: Memo,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Call ONNX Runtime's op for decoders; its rows are as long as their padding leaves them."""
    given = Options.read(options)
    batch, heads, tokens, width = q.shape
    total = past_k.shape[2] + tokens
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": k.shape[1],
        "scale": _scale(q, given),
    }
    if given.softcap is not None:
        attributes["softcap"] = float(given.softcap)
    rows = [x.transpose(1, 2).reshape(batch, tokens, x.shape[1] * width) for x in (q, k, v)]
    ends, length = _ends(q, total, memo, given)
    optional = () if given.sinks is None else (None, None, None, None, given.sinks)
    found, keys, values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (*rows, past_k, past_v, ends, length, *optional),
        attrs=attributes,
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=(rows[0].shape, *((*x.shape[:2], total, width) for x in (k, v))),
        version=1,
    )
    return found.reshape(batch, tokens, heads, width).transpose(1, 2), keys, values


def _ends(q: Tensor, total: Any, memo: Memo, given: Options) -> tuple[Tensor, Tensor]:
    """Return the last position of each row, and the length of the longest."""
    key = ("ends", id(given.padding), str(total))
    if key not in memo:
        if given.padding is None:
            length = torch.full((), total, dtype=torch.int32)
            ends = (length - 1).expand(q.shape[0])
        else:
            length = torch.full((), given.padding.shape[-1], dtype=torch.int32)
            ends = given.padding.flatten(1).sum(dim=-1).to(torch.int32) - 1
        memo[key] = (ends, length, given.padding)
    ends, length, _ = memo[key]
    return ends, length


def _attention(q: Tensor, k: Tensor, v: Tensor, memo: Memo, **options: Any) -> Tensor:
    """Call the standard op."""
    given = Options.read(options)
    k, v = given.heads_of(k, v)
    added, sees = _added(q, k, memo, given)
    found = torch.onnx.ops.symbolic(
        "Attention",
        (q, k, v, added),
        attrs={"scale": _scale(q, given)},
        dtype=q.dtype,
        shape=(*q.shape[:3], v.shape[3]),
        version=_ATTENTION_SINCE,
    )
    return blind_as_zeros(found, sees, given)


def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past: Any,
    memo: Memo,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Call the standard op with its past."""
    given = Options.read(options)
    if given.k_map is not None or given.v_map is not None:
        return _concatenated(_attention)(q, k, v, past_k, past_v, past, memo, **options)
    total = past_k.shape[2] + k.shape[2]
    added, sees = _added(q, k, memo, given, total)
    found, keys, values = torch.onnx.ops.symbolic_multi_out(
        "Attention",
        (q, k, v, added, past_k, past_v),
        attrs={"scale": _scale(q, given)},
        dtypes=(q.dtype, k.dtype, v.dtype),
        shapes=(
            (*q.shape[:3], v.shape[3]),
            (*k.shape[:2], total, k.shape[3]),
            (*v.shape[:2], total, v.shape[3]),
        ),
        version=_ATTENTION_SINCE,
    )
    return blind_as_zeros(found, sees, given), keys, values


def _multi_head(q: Tensor, k: Tensor, v: Tensor, memo: Memo, **options: Any) -> Tensor:
    """Call ONNX Runtime's op, whose queries and results are (B, T, H D)."""
    given = Options.read(options)
    k, v = given.heads_of(k, v)
    added, sees = _added(q, k, memo, given)
    batch, heads, tokens, width = q.shape
    found = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q.transpose(1, 2).reshape(batch, tokens, heads * width), k, v, None, None, added),
        attrs={"num_heads": heads, "scale": _scale(q, given)},
        dtype=q.dtype,
        shape=(batch, tokens, heads * width),
        version=1,
    )
    found = found.reshape(batch, tokens, heads, width).transpose(1, 2)
    return blind_as_zeros(found, sees, given)


def _concatenated(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a kernel that makes the cache longer before it calls another."""

    def cached(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past: Any,
        memo: Memo,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        return kernel(q, keys, values, memo, **options), keys, values

    return cached


_PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "decomposed": attend,
}
_CACHED: Final[dict[str, Callable[..., Any]]] = {
    "Attention": _cached,
    "MultiHeadAttention": _concatenated(_multi_head),
    "decomposed": _concatenated(attend),
}


def _scale(q: Tensor, given: Options) -> float:
    return float(q.shape[-1] ** -0.5 if given.scale is None else given.scale)


def _added(
    q: Tensor, k: Tensor, memo: Memo, given: Options, total: Any = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return bias and masks as one (1 or B, 1 or H, T, S), and which queries see a key."""
    keys = k.shape[2] if total is None else total
    hidden, sees = hidden_keys(q, keys, memo, given)
    if hidden is None and given.bias is None:
        return None, sees
    found = given.bias if hidden is None else hidden
    assert found is not None
    if hidden is not None and given.bias is not None:
        found = given.bias + hidden
    while found.dim() < 4:
        found = found.unsqueeze(0)
    wanted = (*found.shape[:2], q.shape[2], keys)
    return found.to(q.dtype).expand(wanted), sees
