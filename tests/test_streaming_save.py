"""Checkpoints written tensor by tensor are those of save_pretrained; no model is in memory."""

import copy
import gc
import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from dha_models import decoder, ids
from safetensors import safe_open
from torch import Tensor

import attnopt
from attnopt.artifacts.stock import build, hollow
from attnopt.artifacts.streaming import write_checkpoint
from attnopt.frontend.capturing import source_weights
from attnopt.nouns import Choice
from attnopt.weights import Spool, described

FAMILIES = (
    "llama gpt2 qwen3_5_text bloom gemma3 t5 whisper bert vit mamba mixtral nomic_bert".split()
)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("name", [n for n in FAMILIES if n in zoo.ZOO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_are_those_of_save_pretrained(name: str, dtype: Any, tmp_path: Path) -> None:
    try:
        model = zoo.build(name, task="lm")[0]
    except ValueError:
        model = zoo.build(name)[0]
    weights = source_weights(model.to(dtype))
    config = copy.deepcopy(model.config)
    config.name_or_path = ""
    for shard in (10_000, 10**9):
        ours, theirs = tmp_path / f"ours{shard}", tmp_path / f"theirs{shard}"
        ours.mkdir()
        write_checkpoint(hollow(type(model), config, weights), weights, ours, shard)
        held: Any = build(type(model), copy.deepcopy(config), weights)
        held.save_pretrained(theirs, max_shard_size=shard)
        assert contents(ours) == contents(theirs)
        assert ((ours / "model.safetensors.index.json").is_file()) == (shard == 10_000)


class Counted(Mapping[str, Tensor]):
    """Weights that count how many of them are alive at a time."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights, self.alive, self.most = weights, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        made = self.weights[name].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.alive -= 1

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def describe(self, name: str) -> Any:
        return described(self.weights, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_one_tensor_is_read_at_a_time(tmp_path: Path) -> None:
    model = decoder("llama")
    weights = Counted(source_weights(model))
    form = hollow(type(model), copy.deepcopy(model.config), weights)
    write_checkpoint(form, weights, tmp_path, 10**9)
    assert 1 <= weights.most <= 2


def test_a_converted_checkpoint_loads_without_attnopt_and_keeps_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From bfloat16 files to bfloat16 files, with the new weights on disk in between."""
    decoder("llama").to(torch.bfloat16).save_pretrained(tmp_path / "in", max_shard_size=8_000)
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    monkeypatch.setattr(Spool.__init__, "__defaults__", (1000,))
    program = attnopt.apply(attnopt.capture(tmp_path / "in"), "exact")
    stats = attnopt.calibrate(program, ids(8, 24), tmp_path / "statistics")
    choices = tuple(Choice(s.name, "dha", {"kv_heads": 2, "refit": True}) for s in program.sites)
    halved = attnopt.apply(program, attnopt.Plan(choices, statistics=stats))
    spools = [m for m in halved.weights.maps if isinstance(m, Spool)]
    assert spools
    assert all(s.folder is not None for s in spools)
    out = attnopt.save(halved, tmp_path / "out", max_shard_size=8_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_key_value_heads == 2
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, halved.weights[name])
    assert loaded.generation_config.max_length == 77
    folders = [s.folder for s in spools]
    del spools, halved
    gc.collect()
    assert not any(folder.exists() for folder in folders if folder is not None)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    config = decoder("llama").config
    config.tie_word_embeddings = True
    model = transformers.LlamaForCausalLM(config).eval()
    program = attnopt.capture(model, (), {"input_ids": ids(2, 9)})
    out = attnopt.save(program, tmp_path / "out")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded: Any = attnopt.load(out)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
