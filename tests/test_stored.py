"""Tier 2: a program as a directory that loads as itself, and fails loudly as anything else."""

import contextlib
import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from dha_models import decoder, ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import attnopt
from attnopt.artifacts.manifest import IntegrityError, write_manifest
from attnopt.program import Program


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    decoder("llama").save_pretrained(folder)
    return attnopt.apply(attnopt.capture(folder), "exact")


@pytest.fixture(scope="module")
def saved(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attnopt.save(program, tmp_path_factory.mktemp("saved") / "out", tier=2)


def logits(model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**given).logits
    return found


def test_a_fresh_process_loads_generates_and_saves_it(program: Program, saved: Path) -> None:
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    twin: Any = attnopt.lower(program, "eager")
    way = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = (logits(twin, input_ids=tokens, attention_mask=mask), twin.generate(tokens, **way))
    place = saved.parent / "wanted.pt"
    torch.save((tokens, mask, want), place)
    ran = fresh(f"""
import sys, attnopt
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained({str(saved)!r}).model_type == "attnopt"
tokens, mask, (logits, text) = torch.load({str(place)!r})
for folder, then in (({str(saved)!r}, "again"), ({str(saved.parent / "again")!r}, "third")):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, logits)
    way = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(tokens, **way), text)
    model.save_pretrained({str(saved.parent)!r} + "/" + then)
""")
    assert ran.returncode == 0, ran.stderr
    for again in ("again", "third"):
        for name in ("attnopt/weights-00001.safetensors", "config.json"):
            assert (saved.parent / again / name).read_bytes() == (saved / name).read_bytes()


def test_without_attnopt_every_loader_fails_loudly(saved: Path) -> None:
    ran = fresh(f"""
import sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, pipeline
place = {str(saved)!r}
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(place),
    lambda: AutoModel.from_pretrained(place),
    lambda: LlamaForCausalLM.from_pretrained(place),
    lambda: LlamaModel.from_pretrained(place),
    lambda: pipeline("text-generation", model=place),
):
    try:
        load()
    except (ValueError, OSError) as error:
        print("refused:", type(error).__name__)
""")
    assert ran.stdout.count("refused:") == 5, ran.stderr


def test_it_can_be_captured_again(program: Program, saved: Path) -> None:
    again = attnopt.capture(saved)
    assert again.sites == program.sites
    assert again.states == program.states
    tokens = ids(2, 9)
    assert torch.equal(again(input_ids=tokens).logits, program(input_ids=tokens).logits)
    halved = attnopt.optimize(again, {"kv_cache": "50%"}, data=ids(8, 24))
    assert halved.measured is not None
    assert halved.measured["kv_bytes_per_token"] == [512, 256]


def test_what_is_loaded_generates_as_the_lowered_program_does(
    program: Program, saved: Path
) -> None:
    from transformers import GenerationConfig

    model: Any = attnopt.load(saved)
    tokens = ids(1, 5)
    want: Any = attnopt.lower(program, "eager")
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(tokens, generation_config=settings),
        want.generate(tokens, generation_config=copy.deepcopy(settings)),
    )


@pytest.mark.slow
def test_a_text_generation_pipeline_writes_what_the_stock_model_writes(tmp_path: Path) -> None:
    from transformers import pipeline

    source = Path(__file__).parents[1] / "examples/models/code-llama"
    attnopt.save(attnopt.apply(attnopt.capture(source), "exact"), tmp_path / "out", tier=2)
    way = {"max_new_tokens": 12, "do_sample": False}
    written = [
        pipeline("text-generation", model=str(place))("import ", **way)
        for place in (source, tmp_path / "out")
    ]
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["attn_implementation", "device_map", "load_in_8bit"])
def test_an_option_that_a_program_does_not_serve_is_refused(name: str, saved: Path) -> None:
    from attnopt.auto import AttnoptForCausalLM

    with pytest.raises(ValueError, match=f"{name}: a stored program takes dtype and backend"):
        AttnoptForCausalLM.from_pretrained(saved, **{name: "auto"})


def test_another_dtype_is_kept(saved: Path, tmp_path: Path) -> None:
    model: Any = attnopt.load(saved, dtype="float16")
    tokens = ids(2, 7)
    model.save_pretrained(tmp_path / "half")
    half: Any = attnopt.load(tmp_path / "half")
    assert half.dtype == torch.float16
    assert torch.equal(logits(half, input_ids=tokens), logits(model, input_ids=tokens))


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "vit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt2", "t5", "whisper", "detr", "mixtral", "mamba", "longformer", "sew_d")
        ),
    ],
)
def test_other_architectures_compute_the_same_bits(name: str, tmp_path: Path) -> None:
    task = "lm" if name in ("gpt2", "t5", "mixtral", "mamba") else "base"
    model, kwargs, _ = zoo.build(name, "eager", task=task, pad="left" if task == "lm" else "right")
    program = attnopt.apply(attnopt.capture(model, (), kwargs), "exact")
    attnopt.save(program, tmp_path / "out", tier=2)
    with torch.no_grad():
        want = zoo.first_tensor(attnopt.lower(program, "eager")(**kwargs))
        got = zoo.first_tensor(attnopt.load(tmp_path / "out")(**kwargs))
    assert torch.equal(got, want)
    again = attnopt.load(tmp_path / "out")
    again.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "out/attnopt").glob("weights*")):
        assert (tmp_path / "again/attnopt" / file.name).read_bytes() == file.read_bytes()


