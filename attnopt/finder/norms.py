"""Norms of queries and keys between their projections and their product."""

from typing import Literal

from torch import Tensor, fx

from attnopt.finder.evaluate import ancestors
from attnopt.finder.match import Match
from attnopt.finder.ops import args, kind, shape, value
from attnopt.finder.provenance import View
from attnopt.finder.walking import path


def qk_norm(view: View, match: Match) -> Literal["head", "full", "cosine"] | None:
    """Find a norm between projection and product: per head, over all heads, or to unit length."""
    width = match.q.layout.size("D")
    for n in path(view, match.q):
        name = kind(n)
        if name in ("linalg_vector_norm", "norm", "normalize"):
            return "cosine"
        source = args(n)[0] if args(n) and isinstance(args(n)[0], fx.Node) else None
        if source is None or not isinstance(value(source), Tensor):
            continue
        if name in ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"):
            return "head" if shape(source)[-1] == width else "full"
        if name == "rsqrt" and any(kind(m) == "mean" for m in ancestors([n])[-6:]):
            mean = next(m for m in reversed(ancestors([n])) if kind(m) == "mean")
            return "head" if shape(args(mean)[0])[-1] == width else "full"
    return None
