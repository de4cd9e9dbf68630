"""An encoder-decoder from a goal to a directory that plain Transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import attnopt
from attnopt.data import batches_of

VOCABULARY = 43


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=3,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return attnopt.capture(folder)


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_rows_of_text_are_read_and_gone_on_with(program: Any):
    (call,) = batches_of(program, ids(3, 9))
    assert torch.equal(call["input_ids"], ids(3, 9)[:, :4])
    assert torch.equal(call["decoder_input_ids"][:, 1:], ids(3, 9)[:, 4:-1])
    assert not call["decoder_input_ids"][:, 0].any()
    (told,) = batches_of(program, ids(3, 9), labels=True)
    assert list(told) == ["input_ids"]


@pytest.mark.parametrize("pairs", [True, False])
def test_neurons_that_go_leave_a_stock_checkpoint(program: Any, pairs: bool, tmp_path: Path):
    rows: Any = ids(20, 12)
    data = {"input_ids": rows, "decoder_input_ids": rows.flip(1)[:, :5]} if pairs else rows
    result = attnopt.optimize(program, {"params": 0.9}, data=data, out=tmp_path / "out")
    assert result.plan.choices
    assert result.measured is not None
    assert result.measured["tier"] == 0
    assert result.measured["stock_error"] < 1e-4
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    call = {"input_ids": rows[:2], "decoder_input_ids": rows[:2, :5]}
    with torch.no_grad():
        apart = (loaded(**call).logits - result.program.cast(torch.float32)(**call).logits).abs()
    assert float(apart.max()) < 1e-4
