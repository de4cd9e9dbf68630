"""`attnopt plan` and `attnopt recipes`: what they print, and that their files are carried out."""

import json
from pathlib import Path

import pytest
from dha_models import decoder, ids
from safetensors.torch import save_file

import attnopt
from attnopt.cli import main

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plans")
    decoder("llama").save_pretrained(place / "tiny")
    save_file({"input_ids": ids(40, 24)}, place / "ids.safetensors")
    return place


def planned(folder: Path, *words: str) -> int:
    data = str(folder / "ids.safetensors")
    return main(["plan", str(folder / "tiny"), "--data", data, "--held-out", "4", *words])


def test_a_plan_is_a_dry_run_that_optimize_carries_out(folder: Path, tmp_path: Path, capsys):
    file = tmp_path / "plan.yaml"
    words = ["--kv-cache", "40%", "--tier", "2", "--passes", "dha", "-o", str(file)]
    assert planned(folder, *words) == 0
    shown = capsys.readouterr().out
    for part in ("2 sites would be rewritten", "cache of the text", "predicted:", "measured whole"):
        assert part in shown
    assert "kv_cache left" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".attnopt-work",
        "plan.yaml",
        "statistics.safetensors",
    ]
    out = tmp_path / "out"
    data = ["--data", str(folder / "ids.safetensors"), "--held-out", "4"]
    words = ["optimize", str(folder / "tiny"), "-o", str(out), "--plan", str(file), *data]
    assert main(words) == 0
    capsys.readouterr()
    assert attnopt.Plan.load(out / "attnopt/plan.yaml").choices == attnopt.Plan.load(file).choices
    assert main(["diff", str(file), str(out / "attnopt/plan.yaml")]) == 0
    assert "the same" in capsys.readouterr().out


def test_a_plan_is_one_document_with_json(folder: Path, tmp_path: Path, capsys):
    work = ["--work", str(tmp_path / "work"), "--passes", "dha", "--tier", "1", "--json"]
    assert planned(folder, "--kv-cache", "50%", *work) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "attnopt.plan/1"
    before, after = document["costs"]["kv_cache"]
    assert after <= 0.5 * before
    search = document["search"]
    assert search["measured_now"] > 0
    assert set(search["sites"]) == {c["site"] for c in document["choices"]}
    assert planned(folder, "--kv-cache", "50%", *work) == 0
    assert json.loads(capsys.readouterr().out)["search"]["measured_now"] == 0


def test_the_quick_plan_of_tier_0_is_told_too(folder: Path, capsys):
    assert planned(folder, "--kv-cache", "50%") == 0
    assert "dha(kv_heads=2)" in capsys.readouterr().out


def test_a_recipe_is_carried_out_and_kept(folder: Path, tmp_path: Path, capsys):
    mine, out = tmp_path / "mine.yaml", tmp_path / "out"
    mine.write_text(
        "attnopt: 1\ngoal: {kv_cache: 60%}\ntier: 1\npasses: [dha]\nkeep:\n  - layers: [1]\n"
        f"data: {folder / 'ids.safetensors'}\nheld_out: 4\n"
    )
    words = ["optimize", str(folder / "tiny"), "-o", str(out), "--recipe", str(mine)]
    assert main([*words, "--kv-cache", "70%"]) == 0
    capsys.readouterr()
    plan = attnopt.Plan.load(out / "attnopt/plan.yaml")
    assert plan.goal == {"kv_cache": 0.7}
    assert {c.site for c in plan.choices} == {"model.layers.0.self_attn"}
    kept = attnopt.recipes.read_recipe(out / "attnopt/recipe.yaml")
    assert (kept.goal, kept.passes, kept.held_out) == ({"kv_cache": 0.7}, ("dha",), 4)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "name a goal"),
        (["--kv-cache", "50%", "--params", "80%"], 2, "exclude each other in tier 0"),
        (["--recipe", "nothing"], 2, "no recipe 'nothing'"),
        (["--kv-cache", "1%", "--tier", "1", "--passes", "dha"], 3, "the least is 0.25"),
        (["--kv-cache", "50%", "--passes", "dah", "--tier", "1"], 2, "did you mean 'dha'"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    words: list[str], status: int, told: str, folder: Path, tmp_path: Path, capsys
):
    assert planned(folder, "--work", str(tmp_path), *words) == status
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("AO")
    assert told in line


def test_recipes_are_listed_shown_and_checked(tmp_path: Path, capsys):
    assert main(["recipes"]) == 0
    assert "half-cache" in capsys.readouterr().out
    assert main(["recipes", "show", "half-cache"]) == 0
    mine = tmp_path / "mine.yaml"
    mine.write_text(capsys.readouterr().out)
    assert main(["recipes", "validate", str(mine)]) == 0
    mine.write_text(mine.read_text().replace("kv_cache", "kv_cash"))
    assert main(["recipes", "validate", str(mine), "--json"]) == 2
    captured = capsys.readouterr()
    assert f"{mine}:" in captured.err
    assert "did you mean 'kv_cache'" in captured.err
    assert main(["recipes", "schema"]) == 0
    assert '"attnopt recipe"' in capsys.readouterr().out
    for words in (["show"], ["list", "x"], ["show", "half-cash"]):
        assert main(["recipes", *words]) == 2
