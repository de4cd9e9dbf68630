"""Encoders, classifiers and sites: what is compared, and what the gate makes of it."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dha_models import decoder, ids
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

import attnopt
from attnopt.nouns import No
from attnopt.verifying import sites


class States(nn.Module):
    """Returns what it is given as the states of its tokens, turned by some angle."""

    def __init__(self, turn: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.turn, self.scale = torch.tensor(turn), scale

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None) -> BaseModelOutput:
        c, s = self.turn.cos(), self.turn.sin()
        turned = inputs_embeds @ torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
        return BaseModelOutput(last_hidden_state=self.scale * turned)


class Answers(nn.Module):
    """A classifier whose answer is its input, but for some rows."""

    def __init__(self, wrong: tuple[int, ...] = (), value: float = 1.0) -> None:
        super().__init__()
        self.wrong, self.value = wrong, value

    def forward(self, pixel_values: Tensor) -> SequenceClassifierOutput:
        rows = pixel_values[:, 0].long()
        moved = torch.tensor([int(r) in self.wrong for r in rows])
        answers = (rows + moved.long()) % 4
        return SequenceClassifierOutput(logits=functional.one_hot(answers, 4) * self.value)


def rows(count: int) -> Tensor:
    return torch.arange(count).float()[:, None]


def embeds(count: int) -> Tensor:
    return torch.randn(count, 5, 2, generator=torch.Generator().manual_seed(0))


def test_the_drop_of_an_embedding_is_how_far_it_turns():
    report = attnopt.verify(States(0.3), States(), {"inputs_embeds": embeds(30)})
    assert report.task == "embedding"
    assert report.drop.mean == pytest.approx(1 - torch.tensor(0.3).cos().item(), rel=1e-4)
    content = report.content()
    assert content["drop_is"] == "1 - cosine of the embeddings"
    # A turn of the whole space leaves all neighbours where they are.
    assert content["retrieval"]["mean"] == 1
    assert (
        attnopt.verify(States(scale=3.0), States(), {"inputs_embeds": embeds(30)}).drop.mean < 1e-9
    )


def test_neighbours_that_change_are_told():
    moved = embeds(30).flip(0)
    same = States()

    class Other(States):
        def forward(self, inputs_embeds: Tensor, attention_mask: Any = None) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=moved)

    report = attnopt.verify(Other(), same, {"inputs_embeds": embeds(30)}, max_drop=0.01)
    assert report.content()["retrieval"]["mean"] < 0.9
    assert not report.accepted


def test_padding_is_no_part_of_an_embedding():
    values, mask = embeds(12), torch.ones(12, 5, dtype=torch.long)
    mask[:, 3:] = 0
    noisy = values.clone()
    noisy[:, 3:] = torch.nan
    calls = [{"inputs_embeds": v, "attention_mask": mask} for v in (values, noisy)]
    for call in calls:
        report = attnopt.verify(States(0.2), States(), call)
        assert report.drop.mean == pytest.approx(1 - torch.tensor(0.2).cos().item(), rel=1e-4)
    report = attnopt.verify(States(), States(), {"inputs_embeds": noisy})
    assert not report.accepted


def test_a_captured_encoder_is_an_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    model = BertModel(BertConfig(vocab_size=61, intermediate_size=31, **sizes)).eval()
    given = {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9).long()}
    program = attnopt.capture(model, (), given)
    exact = attnopt.apply(program, "exact")
    report = attnopt.verify(exact, program, ids(30, 9), max_drop=1e-6)
    assert report.task == "embedding"
    assert report.accepted
    assert list(report.sites) == [t.name for t in (*program.sites, *program.mlps)]
    stats = attnopt.calibrate(exact, ids(30, 9))
    assert stats.tokens == 30 * 8


def test_the_drop_of_a_classifier_is_of_its_accuracy():
    labels = rows(100)[:, 0].long() % 4
    labels[::10] = (labels[::10] + 1) % 4
    data = {"pixel_values": rows(100), "labels": labels}
    report = attnopt.verify(Answers((1, 2, 3, 10)), Answers(), data, max_drop=0.2)
    content = report.content()
    assert report.task == "classification"
    assert content["drop_is"] == "fall of the accuracy"
    assert content["reference_accuracy"] == pytest.approx(0.9)
    # Three lost, and the tenth one won.
    assert content["accuracy"] == pytest.approx(0.88)
    assert report.drop.mean == pytest.approx(0.02)
    assert content["disagreement"]["mean"] == pytest.approx(0.04)
    assert report.accepted
    low, high = report.drop.ci95
    # Tango's interval of 3 lost and 1 won of 100: where the score is 1.96 standard errors.
    assert low < 0 < report.drop.mean < high < 0.08


def test_the_drop_without_labels_is_the_share_of_other_answers():
    report = attnopt.verify(Answers((1, 2)), Answers(), rows(100))
    assert report.content()["drop_is"] == "other answers"
    assert report.drop.mean == pytest.approx(0.02)
    # Clopper and Pearson, 2 of 100.
    assert report.drop.ci95 == pytest.approx((0.00243, 0.07038), abs=1e-5)


def test_few_rows_without_a_difference_do_not_pass_a_tight_gate():
    few = attnopt.verify(Answers(), Answers(), rows(96), max_drop=0.01)
    assert few.drop.mean == 0
    assert not few.accepted
    assert "these rows cannot show less" in few.verdict
    assert attnopt.verify(Answers(), Answers(), rows(400), max_drop=0.01).accepted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_out_of_numbers_that_are_none_are_never_accepted(value: float):
    for pair in ((Answers(value=value), Answers()), (Answers(), Answers(value=value))):
        assert not attnopt.verify(*pair, rows(100)).accepted
        data = {"pixel_values": rows(100), "labels": torch.zeros(100).long()}
        assert not attnopt.verify(*pair, data, max_drop=1e6).accepted


class Tags(nn.Module):
    """A classifier of tokens, other than its input for one of them."""

    config = SimpleNamespace(vocab_size=61)

    def __init__(self, other: int = -1) -> None:
        super().__init__()
        self.other = other

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> TokenClassifierOutput:
        answers = (input_ids + (input_ids == self.other)) % 3
        return TokenClassifierOutput(logits=functional.one_hot(answers, 3).float())


def test_tokens_are_classified_one_by_one():
    given, mask = ids(40, 9), torch.ones(40, 9, dtype=torch.long)
    mask[:, 7:] = 0
    labels = (given % 3).masked_fill(mask == 0, -100)
    data = {"input_ids": given, "attention_mask": mask, "labels": labels}
    report = attnopt.verify(Tags(5), Tags(), data)
    assert report.task == "classification"
    want = float((given[:, :7] == 5).double().mean())
    assert report.drop.mean == pytest.approx(want)
    assert report.content()["answers"] == 40 * 7


def test_labels_of_another_shape_are_refused():
    data = {"pixel_values": rows(8), "labels": torch.zeros(8, 2).long()}
    with pytest.raises(ValueError, match=r"labels have shape \[8, 2\]; the logits ask for \[8\]"):
        attnopt.verify(Answers(), Answers(), data)


def test_a_result_of_an_unknown_kind_asks_for_the_task():
    class Box(nn.Module):
        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"boxes": pixel_values}

    with pytest.raises(ValueError, match="cannot tell the task from a result of boxes"):
        attnopt.verify(Box(), Box(), rows(8))
    with pytest.raises(TypeError, match="a Program or a module can be compared, not int"):
        attnopt.verify(7, Box(), rows(8))


def test_the_error_of_each_site_is_that_of_its_output_projection():
    model = decoder("llama")
    other = decoder("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.mul_(0.5)
    example = {"input_ids": ids(2, 9)}
    programs = [attnopt.apply(attnopt.capture(m, (), example), "exact") for m in (other, model)]
    mask = torch.ones(3, 9, dtype=torch.long)
    found = attnopt.verify(*programs, {"input_ids": ids(3, 9)}).sites
    first, second = (found[s.name] for s in programs[1].sites)
    assert first == 0
    # Half of the values is half of the result: |y - y/2|^2 / |y|^2.
    assert second == pytest.approx(0.25, rel=1e-4)
    assert attnopt.verify(other, model, ids(3, 9)).sites == {}
    mask[1, :4] = 0
    try_padded = {"input_ids": ids(3, 9), "attention_mask": mask}
    masked = [
        attnopt.apply(
            attnopt.capture(m, (), {**example, "attention_mask": torch.ones(2, 9).long()}), "exact"
        )
        for m in (other, model)
    ]
    errors = sites.site_errors(*masked, try_padded)
    assert errors[masked[1].sites[1].name] == pytest.approx(0.25, rel=1e-4)


def test_sites_that_cannot_be_matched_say_why():
    program = attnopt.apply(
        attnopt.capture(decoder("llama"), (), {"input_ids": ids(2, 9)}), "exact"
    )
    name = program.sites[0].name
    stranger = SimpleNamespace(name="mlp", projections={})
    patched = attnopt.apply(program, "exact")
    object.__setattr__(patched, "mlps", (stranger,))
    found = sites.site_errors(patched, patched, {"input_ids": ids(2, 9)})
    assert found[name] == 0
    assert isinstance(found["mlp"], No)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a harness in place that scores a model by one of its logits."""
    seen: list[Any] = []

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any) -> None:
            self.pretrained, self.tokenizer = pretrained, tokenizer

    def simple_evaluate(model: HFLM, tasks: list[str]) -> dict[str, Any]:
        seen.append((model.tokenizer, tasks))
        if "nothing" in tasks:
            raise KeyError("nothing")
        value = float(model.pretrained(input_ids=ids(1, 4)).logits[0, 0, 0])
        scores = {"alias": "a", "acc,none": value, "acc_stderr,none": "N/A", "f1,strict": 0.5}
        return {"results": dict.fromkeys(tasks, scores)}

    top, models, huggingface = (ModuleType(n) for n in ("lm_eval", "models", "huggingface"))
    top.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM
    monkeypatch.setitem(sys.modules, "lm_eval", top)
    monkeypatch.setitem(sys.modules, "lm_eval.models", models)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    monkeypatch.setattr("attnopt.data.reading.tokenizer_of", lambda program: "its tokenizer")
    return seen


def test_tasks_of_the_harness_are_told_for_both_and_not_judged(harness: list[Any]):
    model, other = decoder("llama"), decoder("llama", seed=1)
    report = attnopt.verify(other, model, ids(8, 9), tasks=("a", "b"))
    values = [float(m(input_ids=ids(1, 4)).logits[0, 0, 0]) for m in (model, other)]
    assert report.benchmarks["b"] == {"acc": tuple(values), "f1,strict": (0.5, 0.5)}
    assert report.content()["benchmarks"]["a"]["acc"] == values
    assert harness == [("its tokenizer", ["a", "b"])] * 2
    assert report.accepted
    with pytest.raises(ValueError, match="knows no task 'nothing'"):
        attnopt.verify(other, model, ids(8, 9), tasks=("nothing",))


def test_the_harness_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = decoder("llama")
    with pytest.raises(ValueError, match=r"pip install 'attnopt\[lm-eval\]'"):
        attnopt.verify(model, model, ids(8, 9), tasks=("a",))
