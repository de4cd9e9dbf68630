"""`attnopt heal`: exit statuses, what it leaves behind, and going on after an interruption."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from dha_models import decoder, ids
from safetensors.torch import load_file, save_file

import attnopt
from attnopt import debug
from attnopt.cli import main
from attnopt.data import Source, split_of
from attnopt.healing.rows import HELD_OUT
from attnopt.verifying import losses

pytestmark = pytest.mark.usefixtures("captured_once")
STEPS = ["--steps", "8", "--every", "4", "--batch", "16", "--lr", "3e-3", "--site-lr", "3e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a teacher, a student with half of its key and value heads, and text of the teacher."""
    root = tmp_path_factory.mktemp("healing")
    model = decoder("llama")
    model.lm_head.weight.normal_(0, 0.5)
    model.save_pretrained(root / "teacher")
    torch.manual_seed(5)
    text = model.generate(ids(400, 1), max_length=12, min_length=12, do_sample=True, top_k=0)
    save_file({"input_ids": text}, root / "text.safetensors")
    words = ["--kv-cache", "50%", "--data", str(root / "text.safetensors"), "--quiet"]
    assert main(["optimize", str(root / "teacher"), "-o", str(root / "student"), *words]) == 0
    return root


def words(folder: Path, out: Path) -> list[str]:
    named = ["heal", str(folder / "student"), "--teacher", str(folder / "teacher")]
    return [*named, "-o", str(out), "--data", str(folder / "text.safetensors"), *STEPS]


def test_a_student_is_healed_and_saved_with_its_plan(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(words(folder, out)) == 0
    shown = capsys.readouterr().out
    for part in ("8 steps on 1,536 tokens", "above the teacher", "nothing was gated", "tier 0"):
        assert part in shown
    report = json.loads((out / "attnopt/report.json").read_text())
    healing = report["measured"]["healing"]
    assert healing["stages"]["sites"]["steps"] == 2
    assert healing["looks"][-1]["loss"] < healing["looks"][0]["loss"]
    assert [site["pass"] for site in report["changed"]] == ["dha", "dha"]
    plan = attnopt.Plan.load(out / "attnopt/plan.yaml")
    assert plan == attnopt.Plan.load(folder / "student/attnopt/plan.yaml")
    assert (out / "attnopt/statistics.safetensors").is_file()
    assert "healed by distillation" in (out / "README.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    text = Source(str(folder / "text.safetensors"), 4096)
    held = split_of(text, None, held_out=HELD_OUT).held_out
    judged = held[: len(held) - len(held) // 2]
    measured = losses(attnopt.load(out), judged, "judged")
    assert float(measured.mean()) == pytest.approx(healing["after"]["nll"], abs=1e-5)


def test_a_gate_that_fails_keeps_the_candidate_aside(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert main([*words(folder, out), "--max-drop", "0.0001%"]) == 4
    shown = capsys.readouterr().out
    assert "> 0.00%: REJECTED" in shown
    assert "more --steps" in shown
    assert not out.exists()
    report = json.loads((tmp_path / "out.rejected/attnopt/report.json").read_text())
    assert report["accepted"] is False


def test_an_interrupted_run_is_resumed(
    folder: Path, tmp_path: Path, capsys, monkeypatch, captured_once
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*words(folder, whole), "--quiet"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(debug, "advance", press_at("distil", 3))
        assert main(words(folder, out)) == 130
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match("AO130 interrupted after step 5 of 8.*--resume", told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.healing", "whole"]
    assert main(words(folder, out)) == 2
    assert "resume it" in capsys.readouterr().err
    capsys.readouterr()
    captured_once.clear()
    assert main([*words(folder, out), "--resume", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "attnopt.heal/1"
    assert Path(document["out"]) == out
    first, second = (load_file(p / "model.safetensors") for p in (whole, out))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert not (tmp_path / "out.healing").exists()


def press_at(stage: str, step: int) -> debug.Listener:
    def advance(name: str, done: int, total: int) -> None:
        if (name, done) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    return advance


def test_a_student_that_passes_already_is_nothing_to_heal(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert main([*words(folder, out), "--max-drop", "1000%"]) == 3
    assert "AO204 nothing was healed: the student passes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--steps", "0"], 2, "steps 0 must be at least 1"),
        (["--train", "everything"], 2, "changed, sites, all"),
        (["--max-drop", "some"], 2, "write 50% or 0.5"),
        (["--held-out", "2"], 2, "at least 4 rows"),
        (["--data", "no/such.txt"], 2, "no such file or folder"),
        (["--teacher", "no/such/model"], 2, "no file or directory"),
        (["--resume"], 2, "no interrupted run"),
        (["--learning-rate", "1"], 2, "unknown argument"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    more: list[str], status: int, told: str, folder: Path, tmp_path: Path, capsys
):
    capsys.readouterr()
    assert main([*words(folder, tmp_path / "out"), *more]) == status
    err = capsys.readouterr().err.strip()
    assert err.startswith("AO")
    assert told in err
    assert err.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(folder: Path, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(words(folder, tmp_path)) == 2
    assert "did not write" in capsys.readouterr().err
    assert main(words(folder, folder / "teacher")) == 2
