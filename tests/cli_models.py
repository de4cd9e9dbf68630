"""Factories and checkpoints that the tests of the command line name as MODEL."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, HEADS, TOKENS = 24, 3, 7


class Attention(nn.Module):
    """Self-attention without a mask, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        split = self.qkv(x).view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))


class Blocks(nn.Module):
    """Two residual attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def blocks() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model with two sites, and an example call."""
    return Blocks().eval(), (torch.rand(2, TOKENS, WIDTH),), {}


def perceptron() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model without attention."""
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU()).eval(), (torch.rand(2, WIDTH),), {}


def alone() -> nn.Module:
    """Return a model without an example call."""
    return Blocks().eval()


def failing() -> nn.Module:
    """Return nothing."""
    raise RuntimeError("not today")


def too_wide() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model with a call that it does not take."""
    return Blocks().eval(), (torch.rand(2, TOKENS, WIDTH + 1),), {}


class Telling(nn.Module):
    """One product of three tensors, with weights that are told, too."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.rand(HEADS, WIDTH, 5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        mixed = torch.einsum("bhts, bhsd, hdc -> btc", weights, v, self.out)
        return {"mixed": mixed, "weights": weights}


def telling() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model that hands out its attention weights, and an example call."""
    return Telling().eval(), tuple(torch.rand(3, 2, HEADS, TOKENS, WIDTH)), {}


def number() -> int:
    """Return what is no model."""
    return 7


def config(**changes: int) -> LlamaConfig:
    """Return the configuration of a narrow Llama."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "intermediate_size": 31,
        "vocab_size": 61,
        "max_position_embeddings": 127,
    }
    return LlamaConfig(**{**sizes, **changes})


def save_checkpoint(folder: Path) -> Path:
    """Save a narrow Llama with random weights."""
    LlamaForCausalLM(config()).save_pretrained(folder)
    return folder


class Undecided(nn.Module):
    """Something that asks its input what to do, and has no attention inside that."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def undecided() -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return a model that cannot be captured, and an example call."""
    return Undecided().eval(), (torch.rand(2, WIDTH),), {}
