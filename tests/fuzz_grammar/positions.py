"""Rotary embeddings, norms of queries and keys, and biases of the scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz_grammar.spec import MAX_POSITIONS, Spec


class Rotary(nn.Module):
    """Rotate q and k by their position along `axis`, with the heads on axis 3 - axis or 2."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.style = "half" if spec.rotary == "joint" else spec.rotary
        self.joint = spec.rotary == "joint"
        self.channels = spec.head_dim // 4 * 2 if self.style == "partial" else spec.head_dim
        self.channels = max(self.channels, 2)
        inverse = 100.0 ** (-torch.arange(0, self.channels, 2) / self.channels)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, q: Tensor, k: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        heads = 1 if axis == 2 else 2
        angles = self.angles(q.shape[axis], q.dim(), axis)
        if self.joint:
            both = self.rotate(torch.cat([q, k], dim=heads), angles)
            q, k = both.split([q.shape[heads], k.shape[heads]], dim=heads)
            return q, k
        return self.rotate(q, angles), self.rotate(k, angles)

    def angles(self, length: int, dims: int, axis: int) -> Tensor:
        positions = torch.arange(length, device=self.inverse.device)
        angles = positions[:, None] * self.inverse[None, :]
        shape = [1] * dims
        shape[axis], shape[-1] = length, self.channels // 2
        return angles.view(shape)

    def rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.style == "complex":
            return self._as_complex(x, angles)
        turned, rest = x[..., : self.channels], x[..., self.channels :]
        if self.style == "interleaved":
            cos, sin = (
                t.repeat_interleave(2, -1).to(x.dtype) for t in (angles.cos(), angles.sin())
            )
            other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        else:
            cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
            first, second = turned.chunk(2, dim=-1)
            other = torch.cat([-second, first], dim=-1)
        turned = turned * cos + other * sin
        return torch.cat([turned, rest], dim=-1) if self.style == "partial" else turned

    def _as_complex(self, x: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
        angles = angles.float()
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).type_as(x)


class QueryKeyNorm(nn.Module):
    """Normalise q and k per head or over all heads, heads and channels on the last two axes."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.style = spec.qk_norm
        if self.style in ("rms", "layer"):
            kind = nn.RMSNorm if self.style == "rms" else nn.LayerNorm
            self.q, self.k = kind(spec.head_dim, eps=1e-6), kind(spec.head_dim, eps=1e-6)
        if self.style == "full":
            self.q = nn.Parameter(1 + 0.2 * torch.randn(spec.heads * spec.head_dim))
            self.k = nn.Parameter(1 + 0.2 * torch.randn(spec.kv_heads * spec.head_dim))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.style.startswith("cosine"):
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.style == "full":
            return self._full(q, self.q), self._full(k, self.k)
        return self.q(q), self.k(k)

    def _full(self, x: Tensor, gain: Tensor) -> Tensor:
        flat = x.flatten(-2)
        flat = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-6) * gain
        return flat.view(x.shape)


class Bias(nn.Module):
    """A bias of the scores, [1, heads, queries, keys]."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.style = spec.bias
        heads = spec.heads
        if self.style.startswith("alibi"):
            slopes = 2.0 ** (-torch.arange(1, heads + 1) * 4.0 / heads)
            self.register_buffer("slopes", slopes, persistent=False)
        elif self.style == "t5":
            self.table = nn.Embedding(16, heads)
        elif self.style == "table":
            self.table = nn.Parameter(torch.randn(2 * MAX_POSITIONS - 1, heads))
        else:
            self.table = nn.Parameter(torch.randn(heads, MAX_POSITIONS, MAX_POSITIONS))

    def forward(self, queries: int, keys: int) -> Tensor:
        if self.style == "dense_parameter":
            return self.table[:, :queries, :keys].unsqueeze(0)
        apart = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
        if self.style.startswith("alibi"):
            return self._alibi(apart, keys)
        if self.style == "table":
            at = (apart + MAX_POSITIONS - 1).view(-1)
            return self.table[at].view(queries, keys, -1).permute(2, 0, 1).unsqueeze(0)
        return self.table(t5_bucket(apart)).permute(2, 0, 1).unsqueeze(0)

    def _alibi(self, apart: Tensor, keys: int) -> Tensor:
        if self.style == "alibi_keys":
            return self.slopes[None, :, None, None] * torch.arange(keys)[None, None, None, :]
        distance = -apart.abs() if self.style == "alibi_abs" else apart
        return (self.slopes[:, None, None] * distance[None]).unsqueeze(0)


def t5_bucket(apart: Tensor) -> Tensor:
    """Half of the 16 buckets for each direction: exact near by, logarithmic far away."""
    bucket = (apart > 0).long() * 8
    distance = apart.abs()
    far = 4 + (torch.log(distance.clamp(min=1).float() / 4) / math.log(32 / 4) * 4).long()
    return bucket + torch.where(distance < 4, distance, far.clamp(max=7))
