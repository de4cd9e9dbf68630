"""`attnopt diff`: what differs between checkpoints, artifacts and plans."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import decoder, ids

import attnopt
from attnopt.cli import main
from attnopt.cli.diff import _said


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, and artifacts of all kinds made of it."""
    root = tmp_path_factory.mktemp("folders")
    decoder("llama").save_pretrained(root / "source")
    program = attnopt.capture(root / "source")
    halved = attnopt.optimize(program, {"kv_cache": "50%"}, data=ids(8, 24))
    attnopt.save(halved, root / "halved")
    attnopt.save(attnopt.apply(program, "exact"), root / "stored", tier=2)
    name = next(b.name for b in program.bindings.values() if "o_proj" in b.name)
    changed = {name: 1.5 * program.weights[name]}
    attnopt.save(program.with_weights(changed), root / "scaled")
    return {path.name: path for path in root.iterdir()}


def compared(a: Path, b: Path, capsys: Any) -> Any:
    assert main(["diff", str(a), str(b), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_directory_is_the_same_as_its_copy(folders, tmp_path, capsys):
    shutil.copytree(folders["halved"], tmp_path / "copy")
    found = compared(folders["halved"], tmp_path / "copy", capsys)
    assert found["same"] is True
    assert main(["diff", str(folders["halved"]), str(tmp_path / "copy")]) == 0
    assert "the same" in capsys.readouterr().out


def test_an_artifact_differs_by_what_was_done(folders, capsys):
    found = compared(folders["source"], folders["halved"], capsys)
    settings = {s["name"]: (s["a"], s["b"]) for s in found["settings"]}
    assert settings["num_key_value_heads"] == (4, 2)
    names = {t["name"].split(".")[-2] for t in found["tensors"]}
    assert names == {"k_proj", "v_proj", "q_proj", "o_proj"} & names
    shapes = {(tuple(t["a"]), tuple(t["b"])) for t in found["tensors"] if "k_proj" in t["name"]}
    assert shapes == {((32, 32), (16, 32))}
    assert len(found["choices"]) == 2
    assert all(c["a"] is None and "dha(" in c["b"] for c in found["choices"])
    assert found["equal_tensors"] > 0
    assert any(s["name"] == "measured.kv_bytes_per_token" for s in found["report"])


def test_a_changed_tensor_is_weighed(folders, capsys):
    found = compared(folders["source"], folders["scaled"], capsys)
    (tensor,) = found["tensors"]
    assert tensor["change"] == pytest.approx(0.5, rel=1e-5)
    assert main(["diff", str(folders["source"]), str(folders["scaled"])]) == 0
    assert "50.00%" in capsys.readouterr().out


def test_a_stored_program_has_the_tensors_of_its_source(folders, capsys):
    found = compared(folders["source"], folders["stored"], capsys)
    assert all(t["a"] is None for t in found["tensors"])  # what is no parameter
    assert found["equal_tensors"] == len(torch.nn.ModuleList([decoder("llama")]).state_dict())


def test_numbers_in_lists_are_rounded_as_others_are():
    assert _said([0.70794690, 0.5, 3]) == "[0.707947, 0.5, 3]"


def test_plans_are_compared_by_site(folders, tmp_path, capsys):
    plan = folders["halved"] / "attnopt/plan.yaml"
    other = tmp_path / "plan.yaml"
    other.write_text(plan.read_text().replace("kv_heads: 2", "kv_heads: 1", 1))
    found = compared(plan, other, capsys)
    (choice,) = found["choices"]
    assert "kv_heads=2" in choice["a"]
    assert "kv_heads=1" in choice["b"]


@pytest.mark.parametrize("harm", ["absent", "empty", "mixed", "outside"])
def test_what_cannot_be_compared_is_told_in_one_line(harm, folders, tmp_path, capsys):
    other, words, status = tmp_path / "other", "no file or directory", 2
    if harm == "empty":
        other.mkdir()
        words = "no config.json"
    elif harm == "mixed":
        other, words = folders["halved"] / "attnopt/plan.yaml", "give two of a kind"
    elif harm == "outside":
        shutil.copytree(folders["stored"], other)
        place = other / "attnopt/program.json"
        place.write_text(place.read_text().replace("attnopt/weights-00001", "../weights-00001"))
        words, status = "no weight file of this directory", 5
    assert main(["diff", str(folders["source"]), str(other)]) == status
    told = capsys.readouterr().err
    assert words in told
    assert len(told.strip().splitlines()) == 1
