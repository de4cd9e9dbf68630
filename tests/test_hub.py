"""Models of the Hugging Face hub: what is fetched of them, and what is said where it is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dha_models import decoder

import attnopt
from attnopt.frontend import hub

REVISION = "0" * 40


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the repository of a model holds: weights in several files, and a pickle."""
    folder = tmp_path_factory.mktemp("remote")
    decoder("llama").save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_llama.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def served(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Serve the repository to the hub's own client, and return what it is asked for."""
    asked: list[dict[str, Any]] = []
    place = tmp_path / "models--owner--model" / "snapshots" / REVISION

    def download(name: str, *, allow_patterns: list[str], **settings: Any) -> str:
        asked.append({"name": name, "files": allow_patterns, **settings})
        place.mkdir(parents=True, exist_ok=True)
        for file in (p for p in remote.iterdir() if p.name in allow_patterns):
            shutil.copyfile(file, place / file.name)
        refs = place.parents[1] / "refs"
        refs.mkdir(exist_ok=True)
        (refs / (settings["revision"] or "main")).write_text(REVISION)
        return str(place)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", download)
    return asked


def test_all_files_of_the_weights_and_the_tokenizer_are_fetched_and_no_code(
    served: list[dict[str, Any]], remote: Path
):
    folder = hub.fetched("owner/model")
    there = {p.name for p in folder.iterdir()}
    weights = {p.name for p in remote.glob("*.safetensors")}
    assert len(weights) > 1
    assert there >= {*weights, "config.json", "tokenizer.json", hub.INDEX}
    assert not there & {"pytorch_model.bin", "modeling_llama.py"}
    assert {call["revision"] for call in served} == {None}


def test_a_model_of_the_hub_is_captured_with_its_weights(served: list[dict[str, Any]]):
    program = attnopt.capture("owner/model")
    assert len(program.sites) == decoder("llama").config.num_hidden_layers
    assert all(program.weights[n].numel() for n in list(program.weights)[:2])


def test_a_revision_follows_the_name(served: list[dict[str, Any]]):
    hub.fetched("owner/model@v1", weights=False)
    assert [(c["name"], c["revision"]) for c in served] == [("owner/model", "v1")]
    assert not list(hub.fetched("owner/model@v1", weights=False).glob("*.safetensors"))


def test_an_index_names_no_file_elsewhere(
    served: list[dict[str, Any]], remote: Path, tmp_path: Path
):
    (tmp_path / hub.INDEX).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert hub._weight_files(tmp_path) == []


def test_a_name_near_that_of_a_directory_is_taken_for_a_slip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "code-llama").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="did you mean the directory 'code-llama'"):
        attnopt.capture("code-lama")
