"""Ways to make queries, keys and values: each returns [A, B, heads, channels] from [A, B, D].

A and B are the first two axes of the input, batch and length in either order.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz_grammar.spec import Spec

Projected = tuple[Tensor, Tensor, Tensor]


def weight(*shape: int, fan_in: int) -> nn.Parameter:
    """Draw a parameter wide enough for attention to be far from uniform."""
    return nn.Parameter(torch.randn(*shape) * 0.9 / math.sqrt(fan_in))


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0, 0.9 / math.sqrt(inputs))
        if bias:
            layer.bias.normal_(0, 0.1)
    return layer


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1)


class Separate(nn.Module):
    """Three linear layers."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        D, bias = spec.width, spec.projection_bias
        self.q = linear(D, spec.heads * spec.head_dim, bias=bias)
        self.k = linear(D, spec.kv_heads * spec.head_dim, bias=bias)
        self.v = linear(D, spec.kv_heads * spec.v_head_dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s = self.spec
        q, k, v = self.q(x), self.k(context), self.v(context)
        return split_heads(q, s.heads), split_heads(k, s.kv_heads), split_heads(v, s.kv_heads)


class SharedQueryKey(nn.Module):
    """One linear layer for q and k."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.qk = linear(spec.width, spec.heads * spec.head_dim, bias=spec.projection_bias)
        self.v = linear(spec.width, spec.heads * spec.v_head_dim, bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        heads = self.spec.heads
        qk = split_heads(self.qk(x), heads)
        return qk, qk, split_heads(self.v(context), heads)


class SharedKeyValue(nn.Module):
    """The keys are the values."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.q = linear(spec.width, spec.heads * spec.head_dim, bias=spec.projection_bias)
        self.kv = linear(spec.width, spec.kv_heads * spec.head_dim, bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        kv = split_heads(self.kv(context), self.spec.kv_heads)
        return split_heads(self.q(x), self.spec.heads), kv, kv


class KeyValueFused(nn.Module):
    """One linear layer for q, one for k and v."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.sizes = [spec.kv_heads * spec.head_dim, spec.kv_heads * spec.v_head_dim]
        self.q = linear(spec.width, spec.heads * spec.head_dim, bias=spec.projection_bias)
        self.kv = linear(spec.width, sum(self.sizes), bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s, kv = self.spec, self.kv(context)
        q = split_heads(self.q(x), s.heads)
        if s.unpack == "unbind" and s.head_dim == s.v_head_dim:
            k, v = kv.view(*kv.shape[:-1], 2, s.kv_heads, s.head_dim).unbind(-3)
            return q, k, v
        if s.unpack == "permute" and s.head_dim == s.v_head_dim:
            kv = kv.view(*kv.shape[:-1], 2, s.kv_heads, s.head_dim).permute(2, 0, 1, 3, 4)
            return q, kv[0], kv[1]
        if s.unpack == "index":
            kv = split_heads(kv, s.kv_heads)
            return q, kv[..., : s.head_dim], kv[..., s.head_dim :]
        k, v = unpack(kv, self.sizes, s.unpack)
        return q, split_heads(k, s.kv_heads), split_heads(v, s.kv_heads)


class FusedThreeFirst(nn.Module):
    """One linear layer whose outputs are laid out [3, heads, channels]."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.qkv = linear(spec.width, 3 * spec.heads * spec.head_dim, bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s, a, b = self.spec, x.shape[0], x.shape[1]
        qkv = self.qkv(x).reshape(a, b, 3, s.heads, s.head_dim)
        if s.unpack == "permute":
            qkv = qkv.permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if s.unpack == "unbind":
            q, k, v = qkv.unbind(2)
            return q, k, v
        if s.unpack == "index":
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        q, k, v = (t.squeeze(2) for t in unpack(qkv, [1, 1, 1], s.unpack, axis=2))
        return q, k, v


class FusedHeadFirst(nn.Module):
    """One linear layer whose outputs are laid out [heads, 3, channels]."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.qkv = linear(spec.width, 3 * spec.heads * spec.head_dim, bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s, a, b = self.spec, x.shape[0], x.shape[1]
        if s.unpack in ("index", "unbind", "permute"):
            qkv = self.qkv(x).view(a, b, s.heads, 3, s.head_dim)
            if s.unpack == "index":
                return qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
            if s.unpack == "permute":
                q, k, v = qkv.permute(3, 0, 1, 2, 4)
                return q, k, v
            q, k, v = qkv.unbind(-2)
            return q, k, v
        qkv = self.qkv(x).view(a, b, s.heads, 3 * s.head_dim)
        q, k, v = unpack(qkv, [s.head_dim] * 3, s.unpack)
        return q, k, v


class FusedGroup(nn.Module):
    """One linear layer whose outputs are laid out [key heads, group + 2, channels]."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        rows = spec.kv_heads * (spec.groups + 2) * spec.head_dim
        self.qkv = linear(spec.width, rows, bias=spec.projection_bias)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s, a, b = self.spec, x.shape[0], x.shape[1]
        qkv = self.qkv(x).view(a, b, s.kv_heads, s.groups + 2, s.head_dim)
        if s.unpack in ("split", "chunk"):
            q, k, v = qkv.split([s.groups, 1, 1], dim=3)
            return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        if s.unpack == "slice":
            q, k, v = qkv[:, :, :, :-2], qkv[:, :, :, [-2]], qkv[:, :, :, [-1]]
            return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        q = qkv[..., :-2, :].reshape(a, b, s.heads, s.head_dim)
        return q, qkv[..., -2, :], qkv[..., -1, :]


class Addmm(nn.Module):
    """A transposed weight and `addmm`, as the first GPTs have it."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.sizes = fused_sizes(spec)
        self.weight = weight(spec.width, sum(self.sizes), fan_in=spec.width)
        self.bias = nn.Parameter(torch.randn(sum(self.sizes)) * 0.1)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return heads_of(flat.view(*x.shape[:-1], sum(self.sizes)), self.spec, self.sizes)


class Conv1x1(nn.Module):
    """A 1x1 convolution over a sequence, or over an image of one column."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.sizes = fused_sizes(spec)
        kind = nn.Conv1d if spec.projection == "conv1x1" else nn.Conv2d
        self.qkv = kind(spec.width, sum(self.sizes), 1, bias=spec.projection_bias)
        nn.init.normal_(self.qkv.weight, std=0.9 / math.sqrt(spec.width))

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        x = x.transpose(1, 2)
        if isinstance(self.qkv, nn.Conv2d):
            x = x.unsqueeze(-1)
        qkv = self.qkv(x).flatten(2) if isinstance(self.qkv, nn.Conv2d) else self.qkv(x)
        s = self.spec
        q, k, v = unpack(qkv, self.sizes, s.unpack, axis=1)
        a, b = q.shape[0], q.shape[2]
        return (
            q.view(a, s.heads, s.head_dim, b).permute(0, 3, 1, 2),
            k.reshape(a, s.kv_heads, s.head_dim, b).permute(0, 3, 1, 2),
            v.reshape(a, s.kv_heads, s.head_dim, b).permute(0, 3, 1, 2),
        )


class Functional(nn.Module):
    """`F.linear` with one parameter."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.sizes = fused_sizes(spec)
        self.in_proj_weight = weight(sum(self.sizes), spec.width, fan_in=spec.width)
        self.in_proj_bias = (
            nn.Parameter(torch.randn(sum(self.sizes)) * 0.1) if spec.projection_bias else None
        )

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        return heads_of(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.spec, self.sizes)


class WeightSplit(nn.Module):
    """`F.linear` with pieces of one parameter."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        k, v = spec.kv_heads * spec.head_dim, spec.kv_heads * spec.v_head_dim
        self.sizes = [spec.heads * spec.head_dim, k, v]
        self.in_proj_weight = weight(sum(self.sizes), spec.width, fan_in=spec.width)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s = self.spec
        w_q, w_k, w_v = unpack(self.in_proj_weight, self.sizes, s.unpack, axis=0)
        q, k, v = F.linear(x, w_q), F.linear(context, w_k), F.linear(context, w_v)
        return split_heads(q, s.heads), split_heads(k, s.kv_heads), split_heads(v, s.kv_heads)


class Einsum(nn.Module):
    """Weights with three axes: [heads, D, channels] or [D, heads, channels]."""

    def __init__(self, spec: Spec):
        super().__init__()
        D, d = spec.width, spec.head_dim
        self.w_q = weight(spec.heads, D, d, fan_in=D)
        self.w_k = weight(D, spec.kv_heads, d, fan_in=D)
        self.w_v = weight(D, spec.kv_heads, spec.v_head_dim, fan_in=D)

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        return (
            torch.einsum("abm,hmd->abhd", x, self.w_q),
            torch.einsum("abm,mhd->abhd", context, self.w_k),
            torch.einsum("abm,mhd->abhd", context, self.w_v),
        )


class Latent(nn.Module):
    """Keys and values from a low-rank latent, half of each key shared by all heads."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.shared = spec.head_dim // 2
        self.own = spec.head_dim - self.shared
        self.q = linear(spec.width, spec.heads * spec.head_dim)
        self.down = linear(spec.width, 6 + self.shared)
        self.up = linear(6, spec.heads * (self.own + spec.v_head_dim))

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        s = self.spec
        latent, shared = self.down(context).split([6, self.shared], dim=-1)
        own, v = split_heads(self.up(latent), s.heads).split([self.own, s.v_head_dim], dim=-1)
        k = torch.cat([own, shared.unsqueeze(-2).expand(-1, -1, s.heads, -1)], dim=-1)
        return split_heads(self.q(x), s.heads), k, v


class Unprojected(nn.Module):
    """The input itself, cut into heads."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, context: Tensor) -> Projected:
        k = split_heads(context, self.spec.heads)
        return split_heads(x, self.spec.heads), k, k


def fused_sizes(spec: Spec) -> list[int]:
    return [count * spec.head_dim for count in (spec.heads, spec.kv_heads, spec.kv_heads)]


def heads_of(qkv: Tensor, spec: Spec, sizes: list[int]) -> Projected:
    q, k, v = unpack(qkv, sizes, spec.unpack)
    k, v = split_heads(k, spec.kv_heads), split_heads(v, spec.kv_heads)
    return split_heads(q, spec.heads), k, v


def unpack(x: Tensor, sizes: list[int], how: str, *, axis: int = -1) -> list[Tensor]:
    """Cut an axis into pieces, in one of the usual ways."""
    if how == "chunk" and len(set(sizes)) == 1:
        return list(x.chunk(len(sizes), dim=axis))
    if how == "unbind" and len(set(sizes)) == 1:
        return list(x.unflatten(axis, (len(sizes), sizes[0])).unbind(axis if axis >= 0 else -2))
    if how in ("slice", "index"):
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [x.narrow(axis, end - size, size) for end, size in zip(ends, sizes, strict=True)]
    return list(x.split(sizes, dim=axis))


PROJECTIONS: Final[dict[str, Callable[[Spec], nn.Module]]] = {
    "separate": Separate,
    "fused_3hd": FusedThreeFirst,
    "fused_h3d": FusedHeadFirst,
    "fused_group": FusedGroup,
    "conv1d": Addmm,
    "conv1x1": Conv1x1,
    "conv2d": Conv1x1,
    "functional": Functional,
    "weight_split": WeightSplit,
    "einsum": Einsum,
    "kv_fused": KeyValueFused,
    "shared_qk": SharedQueryKey,
    "shared_kv": SharedKeyValue,
    "mla": Latent,
    "none": Unprojected,
}
