"""Modules with a softmax, or with products of tokens, that hold no attention.

The line: attention weighs *values of tokens* by a softmax over *products of queries and keys*,
where the keys are made from the tokens that are weighed. So a softmax over one learned score per
token (`Linear(D, 1)`) is pooling without a query, a softmax over rows of a parameter is a codebook,
and products without a softmax across tokens are Gram matrices or linear attention. A learned query
that is contracted with *projected keys per head* is attention; the grammar's `pool` has it.
"""

from collections.abc import Callable
from random import Random
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuzz_grammar.projections import linear, weight

WIDTH: Final = 12


class ExpertGate(nn.Module):
    """A mixture of experts: softmax over experts, weighted sum of their outputs."""

    def __init__(self, rng: Random):
        super().__init__()
        self.experts, self.how = rng.choice((3, 4)), rng.choice(("einsum", "matmul", "sum", "topk"))
        self.gate = linear(WIDTH, self.experts)
        self.up = weight(self.experts, WIDTH, 16, fan_in=WIDTH)
        self.down = weight(self.experts, 16, WIDTH, fan_in=16)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(self.gate(x), dim=-1)
        if self.how == "topk":
            best, at = gate.topk(2, dim=-1)
            gate = torch.zeros_like(gate).scatter(-1, at, best / best.sum(-1, keepdim=True))
        hidden = F.gelu(torch.einsum("btd,edf->btef", x, self.up))
        outputs = torch.einsum("btef,efd->bted", hidden, self.down)
        if self.how == "matmul":
            return torch.matmul(gate.unsqueeze(-2), outputs).squeeze(-2)
        if self.how == "sum":
            return (gate.unsqueeze(-1) * outputs).sum(-2)
        return torch.einsum("bte,bted->btd", gate, outputs)


class SoftExperts(nn.Module):
    """Soft mixture of experts: tokens dispatched to slots by a softmax over tokens of parameter
    scores, the slots processed, and combined by a softmax over slots.
    """

    def __init__(self, rng: Random):
        super().__init__()
        self.slots = weight(WIDTH, rng.choice((3, 5)), fan_in=WIDTH)
        self.expert = linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.slots
        slots = self.expert(logits.softmax(1).transpose(1, 2) @ x)
        return logits.softmax(-1) @ slots


class ScorePooling(nn.Module):
    """A softmax over one learned score per token (and head), and the weighted sum of the tokens."""

    def __init__(self, rng: Random):
        super().__init__()
        self.heads, self.deep = rng.choice((1, 2)), rng.random() < 0.5
        self.hidden = linear(WIDTH, 8) if self.deep else nn.Identity()
        self.score = linear(8 if self.deep else WIDTH, self.heads)
        self.value = linear(WIDTH, WIDTH) if rng.random() < 0.5 else nn.Identity()
        self.how = rng.choice(("matmul", "einsum", "sum"))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(x)) if self.deep else x
        weights, values = torch.softmax(self.score(hidden), dim=1), self.value(x)
        if self.how == "matmul":
            return weights.transpose(1, 2) @ values
        if self.how == "einsum":
            return torch.einsum("bth,btd->bhd", weights, values)
        return (weights[..., :1] * values).sum(1)


class SoftmaxMlp(nn.Module):
    """Softmax as the activation between two layers."""

    def __init__(self, rng: Random):
        super().__init__()
        self.up, self.down = linear(WIDTH, 24), linear(24, WIDTH)
        self.dim = rng.choice((-1, 2))
        self.scaled = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) * 0.5 if self.scaled else self.up(x)
        return self.down(F.softmax(hidden, dim=self.dim))


