"""The bundled checkpoint, halved: every way to run the result generates the same text."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import attnopt
from attnopt.backends.ort.parity import Run, run_onnxruntime
from attnopt.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL = Path(__file__).parents[1] / "examples" / "models" / "code-llama"
TOKENS = 64
LEAST_DISTINCT = 10
PROMPTS = (
    "def read_config(path):\n",
    "class Parser:\n    def __init__(self, text):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "    for name in names:\n        if name in self._cache:\n",
    'def dumps(obj, *, indent=None):\n    """Serialize obj to a string.\n',
    "    try:\n        value = int(text)\n    except ValueError:\n",
    "class Node(object):\n    def insert(self, key, value):\n",
    "def test_add(self):\n    a = Fraction(1, 3)\n",
)


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("agreement") / "out"
    words = ["optimize", str(MODEL), "-o", str(out), "--kv-cache", "50%", "--max-drop", "10%"]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def plain(halved: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(halved, dtype=torch.float32)
    assert all(type(m).__module__.partition(".")[0] != "attnopt" for m in model.modules())
    # Nothing ends a text early.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts(halved: Path) -> list[Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(halved)
    return [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]


@pytest.fixture(scope="module")
def wanted(plain: Any, prompts: list[Tensor]) -> list[Tensor]:
    return [generated(plain, ids) for ids in prompts]


def generated(model: Any, ids: Tensor) -> Tensor:
    found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    assert found.shape == (1, ids.shape[1] + TOKENS)
    return found


def stepped(program: attnopt.Program, ids: Tensor) -> Tensor:
    """Decode with nothing but the program and its states."""
    result = program(input_ids=ids)
    for _ in range(TOKENS):
        following = result.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, following], dim=1)
        result = program(input_ids=following, past_key_values=result.past_key_values)
    return ids


def test_the_texts_say_something(prompts: list[Tensor], wanted: list[Tensor]) -> None:
    for ids, whole in zip(prompts, wanted, strict=True):
        assert len(set(whole[0, ids.shape[1] :].tolist())) >= LEAST_DISTINCT


def test_the_program_agrees(plain: Any, prompts: list[Tensor], wanted: list[Tensor]) -> None:
    program = attnopt.apply(attnopt.capture(plain), "exact")
    lowered: Any = attnopt.lower(program, backend="eager")
    lowered.generation_config.eos_token_id = None
    for ids, want in zip(prompts, wanted, strict=True):
        with torch.no_grad():
            assert torch.equal(stepped(program, ids), want)
        assert torch.equal(generated(lowered, ids), want)


def test_the_compiled_model_agrees(halved: Path, prompts: list[Tensor], wanted: list[Tensor]):
    model = transformers.AutoModelForCausalLM.from_pretrained(halved, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.forward = torch.compile(model.forward, backend="attnopt", dynamic=True)
    attnopt.compile_report(reset=True)
    for ids, want in zip(prompts, wanted, strict=True):
        assert torch.equal(generated(model, ids), want)
    report = attnopt.compile_report()
    assert report.found
    assert report.rewritten == report.found


def test_onnx_runtime_agrees(
    halved: Path, tmp_path: Path, prompts: list[Tensor], wanted: list[Tensor]
) -> None:
    export = attnopt.export_onnx(halved, tmp_path / "onnx")
    assert export.accepted, export.content()
    runs = [
        Run(
            whole[:, :-1],
            torch.ones_like(whole[:, :-1]),
            (ids.shape[1], *[1] * (TOKENS - 1)),
            whole,
        )
        for ids, whole in zip(prompts, wanted, strict=True)
    ]
    logits = run_onnxruntime(export.path, runs)
    assert not isinstance(logits, str), logits
    for ids, whole, found in zip(prompts, wanted, logits, strict=True):
        # Each token is what ONNX Runtime chooses after the ones before it.
        assert torch.equal(found.argmax(-1)[:, ids.shape[1] - 1 :], whole[:, ids.shape[1] :])
