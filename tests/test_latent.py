"""Narrower heads: nothing lost at full width, the tail of the spectrum below, in any basis."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dha_models import captured, decoder, distance, ids, known, logits, turn_heads

import attnopt
from attnopt.layers import Layer
from attnopt.moments import Statistics
from attnopt.nouns import Choice, No
from attnopt.passes import latent
from attnopt.program import Program


def narrowed(program: Program, stats: Statistics, **config: object) -> Program:
    choices = tuple(Choice(s.name, "latent", {"refit": False, **config}) for s in program.sites)
    return attnopt.apply(program, attnopt.Plan(choices, statistics=stats))


def test_full_width_changes_nothing() -> None:
    program, stats = known("llama_wide")
    result = narrowed(program, stats, v_width=16, qk_width=16)
    assert torch.equal(logits(result), logits(program))


def test_values_of_low_rank_lose_nothing() -> None:
    model = decoder("llama_wide")
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight.view(2, 16, 64)
        weight[:, 8:] = torch.randn(2, 8, 8) @ weight[:, :8]
    program, stats = captured(model)
    result = narrowed(program, stats, v_width=8)
    assert distance(logits(result), logits(model)) < 1e-4
    assert [(s.head_dim, s.v_head_dim) for s in result.sites] == [(16, 8)] * 2
    assert result.tier == 2


def test_keys_that_do_not_turn_become_narrower() -> None:
    model = decoder("gpt2")
    for block in model.transformer.h:
        keys = block.attn.c_attn.weight[:, 64:128].view(64, 4, 16)
        mixing = torch.randn(8, 8)
        keys[..., 8:] = keys[..., :8] @ mixing
        bias = block.attn.c_attn.bias[64:128].view(4, 16)
        bias[:, 8:] = bias[:, :8] @ mixing
    program, stats = captured(model)
    result = narrowed(program, stats, qk_width=8, v_width=8)
    only_keys = narrowed(program, stats, qk_width=8)
    assert distance(logits(only_keys), logits(model)) < 1e-4
    assert {t.shape[-1] for t in result.step({"input_ids": ids(1, 4)})[1].tensors.values()} == {8}


def test_the_damage_predicted_is_the_error_of_the_values() -> None:
    program, stats = known("llama_wide")
    result = narrowed(program, stats, v_width=8)
    site = program.sites[0]
    before = Layer.read(site, stats)
    after = Layer.read(result.sites[0], replace(stats, weights=result.weights))
    lost = total = 0.0
    for head in range(4):
        whole = before.o.maps[head].T @ before.v.maps[head // 2]
        gone = whole - after.o.maps[head].T @ after.v.maps[head // 2]
        lost += float(((gone @ before.gram_kv) * gone).sum())
        total += float(((whole @ before.gram_kv) * whole).sum())
    assert latent.damage(site, stats, latent.Config(8)) == pytest.approx(lost / total, rel=1e-4)


def test_the_basis_of_the_heads_does_not_matter() -> None:
    turned = decoder("llama_wide")
    turn_heads(turned)
    pairs = (known("llama_wide"), captured(turned))
    results = [logits(narrowed(*pair, v_width=8)) for pair in pairs]
    assert distance(results[1], results[0]) < 1e-3
    assert distance(results[0], logits(pairs[0][0])) > 1e-2


def test_a_cache_of_narrow_values_decodes_like_the_whole(tmp_path: Path) -> None:
    program, stats = known("llama_wide")
    result = narrowed(program, stats, v_width=8, refit=True)
    whole, tokens = logits(result), ids(3, 17, seed=5)
    state, steps = None, []
    for start, stop in ((0, 9), (9, 10), (10, 17)):
        outputs, state = result.step({"input_ids": tokens[:, start:stop]}, state)
        steps.append(outputs[0])
    assert distance(torch.cat(steps, 1).double(), whole) < 1e-5
    attnopt.save(result, tmp_path / "out")
    loaded = attnopt.load(tmp_path / "out")
    with torch.no_grad():
        assert distance(loaded(input_ids=tokens).logits.double(), whole) < 1e-6


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"v_width": 7}, "multiple of 8"),
        ({"v_width": 24}, "of 16 channels"),
        ({"qk_width": 8}, "turn with their position"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict, words: str) -> None:
    program, _ = known("llama_wide")
    answer = latent.fits(program.sites[0], latent.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)
