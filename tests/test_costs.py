"""Operations and cache bytes against counts by hand."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt
from attnopt.costs import SiteCost, Workload, count_costs, default_workload

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, WORDS, POSITIONS = 2, 56, 7, 1, 33, 63, 127
HEAD = WIDTH // HEADS


@pytest.fixture(scope="module")
def llama() -> attnopt.Program:
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=INNER,
        vocab_size=WORDS,
        max_position_embeddings=POSITIONS,
    )
    words = torch.randint(0, WORDS, (2, 9))
    return attnopt.capture(LlamaForCausalLM(config).eval(), (), {"input_ids": words})


def expected_site(tokens: int, keys: int) -> int:
    projections = 2 * tokens * WIDTH * (2 * WIDTH + 2 * KV_HEADS * HEAD)
    return projections + 2 * tokens * keys * HEADS * 2 * HEAD


def expected(tokens: int, keys: int) -> int:
    rest = LAYERS * 3 * 2 * tokens * WIDTH * INNER + 2 * tokens * WIDTH * WORDS
    return LAYERS * expected_site(tokens, keys) + rest


def test_the_default_workload_is_as_long_as_the_model_allows(llama: attnopt.Program):
    assert default_workload(llama) == Workload(batch=1, sequence=POSITIONS, past=0)


@pytest.mark.parametrize(("batch", "sequence", "past"), [(1, 127, 0), (3, 7, 0), (1, 1, 63)])
def test_the_operations_of_a_llama(llama: attnopt.Program, batch: int, sequence: int, past: int):
    found = count_costs(llama, Workload(batch, sequence, past))
    assert found.flops == batch * expected(sequence, sequence + past)


def test_the_share_and_the_cache_of_a_site(llama: attnopt.Program):
    found = count_costs(llama, Workload(1, 63))
    flops, bytes_per_token = expected_site(63, 63), KV_HEADS * 2 * HEAD * 4
    one = SiteCost(flops, flops / expected(63, 63), bytes_per_token)
    assert found.sites == {f"model.layers.{i}.self_attn": one for i in range(LAYERS)}
    assert found.cache_bytes == LAYERS * bytes_per_token


class Contractions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 7, 5)

    def forward(self, image: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        return (
            self.convolution(image),
            torch.einsum("b...d,...de->b...e", left, right),
            left.transpose(0, 1) @ right,
        )


def test_convolutions_and_einsums_are_contractions():
    image, left, right = torch.rand(2, 3, 9, 11), torch.rand(4, 3, 5), torch.rand(3, 5, 7)
    program = attnopt.capture(Contractions().eval(), (image, left, right), dynamic=False)
    convolved, contracted = 2 * (2 * 7 * 5 * 7) * (3 * 5 * 5), 2 * (4 * 3 * 5 * 7)
    multiplied = 2 * (3 * 4 * 7) * 5
    assert count_costs(program, Workload(batch=2)).flops == convolved + contracted + multiplied
