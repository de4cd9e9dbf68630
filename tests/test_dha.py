"""Fusing heads: exact where nothing is lost, the same in every basis, better than averaging."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from dha_models import captured, decoder, distance, ids, known, logits, repeat_heads, turn_heads

import attnopt
from attnopt.calibrating import Statistics
from attnopt.data import Source, split_of
from attnopt.layers import Layer, joint_components, output_metric
from attnopt.nouns import Choice, No
from attnopt.passes import dha
from attnopt.program import Program
from attnopt.verifying import losses


def fused(program: Program, stats: Statistics, kv_heads: int, **settings: object) -> Program:
    config = {"kv_heads": kv_heads, **settings}
    choices = tuple(Choice(s.name, "dha", config) for s in program.sites)
    return attnopt.apply(program, attnopt.Plan(choices, statistics=stats))


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "qwen2", "glm", "cohere"])
def test_heads_that_are_equal_fuse_without_loss(family: str) -> None:
    model = decoder(family)
    repeat_heads(model, 2)
    program, stats = captured(model)
    result = fused(program, stats, 2, refit=False)
    assert [s.kv_heads for s in result.sites] == [2, 2]
    assert distance(logits(result), logits(model)) < 1e-5


def test_heads_that_are_equal_in_another_basis_fuse_without_loss() -> None:
    model = decoder("llama")
    repeat_heads(model, 2)
    turn_heads(model)
    program, stats = captured(model)
    assert distance(logits(fused(program, stats, 2, refit=False)), logits(model)) < 1e-4


@pytest.mark.parametrize("refit", [False, True])
def test_the_basis_of_the_heads_does_not_matter(refit: bool) -> None:
    plain, turned = decoder("llama"), decoder("llama")
    turn_heads(turned)
    assert distance(logits(turned), logits(plain)) < 1e-5
    results = [logits(fused(*captured(m), 2, refit=refit)) for m in (plain, turned)]
    assert distance(results[1], results[0]) < 1e-4
    assert distance(results[0], logits(plain)) > 1e-2


def test_as_many_heads_as_before_change_nothing() -> None:
    program, stats = known("llama")
    result = fused(program, stats, 4)
    for binding in program.bindings.values():
        if binding.kind == "parameter":
            assert torch.equal(result.weights[binding.name], program.weights[binding.name])
    assert torch.equal(logits(result), logits(program))


def test_a_refit_brings_the_result_closer() -> None:
    """Values are fused by two; with keys fused, too, random heads leave nothing to refit to."""
    model = decoder("llama")
    program, stats = captured(model, rows=128)
    counts = {"k_heads": 4, "v_heads": 2}
    without, with_refit = (
        distance(logits(fused(program, stats, 4, refit=r, **counts)), logits(model))
        for r in (False, True)
    )
    assert with_refit < without


def test_the_cache_shrinks_and_decoding_goes_on() -> None:
    program, stats = known("llama_gqa")
    result = fused(program, stats, 1)
    whole = logits(result, 2, 9)
    tokens = ids(2, 9, seed=5)
    state, steps = None, []
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        outputs, state = result.step({"input_ids": tokens[:, start:stop]}, state)
        steps.append(outputs[0])
    assert {tuple(t.shape) for t in state.tensors.values()} == {(2, 1, 9, 4)}
    assert distance(torch.cat(steps, 1).double(), whole) < 1e-5


def test_a_plan_is_replayed_bit_by_bit_without_data(tmp_path) -> None:
    program, stats = known("llama")
    plan = attnopt.plan(program, {"kv_cache": "50%"}, ids(8, 24, seed=3), statistics=stats)
    first = attnopt.apply(program, plan)
    plan.save(tmp_path / "plan.yaml")
    again = attnopt.apply(program, attnopt.Plan.load(tmp_path / "plan.yaml"))
    for binding in first.bindings.values():
        if binding.kind == "parameter":
            assert torch.equal(first.weights[binding.name], again.weights[binding.name])


def test_an_edited_plan_asks_for_new_statistics(tmp_path) -> None:
    program, stats = known("llama")
    plan = attnopt.plan(program, {"kv_cache": 0.5}, None, statistics=stats)
    attnopt.apply(program, plan)
    plan.save(tmp_path / "plan.yaml")
    text = (tmp_path / "plan.yaml").read_text().replace("kv_heads: 2", "kv_heads: 1")
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match="calibrate again"):
        attnopt.apply(program, attnopt.Plan.load(tmp_path / "plan.yaml"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": "head"}, "norm"),
        ({"projections": {}}, "q projection"),
        ({"kv_heads": 3}, "other key heads"),
    ],
)
def test_what_cannot_be_fused_is_refused(change: dict, words: str) -> None:
    program, _ = known("llama")
    answer = dha.fits(replace(program.sites[0], **change), dha.Config(1))
    assert isinstance(answer, No)
    assert words in str(answer)


def test_a_number_that_does_not_divide_is_refused_with_those_that_do() -> None:
    program, _ = known("llama")
    answer = dha.fits(program.sites[0], dha.Config(3))
    assert "choose 4, 2, 1" in str(answer)


def test_the_damage_predicted_is_the_damage_measured() -> None:
    """The discarded share of the spectrum is the error of the fused values in output units."""
    model = decoder("llama")
    program, stats = captured(model)
    site = program.sites[0]
    predicted = dha.damage(site, stats, dha.Config(2))
    layer = Layer.read(site, stats)
    lost = total = 0.0
    for members in ([0, 1], [2, 3]):
        common, back = joint_components(
            layer.v.maps[members], layer.gram_kv, output_metric(layer, members), layer.v.width
        )
        for i, m in enumerate(members):
            for h in layer.queries_of(m):
                gone = layer.o.maps[h].T @ (layer.v.maps[m] - back[i] @ common)
                whole = layer.o.maps[h].T @ layer.v.maps[m]
                lost += float(((gone @ layer.gram_kv) * gone).sum())
                total += float(((whole @ layer.gram_kv) * whole).sum())
    assert lost / total == pytest.approx(predicted, rel=1e-4)


@pytest.mark.slow
def test_the_basis_of_the_heads_of_the_bundled_checkpoint_does_not_matter() -> None:
    folder = Path(__file__).parents[1] / "examples" / "models" / "code-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    split = split_of(Source("stdlib", 24, 256), tokenizer, held_out=8)
    results: list[torch.Tensor] = []
    for turned in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.requires_grad_(False).eval()
        if turned:
            turn_heads(model)
        program = attnopt.apply(attnopt.capture(model), "exact")
        result = attnopt.apply(program, attnopt.plan(program, {"kv_cache": "50%"}, data=split))
        assert {s.kv_heads for s in result.sites} == {model.config.num_key_value_heads // 2}
        results.append(losses(result, split.held_out, "fused").double())
    assert distance(results[1], results[0]) < 1e-4


def test_weights_that_take_gradients_are_fused_like_others():
    model = decoder("llama").requires_grad_(True)
    result = attnopt.optimize(attnopt.capture(model), {"kv_cache": "50%"}, data=ids(8, 24))
    changed = [c.site for c in result.plan.choices]
    assert len(changed) == 2
    names = [b.name for b in result.program.bindings.values() if "k_proj" in b.name]
    assert not any(result.program.weights[name].requires_grad for name in names)


@pytest.mark.parametrize(("family", "k", "v"), [("llama", 4, 1), ("llama", 1, 2), ("glm", 2, 1)])
def test_keys_and_values_keep_numbers_of_their_own(family: str, k: int, v: int) -> None:
    model = decoder(family)
    repeat_heads(model, 2)
    turn_heads(model) if family == "llama" else None
    program, stats = captured(model)
    result = fused(program, stats, 4, k_heads=k, v_heads=v)
    assert result.tier == 2
    if k >= 2 and v >= 2:
        assert distance(logits(result), logits(model)) < 1e-4
    whole, tokens = logits(result, 2, 9), ids(2, 9, seed=5)
    state, steps = None, []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        outputs, state = result.step({"input_ids": tokens[:, start:stop]}, state)
        steps.append(outputs[0])
    assert distance(torch.cat(steps, 1).double(), whole) < 1e-5
    counts = {s.role: s.shape[1] for s in result.states}
    assert counts == {"key": k, "value": v}


def test_heads_that_are_alike_become_neighbours() -> None:
    """Heads 0 and 2, and 1 and 3, are equal up to their bases: only likeness finds the groups."""
    model = decoder("llama")
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            rows = getattr(layer.self_attn, name).weight.view(4, 8, 32)
            rows[2:] = rows[:2]
    turn_heads(model)
    program, stats = captured(model)
    alike = fused(program, stats, 2, grouping="similar", refit=False)
    assert distance(logits(alike), logits(model)) < 1e-4
    assert distance(logits(fused(program, stats, 2, refit=False)), logits(model)) > 0.05


def test_only_values_fuse_where_keys_pass_a_norm() -> None:
    program, _ = known("llama")
    normed = replace(program.sites[0], qk_norm="head")
    assert dha.fits(normed, dha.Config(4, v_heads=1)) is True
    assert "only values" in str(dha.fits(normed, dha.Config(2)))
    assert all(c.keys == 4 for c in dha.decoupled(normed))
