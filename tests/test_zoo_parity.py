"""The exact program of a zoo model is as near to float64 as the model; its mutants are not."""

import pytest
import torch
import zoo
import zoo_parity
from parity import Gap, Verdict, judge

import attnopt

# The stock models warn about their own configs.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = (
    ("bert", "eager", "base"),
    ("bridgetower_like_clip", "eager", "base"),
    ("falcon_new", "eager", "base"),
    ("gpt2", "sdpa", "base"),
    ("llama", "eager", "lm"),
    ("swin", "eager", "base"),
    ("vit", "sdpa", "base"),
)
MUTATED = ("bert", "gpt_oss", "llama", "t5")


def subject_of(name: str, attention: str, task: str) -> zoo_parity.Subject:
    if not zoo.offers(name, attention, task):
        pytest.skip("no such attention in Transformers")
    return zoo_parity.subject(name, attention, task)


def verdict_of(name: str, attention: str, task: str) -> Verdict:
    if not zoo.offers(name, attention, task):
        pytest.skip("no such attention in Transformers")
    subject, program = zoo_parity.captured(name, attention, task)
    exact = attnopt.apply(program, "exact")
    return zoo_parity.parity(subject, {"exact": exact})["exact"]


@pytest.mark.parametrize(("name", "attention", "task"), SAMPLE)
def test_an_exact_program_is_as_near_to_float64_as_its_source(name, attention, task) -> None:
    verdict = verdict_of(name, attention, task)
    assert verdict.passed, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_exact_program_is_as_near_to_float64_as_its_source(name, attention) -> None:
    verdict = verdict_of(name, attention, "base")
    assert verdict.passed, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.LM)
def test_every_exact_program_decodes_as_near_to_float64_as_its_source(name, attention) -> None:
    verdict = verdict_of(name, attention, "lm")
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", MUTATED)
def test_the_comparison_notices_a_broken_model(name) -> None:
    verdicts = dict(zoo_parity.mutant_verdicts(zoo_parity.subject(name)))
    assert {"scale", "mask", "padding"} <= set(verdicts)
    assert not [label for label, verdict in verdicts.items() if verdict.passed]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name, entry in zoo.ZOO.items() if entry.sites])
def test_the_comparison_notices_every_way_to_break_a_model(name, attention) -> None:
    task = "lm" if name in zoo.LM else "base"
    subject = subject_of(name, attention, task)
    verdicts = dict(zoo_parity.mutant_verdicts(subject))
    assert not [label for label, verdict in verdicts.items() if verdict.passed]


def test_draws_differ_and_are_padded_at_both_sides() -> None:
    subject = zoo_parity.subject("bert")
    left, right = zoo_parity.drawn(subject, 0), zoo_parity.drawn(subject, 1)
    assert not torch.equal(left["input_ids"], right["input_ids"])
    assert left["attention_mask"][1, 0] == 0
    assert right["attention_mask"][1, -1] == 0


def test_an_error_a_third_larger_than_the_stock_one_fails() -> None:
    want = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stock, close, far = Gap(), Gap(), Gap()
    for gap, size in ((stock, 1e-5), (close, 1.2e-5), (far, 1.34e-5)):
        gap.add(want + size * noise, want)
    assert judge(close, stock).passed
    assert not judge(far, stock).passed


def test_what_few_roundings_make_passes_and_more_in_a_row_may_make_more() -> None:
    want = torch.ones(1000, dtype=torch.float64)
    stock, far = Gap(), Gap()
    stock.add(want, want)
    far.add(want + 3 * torch.finfo(torch.float32).eps, want)
    assert [judge(far, stock, depth=depth).passed for depth in (1, 2, 3)] == [False, False, True]


def test_one_far_number_fails() -> None:
    want = torch.ones(1000, dtype=torch.float64)
    stock, far = Gap(), Gap()
    stock.add(want + 1e-5, want)
    far.add(want + 1e-5 + 1.5e-5 * (torch.arange(1000) == 7), want)
    assert not judge(far, stock).passed


def test_a_number_that_is_not_finite_fails_even_where_it_is_not_compared() -> None:
    want = torch.ones(2, 3, dtype=torch.float64)
    got = want.clone()
    got[1, 0] = torch.nan
    seen = torch.tensor([[True] * 3, [False, True, True]])
    stock, broken = Gap(), Gap()
    stock.add(want, want, seen)
    broken.add(got, want, seen)
    assert not judge(broken, stock).passed
