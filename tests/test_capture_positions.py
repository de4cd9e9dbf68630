"""Positions of models without a cache are inputs, and picks by a list of neighbours are slices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnopt

WAY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}


@pytest.fixture(scope="module")
def stock() -> Any:
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def padded() -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_row_padded_on_the_left_is_numbered_as_the_source_numbers_it(stock, tmp_path: Path):
    """Stored and loaded, too; where positions are left out, the source counts from 0."""
    program = attnopt.apply(attnopt.capture(stock, kwargs=padded()), "exact")
    want = stock.generate(**padded(), **WAY)
    seen = padded()["attention_mask"].bool()
    attnopt.save(program, tmp_path / "out", tier=2)
    for model in (attnopt.lower(program, "eager"), attnopt.load(tmp_path / "out")):
        assert torch.equal(model.generate(**padded(), **WAY), want)
        plain = stock(**padded()).logits[seen]
        torch.testing.assert_close(model(**padded()).logits[seen], plain)
        shifted = torch.arange(2, 9)[None]
        got = model(**padded(), position_ids=shifted).logits[seen]
        torch.testing.assert_close(got, stock(**padded(), position_ids=shifted).logits[seen])
        assert not torch.allclose(got, plain)


def test_a_class_without_a_source_file_is_captured_as_it_is(stock):
    """As one that was typed into an interpreter."""
    places: dict[str, Any] = {"Base": transformers.OpenAIGPTLMHeadModel}
    exec(
        "class Typed(Base):\n"
        "    def forward(self, input_ids=None, attention_mask=None, position_ids=None,\n"
        "                inputs_embeds=None):\n"
        "        given = (input_ids, attention_mask, None, position_ids)\n"
        "        return super(Typed, self).forward(*given)\n",
        places,
    )
    model = places["Typed"](stock.config).eval()
    program = attnopt.capture(model, kwargs=padded())
    torch.testing.assert_close(program(**padded()).logits, model(**padded()).logits)


def test_a_source_that_numbers_by_its_tokens_keeps_doing_so():
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=34, pad_token_id=1, is_decoder=False,
    )  # fmt: skip
    model = transformers.RobertaForCausalLM(config).eval()
    program = attnopt.capture(model, kwargs=padded())
    assert "position_ids" not in {b.name for b in program.bindings.values()}
    given = padded()
    given["input_ids"] = given["input_ids"].where(given["attention_mask"] > 0, 1)
    torch.testing.assert_close(program(**given).logits, model(**given).logits)


class Picks(nn.Module):
    """Picks by lists, of which the first two are of neighbours."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x[..., [-2], :], x[:, [-2, -1]].view(-1), x[:, [0, 2]], x[:, [-1, 0]]


def test_lists_of_neighbours_are_slices():
    program = attnopt.capture(Picks(), (torch.randn(2, 5, 3),))
    assert (
        len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)) == 2
    )
    x = torch.randn(2, 5, 3)
    assert all(torch.equal(a, b) for a, b in zip(program(x), Picks()(x), strict=True))
    assert {b.name for b in program.bindings.values() if b.kind == "constant"} <= set(
        program.weights
    )
    assert len(program.weights) == 2
