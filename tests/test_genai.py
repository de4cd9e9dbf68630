"""`attnopt export --to ort-genai`: what lies beside the file, and the same texts in GenAI.

Its package brings the CPU build of onnxruntime, which does not live beside that for GPUs: where it
has an environment of its own, GENAI_PYTHON names the Python there.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from dha_models import decoder

import attnopt
from attnopt.cli import main

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from attnopt.backends.ort.genai import Graph, Value, content, fits, refuse_early

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
MODEL = Path(__file__).parents[1] / "examples/models/code-llama"
PROMPTS = ("import os\n", "def mean(values):\n    return", "class Stack:\n    def ", "for x in")
STEPS = 64
PYTHON = os.environ.get("GENAI_PYTHON", sys.executable)

# What GenAI 0.18.0 reads: it refuses every other key, and null everywhere.
TYPES = (
    "chatglm decoder ernie4_5 gemma gemma2 gemma3_text gptoss granite internlm2 llama mistral "
    "nemotron olmo phi phi3 phi3small phimoe qwen2 qwen3 smollm3"
).split()
SCHEMA: dict[str, Any] = {
    "model": {
        "type": lambda x: x in TYPES,
        "bos_token_id": int,
        "eos_token_id": lambda x: all(isinstance(t, int) and t >= 0 for t in _listed(x)),
        "pad_token_id": lambda x: isinstance(x, int) and x >= 0,
        "context_length": lambda x: isinstance(x, int) and x > 0,
        "vocab_size": lambda x: isinstance(x, int) and x > 0,
        "decoder": {
            "session_options": {"log_id": str, "provider_options": list},
            "filename": lambda x: x == "model.onnx",
            "head_size": int,
            "hidden_size": int,
            "num_attention_heads": int,
            "num_key_value_heads": int,
            "num_hidden_layers": lambda x: isinstance(x, int) and x > 0,
            "inputs": {
                "input_ids": str,
                "attention_mask": str,
                "position_ids": str,
                "past_key_names": str,
                "past_value_names": str,
            },
            "outputs": {"logits": str, "present_key_names": str, "present_value_names": str},
        },
    },
    "search": {
        "do_sample": bool,
        "temperature": float,
        "top_k": int,
        "top_p": float,
        "repetition_penalty": float,
        "no_repeat_ngram_size": int,
        "num_beams": int,
        "length_penalty": float,
        "min_length": int,
        "max_length": lambda x: isinstance(x, int) and x > 0,
        "past_present_share_buffer": lambda x: isinstance(x, bool),
    },
}
OPTIONAL = {"bos_token_id", "attention_mask", "position_ids"}


def _listed(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def conforms(found: Any, schema: Any = SCHEMA) -> bool:
    if isinstance(schema, dict):
        needed = schema.keys() - OPTIONAL
        known = needed <= found.keys() <= schema.keys()
        return known and all(conforms(found[name], schema[name]) for name in found)
    if isinstance(schema, type):
        return isinstance(found, schema) and (schema is bool or not isinstance(found, bool))
    return bool(schema(found))


@pytest.fixture(scope="module")
def program() -> attnopt.Program:
    return attnopt.capture(decoder("llama_gqa"))


def graph(layers: int = 2, **changes: Value | None) -> Graph:
    """The inputs and outputs of a file; a value that is None is not there."""
    caches = [f"{n}.{x}" for n in range(layers) for x in ("key", "value")]
    tokens = {n: Value(7, ("batch", "sequence")) for n in ("input_ids", "attention_mask")}
    past = {f"past_key_values.{c}": Value(1, ("batch", 4, "past", 4)) for c in caches}
    inputs = {**tokens, "position_ids": Value(7, ("batch", "sequence")), **past}
    outputs = {f"present.{c}": Value(1, ("batch", 4, "total", 4)) for c in caches}
    outputs["logits"] = Value(1, ("batch", "sequence", 61))
    for name, value in changes.items():
        part = outputs if name.startswith(("present", "logits")) else inputs
        part.pop(name, None)
        if value is not None:
            part[name] = value
    return Graph(inputs, outputs)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"input_ids": None}, "inputs are input_ids"),
        ({"inputs_embeds": Value(1, (2, 3, 4))}, "inputs_embeds: inputs are"),
        ({"past_key_values.1.key": None, "past_key_values.2.key": Value(1, ())}, "values.2.key: "),
        ({"present.1.value": None}, "present.1.value: outputs are logits"),
        ({"logits": None}, "logits: outputs are"),
        ({"logits": Value(1, ("batch", "sequence", "many"))}, "vocabulary"),
        ({"past_key_values.1.key": Value(1, ("b", "heads", "p", 4))}, "known heads and width"),
        ({"past_key_values.1.key": Value(1, ("b", 4, 8))}, "known heads and width"),
        (
            {"past_key_values.1.value": Value(1, ("b", 4, "p", 6))},
            "past_key_values.1.key: keys 4 x 4 and values 4 x 6 are unlike",
        ),
        ({"position_ids": Value(6, ("b", "s"))}, "the last two of one type"),
        ({"input_ids": Value(1, ("b", "s"))}, "are integers"),
    ],
)
def test_what_genai_cannot_call_is_refused(
    changes: dict[str, Value | None], told: str, program: attnopt.Program
):
    refused = fits(program, graph(**changes))
    assert not refused
    assert told in str(refused)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_ids": None},
        {"attention_mask": None},
        {
            "past_key_values.1.key": Value(1, ("b", 2, "p", 4)),
            "past_key_values.1.value": Value(1, ("b", 2, "p", 4)),
        },
    ],
)
def test_positions_and_mask_may_be_missing_and_layers_may_differ(
    changes: dict[str, Value | None], program: attnopt.Program
):
    found = graph(**changes)
    assert fits(program, found) is True
    made = content(program, found, "model.onnx")
    assert conforms(made)
    decoder_ = made["model"]["decoder"]
    assert decoder_["num_key_value_heads"] == 4
    given = {n for n in ("position_ids", "attention_mask") if n in decoder_["inputs"]}
    assert given == {"position_ids", "attention_mask"} - changes.keys()


def with_config(program: attnopt.Program, generation: dict[str, Any], **changes: Any) -> Any:
    config = transformers.LlamaConfig(vocab_size=61, bos_token_id=None, **changes)
    source = replace(program.source, generation_config=transformers.GenerationConfig(**generation))
    return replace(program, config=config, source=source)


@pytest.mark.parametrize(
    ("generation", "changes", "expected"),
    [
        ({}, {"eos_token_id": 5}, {"eos_token_id": 5, "pad_token_id": 5}),
        ({}, {"eos_token_id": [5, 6]}, {"eos_token_id": [5, 6], "pad_token_id": 5}),
        ({"eos_token_id": [7]}, {"eos_token_id": 5}, {"eos_token_id": 7, "pad_token_id": 7}),
        ({"pad_token_id": -1}, {"eos_token_id": 5}, {"eos_token_id": 5, "pad_token_id": 5}),
        (
            {"pad_token_id": 0, "bos_token_id": 3},
            {"eos_token_id": 5},
            {"eos_token_id": 5, "pad_token_id": 0, "bos_token_id": 3},
        ),
    ],
)
def test_texts_end_as_in_the_source(
    generation: dict[str, Any],
    changes: dict[str, Any],
    expected: dict[str, Any],
    program: attnopt.Program,
):
    made = content(with_config(program, generation, **changes), graph(), "model.onnx")
    assert conforms(made)
    assert {k: v for k, v in made["model"].items() if k.endswith("_token_id")} == expected


def test_the_search_is_that_of_the_source(program: attnopt.Program):
    given = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    made = content(with_config(program, given), graph(), "model.onnx")
    assert conforms(made)
    assert {n: made["search"][n] for n in given} == given


def test_a_type_that_genai_runs_in_its_own_way_is_a_decoder(program: attnopt.Program):
    for config, kind in (
        (transformers.Phi3Config(), "decoder"),
        (transformers.GptOssConfig(), "gptoss"),
        (transformers.BloomConfig(), "decoder"),
        (transformers.Qwen3Config(), "qwen3"),
    ):
        made = content(replace(program, config=config), graph(), "model.onnx")
        assert conforms(made)
        assert made["model"]["type"] == kind


def test_what_generates_nothing_is_refused_before_the_export(program: attnopt.Program):
    for changes, told in (
        ({"parts": {"decoder": program}}, "it is no decoder alone"),
        ({"states": ()}, "it keeps no cache"),
        ({"config": None}, "it has no config"),
        (vars(with_config(program, {}, eos_token_id=None)), "no eos_token_id ends its texts"),
    ):
        with pytest.raises(NotImplementedError, match=told):
            refuse_early(replace(program, **changes))


def test_a_checkpoint_that_generates_nothing_ends_in_one_line(tmp_path: Path, capsys: Any):
    words = ["export", str(MODEL.with_name("vit-digits")), "--to", "ort-genai"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 3
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("AO203 ONNX Runtime GenAI cannot run ViTForImageClassification: ")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights whose second layer has fewer heads, with a tokenizer's files."""
    folder = tmp_path_factory.mktemp("genai")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=61,
        max_position_embeddings=127,
        eos_token_id=1,
    )
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {1: {"num_key_value_heads": 2}}
    config.attnopt = {"format": 1, "min_reader": 1, "tier": 1}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        # It says 0 often, and never its last word.
        model.lm_head.weight[[0, 5]] = model.lm_head.weight[[5, 0]].clone()
        model.lm_head.weight[1] = 0
    model.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).write_bytes((MODEL / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    words = ["export", str(tiny / "model"), "--to", "ort-genai", "-o", str(tiny / "out")]
    assert main([*words, "--steps", "4"]) == 0
    return tiny / "out"


def test_all_that_genai_reads_lies_in_one_folder(exported: Path):
    found = {p.name for p in exported.iterdir()} - {"attnopt"}
    assert found == {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    listed = json.loads((exported / "attnopt/manifest.json").read_text())["files"]
    assert found <= listed.keys()
    made = json.loads((exported / "genai_config.json").read_text())
    assert conforms(made)
    assert (made["model"]["type"], made["model"]["context_length"]) == ("llama", 127)


def test_each_layer_has_its_own_heads_in_the_file(exported: Path):
    inputs = Graph.read(exported / "model.onnx").inputs
    shapes = [inputs[f"past_key_values.{n}.key"].shape for n in (0, 1)]
    assert [(shape[1], shape[3]) for shape in shapes] == [(4, 8), (2, 8)]


def genai(folder: Path, **asked: Any) -> list[Any]:
    """Run a folder in GenAI, or skip where it is not installed."""
    there = subprocess.run([PYTHON, "-c", "import onnxruntime_genai"], capture_output=True)
    if there.returncode:
        pytest.skip("onnxruntime_genai is not installed here, and no GENAI_PYTHON has it")
    script = Path(__file__).with_name("genai_run.py")
    command = [PYTHON, str(script), str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    runs: list[Any] = json.loads(done.stdout.splitlines()[-1])["runs"]
    return runs


@torch.no_grad()
def transformers_says(model: Any, prompts: list[list[int]], steps: int) -> list[list[int]]:
    found: list[list[int]] = []
    for ids in prompts:
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=steps, do_sample=False, pad_token_id=0
        )
        found.append(made[0, len(ids) :].tolist())
    # GenAI leaves out the token that ends a text.
    end = model.generation_config.eos_token_id
    return [f[:-1] if f[-1] == end else f for f in found]


def test_layers_with_different_heads_generate_the_same_in_genai(tiny: Path, exported: Path):
    prompts = [[2, 5, 6, 7], [3], [5, 6], [9, 8, 30, 17, 11]]
    runs = genai(exported, prompts=prompts, steps=40)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny / "model")
    wanted = transformers_says(model, prompts, 40)
    assert [r["made"][0] for r in runs] == wanted
    assert any(0 in w for w in wanted)


def test_a_batch_padded_on_the_right_generates_the_same_in_genai(tiny: Path, exported: Path):
    """So GenAI pads; to it, a padding token before another is a token."""
    overlay = {"model": {"pad_token_id": 60}}
    (run,) = genai(exported, prompts=[[[5, 6, 60, 60], [2, 9, 8, 30]]], steps=20, overlay=overlay)
    model = transformers.LlamaForCausalLM.from_pretrained(tiny / "model")
    assert run["made"] == transformers_says(model, [[5, 6], [2, 9, 8, 30]], 20)


@pytest.mark.slow
def test_the_bundled_checkpoint_writes_the_same_text_in_genai(tmp_path: Path):
    assert main(["export", str(MODEL), "--to", "ort-genai", "-o", str(tmp_path / "out")]) == 0
    runs = genai(tmp_path / "out", prompts=PROMPTS, steps=STEPS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert [r["ids"] for r in runs] == ids
    wanted = transformers_says(model, ids, STEPS)
    assert [r["made"][0] for r in runs] == wanted
    assert [r["text"] for r in runs] == [tokenizer.decode(w) for w in wanted]
    assert all(len(w) == STEPS for w in wanted)


# Learned positions, ALiBi without positions, soft caps, windows, one head for all, sinks.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "mistral", "falcon_mq", "gpt_oss"])
def test_the_zoo_generates_the_same_in_genai(name: str, tmp_path: Path):
    model, _, _ = zoo.build(name, task="lm", attn="eager")
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    attnopt.export_onnx(attnopt.capture(model), tmp_path / "out", steps=4, genai=True)
    prompts = [[3, 5, 6, 7], [9, 8, 30, 17, 11]]
    runs = genai(tmp_path / "out", prompts=prompts, steps=32)
    assert [r["made"][0] for r in runs] == transformers_says(model, prompts, 32)


@pytest.mark.slow
def test_keys_wider_than_values_are_refused(tmp_path: Path):
    model, _, _ = zoo.build("deepseek_v3", task="lm", attn="eager")
    with pytest.raises(NotImplementedError, match=r"keys .* and values .* are unlike"):
        attnopt.export_onnx(attnopt.capture(model), tmp_path / "out", steps=4, genai=True)
