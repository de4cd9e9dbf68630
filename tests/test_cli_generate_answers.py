"""`attnopt generate` of an encoder-decoder: an answer of its own, not a continuation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from attnopt.cli import main

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "examples/models/code-llama"
PROMPT = "import os"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(AutoTokenizer.from_pretrained(LLAMA)),
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=3,
        decoder_start_token_id=0,
        initializer_factor=20.0,
    )
    T5ForConditionalGeneration(config).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LLAMA / name, place / name)
    return place


def test_all_of_the_answer_is_printed_and_nothing_else(folder: Path, capsys):
    assert main(["generate", str(folder), PROMPT, "--max-new-tokens", "6", "--json"]) == 0
    (written,) = json.loads(capsys.readouterr().out)["written"]
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    given = AutoTokenizer.from_pretrained(LLAMA)(PROMPT, return_tensors="pt")
    rows = model.generate(
        input_ids=given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=6,
        do_sample=False,
    )
    assert written["tokens"] == rows[0, 1:].tolist()
    assert len(written["tokens"]) > 1
