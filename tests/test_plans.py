"""Plan files: written in full, read strictly, wrong ones told in one line."""

from pathlib import Path

import pytest

from attnopt.nouns import Choice, Plan

PLAN = Plan(
    (Choice("layers.0", "dha", {"kv_heads": 2}, "why"), Choice("layers.1", "dha", {}, "")),
    {"kv_cache": 0.5},
    {"data": "stdlib:48x256"},
)


def test_a_plan_comes_back_as_it_was(tmp_path: Path):
    PLAN.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == PLAN


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kv_cache: 0.5", "kv_cache: 0.5\n  kv_cache: 0.5", ""),
        ("provenance:", "provenence:", r"plan.yaml:4 unknown key 'provenence'; did you mean"),
        ("  why: why", "  wy: why", r"plan.yaml:\d+ unknown key 'wy'; did you mean 'why'"),
        ("attnopt: 1", "attnopt: 9", "has format 9; this attnopt reads 1"),
        ("attnopt: 1", "attnopt: [", "is not YAML"),
        ("- site: layers.0", "- site: [1]", "a choice names a site"),
        ("choices:", "choices: &a\n- *a\nx:", "alias"),
        ("  pass: dha", "  pass: dha\n  pass: dha", "twice"),
        ("attnopt: 1", "attnopt: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_wrong_plan_is_told_with_its_line(tmp_path: Path, old: str, new: str, words: str):
    place = tmp_path / "plan.yaml"
    PLAN.save(place)
    text = place.read_text()
    assert old in text
    place.write_text(text.replace(old, new, 1))
    if not words:
        assert Plan.load(place).goal == PLAN.goal
        return
    with pytest.raises(ValueError, match=words):
        Plan.load(place)


def test_a_missing_and_a_huge_plan_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no plan at"):
        Plan.load(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text("x" * 2**21)
    with pytest.raises(ValueError, match="larger than any plan"):
        Plan.load(tmp_path / "plan.yaml")
