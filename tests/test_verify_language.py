"""The loss of language models: causal, masked and encoder-decoder, with padding and labels."""

import math
from typing import Any

import pytest
import torch
from dha_models import decoder, ids
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutput

import attnopt


def harmed(model: nn.Module, seed: int = 0, size: float = 0.05) -> nn.Module:
    """Return a copy of a model with noise in its weights."""
    import copy

    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return decoder("llama")


def padded(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return rows with padding on the left, more of it from row to row."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(rows):
        mask[row, : row % 4] = 0
    return ids(rows, tokens), mask


def test_the_numbers_are_those_of_their_definitions(model: nn.Module):
    other, rows = harmed(model), ids(24, 13)
    report = attnopt.verify(other, model, rows)
    log_p, log_q = (m(input_ids=rows).logits[:, :-1].log_softmax(-1) for m in (model, other))
    took = rows[:, 1:, None]
    before, after = (-x.gather(2, took).squeeze(2).double() for x in (log_p, log_q))
    content = report.content()
    assert report.task == "lm"
    assert content["objective"] == "causal"
    assert report.tokens == 24 * 12
    assert report.base == pytest.approx(float(before.mean()), rel=1e-6)
    assert report.delta_nll.mean == pytest.approx(float((after - before).mean()), rel=1e-4)
    assert report.drop.mean == pytest.approx(float(after.sum() / before.sum()) - 1, rel=1e-4)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert content["kl"]["mean"] == pytest.approx(float(kl), rel=1e-4)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert content["agreement"]["mean"] == pytest.approx(float(same))
    assert content["perplexity"] == pytest.approx(math.exp(float(after.mean())), rel=1e-5)
    low, high = report.delta_nll.ci95
    assert low < report.delta_nll.mean < high


def test_the_interval_is_the_same_every_time_and_of_the_seed(model: nn.Module):
    other, rows = harmed(model), ids(24, 13)
    once, again = (attnopt.verify(other, model, rows).content() for _ in range(2))
    assert once == again
    turned = attnopt.verify(other, model, rows, seed=1).content()
    assert turned["drop"]["mean"] == once["drop"]["mean"]
    assert turned["drop"]["ci95"] != once["drop"]["ci95"]


def test_padding_counts_for_nothing(model: nn.Module):
    other, (rows, mask) = harmed(model), padded(8, 13)
    whole = attnopt.verify(other, model, {"input_ids": rows, "attention_mask": mask})
    assert whole.tokens == int((mask.sum(1) - 1).sum())
    real = [row[kept.bool()][None] for row, kept in zip(rows, mask, strict=True)]
    alone = [attnopt.verify(other, model, row) for row in real]
    for row, found in enumerate(alone):
        assert float(whole.nll[row]) == pytest.approx(float(found.nll[0]), abs=1e-5)
    total = sum(float(f.nll[0]) * f.tokens for f in alone) / whole.tokens
    assert whole.content()["nll"] == pytest.approx(total, abs=1e-5)


def test_labels_say_what_is_judged(model: nn.Module):
    rows = ids(4, 9)
    labels = rows.masked_fill(torch.arange(9) < 5, -100)
    report = attnopt.verify(model, model, {"input_ids": rows, "labels": labels})
    assert report.tokens == 4 * 4
    nothing = {"input_ids": rows, "labels": torch.full_like(rows, -100)}
    with pytest.raises(ValueError, match="no token to predict"):
        attnopt.verify(model, model, nothing)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=31,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return BertForMaskedLM(config).eval()


class Watched(nn.Module):
    """Keeps what a model was given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.given: list[dict[str, Any]] = []

    def forward(self, **given: Any) -> Any:
        self.given.append(given)
        return self.model(**given)


def test_a_masked_model_is_judged_on_what_is_masked():
    """What sees the tokens after it is told by trying; the loss at what it was given is none."""
    source = Watched(bert())
    source.config.mask_token_id = 60
    rows, mask = ids(8, 20).clamp(max=59), torch.ones(8, 20, dtype=torch.long)
    mask[3, 15:] = 0
    data = {"input_ids": rows, "attention_mask": mask}
    report = attnopt.verify(harmed(source.model), source, data)
    shown = source.given[-1]["input_ids"]
    hidden = shown == 60
    assert report.content()["objective"] == "masked"
    assert torch.equal(shown[~hidden], rows[~hidden])
    assert not (hidden & (mask == 0)).any()
    assert not hidden[:, 0].any()
    assert hidden.any(1).all()
    assert report.tokens == int(hidden.sum())
    logits = source.model(input_ids=shown, attention_mask=mask).logits
    want = functional.cross_entropy(logits[hidden], rows[hidden])
    assert report.base == pytest.approx(float(want.detach()), rel=1e-5)
    assert attnopt.verify(source, source, data).drop.mean == 0


def test_a_masked_model_without_a_mask_token_is_given_other_tokens():
    source = Watched(bert())
    report = attnopt.verify(source, source, ids(8, 20))
    shown = source.given[-1]["input_ids"]
    assert report.content()["objective"] == "masked"
    assert 0 < int((shown != ids(8, 20)).sum()) <= report.tokens


def test_an_encoder_decoder_is_judged_on_what_it_decodes():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=24,
        d_kv=8,
        d_ff=31,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
    )
    source = T5ForConditionalGeneration(config).eval()
    given, labels = ids(6, 9), ids(6, 7, seed=3)
    report = attnopt.verify(harmed(source), source, {"input_ids": given, "labels": labels})
    assert report.content()["objective"] == "seq2seq"
    want = source(input_ids=given, labels=labels).loss
    assert report.base == pytest.approx(float(want.detach()), rel=1e-5)
    halves = attnopt.verify(source, source, ids(6, 10))
    whole = ids(6, 10)
    want = source(input_ids=whole[:, :5], labels=whole[:, 5:].contiguous()).loss
    assert halves.base == pytest.approx(float(want.detach()), rel=1e-5)


class Fixed(nn.Module):
    """Gives logits that do not depend on what is before."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        logits = functional.one_hot(input_ids, 61).float()
        return CausalLMOutput(logits=logits.masked_fill(logits == 0, self.value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [None, 1e9])
def test_results_that_are_no_numbers_are_never_accepted(value: float, limit: float | None):
    good, bad = Fixed(0.1), Fixed(value)
    assert attnopt.verify(good, good, ids(8, 9), max_drop=limit).accepted
    for pair in ((bad, good), (good, bad), (bad, bad)):
        report = attnopt.verify(*pair, ids(8, 9), max_drop=limit, task="lm")
        assert not report.accepted
        assert report.content()["drop"] == {"mean": None, "ci95": [None, None]}
        if limit is not None:
            assert "REJECTED" in report.verdict


def test_the_bound_is_compared_and_not_what_is_shown_of_it(model: nn.Module):
    other, rows = harmed(model), ids(24, 13)
    high = attnopt.verify(other, model, rows).drop.ci95[1]
    assert attnopt.verify(other, model, rows, max_drop=high).accepted
    below = math.nextafter(high, 0)
    report = attnopt.verify(other, model, rows, max_drop=below)
    assert not report.accepted
    shown = report.verdict.split("upper bound ")[1].split(": REJECTED")[0].split(" > ")
    assert "REJECTED" in report.verdict
    near = attnopt.verify(other, model, rows, max_drop=high - 1e-7)
    shown = near.verdict.split("upper bound ")[1].split(": REJECTED")[0].split(" > ")
    assert float(shown[0][:-1]) > float(shown[1][:-1])


@pytest.mark.parametrize("limit", [math.nan, math.inf, -0.1])
def test_a_limit_that_is_none_is_refused(limit: float, model: nn.Module):
    with pytest.raises(ValueError, match="max_drop"):
        attnopt.verify(model, model, ids(8, 9), max_drop=limit)


def test_a_module_in_training_is_judged_without_dropout_and_left_in_training():
    source = bert().train()
    report = attnopt.verify(source, source, ids(8, 20))
    assert report.drop.mean == 0
    assert source.training
    assert source.bert.encoder.layer[0].attention.self.dropout.training


def test_other_tasks_have_no_nll():
    source = bert().bert
    report = attnopt.verify(source, source, ids(8, 20))
    assert report.task == "embedding"
    with pytest.raises(AttributeError, match="the task is embedding, which has no delta_nll"):
        _ = report.delta_nll
    with pytest.raises(ValueError, match="unknown task 'vision'; there is lm"):
        attnopt.verify(source, source, ids(8, 20), task="vision")
