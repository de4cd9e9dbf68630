"""Whether a model of the zoo is compiled with every attention rewritten, in ways that torch allows.

Where backend "eager" fails in the same place, without attnopt, the next way is tried, and what
torch cannot do in any of them is told apart from what we do wrong.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

import torch
import zoo_parity
from deploy_case import (
    DRAWS,
    Case,
    Decoded,
    DiffersError,
    Facts,
    LimitError,
    RefusedError,
    decoded,
    error_told,
    first_error,
    same_tokens,
)

import attnopt


@dataclass(frozen=True)
class Way:
    """How torch.compile is asked: for sizes that vary, with the numbers of tensors in the graph."""

    dynamic: bool = True
    scalars: bool = False

    def __str__(self) -> str:
        told = [] if self.dynamic else ["sizes fixed"]
        return ", ".join([*told, *["scalar outputs captured"] * self.scalars])


WAYS: Final = (Way(), Way(scalars=True), Way(dynamic=False), Way(dynamic=False, scalars=True))
"""Tried in turn; a later one where the earlier fails without attnopt, too."""
CUT: Final = "cut within the attention"
"""Words of the refusal of an attention of which dynamo hands over a part."""
READ: Final = "the attention weights are read elsewhere"
"""Words of the refusal of an attention whose weights a function of the source returns.

