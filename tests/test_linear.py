"""The pass linear: what it refuses, what it starts from, and what is kept of a text."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from dha_models import captured, decoder, ids

import attnopt
from attnopt.branches import branches, has_branches
from attnopt.data import Split
from attnopt.healing import Recipe, healed
from attnopt.moments import Refits, Statistics
from attnopt.nouns import Choice, Mask, Plan, Site
from attnopt.ops import linear_attention
from attnopt.passes import linear
from attnopt.program import Program
from attnopt.refusals import NothingToDoError
from attnopt.search import Rule
from attnopt.search.candidates import Asked, steps_at


@cache
def source(family: str = "llama") -> tuple[Program, Statistics]:
    model = decoder(family)
    torch.manual_seed(4)
    model.lm_head.weight.normal_(0, 0.5)
    return captured(model)


def converted(config: dict, family: str = "llama", sites: slice = slice(None)) -> Program:
    teacher, stats = source(family)
    choices = tuple(Choice(s.name, "linear", config) for s in teacher.sites[sites])
    return attnopt.apply(teacher, Plan(choices, statistics=stats))


HYBRID = {"window": 4}
PURE = {"kind": "pure", "heal": True}
GATED = {"kind": "gated", "heal": True, "feature": "elu"}
HEDGEHOG = {"window": 3, "feature": "hedgehog"}
KINDS = [HYBRID, PURE, GATED, HEDGEHOG]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_window_over_the_whole_text_is_the_source(family: str) -> None:
    teacher, _ = source(family)
    given = {"input_ids": ids(2, 11)}
    for feature in ("centroids", "hedgehog"):
        found = converted({"window": 11, "feature": feature}, family)(**given).logits
        assert torch.allclose(found, teacher(**given).logits, atol=1e-5)


def test_no_layers_leave_the_source_as_it_is() -> None:
    teacher, stats = source()
    assert linear.choose(teacher, stats, 0) == ()
    given = {"input_ids": ids(2, 11)}
    found = attnopt.apply(teacher, Plan((), statistics=stats))
    assert torch.equal(found(**given).logits, teacher(**given).logits)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_text_step_by_step_is_the_text_at_once(config: dict) -> None:
    program = converted(config)
    text = ids(2, 13)
    want = program.growing(input_ids=text).logits
    assert torch.allclose(program(input_ids=text).logits, want, atol=1e-5)
    state, found = None, []
    for part in (text[:, :6], text[:, 6:7], text[:, 7:8], text[:, 8:]):
        out, state = program.step({"input_ids": part}, state)
        found.append(out[0])
    assert torch.allclose(torch.cat(found, dim=1), want, atol=1e-5)


def test_the_state_is_a_window_and_a_matrix_of_constant_size() -> None:
    program = converted(HYBRID)
    assert {s.role for s in program.states} == {"key", "value", "recurrent"}
    assert all(s.grows is None for s in program.states)
    matrix = next(s for s in program.states if s.role == "recurrent")
    assert matrix.shape == ("batch", 4, 16, 9)
    assert matrix.dtype == torch.float32
    told = linear.cost(source()[0].sites[0], linear.Config(**HYBRID), None)["kv_elements"]
    _, carry = program.step({"input_ids": ids(1, 29)})
    assert sum(x.numel() for x in carry.tensors.values()) == 2 * told


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_padding_on_the_left_changes_nothing(config: dict) -> None:
    program = converted(config)
    text, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model = attnopt.lower(program, "eager")
    for run in (program, program.growing, model):
        found = run(input_ids=text, attention_mask=mask, position_ids=places).logits
        assert torch.allclose(found[:1, 5:], run(input_ids=text[:1, 5:]).logits, atol=1e-5)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_it_is_saved_loaded_and_generates(config: dict, tmp_path: Path) -> None:
    program = converted(config)
    attnopt.save(program, tmp_path / "out")
    model = attnopt.load(tmp_path / "out", strict=True)
    text, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    given = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    found = model.generate(text, **given)
    assert torch.equal(found, attnopt.lower(program, "eager").generate(text, **given))
    again = program.growing(input_ids=found[:1]).logits[0, 6:-1].argmax(-1)
    assert torch.equal(again, found[0, 7:])


@pytest.mark.parametrize("config", [HYBRID, pytest.param(GATED, marks=pytest.mark.slow)], ids=str)
def test_onnxruntime_agrees(config: dict, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made = attnopt.export_onnx(converted(config), tmp_path / "out", steps=8)
    assert made.accepted, made.content()


def site(**changes: object) -> Site:
    return replace(source()[0].sites[0], **changes)


@pytest.mark.parametrize(
    ("changes", "config", "told"),
    [
        ({"kind": "cross"}, {}, "cross-attention"),
        ({"mask": Mask("sliding", window=9)}, {}, "sliding"),
        ({"mask": Mask("none")}, {}, "kind 'pure' needs none"),
        ({"bias": "alibi"}, {}, "a bias"),
        ({"sinks": True}, {}, "sinks"),
        ({"softcap": 30.0}, {}, "soft cap"),
        ({}, {"kind": "pure"}, "heal=True"),
        ({}, {"kind": "gated"}, "heal=True"),
        ({}, {"kind": "linear"}, "hybrid, pure, gated"),
        ({}, {"feature": "cosine"}, "hedgehog"),
        ({}, {"window": 0}, "own key"),
        ({}, {"features": 3}, "even number"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict, config: dict, told: str) -> None:
    answer = linear.fits(site(**changes), linear.Config(**config))
    assert not answer
    assert told in str(answer)


def test_centres_need_the_rows_of_the_calibration() -> None:
    teacher, stats = source()
    choice = Choice(teacher.sites[0].name, "linear", HYBRID)
    bare = replace(stats, batches=(), refits=Refits())
    with pytest.raises(ValueError, match="without their rows"):
        attnopt.apply(teacher, Plan((choice,), statistics=bare))


def test_the_layers_that_lose_least_are_chosen() -> None:
    teacher, stats = source()
    one = linear.choose(teacher, stats, 0.5, **HYBRID)
    both = linear.choose(teacher, stats, 2, **HYBRID)
    lost = {c.site: float(c.why.split()[1].rstrip("%")) for c in both}
    assert [c.site for c in one] == [min(lost, key=lost.__getitem__)]
    tokens = 200
    share = (
        linear.cost(teacher.sites[0], linear.Config(**HYBRID), None)["kv_elements"] / 64 / tokens
    )
    (half,) = linear.allocate(teacher, stats, 0.5 + share / 2, tokens=tokens, **HYBRID)
    assert half == one[0]
    with pytest.raises(NothingToDoError, match="smaller window"):
        linear.allocate(teacher, stats, 0.01, tokens=tokens, **HYBRID)


def rows() -> Split:
    return Split(ids(96, 16, seed=3), ids(24, 16, seed=4), "random", "")


def test_healing_starts_at_its_attention_and_is_told_what_the_matrix_brings() -> None:
    teacher, _ = source()
    student = converted({"window": 2, "feature": "hedgehog"})
    recipe = Recipe(40, site_steps=30, batch=8, site_lr=1e-2, lr=1e-3, every=10)
    result = healed(student, teacher, rows(), recipe)
    lost = result.losses["sites"]
    assert sum(lost[-5:]) < 0.8 * sum(lost[:5])
    before, after = student.weights, result.program.weights
    added = [n for n in before if ".linear." in n]
    assert len(added) == 6
    assert all(not torch.equal(before[n], after[n]) for n in added)
    assert "linear" in result.content()


def test_maps_may_learn_faster_than_the_weights_that_were_there() -> None:
    teacher, _ = source()
    student = converted({"window": 2, "feature": "hedgehog"})
    left: list[float] = []
    for added in (None, 3e-2):
        recipe = Recipe(20, site_steps=20, site_lr=1e-5, added_lr=added, every=20)
        lost = healed(student, teacher, rows(), recipe).losses["sites"]
        left.append(sum(lost[-5:]) / sum(lost[:5]))
    assert left[0] > 0.95
    assert left[1] < 0.97 * left[0]


def test_layers_are_chosen_by_what_a_window_of_as_many_bytes_would_lose() -> None:
    teacher, stats = source()
    (one,) = linear.choose(teacher, stats, 1, over_window=True, **HYBRID)
    both = linear.choose(teacher, stats, 2, over_window=True, **HYBRID)
    lost = {c.site: [float(x) for x in re.findall(r"-?[0-9.]+", c.why)] for c in both}
    assert one.site == min(lost, key=lambda name: (lost[name][0] >= lost[name][1], lost[name]))
    site = teacher.sites[0]
    window = linear.as_window(site, linear.Config(**HYBRID))
    assert window.rewrite == "window"
    told = linear.cost(site, linear.Config(**HYBRID), None)["kv_elements"]
    slots = window.config["window"]
    assert slots - 1 < told / (site.kv_heads * (site.head_dim + site.v_head_dim)) <= slots


def test_the_share_of_far_keys_is_measured() -> None:
    program = converted(HYBRID)
    assert has_branches(program)
    assert not has_branches(source()[0])
    found = branches(program, ids(4, 24))
    assert [b.name for b in found.sites] == [s.name for s in program.sites]
    for branch in found.sites:
        assert 0 < branch.denominator < 1
        assert 0 < branch.output < 1
        assert list(branch.by_distance) == [4, 8, 16]


def test_a_hybrid_that_ignores_its_far_keys_is_called_a_window() -> None:
    program = converted({"window": 4, "feature": "hedgehog"})
    gates = {n: torch.full_like(x, 60.0) for n, x in program.weights.items() if "linear.gate" in n}
    found = branches(program.with_weights(gates), ids(4, 24))
    assert all(b.is_window for b in found.sites)
    assert len(found.told) == 2
    assert "a window of 4" in found.told[0]


def test_attention_without_a_mask_becomes_linear_in_an_image() -> None:
    from cli_models import TOKENS, WIDTH, Blocks

    torch.manual_seed(0)
    call = (torch.rand(2, TOKENS, WIDTH),)
    teacher = attnopt.apply(attnopt.capture(Blocks().eval(), call), "exact")
    stats = attnopt.calibrate(teacher, [call[0]])
    plan = Plan(tuple(Choice(s.name, "linear", PURE) for s in teacher.sites), statistics=stats)
    student = attnopt.apply(teacher, plan)
    assert len(student.graph.find_nodes(op="call_function", target=linear_attention)) == len(
        teacher.sites
    )
    want, found = teacher(*call), student(*call)
    assert float((found - want).norm() / want.norm()) < 0.1
    assert torch.allclose(attnopt.lower(student, "eager")(*call), found, atol=1e-5)


def asked(*goals: str, tokens: int = 64) -> Asked:
    teacher, stats = source()
    return Asked(teacher, stats, goals, 2, tokens, tokens)


def test_hybrids_are_proposed_whose_state_is_less_than_the_cache() -> None:
    steps, refused = steps_at(site(), asked("kv_cache"), ("linear",))
    found = {(s.config.window, s.config.features) for s in steps}
    assert found == {(4, 8), (4, 16), (16, 8), (16, 16)}
    assert not refused
    # A matrix of 16 features takes as much as 9 keys and values.
    short = steps_at(site(), asked("kv_cache", tokens=12), ("linear",))[0]
    assert {(s.config.window, s.config.features) for s in short} == {(4, 8)}
    assert steps_at(site(), asked("params"), ("linear",)) == ([], [])


def test_hybrids_are_not_judged_on_rows_shorter_than_the_text() -> None:
    steps, refused = steps_at(site(), replace(asked("flops"), seen=32), ("linear",))
    assert not steps
    assert "rows of 32 tokens say nothing of a text of 64" in str(refused[0])


def test_where_nothing_is_hidden_a_matrix_is_declined_without_healing() -> None:
    image = site(mask=Mask("none"), cached=False)
    steps, refused = steps_at(image, asked("flops", tokens=0), ("linear",))
    assert not steps
    assert "say heal=True, and heal the result" in str(refused[0])


def test_a_hybrid_is_replayed_without_data(tmp_path: Path) -> None:
    teacher, stats = source()
    choices = tuple(Choice(s.name, "linear", HYBRID) for s in teacher.sites)
    plan = Plan(choices, statistics=replace(stats, refits=Refits()))
    first = attnopt.apply(teacher, plan)
    plan.save(tmp_path / "plan.yaml")
    again = attnopt.apply(teacher, Plan.load(tmp_path / "plan.yaml"))
    assert first.weights.keys() == again.weights.keys()
    assert all(torch.equal(first.weights[n], again.weights[n]) for n in first.weights)


def test_a_search_takes_hybrids_and_its_plan_is_replayed(tmp_path: Path) -> None:
    teacher, stats = source()
    terms = {"rules": [Rule(passes=("linear",))], "tier": 2}
    plan = attnopt.plan(teacher, {"kv_cache": 0.7}, statistics=stats, **terms)
    assert {c.rewrite for c in plan.choices} == {"linear"}
    assert plan.provenance["left"]["kv_cache"] <= 0.7
    plan.save(tmp_path / "plan.yaml")
    first, again = (attnopt.apply(teacher, p) for p in (plan, Plan.load(tmp_path / "plan.yaml")))
    assert all(torch.equal(first.weights[n], again.weights[n]) for n in first.weights)
