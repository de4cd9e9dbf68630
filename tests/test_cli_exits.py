"""Every documented exit status of `attnopt optimize`, and what is left behind."""

from pathlib import Path
from typing import Any

import pytest
from dha_models import decoder, ids
from safetensors.torch import save_file

import attnopt.cli.optimize
from attnopt import estimating, optimizing
from attnopt.cli import Exit, main

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a command that succeeds, but for the place of its result."""
    root = tmp_path_factory.mktemp("exits")
    decoder("llama").save_pretrained(root / "tiny")
    save_file({"input_ids": ids(40, 24)}, root / "ids.safetensors")
    data = ["--data", str(root / "ids.safetensors")]
    return ["optimize", str(root / "tiny"), "--kv-cache", "50%", *data]


def test_the_help_documents_the_statuses_that_are_tested_here():
    told = attnopt.cli.optimize.__doc__ or ""
    for status in Exit:
        if status is not Exit.INTERNAL:
            assert f"{status.value} " in told


def test_0_and_4_tell_an_accepted_result_from_a_rejected_one(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert main([*words, "-o", str(out), "--max-drop", "100%"]) == Exit.ACCEPTED
    shown = capsys.readouterr().out
    assert shown.strip().endswith("attnopt/report.html")
    assert Path(shown.split()[-1]).is_file()
    other = tmp_path / "other"
    assert main([*words, "-o", str(other), "--max-drop", "0%", "--held-out", "2"]) == Exit.GATE
    assert not other.exists()
    assert (tmp_path / "other.rejected/attnopt/report.html").is_file()


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        (["--kv-cache", "fifty"], Exit.USAGE, "AO111"),
        (["--kv-cache", "1%"], Exit.NOTHING, "AO201"),
    ],
)
def test_2_and_3_change_nothing(
    given: list[str],
    status: Exit,
    code: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*words, "-o", str(tmp_path / "out"), *given]) == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(code)
    assert list(tmp_path.iterdir()) == []


def test_5_is_for_what_may_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"")
    status = main(["optimize", str(folder), "-o", str(tmp_path / "out"), "--kv-cache", "50%"])
    assert status == Exit.SAFETY
    assert "AO503" in capsys.readouterr().err


def test_6_is_for_a_machine_that_is_clearly_too_small(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(estimating, "available", lambda: 2**10)
        assert main([*words, "-o", out]) == Exit.RESOURCES
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("AO603 about ")
    assert "1 KiB are free here" in error
    with monkeypatch.context() as patch:
        patch.setattr(estimating, "free_at", lambda place: 2**10)
        assert main([*words, "-o", out]) == Exit.RESOURCES
    assert "choose another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_130_leaves_what_was_there_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(optimizing, "verify", interrupted)
        assert main([*words, "-o", str(out)]) == Exit.INTERRUPTED
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"AO130 interrupted; {out} is what it was before")
    assert "the same command goes on" in error
    assert not out.exists()
    assert main([*words, "-o", str(out)]) == Exit.ACCEPTED
    assert out.is_dir()
