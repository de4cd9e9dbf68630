"""`attnopt optimize`: exit statuses, errors in one line, and what it leaves behind."""

import json
import re
from pathlib import Path

import pytest
from dha_models import decoder, ids
from safetensors.torch import save_file

import attnopt
from attnopt.cli import main

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    decoder("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "ids.safetensors"
    save_file({"input_ids": ids(60, 24)}, path)
    return str(path)


def test_a_goal_that_is_met_is_saved_and_accepted(model: Path, data: str, tmp_path: Path, capsys):
    out = tmp_path / "out"
    words = ["optimize", str(model), "-o", str(out), "--kv-cache", "50%", "--data", data]
    assert main([*words, "--max-drop", "100%"]) == 0
    shown = capsys.readouterr().out
    for part in ("2 of 2 attentions rewritten (dha)", "-50.0%", "accepted", "tier 0"):
        assert part in shown
    assert attnopt.load(out).config.num_key_value_heads == 2
    assert main([*words, "--plan", str(out / "attnopt/plan.yaml")]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_a_gate_that_fails_keeps_the_candidate_aside(
    model: Path, data: str, tmp_path: Path, capsys
):
    out = tmp_path / "out"
    words = ["optimize", str(model), "-o", str(out), "--kv-cache", "25%", "--data", data]
    assert main([*words, "--tier", "0", "--max-drop", "0.000001%", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "attnopt.optimize/1"
    assert document["accepted"] is False
    assert not out.exists()
    assert Path(document["out"]) == tmp_path / "out.rejected"
    assert "REJECTED" in (tmp_path / "out.rejected/README.md").read_text()
    assert json.loads((tmp_path / "out.rejected/config.json").read_text())["attnopt"] == {
        "format": 1,
        "min_reader": 1,
        "tier": 0,
        "must_understand": [],
        "accepted": False,
    }


def test_passes_say_what_is_chosen_among(model: Path, data: str, tmp_path: Path, capsys):
    words = ["optimize", str(model), "-o", str(tmp_path / "out"), "--kv-cache", "70%"]
    assert main([*words, "--data", data, "--passes", "window"]) == 0
    shown = capsys.readouterr().out
    for part in ("attentions rewritten (window)", "windows, bytes a row", "tier 2"):
        assert part in shown
    plan = attnopt.Plan.load(tmp_path / "out/attnopt/plan.yaml")
    assert {c.rewrite for c in plan.choices} == {"window"}
    assert main([*words, "--data", data, "--passes", "windw"]) == 2
    assert "did you mean 'window'" in capsys.readouterr().err


def test_a_plan_file_is_carried_out(model: Path, data: str, tmp_path: Path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    words = ["--data", data, "--json"]
    assert main(["optimize", str(model), "-o", str(out), "--kv-cache", "50%", *words]) == 0
    plan = str(out / "attnopt/plan.yaml")
    assert main(["optimize", str(model), "-o", str(again), "--plan", plan, *words]) == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ([], 2, "name a goal, such as --kv-cache 50%"),
        (["--kv-cache", "half"], 2, "write 50% or 0.5"),
        (["--kv-cache", "0%"], 2, "above 0"),
        (["--kv-cache", "150%"], 2, "at most 100%"),
        (["--kv-cache", "50%", "--max-drop=-1%"], 2, "must not be negative"),
        (["--kv-cache", "50%", "--params", "80%"], 2, "exclude each other"),
        (["--flops", "1%"], 3, "no plan leaves 0.01 of the operations"),
        (["--recipe", "half-cash"], 2, "did you mean 'half-cache'"),
        (["--recipe", "half-cache", "--plan", "x"], 2, "exclude each other"),
        (["--kv-cache", "50%", "--keep", "nothing"], 2, "decides about no site"),
        (["--kv-cache", "50%", "--tokens", "0"], 2, "at least 1"),
        (["--params", "1%"], 3, "the least is 0"),
        (["--kv-cash", "50%"], 2, "did you mean '--kv-cache'"),
        (["--kv-cache", "10%"], 3, "the least is 0.1"),
        (["--kv-cache", "10%", "--tier", "0"], 3, "the least is 0.25"),
        (["--kv-cache", "50%", "--data", "no/such.txt"], 2, "no such file or folder"),
        (["--kv-cache", "50%", "--held-out", "1"], 2, "at least 2 rows"),
        (["--plan", "no/plan.yaml"], 2, "no plan at"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    words: list[str], status: int, told: str, model: Path, data: str, tmp_path: Path, capsys
):
    given = words if "--data" in words else ["--data", data, *words]
    assert main(["optimize", str(model), "-o", str(tmp_path / "out"), *given]) == status
    err = capsys.readouterr().err
    line = err.strip().splitlines()[-1]
    assert line.startswith("AO")
    assert re.search(told, line), line
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_cache_has_nothing_to_halve(data: str, tmp_path: Path, capsys):
    words = ["optimize", "cli_models:blocks", "-o", str(tmp_path / "out"), "--kv-cache", "50%"]
    assert main([*words, "--data", data]) == 3
    assert "no attention of this program keeps a cache" in capsys.readouterr().err


def test_a_folder_of_somebody_else_is_left_alone(model: Path, data: str, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    words = ["optimize", str(model), "-o", str(tmp_path), "--kv-cache", "50%", "--data", data]
    assert main(words) == 2
    assert "did not write" in capsys.readouterr().err
