"""The table of deployments: what dies costs one check, and no difference passes for equality."""

import importlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo_deploy
from deploy_case import Case, Decoded, DiffersError, LimitError, same_bits, same_tokens
from deploy_compiling import CUT, READ, Way, in_a_way, limit_of_torch, raise_left


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


def _row(name: str, status: str = "passed", **stored: Any) -> dict[str, Any]:
    checks = {c: {"status": status, "reason": "why"} for c in deploy_rows().CHECKS}
    checks["stored"] = {"status": "passed", "reason": "", "tier": 2, "loaded": {}, **stored}
    return {"model": name, "checks": checks, "seconds": 1.0}


def deploy_rows() -> Any:
    return importlib.import_module("deploy_rows")


def test_an_interrupted_file_keeps_the_rows_that_are_whole(deploy, tmp_path) -> None:
    whole, unloaded = _row("a"), _row("b")
    del unloaded["checks"]["stored"]["loaded"]
    failed = {**_row("c"), "checks": {"stored": {"status": "failed"}}}
    made = {"a": whole, "b": unloaded, "c": failed}
    deploy.put(tmp_path / "d.json", made, {"commit": "1"}, ["a", "b", "c"])
    assert list(deploy.read(tmp_path / "d.json")) == ["a", "c"]


def test_rows_of_several_runs_and_files_come_into_one_with_who_measured_them(
    deploy, tmp_path
) -> None:
    order = ["a", "b", "c"]
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    deploy.put(one, {"b": _row("b")}, {"commit": "1"}, order)
    deploy.put(one, {"b": _row("b"), "a": _row("a")}, {"commit": "1"}, order)
    deploy.put(two, {"c": _row("c"), "a": _row("a", "failed")}, {"commit": "2"}, order)
    assert not json.loads(one.read_text())["complete"]
    rows = deploy.merge(one, [two], order)
    content = json.loads(one.read_text())
    assert content["complete"]
    assert [run["commit"] for run in content["runs"]] == ["2", "1"]
    assert [(r["model"], content["runs"][r["run"]]["commit"]) for r in content["rows"]] == [
        ("a", "2"), ("b", "1"), ("c", "2"),
    ]  # fmt: skip
    assert [name for name, row in rows.items() if deploy.bad(row)] == ["a"]


def test_parts_make_up_the_whole(deploy) -> None:
    order = [str(n) for n in range(10)]
    parts = [deploy.part(f"{n}/3", order) for n in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == order
    for wrong in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(SystemExit, match="--part"):
            deploy.part(wrong, order)


def test_only_what_has_no_row_is_measured_unless_it_is_named_or_failed(deploy) -> None:
    order, rows = ["llama", "bert", "vit"], {"llama": _row("llama"), "vit": _row("vit", "failed")}
    assert deploy.wanted(deploy.options([]), order, rows) == order
    assert deploy.wanted(deploy.options(["--failed"]), order, rows) == ["vit"]
    assert deploy.wanted(deploy.options(["--only", "bert"]), order, rows) == ["bert"]
    with pytest.raises(SystemExit, match="the zoo has no bart"):
        deploy.wanted(deploy.options(["--only", "bart"]), order, rows)


def test_what_torch_cannot_do_is_told_and_is_no_failure(deploy) -> None:
    row = _row("a")
    row["checks"] = {c: {"status": "n/a", "reason": ""} for c in deploy.CHECKS} | {
        "stored": row["checks"]["stored"],
        "compiled": {"status": "limit", "reason": "dynamo cuts the graph"},
    }
    assert deploy.bad(row) == []
    assert "dynamo cuts the graph" in "\n".join(deploy.summary([row]))
    assert "| torch cannot |" in list(deploy.table([row]))[-1]
    row["checks"]["compiled"]["status"] = "failed"
    assert deploy.bad(row) == ["compiled"]


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


class Cuts(torch.nn.Module):
    """Divides its scores by a number that dynamo takes out of the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x / x.sum().item(), dim=-1)


class Branches(torch.nn.Module):
    """Takes one of two ways by a number of its scores."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        many = (x > 0).sum().item() > 4
        return torch.softmax(x if many else -x, dim=-1)


def test_a_branch_on_data_is_a_limit_of_torch_even_where_numbers_are_captured() -> None:
    module, x = Branches(), torch.rand(2, 4)

    def alone(case: Any, way: Way) -> None:
        torch.compile(module, backend="eager", dynamic=way.dynamic)(x)

    way, cut = Way(scalars=True), DiffersError("left as it was", cut=True)
    told = limit_of_torch(Case("none"), way, cut, alone)
    assert told.startswith("dynamo cuts the graph within an attention for any backend")


@pytest.mark.parametrize(
    ("reasons", "rewritten", "cut"),
    [
        ([CUT], 3, True),
        ([READ], 2, True),
        ([CUT, READ], 2, True),
        # Several pieces of one attention.
        ([CUT, READ, READ], 2, True),
        # A site that is lost without a reason is no limit of torch.
        ([CUT], 2, False),
        ([CUT, "its mask is odd"], 3, False),
    ],
)
def test_attentions_that_a_cut_leaves_as_they_were_are_told_apart(
    reasons: list[str], rewritten: int, cut: bool
) -> None:
    sites = ["a", "b", "c"]
    report = SimpleNamespace(refused=reasons, found=sites, rewritten=sites[:rewritten])
    with pytest.raises(DiffersError, match="not all are rewritten") as caught:
        raise_left(report)
    assert bool(caught.value.facts.get("cut")) is cut


def test_a_limit_of_torch_fails_without_attnopt_too(monkeypatch) -> None:
    """A way to compile is left for the next only where backend eager fails in the same place."""
    torch._dynamo.reset()
    module, x = Cuts(), torch.rand(2, 4)

    def alone(case: Any, way: Way) -> None:
        torch.compile(module, backend="eager", dynamic=way.dynamic)(x)

    def work(way: Way) -> dict[str, Any]:
        if not way.scalars:
            raise DiffersError("left as it was", cut=True)
        return {"equal": 1}

    found = in_a_way(Case("none"), work, alone)
    assert (found["equal"], found["way"]) == (1, "scalar outputs captured")
    assert "dynamo cuts the graph" in found["not_by_torch"][0]

    def ours(way: Way) -> dict[str, Any]:
        raise DiffersError("left as it was")

    with pytest.raises(DiffersError, match=r"^left as it was$"):
        in_a_way(Case("none"), ours, alone)

    def crash(way: Way) -> dict[str, Any]:
        raise RuntimeError("ours alone")

    with pytest.raises(RuntimeError, match="ours alone"):
        in_a_way(Case("none"), crash, alone)

    def fails(case: Any, way: Way) -> None:
        raise RuntimeError("the source's")

    with pytest.raises(LimitError, match="backend 'eager' fails, too"):
        in_a_way(Case("none"), crash, fails)