Where dynamo cuts the graph around that function, they are results of the graph.
"""
ASSEMBLED: Final = "assembled from pieces"
"""Words of the refusal of an attention that pass exact does not rewrite."""


def compiled_forward(case: Case, way: Way) -> Callable[..., Any]:
    """Compile the model in a way, once."""
    if way not in case.forwards:
        torch._dynamo.reset()
        options = {"backend": "attnopt", "options": {"inner": case.inner}}
        forward = case.subject.model.forward
        case.forwards[way] = torch.compile(forward, **options, dynamic=way.dynamic)
    return case.forwards[way]


@contextlib.contextmanager
def compiled(case: Case, way: Way) -> Iterator[Any]:
    """Give the stock model with a compiled forward, the same one for all checks of a process."""
    model = case.subject.model
    forward = compiled_forward(case, way)
    model.forward = forward
    attnopt.compile_report(reset=True)
    try:
        with torch._dynamo.config.patch(settings(way)):
            yield model
    finally:
        del model.forward


def settings(way: Way) -> dict[str, Any]:
    """Return what dynamo is told.

    Without the limits a model that recompiles often would run as it was, and say nothing.
    """
    never_give_up = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
    return {**never_give_up, "capture_scalar_outputs": way.scalars}


def in_a_way(case: Case, work: Callable[[Way], Facts], alone: Callable[[Case, Way], None]) -> Facts:
    """Try the ways to compile; where `alone` fails as well, without attnopt, go on to the next."""
    told: list[str] = []
    for way in WAYS:
        try:
            facts = work(way)
        except Exception as error:
            limit = limit_of_torch(case, way, error, alone)
            if not limit:
                raise
            told.append(f"{str(way) or 'as usual'}: {limit}")
        else:
            return {**facts, "way": str(way), "not_by_torch": told}
    raise LimitError("; ".join(told))


def limit_of_torch(
    case: Case, way: Way, error: Exception, alone: Callable[[Case, Way], None]
) -> str:
    """Say how backend "eager" fails in the same place; nothing where the failure is ours."""
    differs = isinstance(error, DiffersError)
    if differs and not getattr(error, "facts", {}).get("cut"):
        return ""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    try:
        with torch._dynamo.config.patch(settings(way)):
            alone(case, way)
    except Exception as other:
        same = type(other) is type(error) or type(other) is type(error.__cause__)
        return (
            f"backend 'eager' fails, too: {error_told(first_error(other))}"
            if same and not differs
            else ""
        )
    # A branch on data is in the second only; what follows any cut is in the third.
    kinds = ("graph_break", "unimplemented", "resumes")
    cuts = next((counters[kind] for kind in kinds if counters[kind]), {})
    if not differs or not cuts:
        return ""
    reasons = sorted({str(reason).strip().splitlines()[0] for reason in cuts})
    return f"dynamo cuts the graph within an attention for any backend: {'; '.join(reasons)[:200]}"


def call_alone(case: Case, way: Way) -> None:
    """Compile the stock model without attnopt, and call it."""
    stock = replace(case.another(), task="base")
    model = torch.compile(stock.model, backend="eager", dynamic=way.dynamic)
    for draw in range(DRAWS):
        zoo_parity.run(stock, model, zoo_parity.drawn(stock, draw))


def decode_alone(case: Case, way: Way) -> None:
    """Decode with the stock model, compiled without attnopt."""
    model = case.another().model
    model.forward = torch.compile(model.forward, backend="eager", dynamic=way.dynamic)
    decoded(model, case.subject.kwargs)


def check_compiled(case: Case) -> Facts:
    """Compile the model: every attention is rewritten, and it is as exact as the stock one."""
    try:
        return in_a_way(case, lambda way: compiled_facts(case, way), call_alone)
    except LimitError as limit:
        raise LimitError(f"{limit}; {lowered_instead(case)}") from limit


def lowered_instead(case: Case) -> str:
    """Compile what attnopt captured of a source that dynamo cannot read, and compare."""
    stock = replace(case.another(), task="base")
    lowered = attnopt.lower(case.program, "inductor")
    verdict = zoo_parity.parity(stock, {"lowered": lowered})["lowered"]
    if not verdict.passed:
        raise DiffersError(f"lowered to inductor, it is not as exact as the stock model: {verdict}")
    return f"lowered to inductor, it is as exact as the stock model: {verdict}"


def compiled_facts(case: Case, way: Way) -> Facts:
    """Compile in one way, and compare."""
    # Whole calls; decoding step by step is compared by its tokens.
    stock = replace(case.another(), task="base")
    with compiled(case, way) as model, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        verdict = zoo_parity.parity(stock, {"compiled": model})["compiled"]
        report = attnopt.compile_report()
    found = {site.name for site in report.found}
    facts: Facts = {
        "sites": case.sites,
        "found": len(found),
        "graphs_found": len(report.found),
        "graphs_rewritten": len(report.rewritten),
        "refused": sorted({str(no) for no in report.refused})[:4],
        "rms_ratio": verdict.rms_ratio,
        "peak_ratio": verdict.peak_ratio,
    }
    if not verdict.passed:
        raise DiffersError(f"not as exact as the stock model: {verdict}", **facts)
    if report.refused or report.rewritten != report.found:
        raise_left(report, **facts)
    if len(found) < case.sites:
        texts = (str(w.message) for w in told)
        why = next((text for text in texts if text.startswith("attnopt")), "no warning")
        raise DiffersError(f"found {len(found)} of {case.sites} attentions ({why})", **facts)
    return facts


def raise_left(report: Any, **facts: Any) -> NoReturn:
    """Raise what attentions that stay as they were mean."""
    reasons = [str(no) for no in report.refused] or ["no reason is given"]
    told = f"not all are rewritten: {reasons[0]}"
    read = sum(READ in reason for reason in reasons)
    # What is cut is no site; what is read elsewhere is one that stays, or a piece of one.
    left = len(report.found) - len(report.rewritten)
    whole = left == read or 0 < left < read
    if whole and all(CUT in reason or READ in reason for reason in reasons):
        raise DiffersError(told, **facts, cut=True)
    if all(CUT in reason or ASSEMBLED in reason for reason in reasons):
        raise RefusedError(told, **facts)
    raise DiffersError(told, **facts)


def check_tokens_compiled(case: Case) -> Facts:
    """Decode with the compiled stock model."""
    want = case.stock_tokens
    return in_a_way(case, lambda way: compiled_tokens(case, way, want), decode_alone)


def compiled_tokens(case: Case, way: Way, want: Decoded) -> Facts:
    """Decode with the model compiled in one way."""
    with compiled(case, way) as model:
        got = decoded(model, case.subject.kwargs)
        report = attnopt.compile_report()
    facts = same_tokens(got, want)
    if report.refused:
        raise_left(report, **facts)
    return facts
