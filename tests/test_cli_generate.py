"""`attnopt generate`: what it writes, and what it says of wrong settings."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnopt.cli import main

pytestmark = pytest.mark.usefixtures("captured_once")
ROOT = Path(__file__).parents[1]
LLAMA = str(ROOT / "examples/models/code-llama")
PROMPTS = ["import ", "def main(argv):"]


def stock(**way: object) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(LLAMA, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(7)
    rows = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=12,
        **way,
    )
    start = given["input_ids"].shape[1]
    return list(tokenizer.batch_decode(rows[:, start:], skip_special_tokens=True))


WAYS: dict[str, tuple[list[str], dict[str, object]]] = {
    "greedy": ([], {"do_sample": False}),
    "beams": (["--beams", "3"], {"do_sample": False, "num_beams": 3}),
    "sampling": (["--sample", "--top-k", "20", "--seed", "7"], {"do_sample": True, "top_k": 20}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_it_writes_what_the_stock_model_writes(way, capsys):
    flags, settings = way
    words = ["generate", LLAMA, *PROMPTS, "--max-new-tokens", "12", "--json", *flags]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert [w["prompt"] for w in document["written"]] == PROMPTS
    assert [w["text"] for w in document["written"]] == stock(**settings)


def test_prompts_come_from_a_file_and_are_printed_with_what_follows(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["generate", LLAMA, "--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12"]
    assert main(words) == 0
    want = "\n\n".join(p + t for p, t in zip(PROMPTS, stock(do_sample=False), strict=True))
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--backend", "egaer"], "did you mean 'eager'"),
        (["--top-k", "5"], "--top-k needs --sample"),
        (["--sample", "--top-p", "1.5"], "at most 1"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--stream", "--beams", "2"], "exclude each other"),
        (["another", "--stream"], "give one PROMPT"),
        (["--file", "missing.txt"], "cannot read missing.txt"),
        ([""], "a prompt is empty"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(flags, words, capsys):
    assert main(["generate", LLAMA, "import ", *flags]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.strip().splitlines()) == 1


def test_a_model_that_writes_nothing_is_refused(capsys):
    assert main(["generate", str(ROOT / "examples/models/vit-digits"), "import "]) == 3
    assert "does not generate" in capsys.readouterr().err
