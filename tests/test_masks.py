"""Structures are named from what they show, at sizes that tell them apart."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import attnopt
from attnopt.finder.structures import name_structure, structure
from attnopt.nouns import Mask

NAMED = (
    Mask("none"),
    Mask("causal"),
    Mask("sliding", window=1),
    Mask("sliding", window=8),
    Mask("sliding", window=3, right=3),
    Mask("sliding", window=4, right=1),
    Mask("chunked", window=5),
    Mask("block", window=4),
    Mask("prefix", prefix=3),
    Mask("sliding", window=4, first=3),
)


@pytest.mark.parametrize("mask", NAMED, ids=str)
def test_a_structure_is_named_from_square_samples(mask):
    assert name_structure([structure(mask, n, n) for n in (7, 13, 20)]) == mask


@pytest.mark.parametrize("window", [1024, 4096, 8192])
@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_large_windows_are_named_from_a_few_rows_after_a_long_past(kind, window):
    mask = Mask(kind, window=window)
    seen = [structure(mask, 3, n) for n in (7, window - 1, window + 1, 2 * window + 1)]
    assert name_structure(seen) == mask


def test_a_window_larger_than_every_sample_is_causal():
    mask = Mask("sliding", window=100)
    assert name_structure([structure(mask, n, n) for n in (7, 13)]) == Mask("causal")


def test_one_changed_element_makes_a_mask_dense():
    visible = structure(Mask("causal"), 13, 13)
    visible[9, 2] = False
    assert name_structure([visible]).kind == "dense"


def test_a_random_mask_is_dense():
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(13, 13, generator=generator) < 0.5
    assert name_structure([visible | torch.eye(13, dtype=torch.bool)]).kind == "dense"


def test_a_window_is_named_in_every_layer():
    """Each layer's keys are as long as its own state, whose length is no number of queries."""
    config = MistralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=9, num_attention_heads=1,
        num_key_value_heads=1, vocab_size=9, sliding_window=100,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    program = attnopt.apply(attnopt.capture(model), "exact")
    assert {s.mask for s in program.sites} == {Mask("sliding", window=100)}
