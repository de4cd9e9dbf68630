"""Operations and cache bytes against counts by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import attnopt
from attnopt.costs import SiteCost, Workload, count_costs, default_workload, uncounted
from attnopt.nouns import Choice, Plan

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


@pytest.fixture(scope="module")
def mistral() -> attnopt.Program:
    config = MistralConfig(
        num_hidden_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        intermediate_size=INNER,
        vocab_size=WORDS,
        max_position_embeddings=2048,
        sliding_window=16,
    )
    words = torch.randint(0, WORDS, (2, 9))
    model = MistralForCausalLM(config).eval()
    return attnopt.apply(attnopt.capture(model, (), {"input_ids": words}), "exact")


def attended(program: attnopt.Program, workload: Workload) -> float:
    """Return the pairs of a query and a key that the one attention of a model computes."""
    (site,) = count_costs(program, workload).sites.values()
    tokens = workload.sequence
    projections = 2 * tokens * WIDTH * (2 * WIDTH + 2 * KV_HEADS * HEAD)
    return (site.flops - projections) / (2 * HEADS * 2 * HEAD)


def test_a_window_costs_what_is_computed(mistral: attnopt.Program):
    seen = 512 * 16 - 16 * 15 / 2
    assert seen <= attended(mistral, Workload(1, 512)) < 0.3 * 512 * 512
    double = attended(mistral, Workload(1, 1024)) / attended(mistral, Workload(1, 512))
    assert double == pytest.approx(2, rel=0.1)
    assert attended(mistral, Workload(1, 1, 511)) == 16
    # All keys of a short text are in the window.
    assert attended(mistral, Workload(1, 16)) == 16 * 16


def test_a_ring_costs_what_it_holds(llama: attnopt.Program):
    exact = attnopt.apply(llama, "exact")
    choices = tuple(Choice(s.name, "window", {"window": 8, "first": 2}) for s in exact.sites)
    windowed = attnopt.apply(exact, Plan(choices))
    assert not list(uncounted(windowed))
    whole, short = (
        count_costs(p, Workload(1, 1, 63)).sites["model.layers.0.self_attn"].flops
        for p in (exact, windowed)
    )
    assert whole - short == 2 * HEADS * 2 * HEAD * (64 - 10)


def computed(program: attnopt.Program, workload: Workload) -> float:
    """Return the operations of a running model's one call, as torch counts them."""
    words = torch.randint(0, WORDS, (1, workload.past + workload.sequence))
    model = attnopt.lower(program, "eager")
    with torch.no_grad():
        before, new = words.split([workload.past, workload.sequence], dim=1)
        cache = model(input_ids=before).past_key_values if workload.past else None
        with FlopCounterMode(display=False) as counter:
            model(input_ids=new, past_key_values=cache)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("config", [{"window": 5}, {"window": 70}, {"kind": "pure", "heal": True}])
def test_linear_attention_costs_what_it_computes(llama: attnopt.Program, config: dict[str, object]):
    exact = attnopt.apply(llama, "exact")
    given = {"feature": "hedgehog", "features": 6, **config}
    choices = tuple(Choice(s.name, "linear", given) for s in exact.sites)
    program = attnopt.apply(exact, Plan(choices))
    assert not list(uncounted(program))
    # What a cache keeps of the text is computed once more.
    for workload in (Workload(1, 127), Workload(1, 1, 99)):
        found = count_costs(program, workload).flops
        assert found == pytest.approx(computed(program, workload), rel=0.03)