class Odd(nn.Module):
    """Attention of nobody's library, that takes and returns nested values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("shift", torch.randn(16), persistent=False)

    def forward(self, given: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        q, k, v = self.qkv(given["x"] + self.shift).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) * (scale / 4), -1)
        return {"out": [weights @ v, given["x"].sum()], "scale": scale}


def test_a_module_of_ones_own_is_stored_without_asking(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Odd().eval()
    program = attnopt.apply(attnopt.capture(module, ({"x": torch.randn(2, 8, 16)},)), "exact")
    attnopt.save(program, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["attnopt"]["tier"] == 2
    loaded = attnopt.load(tmp_path / "out")
    x = torch.randn(3, 5, 16)
    want, got = module({"x": x}), loaded({"x": x})
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="differs from the captured call"):
        loaded({"x": x}, scale=2.0)


def test_weights_are_written_in_shards_and_tied_ones_once(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=90, n_positions=64)
    model, kwargs = GPT2LMHeadModel(config).eval(), {"input_ids": ids(2, 9)}
    program = attnopt.capture(model, (), kwargs)
    attnopt.save(program, tmp_path / "out", tier=2, max_shard_size=20_000)
    files = sorted((tmp_path / "out/attnopt").glob("weights-*.safetensors"))
    assert len(files) > 2
    places = json.loads((tmp_path / "out/attnopt/program.json").read_text())["weights"]
    assert places["lm_head.weight"] == places["transformer.wte.weight"]
    again: Any = attnopt.load(tmp_path / "out")
    weights = dict(again.named_parameters(remove_duplicate=False))
    assert weights["lm_head.weight"] is weights["transformer.wte.weight"]
    with torch.no_grad():
        want = attnopt.lower(program, "eager")(**kwargs).logits
        assert torch.equal(again(**kwargs).logits, want)


def test_a_tier_that_cannot_hold_a_program_is_refused(program: Program, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="it is 0, 1 or 2"):
        attnopt.save(program, tmp_path / "out", tier=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="computes what no stock class does"):
        attnopt.save(replace(program, tier=2), tmp_path / "out", tier=0)
    attnopt.save(replace(program, tier=2), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["attnopt"]["tier"] == 2


def first(content: Any, op: str) -> Any:
    return next(n for n in content["graph"]["nodes"] if n.get("op", "").startswith(op))


def rename(content: Any, op: str) -> None:
    first(content, "aten.add.Tensor")["op"] = op


HOSTILE = {
    "an op that reads files": lambda c: rename(c, "aten.from_file.default"),
    "an op that writes": lambda c: rename(c, "aten.add_.Tensor"),
    "an op of another library": lambda c: rename(c, "quantized.linear.default"),
    "a python function": lambda c: rename(c, "os.system"),
    "a builtin": lambda c: rename(c, "operator.methodcaller"),
    "a class that runs code": lambda c: c["call"]["returns"].update({"class": "os:system"}),
    "a class of another module": lambda c: c["call"]["returns"].update(
        {"class": "transformers.utils.import_utils:importlib"}
    ),
    "a class that is no output": lambda c: c["call"]["returns"].update(
        {"class": "transformers.modeling_utils:PreTrainedModel"}
    ),
    "a file outside": lambda c: c["weights"].update({"lm_head.weight": ["../../x", "a"]}),
    "an absolute file": lambda c: c["weights"].update({"lm_head.weight": ["/etc/passwd", "a"]}),
    "a pickle": lambda c: c["weights"].update({"lm_head.weight": ["attnopt/weights.bin", "a"]}),
    "a tensor that is not there": lambda c: c["weights"].update(
        {"lm_head.weight": ["attnopt/weights-00001.safetensors", "absent"]}
    ),
    "a tensor too few": lambda c: c["weights"].pop("lm_head.weight"),
    "a name that is code": lambda c: first(c, "aten").update({"name": "x = evil()"}),
    "a node that is not there": lambda c: first(c, "aten.add").update({"args": [{"node": "no"}]}),
    "a size that is code": lambda c: c["graph"]["nodes"][0]["value"].update(
        {"shape": [["__import__", "os"]]}
    ),
    "an unknown dtype": lambda c: c["states"][0].update({"dtype": "save"}),
    "an unknown constant": lambda c: first(c, "aten.add").update({"args": [{"dtype": "load"}]}),
    "another format": lambda c: c.update({"format": 99}),
    "no graph": lambda c: c.pop("graph"),
    "another kind of input": lambda c: c["bindings"].update({"input_ids": ["parameter", "no"]}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_program_is_refused(change: Any, saved: Path, tmp_path: Path) -> None:
    out = copied(saved, tmp_path)
    content = json.loads((out / "attnopt/program.json").read_text())
    change(content)
    (out / "attnopt/program.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="does not match"):
        attnopt.load(out)
    write_manifest(out)
    with pytest.raises(IntegrityError, match="is broken"):
        attnopt.load(out)


def copied(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_harmed_program_is_refused_in_one_way(saved: Path, tmp_path: Path) -> None:
    """Whatever a character becomes: the program is the same for its purposes, or it is refused."""
    out = copied(saved, tmp_path)
    place = out / "attnopt/program.json"
    text = place.read_text()
    draw = random.Random(0)
    for _ in range(15):
        at = draw.randrange(len(text))
        place.write_text(text[:at] + draw.choice('0]}"x,') + text[at + 1 :])
        with contextlib.suppress(IntegrityError):
            attnopt.load(out, strict=False)
