"""What the finder says of the zoo's sites agrees with the models' configs."""

from typing import Any

import pytest
import torch
import zoo
import zoo_facts
import zoo_parity
from site_facts import ANY, Expected, all_mismatches

import attnopt
from attnopt.nouns import Mask

# The stock models warn about their own configs.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLE = (
    "bert",
    "bloom",
    "falcon_new",
    "gemma2",
    "gpt_neo",
    "gpt_oss",
    "modernbert",
    "resnet",
    "siglip_vision",
)
WINDOWS = (1024, 4096, 8192)


def check(name: str, attention: str, task: str, **options: Any) -> None:
    if not zoo.offers(name, attention, task):
        pytest.skip("no such attention in Transformers")
    subject, program = zoo_parity.captured(name, attention, task, **options)
    expected = zoo_facts.expected(name, subject.model.config, subject.kwargs, task)
    assert len(program.sites) == zoo.ZOO[name].sites, near_misses(program)
    assert all_mismatches(program.sites, expected) == ()


def near_misses(program: attnopt.Program) -> str:
    return "\n".join(f"{miss.module} {miss.node}: {miss.why}" for miss in program.near_misses)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_facts_of_a_site_agree_with_the_config(name: str) -> None:
    check(name, "eager", "base")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_the_facts_of_every_site_agree_with_the_config(name: str, attention: str) -> None:
    check(name, attention, "base")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.LM)
def test_the_facts_of_every_cached_site_agree_with_the_config(name: str, attention: str) -> None:
    check(name, attention, "lm")


@pytest.mark.parametrize(
    ("name", "window"),
    [("mistral", 1024), pytest.param("llama4_text", 8192, marks=pytest.mark.slow)],
)
def test_a_window_larger_than_the_example_is_read_from_the_graph(name: str, window: int) -> None:
    check(name, "eager", "base", window=window, positions=4 * window)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", zoo.WINDOWED)
def test_every_window_is_read_at_its_real_size(name: str, window: int, attention: str) -> None:
    check(name, attention, "base", window=window, positions=4 * window)


# The table itself, against the scores that the stock models compute.

UNSEEN = -1e3
BLOCKWISE = ("longformer", "longformer_global", "led", "longt5_local", "big_bird_sparse")
# Softmaxes of experts, of landmarks, inside torch.nn.MultiheadAttention, or of another name.
OTHER_SOFTMAX = (
    "reformer",
    "nystromformer",
    "siglip_vision",
    "switch_transformers",
    *BLOCKWISE,
)


def scores_of(model: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Record what goes into every softmax over the last of 3 or more axes."""
    seen: list[torch.Tensor] = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") == "softmax" and args[0].dim() >= 3:
                scores = args[0].detach()
                if not seen or seen[-1].data_ptr() != scores.data_ptr():
                    seen.append(scores)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        model(**kwargs)
    return seen


def visible(mask: Mask, queries: int, keys: int) -> torch.Tensor:
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if mask.kind == "none":
        return torch.ones(queries, keys, dtype=torch.bool)
    if mask.kind == "chunked":
        return (k <= q) & (q // mask.window == k // mask.window)
    if mask.kind == "sliding" and mask.right is not None:
        return (q - k <= mask.window) & (k - q <= mask.right)
    if mask.kind == "sliding":
        return (k <= q) & (q - k < mask.window)
    return k <= q


def agrees(scores: torch.Tensor, facts: Expected) -> bool:
    if facts.sinks is True:
        scores = scores[..., :-1]
    queries, keys = scores.shape[-2:]
    heads_agree = scores.dim() != 4 or scores.shape[1] == facts.heads
    if not isinstance(facts.mask, Mask) or facts.kind == "cross":
        return heads_agree
    seen = (scores > UNSEEN).reshape(-1, queries, keys)
    return heads_agree and bool((seen == visible(facts.mask, queries, keys)).all())


# The rows that only slow tests read are checked by slow tests.
@pytest.mark.parametrize(
    "name",
    [
        n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow)
        for n in zoo.ZOO
        if n not in OTHER_SOFTMAX
    ],
)
def test_the_table_agrees_with_the_scores_of_the_stock_model(name: str) -> None:
    model, kwargs, count = zoo.build(name, pad="none")
    expected = zoo_facts.expected(name, model.config, kwargs)
    scores = scores_of(model, kwargs) if count else []
    assert len(expected) == len(scores) == count
    wrong = [i for i, (s, e) in enumerate(zip(scores, expected, strict=True)) if not agrees(s, e)]
    assert wrong == []


@pytest.mark.parametrize("name", OTHER_SOFTMAX)
def test_the_table_has_a_row_for_every_declared_site(name: str) -> None:
    model, kwargs, count = zoo.build(name)
    assert len(zoo_facts.expected(name, model.config, kwargs)) == count


def test_a_fact_that_is_not_settled_is_never_compared() -> None:
    assert all(getattr(Expected(), name) is ANY for name in ("heads", "scale", "mask"))


def test_what_transformers_does_not_have_is_known() -> None:
    assert zoo.offers("gemma2", "eager", "lm")
    assert not zoo.offers("gemma2", "sdpa", "lm")
    assert zoo.offers("llama", "sdpa")
    assert zoo.keeps_cache("gpt2")
    assert not zoo.keeps_cache("openai_gpt")
