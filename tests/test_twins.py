"""A small twin of a checkpoint, and `attnopt optimize --test` on it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from dha_models import ids
from safetensors.torch import save_file

from attnopt.cli import main
from attnopt.twins import twin

FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {}),
    "vit": ("ViTConfig", "ViTForImageClassification", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
}
SLOW = ("mixtral", "deepseek_v3", "t5", "gpt2", "bert", "qwen3")


def written(family: str, folder: Path) -> Path:
    """Write the config of a family at its full size, with a small vocabulary, and no weights."""
    config, model, changes = FAMILIES[family]
    made = getattr(transformers, config)(**changes)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made, name, 0)
    made.vocab_size = 64
    made.architectures = [model]
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "ids.safetensors"
    save_file({"input_ids": ids(40, 24)}, path)
    return str(path)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FAMILIES]
)
def test_a_twin_is_small_and_of_the_same_kind(family: str, tmp_path: Path):
    source = written(family, tmp_path / "source")
    made = twin(source, tmp_path)
    before = transformers.AutoConfig.from_pretrained(source)
    assert made.program.name == FAMILIES[family][1]
    assert made.layers == 2
    assert made.parameters < 6_000_000
    assert made.program.uncaptured == ()
    assert len(made.program.sites) >= 2
    after = made.program.config
    assert type(after) is type(before)
    heads = ("num_attention_heads", "num_key_value_heads", "vocab_size", "sliding_window")
    for name in (n for n in heads if hasattr(before, n)):
        assert getattr(after, name) == getattr(before, name)


def test_what_is_no_class_of_transformers_has_no_twin(tmp_path: Path):
    folder = tmp_path / "own"
    folder.mkdir()
    told = {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="names no class of Transformers"):
        twin(folder, tmp_path)


def test_the_whole_pipeline_is_tried_and_nothing_is_kept(tmp_path: Path, data: str, capsys):
    source, out = written("llama", tmp_path / "source"), tmp_path / "out"
    words = ["optimize", str(source), "-o", str(out), "--kv-cache", "50%", "--data", data]
    assert main([*words, "--max-drop", "0.0001%", "--test"]) == 0
    shown = capsys.readouterr().out
    assert "a random twin of 2 layers, 256 channels" in shown
    assert "rewritten at 2 places (dha), judged, saved (tier 0), loaded again" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert", "vit"])
def test_pruning_is_tried_on_other_families(family: str, tmp_path: Path, data: str, capsys):
    source, out = written(family, tmp_path / "source"), tmp_path / "out"
    rows = pictures(tmp_path) if family == "vit" else data
    words = ["optimize", str(source), "-o", str(out), "--params", "60%", "--data", rows]
    assert main([*words, "--test", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "attnopt.optimize-test/1"
    assert document["loaded_error"] < 1e-3
    assert {c["pass"] for c in document["changed"]} == {"amp"}
    assert not out.exists()


def pictures(folder: Path) -> str:
    place = folder / "pictures.safetensors"
    save_file({"pixel_values": torch.rand(12, 3, 224, 224)}, place)
    return str(place)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["cli_models:blocks", "--kv-cache", "50%"], 2, "which cli_models:blocks has none of"),
        (["SOURCE", "--plan", "some.yaml"], 2, "--test and --plan exclude each other"),
        (["SOURCE", "--kv-cache", "0.1%"], 3, "on a small twin: no plan"),
    ],
)
def test_what_cannot_be_tried_is_told(
    words: list[str], status: int, told: str, tmp_path: Path, data: str, capsys
):
    source = str(written("llama", tmp_path / "source"))
    given = [source if word == "SOURCE" else word for word in words]
    assert main(["optimize", *given, "-o", str(tmp_path / "o"), "--data", data, "--test"]) == status
    assert told in capsys.readouterr().err
