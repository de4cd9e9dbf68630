"""`attnopt verify`: the gate's exit statuses, its documents, and wrong calls in one line."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dha_models import decoder, ids
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from attnopt.cli import main

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a decoder, a copy with other values in one layer, and token ids."""
    folder = tmp_path_factory.mktemp("verify")
    model = decoder("llama")
    model.save_pretrained(folder / "source")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(0.5)
    model.save_pretrained(folder / "other")
    save_file({"input_ids": ids(80, 24)}, folder / "ids.safetensors")
    return folder


def words(folder: Path, candidate: str, *more: str) -> list[str]:
    data = str(folder / "ids.safetensors")
    return ["verify", str(folder / candidate), str(folder / "source"), "--data", data, *more]


def test_the_same_model_is_accepted(folder: Path, capsys):
    assert main(words(folder, "source", "--max-drop", "0.1%", "--quiet")) == 0
    quiet = capsys.readouterr()
    for part in ("held-out loss", "perplexity", "accepted", "largest error of a site"):
        assert part in quiet.out
    assert quiet.err == ""
    assert "beside" not in quiet.out


def test_what_loses_too_much_fails_the_gate(folder: Path, capsys):
    assert main(words(folder, "other", "--max-drop", "0.001%", "--json")) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "attnopt.verify/1"
    assert document["accepted"] is False
    assert document["rows"] == 20
    assert document["max_drop"] == pytest.approx(1e-5)
    assert document["drop"]["ci95"][1] > 1e-5
    assert document["sites"]["model.layers.0.self_attn"] == 0
    assert document["sites"]["model.layers.1.self_attn"] == pytest.approx(0.25, rel=1e-3)


def test_without_a_limit_nothing_is_gated_and_verbose_says_every_site(folder: Path, capsys):
    assert main(words(folder, "other", "-v", "--task", "lm")) == 0
    out = capsys.readouterr().out
    assert "nothing was gated" in out
    assert out.count("error of model.layers.") == 4


def test_a_classifier_is_judged_by_its_answers(tmp_path: Path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_labels": 5}
    config = ViTConfig(intermediate_size=31, image_size=8, patch_size=4, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    images = np.random.default_rng(0).normal(size=(40, 3, 8, 8))
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(40) % 5)
    model = str(tmp_path / "vit")
    given = ["verify", model, model, "--data", str(tmp_path / "images.npy"), "--json"]
    assert main([*given, "--max-drop", "50%"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["task"] == "classification"
    assert document["drop_is"] == "fall of the accuracy"
    assert main([*given, "--max-drop", "1%"]) == 4


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--task", "lmm"], 2, "AO111 --task lmm; did you mean 'lm'"),
        (["--max-drop", "little"], 2, "AO111 max_drop 'little' is no fraction"),
        (["--max-drop=-1%"], 2, "AO111 .*must not be negative"),
        (["--held-out", "1"], 2, "AO111 --held-out needs at least 2 rows"),
        (["--data", "no/such.jsonl"], 2, "AO112 .*no such file or folder"),
        (["--data", "model.pt"], 2, "AO112 .*can run code"),
        (["--max-dorp", "1%"], 2, "did you mean '--max-drop'"),
        (["--lm-eval", "a"], 2, r"AO112 .*pip install 'attnopt\[lm-eval\]'"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    more: list[str], status: int, told: str, folder: Path, monkeypatch: Any, capsys
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.chdir(folder)
    (folder / "model.pt").write_bytes(b"")
    assert main(words(folder, "source", *more)) == status
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(told, line), line


def test_a_missing_model_is_told(folder: Path, capsys):
    assert main(words(folder, "no-such-model")) == 2
    assert "AO102 no file or directory" in capsys.readouterr().err
