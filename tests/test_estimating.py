"""What a run will take, told before it."""

from collections import Counter
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import exactly, ids
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt
from attnopt import estimating
from attnopt.data import split_for
from attnopt.estimating import Estimate, TooLargeError, estimate, refuse_too_large
from attnopt.nouns import No
from attnopt.program import Program
from attnopt.search.foreseeing import Looks, looks_of
from attnopt.search.preparing import Terms
from attnopt.search.scores import Scores

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 320,
    "vocab_size": 1500,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    return exactly(model)


@pytest.mark.parametrize("goal", [{"kv_cache": 0.5}, {"params": 0.9}])
def test_disk_is_told_within_five_percent(goal: dict[str, float], program, tmp_path: Path):
    rows = ids(40, 24)
    result = attnopt.optimize(program, goal, data=rows, out=tmp_path / "out")
    measured = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert result.measured["estimate"]["disk"] == pytest.approx(measured, rel=0.05)
    replayed = estimate(program, split_for(program, rows), goal, result.plan)
    assert replayed.disk == pytest.approx(measured, rel=0.05)
    assert set(replayed.seconds) == {"plan", "rewrite", "verify", "measure", "save"}


def test_more_data_takes_more(program, monkeypatch: pytest.MonkeyPatch):
    probe = probed(program)
    monkeypatch.setattr(estimating.Probe, "of", lambda *_: probe)
    small, large = (split_for(program, ids(n, 24)) for n in (4, 400))
    few, many = (estimate(program, split, {"kv_cache": 0.5}) for split in (small, large))
    assert many.seconds["verify"] > few.seconds["verify"]
    assert many.memory > few.memory
    assert many.disk > few.disk
    looks = Looks(first=100, second=10, whole=10, rows=8)
    looked = estimate(program, small, {"kv_cache": 0.5}, looks=looks)
    assert looked.seconds["plan"] > few.seconds["plan"]
    assert looked.seconds["rewrite"] == few.seconds["rewrite"]


@pytest.mark.parametrize(
    ("goal", "passes"),
    [
        ({"kv_cache": 0.5}, ("dha",)),
        pytest.param({"params": 0.9}, ("amp",), marks=pytest.mark.slow),
    ],
)
def test_the_looks_of_a_search_are_counted_before_it(
    goal: dict[str, float], passes: tuple[str, ...], program, tmp_path: Path, monkeypatch
):
    made: Counter[str] = Counter()
    get = Scores.get

    def counting(self: Scores, name: str, make: Any) -> Any:
        made[name.split()[0]] += name not in self
        return get(self, name, make)

    monkeypatch.setattr(Scores, "get", counting)
    split, terms = split_for(program, ids(40, 24)), Terms(2, passes)
    told = looks_of(program, goal, split, terms, tmp_path)
    attnopt.plan(program, goal, split, passes, tier=2, work=tmp_path)
    assert told.first == made["first"]
    assert made["second"] <= told.second <= 2 * made["second"]
    assert made["whole"] <= told.whole + 2
    assert told.whole <= 2 * made["whole"]
    again = looks_of(program, goal, split, terms, tmp_path)
    assert again.first == 0
    assert again.whole < told.whole


def probed(program: Program) -> estimating.Probe:
    """Return a probe that no other process disturbs between two estimates."""
    names = [p.parameter for s in program.sites for p in s.projections.values()]
    return estimating.Probe.of(program, {"input_ids": ids(4, 24)}, names)


def test_a_plan_that_changes_nothing_removes_nothing(program):
    split = split_for(program, ids(8, 24))
    kept = estimate(program, split, {}, attnopt.Plan(()))
    halved = estimate(program, split, {"kv_cache": 0.5})
    assert kept.disk != halved.disk
    stored = sum(t.nbytes for t in {id(t): t for t in program.weights.values()}.values())
    assert kept.disk > 0.9 * stored


def test_a_model_of_parts_has_no_estimate(program):
    parts = replace(program, parts={"layers.0": program, "layers.1": program})
    assert isinstance(estimate(parts, split_for(program, ids(8, 24))), No)


def test_what_clearly_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = Estimate({"plan": 100.0}, memory=estimating.resident() + 1000, disk=1000)
    assert str(expected).startswith("about 2 min, ")
    monkeypatch.setattr(estimating, "available", lambda: 900)
    refuse_too_large(expected, None)
    monkeypatch.setattr(estimating, "available", lambda: None)
    refuse_too_large(expected, tmp_path / "a" / "b")
    monkeypatch.setattr(estimating, "available", lambda: 100)
    with pytest.raises(TooLargeError, match="of memory are needed, and 0 KiB are free"):
        refuse_too_large(replace(expected, memory=2 * expected.memory), None)
    monkeypatch.setattr(estimating, "available", lambda: None)
    monkeypatch.setattr(estimating, "free_at", lambda place: 700)
    with pytest.raises(TooLargeError, match="choose another disk"):
        refuse_too_large(expected, tmp_path)


def test_a_machine_that_is_slow_in_spells_is_told_as_it_is(
    program, monkeypatch: pytest.MonkeyPatch
):
    # Every other moment takes ten times as long.
    passed = accumulate(cycle([0.001, 0.001, 0.001, 0.01]))
    monkeypatch.setattr("attnopt.probing.time.perf_counter", lambda: next(passed))
    probe = probed(program)
    assert probe.multiply * 768**3 == pytest.approx(0.0055, rel=0.1)
    assert probe.touch * 2**20 == pytest.approx(0.0055, rel=0.1)
