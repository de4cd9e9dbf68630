"""The table of deployments: what dies costs one check, and no difference passes for equality."""

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_deploy
from zoo_deploy import Decoded, DiffersError, same_bits, same_tokens


@pytest.fixture
def deploy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    return importlib.import_module("deploy")


class Checks:
    """Checks of which one dies in a way of its own."""

    def __init__(self, deadly: str, how: Any) -> None:
        self.deadly, self.how = deadly, how

    def check(self, name: str, checks: list[str], inner: str, shelf: Path) -> None:
        for check in checks:
            print(zoo_deploy.MARK + json.dumps({"started": check}), flush=True)
            if check == self.deadly:
                self.how()
            found = {"check": check, "status": "passed", "reason": ""}
            print(zoo_deploy.MARK + json.dumps(found), flush=True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda: os._exit(6), "status 6"),
        (lambda: 1 / 0, "division"),
        (lambda: time.sleep(60), "more than"),
    ],
)
def test_a_check_that_dies_is_one_failed_check(deploy, how, reason, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(deploy, "LEAST", 0.5)
    limit = 0.9 if reason == "more than" else 60.0
    deploy_bench = deploy.Bench(Checks("onnx", how), "eager", limit, tmp_path)
    checks = deploy_bench.measure("llama")["checks"]
    failed = {name: c["reason"] for name, c in checks.items() if c["status"] == "failed"}
    assert list(checks) == list(deploy.CHECKS)
    assert reason in failed.pop("onnx")
    if reason == "more than":
        assert set(failed.values()) == {"no time was left"}
    else:
        assert not failed


def test_checks_have_the_same_names_in_both_files(deploy) -> None:
    assert tuple(zoo_deploy.CHECKS) == deploy.CHECKS
    assert deploy.MARK == zoo_deploy.MARK
    assert set(deploy.SAMPLE) < set(zoo_deploy.zoo.ZOO)


def test_an_interrupted_file_keeps_the_rows_that_are_whole(deploy, tmp_path) -> None:
    stored = {"status": "passed", "reason": "", "tier": 2}
    rows = [
        {"model": "a", "checks": {"stored": {**stored, "loaded": {}}}},
        {"model": "b", "checks": {"stored": stored}},
        {"model": "c", "checks": {"stored": {**stored, "status": "failed"}}},
    ]
    deploy.write(tmp_path / "d.json", rows, complete=False)
    assert [row["model"] for row in deploy.interrupted(tmp_path / "d.json")] == ["a", "c"]
    deploy.write(tmp_path / "d.json", rows, complete=True)
    assert deploy.interrupted(tmp_path / "d.json") == []


def test_the_margin_at_the_first_different_token_is_told() -> None:
    logits = torch.zeros(2, 3, 5)
    logits[0, :, 1], logits[1, :, 2] = 1.0, 3.0
    logits[1, 1, 4] = 2.5
    want = Decoded(logits.argmax(-1), logits)
    assert same_tokens(want, want) == {"equal": 6, "of": 6, "distinct": 1, "logits_differ": 0.0}
    other = want.tokens.clone()
    other[1, 1:] = 4
    with pytest.raises(DiffersError, match="4 of 6 tokens equal; the first difference is in row 1"):
        same_tokens(Decoded(other, logits), want)


def test_one_bit_is_a_difference_and_so_is_a_shape() -> None:
    want = {"logits": torch.tensor([1.0, torch.nan])}
    assert same_bits({"logits": want["logits"].clone()}, want) == 0
    assert same_bits({"logits": want["logits"].nextafter(torch.tensor(2.0))}, want) > 0
    assert same_bits({"logits": torch.ones(3)}, want) > 0
