"""What a directory of somebody else's names and links to, where Transformers would follow it."""

import json
from pathlib import Path

import pytest
from subjects import edit, save_checkpoint

import attnopt
from attnopt import untrusted


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", seed=0)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"attn_implementation": "some/kernel"}, "the kernel some/kernel"),
        ({"text_config": {"_attn_implementation": {"": "some/kernel@v1"}}}, "the kernel"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"transformers_weights": "../other.safetensors"}, "its own weight file"),
    ],
)
def test_a_config_that_names_code_or_other_weights_is_refused(
    setting: dict[str, object], words: str, checkpoint: Path
) -> None:
    edit(checkpoint / "config.json", lambda c: c.update(setting))
    with pytest.raises(ValueError, match=words):
        attnopt.capture(checkpoint)


@pytest.mark.parametrize("name", ["../outside/tokenizer.4.0.json", "/tokenizer.4.0.json", 4])
def test_a_tokenizer_is_not_read_from_elsewhere(name: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": [name]}))
    with pytest.raises(ValueError, match="leaves the directory"):
        untrusted.check_tokenizer(tmp_path)


def test_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "rev", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "same.json").symlink_to("config.json")
    untrusted.check_files(snapshot)
    assert untrusted.read_json(snapshot / "config.json") == {}
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "hash").write_text("{}")
    (snapshot / "other.json").symlink_to(tmp_path / "blobs" / "hash")
    with pytest.raises(ValueError, match="leaves the directory"):
        untrusted.check_files(snapshot)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "a b+c.safetensors"]
)
def test_names_of_weight_files_are_accepted(name: str) -> None:
    assert untrusted.is_weight_file(name)
