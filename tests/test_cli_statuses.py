"""Every exit status that a command documents is the end of a test, here or where it says."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from dha_models import decoder, ids
from safetensors.torch import save_file

from attnopt import estimating, healing
from attnopt.cli import Exit, doctor, main
from attnopt.cli._main import commands

HERE = Path(__file__).parent
NAMED = {
    "bench 0": "test_cli_bench.py::test_two_models_are_compared",
    "bench 2": "test_cli_bench.py::test_wrong_settings_are_refused_in_one_line",
    "bench 6": "test_cli_bench.py::test_a_missing_package_is_named_with_its_remedy",
    "diff 0": "test_cli_diff.py::test_a_directory_is_the_same_as_its_copy",
    "diff 2": "test_cli_diff.py::test_what_cannot_be_compared_is_told_in_one_line",
    "diff 5": "test_cli_diff.py::test_what_cannot_be_compared_is_told_in_one_line",
    "export 0": "test_delta.py::test_the_base_is_found_where_the_command_names_it",
    "export 2": "test_export_onnx.py::test_a_wrong_call_is_told_in_one_line",
    "export 3": "test_genai.py::test_a_checkpoint_that_generates_nothing_ends_in_one_line",
    "export 4": "test_export_onnx.py::test_a_file_that_computes_something_else_is_rejected",
    "export 6": "test_export_onnx.py::test_a_missing_package_is_named_with_its_remedy",
    "generate 0": "test_cli_generate.py::test_it_writes_what_the_stock_model_writes",
    "generate 2": "test_cli_generate.py::test_wrong_settings_are_refused_in_one_line",
    "generate 3": "test_cli_generate.py::test_a_model_that_writes_nothing_is_refused",
    "heal 0": "test_cli_heal.py::test_a_student_is_healed_and_saved_with_its_plan",
    "heal 2": "test_cli_heal.py::test_a_wrong_call_is_told_in_one_line",
    "heal 3": "test_cli_heal.py::test_a_student_that_passes_already_is_nothing_to_heal",
    "heal 4": "test_cli_heal.py::test_a_gate_that_fails_keeps_the_candidate_aside",
    "heal 130": "test_cli_heal.py::test_an_interrupted_run_is_resumed",
    "inspect 3": "test_cli_inspect.py::test_a_model_without_attention_is_status_three",
    "optimize 0": "test_cli_exits.py::test_0_and_4_tell_an_accepted_result_from_a_rejected_one",
    "optimize 2": "test_cli_exits.py::test_2_and_3_change_nothing",
    "optimize 3": "test_cli_exits.py::test_2_and_3_change_nothing",
    "optimize 4": "test_cli_exits.py::test_0_and_4_tell_an_accepted_result_from_a_rejected_one",
    "optimize 6": "test_cli_exits.py::test_6_is_for_a_machine_that_is_clearly_too_small",
    "optimize 130": "test_interruptions.py::test_a_run_that_is_interrupted_again_and_again_ends_",
    "plan 0": "test_cli_plan.py::test_a_plan_is_a_dry_run_that_optimize_carries_out",
    "plan 2": "test_cli_plan.py::test_a_wrong_call_is_told_in_one_line",
    "plan 3": "test_cli_plan.py::test_a_wrong_call_is_told_in_one_line",
    "plan 130": "test_interruptions.py::test_a_plan_is_interrupted_and_goes_on",
    "recipes 0": "test_cli_plan.py::test_recipes_are_listed_shown_and_checked",
    "recipes 2": "test_cli_plan.py::test_recipes_are_listed_shown_and_checked",
    "verify 0": "test_cli_verify.py::test_the_same_model_is_accepted",
    "verify 2": "test_cli_verify.py::test_a_wrong_call_is_told_in_one_line",
    "verify 4": "test_cli_verify.py::test_what_loses_too_much_fails_the_gate",
}
# What each command is given of a model, for its place in braces.
PICKLED = {
    "bench": ["{}"],
    "export": ["{}", "--to", "onnx", "-o", "{out}"],
    "generate": ["{}", "a prompt"],
    "heal": ["{}", "--teacher", "{}", "-o", "{out}", "--steps", "2"],
    "inspect": ["{}"],
    "explain": ["{}"],
    "optimize": ["{}", "-o", "{out}", "--kv-cache", "50%"],
    "plan": ["{}", "--kv-cache", "50%"],
    "verify": ["{}", "{}"],
}
UNCAPTURED = {"bench": ["{}"], "verify": ["{}", "{}"], "inspect": ["{}"]}
SHORT = {"heal 6", "plan 6", "doctor 6"}


def documented() -> set[str]:
    """Read the statuses off the help of every command."""
    found: set[str] = set()
    for name in commands():
        told = importlib.import_module(f"attnopt.cli.{name}").__doc__ or ""
        _, says, after = told.partition("Exit status")
        if says:
            found |= {f"{name} {n}" for n in re.findall(r"\b(0|2|3|4|5|6|130)\b(?! %)", after)}
    return found


def test_every_documented_status_has_a_test():
    here = {f"{name} 5" for name in PICKLED} | {f"{name} 3" for name in UNCAPTURED} | SHORT
    assert documented() - set(NAMED) - here == set()
    for place in NAMED.values():
        file, name = place.split("::")
        assert f"def {name}" in (HERE / file).read_text("utf-8"), place


@pytest.mark.parametrize("command", PICKLED)
def test_5_is_for_what_may_run_code(command: str, tmp_path: Path, capsys):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"")
    words = [w.replace("{out}", str(tmp_path / "out")) for w in PICKLED[command]]
    assert main([command, *(w.replace("{}", str(folder)) for w in words)]) == Exit.SAFETY
    err = capsys.readouterr().err
    assert err.startswith("AO503 refused: ")
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["pickled"]


@pytest.mark.parametrize("command", UNCAPTURED)
def test_3_is_for_what_cannot_be_captured(command: str, capsys):
    words = [w.replace("{}", "cli_models:undecided") for w in UNCAPTURED[command]]
    assert main([command, *words]) == Exit.NOTHING
    assert "cannot capture Undecided" in capsys.readouterr().err.splitlines()[-1]


def test_6_is_for_a_machine_without_what_attnopt_needs(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(doctor, "_NEEDED", (("torch", "99.0", "100"),))
    assert main(["doctor"]) == Exit.RESOURCES
    assert 'pip install "torch>=99.0"' in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a small model, and the data for it."""
    root = tmp_path_factory.mktemp("statuses")
    decoder("llama").save_pretrained(root / "tiny")
    save_file({"input_ids": ids(40, 24)}, root / "ids.safetensors")
    return [str(root / "tiny"), "--data", str(root / "ids.safetensors")]


@pytest.mark.usefixtures("captured_once")
def test_6_is_for_a_disk_that_is_full(tiny, tmp_path: Path, monkeypatch, capsys):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(healing, "healed", full)
    words = ["heal", *tiny, "--teacher", tiny[0], "-o", str(tmp_path / "out"), "--steps", "2"]
    assert main(words) == Exit.RESOURCES
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("captured_once")
def test_6_is_for_a_plan_that_does_not_fit(tiny, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(estimating, "available", lambda: 2**10)
    words = ["plan", *tiny, "--kv-cache", "50%", "-o", str(tmp_path / "plan.yaml")]
    assert main(words) == Exit.RESOURCES
    assert "AO603 about " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