class ChannelGate(nn.Module):
    """Squeeze and excitation: one weight per channel, from the mean over tokens."""

    def __init__(self, rng: Random):
        super().__init__()
        self.gate = rng.choice((torch.sigmoid, lambda x: torch.softmax(x, dim=-1)))
        self.mlp = nn.Sequential(linear(WIDTH, 4), nn.ReLU(), linear(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.mlp(x.mean(1, keepdim=True)))


class Codebook(nn.Module):
    """A softmax over the rows of a parameter, and a weighted sum of the rows of a parameter."""

    def __init__(self, rng: Random):
        super().__init__()
        self.rows = weight(10, WIDTH, fan_in=1)
        self.values = weight(10, WIDTH, fan_in=1) if rng.random() < 0.5 else self.rows
        self.distance = rng.random() < 0.3
        self.scale = rng.choice((1.0, WIDTH**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.rows.t() * self.scale
        if self.distance:
            scores = 2 * scores - self.rows.square().sum(-1) - x.square().sum(-1, keepdim=True)
        return F.softmax(scores, dim=-1) @ self.values


class Gram(nn.Module):
    """Products of all pairs of tokens, without a softmax."""

    def __init__(self, rng: Random):
        super().__init__()
        self.activation = rng.choice((torch.relu, torch.sigmoid, lambda x: x / x.shape[-1]))
        self.q, self.k = linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.back = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        gram = self.activation(self.q(x) @ self.k(x).transpose(1, 2) * 0.3)
        return gram @ x if self.back else gram


class SimilarityMatrix(nn.Module):
    """A softmax over products of tokens that weighs nothing: the weights are the result."""

    def __init__(self, rng: Random):
        super().__init__()
        self.k = linear(WIDTH, WIDTH)
        self.log = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.k(x).transpose(1, 2) / 0.7
        return scores.log_softmax(-1) if self.log else scores.softmax(-1)


class Bilinear(nn.Module):
    """Bilinear pooling: products of channels, summed over tokens."""

    def __init__(self, rng: Random):
        super().__init__()
        self.a, self.b = linear(WIDTH, 6), linear(WIDTH, 5)
        self.normalised = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.a(x).transpose(1, 2) @ self.b(x)
        return F.softmax(pooled, dim=-1) if self.normalised else pooled / x.shape[1]


class LinearAttention(nn.Module):
    """A feature map on q and on k separately, keys and values contracted first."""

    def __init__(self, rng: Random):
        super().__init__()
        self.qkv = linear(WIDTH, 3 * WIDTH)
        self.softmax, self.order = rng.random() < 0.6, rng.choice(("kv_first", "einsum"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.softmax:
            q, k = q.softmax(-1), k.softmax(-2)
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.order == "einsum":
            out = torch.einsum("bhtd,bhde->bhte", q, torch.einsum("bhsd,bhse->bhde", k, v))
        else:
            out = q @ (k.transpose(-1, -2) @ v)
        if not self.softmax:
            out = out / (q @ k.sum(-2).unsqueeze(-1) + 1e-6)
        return out.transpose(1, 2).flatten(2)


class TimeGate(nn.Module):
    """Weights over time from a convolution, or a convolution whose kernel is a softmax."""

    def __init__(self, rng: Random):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.kernel = weight(WIDTH, 1, 3, fan_in=1)
        self.dynamic = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self.dynamic:
            return F.conv1d(x, self.kernel.softmax(-1), padding=1, groups=WIDTH).transpose(1, 2)
        return (self.conv(x).softmax(dim=-1) * x).transpose(1, 2)


class DynamicConvolution(nn.Module):
    """Each token's own softmax kernel over its three neighbours."""

    def __init__(self, rng: Random):
        super().__init__()
        self.heads = rng.choice((1, 2))
        self.kernel = linear(WIDTH, 3 * self.heads)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x).unflatten(-1, (self.heads, 3)).softmax(-1)
        padded = F.pad(x, (0, 0, 1, 1))
        near = torch.stack([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=-1)
        near = near.unflatten(2, (self.heads, -1))
        return torch.matmul(near, kernel.unsqueeze(-1)).squeeze(-1).flatten(2)


class TokenMixing(nn.Module):
    """An MLP across tokens; its mixing matrix may be a softmax of a parameter."""

    def __init__(self, rng: Random):
        super().__init__()
        self.mix = weight(64, 64, fan_in=64)
        self.softmax = rng.random() < 0.6

    def forward(self, x: Tensor) -> Tensor:
        mix = self.mix[: x.shape[1], : x.shape[1]]
        mix = mix.softmax(-1) if self.softmax else mix
        return mix @ x


class Sinkhorn(nn.Module):
    """Rows and columns of token products normalised in turn, or experts balanced so."""

    def __init__(self, rng: Random):
        super().__init__()
        self.rows = linear(WIDTH, 6)
        self.rounds = rng.choice((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.rows(x)
        for _ in range(self.rounds):
            logits = logits - logits.logsumexp(-1, keepdim=True)
            logits = logits - logits.logsumexp(-2, keepdim=True)
        return logits.exp()


class Classifier(nn.Module):
    """A head with a temperature."""

    def __init__(self, rng: Random):
        super().__init__()
        self.head = linear(WIDTH, 7)
        self.temperature = nn.Parameter(torch.tensor(rng.choice((0.5, 2.0))))
        self.cosine = rng.random() < 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        if self.cosine:
            logits = F.normalize(x, dim=-1) @ F.normalize(self.head.weight, dim=-1).t()
        else:
            logits = self.head(x)
        return torch.softmax(logits / self.temperature, dim=-1)


class LabelExpectation(nn.Module):
    """Softmax over bins times their values, as in distributional regression."""

    def __init__(self, rng: Random):
        super().__init__()
        self.bins = linear(WIDTH, 9)
        self.register_buffer("values", torch.linspace(-2, 2, 9))
        self.matrix = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.bins(x), dim=-1)
        if self.matrix:
            return weights @ torch.stack([self.values, self.values.square()], dim=-1)
        return weights @ self.values


class BranchSelection(nn.Module):
    """Selective kernels: softmax over branches, per channel, and their weighted sum."""

    def __init__(self, rng: Random):
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, k, padding="same") for k in (1, 3)])
        self.select = linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        branches = torch.stack([branch(x) for branch in self.branches], dim=1)
        weights = self.select(branches.sum(1).mean(-1)).unflatten(-1, (2, WIDTH)).softmax(1)
        return (branches * weights.unsqueeze(-1)).sum(1).transpose(1, 2)


class TwoTower(nn.Module):
    """A contrastive head: scaled products of two pooled embeddings."""

    def __init__(self, rng: Random):
        super().__init__()
        self.a, self.b = linear(WIDTH, 6), linear(WIDTH, 6)
        self.softmax = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        a = F.normalize(self.a(x.mean(1)), dim=-1)
        b = F.normalize(self.b(x.amax(1)), dim=-1)
        logits = a @ b.t() * 10
        return logits.softmax(-1) if self.softmax else logits


class MemoryPair(nn.Module):
    """External attention: keys and values are parameters, shared by all inputs."""

    def __init__(self, rng: Random):
        super().__init__()
        self.keys, self.values = linear(WIDTH, 8), linear(8, WIDTH)
        self.renormalised = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        weights = self.keys(x).softmax(dim=1)
        if self.renormalised:
            weights = weights / (1e-9 + weights.sum(dim=-1, keepdim=True))
        return self.values(weights)


LOOKALIKES: Final[dict[str, Callable[[Random], nn.Module]]] = {
    kind.__name__: kind
    for kind in (
        ExpertGate,
        SoftExperts,
        ScorePooling,
        SoftmaxMlp,
        ChannelGate,
        Codebook,
        Gram,
        SimilarityMatrix,
        Bilinear,
        LinearAttention,
        TimeGate,
        DynamicConvolution,
        TokenMixing,
        Sinkhorn,
        Classifier,
        LabelExpectation,
        BranchSelection,
        TwoTower,
        MemoryPair,
    )
}


class Surrounded(nn.Module):
    """A look-alike inside a residual block."""

    def __init__(self, inner: nn.Module, rng: Random):
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(WIDTH)
        probe = torch.zeros(1, 5, WIDTH)
        self.residual = rng.random() < 0.5 and inner(probe).shape == probe.shape

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.norm(x))
        return x + y if self.residual else y


def lookalike(kind: str, rng: Random) -> nn.Module:
    """Build a look-alike."""
    inner = LOOKALIKES[kind](rng)
    return Surrounded(inner, rng) if rng.random() < 0.5 else inner
