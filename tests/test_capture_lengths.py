"""One graph holds every batch and length, where the source loops over tokens or chunks too."""

from typing import Any

import pytest
import torch
import transformers
import zoo
from test_capture_zoo import build, error_of
from torch import nn
from torch._dynamo import trace_rules
from transformers.models.funnel import modeling_funnel

import attnopt
from attnopt.frontend.pooling import POOLING
from attnopt.frontend.windows import divide

SIZES = ((1, 1), (3, 2), (1, 7), (2, 16), (3, 23))


def call(batch: int, length: int, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Draw a call with padding at the end of its last row."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    ids = torch.randint(5, 30, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, max(1, length - 2) :] = 0
    return {n: mask if n == "attention_mask" else ids for n in names}


def worst(program: Any, model: Any, names: tuple[str, ...], sizes: Any = SIZES) -> float:
    """Return the largest relative error of a program over calls of several sizes."""
    calls = [call(batch, length, names) for batch, length in sizes]
    return max(error_of(program(**c), model(**c)) for c in calls)


def test_a_state_space_is_one_op_at_every_length() -> None:
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, use_cache=False
    )
    model = transformers.MambaModel(config).eval()
    program = attnopt.capture(model, kwargs=call(2, 16, ("input_ids",)))
    assert "whole, dynamic" in program.history[0]
    assert worst(program, model, ("input_ids",)) < 2e-6
    assert [m.module for m in program.near_misses] == ["layers.0.mixer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", "jamba", "recurrent_gemma"])
def test_a_loop_over_tokens_fixes_no_length(name: str) -> None:
    model, kwargs = build(name, "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert program.history == ("capture: whole, dynamic",)
    assert worst(program, model, tuple(kwargs)) < 2e-6
    assert len(program.sites) == zoo.ZOO[name].sites
    assert any("recurrence" in m.why for m in program.near_misses)


@pytest.mark.slow
def test_positions_of_pooled_tokens_fix_no_length() -> None:
    model, kwargs = build("funnel", "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert program.history == ("capture: whole, dynamic",)
    assert worst(program, model, tuple(kwargs), ((1, 3), (3, 4), (1, 7), (3, 23))) == 0
    assert len(program.sites) == zoo.ZOO["funnel"].sites


@pytest.mark.parametrize("kind", ["relative_shift", "factorized"])
@pytest.mark.parametrize(("separate", "truncate"), [(True, True), (True, False), (False, False)])
def test_positions_of_pooled_tokens_are_those_of_the_source(
    kind: str, separate: bool, truncate: bool
) -> None:
    config = transformers.FunnelConfig(
        separate_cls=separate, truncate_seq=truncate, attention_type=kind, block_sizes=[1, 1, 1]
    )
    structure = modeling_funnel.FunnelAttentionStructure(config).eval()
    for length in (5, 7, 16):
        given = (length, torch.float32, torch.device("cpu"))
        found = POOLING["FunnelAttentionStructure.get_position_embeds"](structure, *given)
        torch.testing.assert_close(found, structure.get_position_embeds(*given))


@pytest.mark.slow
def test_a_model_of_one_length_is_one_graph_for_every_batch() -> None:
    model, kwargs = build("nystromformer", "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert program.history == ("capture: whole, dynamic except input_ids axis 1 = 16",)
    assert worst(program, model, tuple(kwargs), ((1, 16), (3, 16))) == 0


class Patches(nn.Module):
    """Frames in patches of eight, with four places for them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(1, 4, 8, stride=8)
        self.places = nn.Parameter(torch.randn(4, 4))

    def forward(self, input_values: Any) -> Any:
        return self.patches(input_values.unsqueeze(1)).transpose(1, 2) + self.places


def test_a_size_that_a_model_cannot_have_is_refused_by_its_program() -> None:
    program = attnopt.capture(Patches().eval(), (torch.randn(2, 32),))
    assert program(torch.randn(3, 38)).shape == (3, 4, 4)
    assert "only where" in program.history[0]
    with pytest.raises(ValueError, match="the captured graph holds only where"):
        program(torch.randn(3, 40))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longformer", "led"])
def test_sliding_chunks_are_one_graph_for_other_lengths(name: str) -> None:
    model, kwargs = build(name, "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert program.history == ("capture: whole, dynamic",)
    assert worst(program, model, tuple(kwargs), ((1, 1), (2, 7), (2, 8), (1, 9), (3, 23))) < 1e-6


@pytest.mark.slow
def test_any_number_of_global_tokens_is_one_graph() -> None:
    model, kwargs = build("longformer_global", "eager")
    program = attnopt.capture(model, kwargs=kwargs)
    assert program.history == ("capture: whole, dynamic",)
    assert len(program.sites) == zoo.ZOO["longformer_global"].sites
    for batch, length, most in ((1, 1, 1), (2, 7, 0), (2, 8, 1), (3, 23, 4), (2, 40, 33)):
        given = call(batch, length, ("input_ids", "attention_mask"))
        places = torch.arange(batch)[:, None] + torch.arange(length)
        # Each row has another number of them, and the last one may have none.
        given["global_attention_mask"] = (places < most).long()
        assert error_of(program(**given), model(**given)) < 2e-6, (batch, length, most)


def test_dynamo_knows_afterwards_what_was_replaced_while_tracing() -> None:
    trace_rules.get_torch_obj_rule_map.cache_clear()
    attnopt.capture(nn.Linear(3, 3), (torch.randn(2, 3),))
    assert torch.div in trace_rules.get_torch_obj_rule_map()


def test_sizes_are_divided_without_a_tensor_and_tensors_as_ever() -> None:
    assert divide(17, 8, rounding_mode="trunc") == 2
    assert torch.equal(divide(torch.tensor([3.0]), 2), torch.tensor([1.5]))
    assert torch.equal(divide(3, 2), torch.tensor(1.5))
