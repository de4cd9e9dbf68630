"""Recipes: read strictly, mistakes told with their lines, whatever word of them is wrong."""

import json
import re
from pathlib import Path

import pytest
import yaml
from recipe_mutants import mutants

from attnopt import recipes
from attnopt.recipes import Recipe, read_recipe, recipe_of, recipe_text
from attnopt.recipes.schema import FOLDER, texts
from attnopt.search import Rule

WHOLE = """\
# Everything that a recipe may say.
attnopt: 1
description: an example of all keys
goal:
  kv_cache: 50%
  params: 0.9
  max_drop: 1%
tier: 2
passes: [dha, window, amp]
keep:
  - layers: [0, 5]
  - sites: "*.mlp"
try:
  - sites: "model.layers.1.*"
    passes: [window]
    config: {window: 128, first: 16}
tensor_parallel: 2
tokens: 4096
data: stdlib:48x256
held_out: 96
seed: 3
"""


def written(folder: Path, text: str) -> Path:
    place = folder / "mine.yaml"
    place.write_text(text, encoding="utf-8")
    return place


def test_a_recipe_is_read_whole_and_comes_back(tmp_path: Path):
    recipe = read_recipe(written(tmp_path, WHOLE))
    assert recipe.goal == {"kv_cache": 0.5, "params": 0.9, "max_drop": 0.01}
    assert (recipe.tier, recipe.passes, recipe.tensor_parallel) == (2, ("dha", "window", "amp"), 2)
    first, second, third = recipe.rules
    assert (first.keep, first.layers, second.sites) == (True, (0, 5), "*.mlp")
    assert third == Rule(
        "model.layers.1.*", passes=("window",), config={"window": 128, "first": 16}
    )
    assert read_recipe(written(tmp_path, recipe_text(recipe))) == recipe


def test_the_recipes_of_attnopt_are_valid_and_described(tmp_path: Path):
    assert "half-cache" in recipes.names()
    for name in recipes.names():
        recipe = recipe_of(name)
        assert recipe.description
        assert read_recipe(written(tmp_path, recipe_text(recipe))) == recipe


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("goal:", "gaol:", r"mine.yaml:4 unknown key 'gaol'; did you mean 'goal'\?"),
        ("  kv_cache: 50%", "  kv_cash: 50%", r":5 unknown key 'kv_cash'; did you mean 'kv_cache'"),
        ("  kv_cache: 50%", "  kv_cache: half", r":5 .*write 50% or 0.5"),
        ("  kv_cache: 50%", "  kv_cache: 150%", r":5 .*at most 100%"),
        ("  kv_cache: 50%", "  kv_cache: yes", r":5 True is no share"),
        ("  kv_cache: 50%", "  kv_cache: 50%\n  kv_cache: 40%", r":6 has 'kv_cache' twice"),
        ("tier: 2", "tier: 3", r":8 3 must be from 0 to 2"),
        ("tier: 2", "tier: two", r":8 'two' is no whole number"),
        ("[dha, window, amp]", "[dha, windw]", r":9 unknown pass 'windw'; did you mean 'window'"),
        ("[dha, window, amp]", "dha", r":9 must be a list"),
        ("[dha, window, amp]", "[exact]", r":9 pass 'exact' is always used"),
        ("[0, 5]", "[-1]", r":11 -1 must be from 0"),
        ("  - layers: [0, 5]", "  - {}", r":11 must have at least 1 of sites, layers"),
        ("window: 128", "windw: 128", r":16 .*setting 'windw'; did you mean 'window'"),
        ("window: 128", "window: wide", r":16 setting 'window' of pass 'window' takes a whole"),
        ("tokens: 4096", "tokens: 2026-11-22", r":18 .*would be read as timestamp"),
        ("tokens: 4096", "tokens: &a 4096\nx: *a", r":19 is not YAML: .*alias"),
        ("seed: 3", "seed: !!python/name:os.getcwd x", r":21 is not YAML of plain values"),
        ("seed: 3", "seed: [", r":22 is not YAML"),
        ("attnopt: 1\n", "", r"mine.yaml:2 lacks the key 'attnopt'"),
        ("  kv_cache: 50%\n  params: 0.9\n", "", r":2 the goal names no budget"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, told: str):
    assert old in WHOLE
    with pytest.raises(ValueError, match=told):
        read_recipe(written(tmp_path, WHOLE.replace(old, new, 1)))


def test_files_that_are_no_recipes_are_refused(tmp_path: Path):
    for content in (b"", b"\xff\xfe", b"[" * 10_000, b"a" * 2**21, b"- 1", b"7", b"? [a]\n: b"):
        place = tmp_path / "bad.yaml"
        place.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.yaml"):
            read_recipe(place)
    with pytest.raises(ValueError, match="did you mean 'half-cache'"):
        recipe_of("half-cach")


def check_mutants(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read so many recipes with one token changed; count how each ended."""
    original = read_recipe(written(folder, WHOLE))
    plain = yaml.safe_load(WHOLE)
    ends = {"changed": 0, "told": 0, "same": 0}
    for text in mutants(WHOLE, count, seed):
        place = written(folder, text)
        found = _read(place)
        if isinstance(found, str):
            assert re.match(rf"{re.escape(str(place))}:\d+ ", found), (text, found)
            line = int(found[len(str(place)) + 1 :].split()[0])
            assert 1 <= line <= text.count("\n") + 1, (text, found)
            ends["told"] += 1
            continue
        same = yaml.safe_load(text) == plain or _alike(found, original)
        assert found != original or same, text
        ends["same" if found == original else "changed"] += 1
    return ends


def _read(place: Path) -> Recipe | str:
    """Read a recipe, or return what is wrong with it; another exception ends the test."""
    try:
        return read_recipe(place)
    except ValueError as error:
        return str(error)


def _alike(found: Recipe, original: Recipe) -> bool:
    """Whether another spelling says the same, such as 0.5 for 50%."""
    return recipe_text(found) == recipe_text(original)


def test_every_wrong_word_is_told_or_changes_the_recipe(tmp_path: Path):
    ends = check_mutants(tmp_path, 500, seed=0)
    assert ends["told"] > 100
    assert ends["changed"] > 50
    assert ends["same"] < 25


@pytest.mark.slow
def test_ten_thousand_wrong_words(tmp_path: Path):
    ends = check_mutants(tmp_path, 10_000, seed=1)
    assert sum(ends.values()) == 10_000


def test_schemas_are_what_is_read():
    for name, text in texts().items():
        assert (FOLDER / name).read_text("utf-8") == text, "run python -m attnopt.recipes.schema"
    schema = json.loads(texts()["recipe.schema.json"])
    assert set(yaml.safe_load(WHOLE)) == set(schema["properties"])
    assert schema["additionalProperties"] is False
