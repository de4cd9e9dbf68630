"""Whole modules around attentions: stacks, decoders, pooling, windows of images."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fuzz_grammar.attention import Raw, attention
from fuzz_grammar.projections import linear
from fuzz_grammar.spec import IMAGE, POOL_QUERIES, Spec, repair

WINDOW = (2, 3)


class Tokens(nn.Module):
    """Name the inputs that a case has; every model takes them so."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        padding: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Any:
        given = {"context": context, "padding": padding, "dense": dense}
        return self.inner(x, **{name: t for name, t in given.items() if t is not None})


class RawTokens(nn.Module):
    """The same for queries, keys and values."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Any:
        given = {"padding": padding, "dense": dense}
        return self.inner(q, k, v, **{name: t for name, t in given.items() if t is not None})


class Twice(nn.Module):
    """The same weights, two times."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.shared = inner

    def forward(self, x: Tensor, **given: Tensor) -> Any:
        return self.shared(self.shared(x, **given), **given)


class Block(nn.Module):
    """Attention and an MLP, with residuals and norms."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.style = spec.stack
        self.attention = attention(spec)
        self.norms = nn.ModuleList([nn.LayerNorm(spec.width) for _ in range(2)])
        self.mlp = nn.Sequential(
            linear(spec.width, 2 * spec.width), nn.GELU(), linear(2 * spec.width, spec.width)
        )

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        first, second = self.norms
        if self.style == "parallel":
            y = first(x)
            return x + self.attention(y, **given) + self.mlp(y)
        if self.style == "pre_norm":
            x = x + self.attention(first(x), **given)
            return x + self.mlp(second(x))
        x = first(x + self.attention(x, **given))
        return second(x + self.mlp(x))


class DecoderBlock(nn.Module):
    """Self-attention, then attention to a context."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.own, self.cross = attention(spec), attention(cross_of(spec))
        self.norms = nn.ModuleList([nn.LayerNorm(spec.width) for _ in range(2)])

    def forward(self, x: Tensor, context: Tensor, **given: Tensor) -> Tensor:
        first, second = self.norms
        x = x + self.own(first(x), **given)
        return x + self.cross(second(x), context=context)


class Layers(nn.Module):
    """Layers in a list, which may share the first one's position bias."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.shared_bias = spec.shared_bias
        kind = {"list": attention, "decoder": DecoderBlock}.get(spec.stack, Block)
        self.layers = nn.ModuleList([kind(spec) for _ in range(spec.layers)])

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        if self.shared_bias:
            first = self.layers[0]
            owner = first.attention if isinstance(first, Block) else first
            given["position_bias"] = owner.position_bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, **given)
        return x


class Pool(nn.Module):
    """Learned queries that attend to the tokens."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(POOL_QUERIES, spec.width))
        self.attention = attention(spec)

    def forward(self, x: Tensor, **given: Tensor) -> Any:
        queries = self.queries.unsqueeze(0).expand(x.shape[0], -1, -1)
        return self.attention(queries, context=x, **given)


class Windows(nn.Module):
    """Attention inside the windows (or rows) of an image [B, height, width, channels]."""

    def __init__(self, spec: Spec, inner: nn.Module):
        super().__init__()
        self.spec, self.inner = spec, inner
        self.shifted = spec.partition == "shifted"
        self.window = (1, IMAGE[1]) if spec.partition == "rows" else WINDOW
        if self.shifted:
            self.register_buffer("mask", self._shift_mask(), persistent=False)

    def forward(self, image: Tensor) -> Any:
        if self.shifted:
            image = image.roll((-1, -1), dims=(1, 2))
        given = {"shift_mask": self.mask} if self.shifted else {}
        result = self.inner(self.cut(image), **given)
        out, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
        out = self.joined(out)
        out = out.roll((1, 1), dims=(1, 2)) if self.shifted else out
        return (out, *rest) if rest else out

    def cut(self, image: Tensor) -> Tensor:
        (height, width), channels = self.window, image.shape[-1]
        rows, columns = IMAGE[0] // height, IMAGE[1] // width
        image = image.view(-1, rows, height, columns, width, channels)
        return image.permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, channels)

    def joined(self, windows: Tensor) -> Tensor:
        (height, width), channels = self.window, windows.shape[-1]
        rows, columns = IMAGE[0] // height, IMAGE[1] // width
        image = windows.view(-1, rows, columns, height, width, channels)
        return image.permute(0, 1, 3, 2, 4, 5).reshape(-1, *IMAGE, channels)

    def _shift_mask(self) -> Tensor:
        labels = torch.zeros(1, *IMAGE, 1)
        labels[:, -1:] += 1
        labels[:, :, -1:] += 2
        windows = self.cut(labels).squeeze(-1)
        return (windows[:, None, :] != windows[:, :, None]) * -100.0


def cross_of(spec: Spec) -> Spec:
    """The attention to the context in a decoder whose self-attention is `spec`."""
    changes = {"source": "cross", "stack": "bare", "layers": 1, "mask": "none", "padding": "none"}
    bias = {"bias": "none", "shared_bias": False, "output": "linear"}
    return repair(replace(spec, **changes, **bias))


def model(spec: Spec) -> nn.Module:
    """Build the module of a spec."""
    if spec.source == "raw":
        return RawTokens(Raw(spec))
    if spec.source == "pool":
        return Tokens(Pool(spec))
    if spec.stack == "bare":
        inner = attention(spec)
    elif spec.stack == "sequential":
        inner = nn.Sequential(*[attention(spec) for _ in range(spec.layers)])
    else:
        inner = Layers(spec)
    inner = Twice(inner) if spec.twice else inner
    return Tokens(Windows(spec, inner) if spec.partition != "none" else inner)
