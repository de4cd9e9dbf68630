"""Ctrl-C in the middle of a command: what it leaves, and that the same command goes on from it."""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import decoder, ids
from safetensors.torch import save_file

from attnopt import compensating, debug, keeping
from attnopt.artifacts import saving
from attnopt.cli import Exit, main
from attnopt.moments import Refits
from attnopt.resuming import shared_lock

pytestmark = pytest.mark.usefixtures("captured_once", "pressed")


@pytest.fixture
def pressed() -> Iterator[None]:
    """Let a signal interrupt, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("interrupted")
    decoder("llama").save_pretrained(root / "tiny")
    save_file({"input_ids": ids(40, 24)}, root / "ids.safetensors")
    return [str(root / "tiny"), "--data", str(root / "ids.safetensors"), "--kv-cache", "50%"]


def prints(out: Path) -> dict[str, str]:
    """Return the sha256 of the plan, of its statistics, and of the weights."""
    own = ("attnopt/plan.yaml", "attnopt/statistics.safetensors", "model.safetensors")
    stored = ("attnopt/weights-00001-of-00001.safetensors",)
    files = [out / name for name in (*own, *stored) if (out / name).is_file()]
    assert len(files) >= 2
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def press_at(stage: str, step: int, seen: Counter[str]) -> debug.Listener:
    def advance(name: str, done: int, total: int) -> None:
        seen[name] += 1
        if (name, done) == (stage, step):
            press()

    return advance


def test_a_run_that_is_interrupted_again_and_again_ends_with_the_same_bits(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    whole, out, work = tmp_path / "whole", tmp_path / "out", tmp_path / keeping_folder()
    assert main(["optimize", *words, "-o", str(whole), "--quiet"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole"]
    gathered: list[str] = []
    own = compensating._moments
    monkeypatch.setattr(
        compensating, "_moments", lambda name, *a, **k: gathered.append(name) or own(name, *a, **k)
    )
    command = ["optimize", *words, "-o", str(out)]
    seen: dict[str, Counter[str]] = {}
    for stage, step in (("calibrate", 1), ("refit", 1), ("verify", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(
                debug, "advance", press_at(stage, step, seen.setdefault(stage, Counter()))
            )
            assert main(command) == Exit.INTERRUPTED
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told == (
            f"AO130 interrupted; {out} is what it was before; what was finished is kept in {work}, "
            "and the same command goes on from there"
        )
        assert not out.exists()
    assert seen["refit"]["calibrate"] > 0
    # What was calibrated and refitted before is not done again.
    assert seen["verify"]["calibrate"] == 0
    assert len(gathered) == len(set(gathered)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_manifest", lambda *_: press())
        assert main(command) == Exit.INTERRUPTED
    assert sorted(p.name for p in tmp_path.iterdir()) == [work.name, "whole"]
    assert main(command) == 0
    assert len(gathered) == 2
    assert prints(out) == prints(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def keeping_folder() -> str:
    from attnopt.cli._wanted import WORK

    return WORK


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("score", 1), ("alike", 1), ("refit", 1)])
def test_a_search_that_is_interrupted_goes_on(
    stage: str, step: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    terms = ["--tier", "2", "--passes", "dha", "--quiet"]
    whole, out = tmp_path / "a" / "out", tmp_path / "b" / "out"
    assert main(["optimize", *words, *terms, "-o", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(debug, "advance", press_at(stage, step, Counter()))
        assert main(["optimize", *words, *terms, "-o", str(out)]) == Exit.INTERRUPTED
    assert "goes on from there" in capsys.readouterr().err
    assert main(["optimize", *words, *terms, "-o", str(out)]) == 0
    assert prints(out) == prints(whole)


def test_a_plan_is_interrupted_and_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    command = ["plan", *words, "-o", str(tmp_path / "plan.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(debug, "advance", press_at("calibrate", 2, Counter()))
        assert main(command) == Exit.INTERRUPTED
    told = capsys.readouterr().err
    assert "AO130 interrupted; no plan was written; what was finished is kept in" in told
    assert main(command) == 0
    assert "carrying it out takes about" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.yaml", "statistics.safetensors"]


def test_before_anything_is_finished_there_is_nothing_to_keep(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(debug, "advance", press_at("prove", 1, Counter()))
    assert main(["optimize", *words, "-o", str(tmp_path / "out")]) == Exit.INTERRUPTED
    assert "the same command starts again: nothing was finished yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- pieces


def test_moments_of_refits_are_kept_one_by_one(tmp_path: Path):
    pair = torch.rand(3, 3, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    first = Refits(tmp_path / "refits")
    first["a/b.weight"] = pair
    again = Refits(tmp_path / "refits")
    assert list(again) == ["a/b.weight"]
    assert all(torch.equal(x, y) for x, y in zip(again["a/b.weight"], pair, strict=True))
    assert not Refits()


def test_what_another_process_uses_is_not_removed(tmp_path: Path):
    place = tmp_path / "work" / "one"
    other = shared_lock(place)
    assert other is not None
    (place / "statistics.safetensors").touch()
    with keeping.kept(place):
        pass
    assert (place / "statistics.safetensors").is_file()
    other.release()
    with keeping.kept(place):
        pass
    assert list(tmp_path.iterdir()) == []


def test_scores_and_what_belongs_to_them_stay(tmp_path: Path):
    place = tmp_path / "work" / "one"
    (place / "refits-0").mkdir(parents=True)
    for name in ("scores-0.jsonl", "statistics.safetensors"):
        (place / name).touch()
    with keeping.kept(place):
        pass
    assert sorted(p.name for p in place.iterdir()) == ["scores-0.jsonl", "statistics.safetensors"]


def test_one_who_calibrates_beside_another_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    def calibrate(program: Any, data: Any, out: Path | None = None) -> str:
        if out is not None:
            raise keeping.BusyError("another")
        return "calibrated"

    monkeypatch.setattr(keeping, "calibrate", calibrate)
    program: Any = None
    assert keeping.calibrated(program, None, Path("somewhere")) == "calibrated"
