"""Two tiny decoders that passes are tried on: one whose channels turn, and one with embeddings."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SHAPE = {"vocab_size": 97, "max_position_embeddings": 256, "num_hidden_layers": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48}


def llama() -> LlamaForCausalLM:
    """Return a decoder of eight heads, two to each key head."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, **SIZES, num_attention_heads=8, num_key_value_heads=4)
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """Return a decoder of four heads, with keys of their own."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def words(rows: int = 2, tokens: int = 40, seed: int = 1) -> Tensor:
    """Return texts for either."""
    return torch.randint(0, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))
