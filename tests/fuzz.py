"""Fuzz the finder and the exact rewrite with random spellings of attention and look-alikes.

    python tests/fuzz.py --cases 3000 --seed random
    python tests/fuzz.py --cases 200 --only lookalike
    python tests/fuzz.py --seed 7 --index 41 --shrink

A case is its seed and index. It must be found as often as it is there, with the right facts, and
the rewritten module must be as near to float64 as the stock one (see `parity`), at sizes that were
not captured, too. Exit status 1 where a case is missed, has a wrong fact or rewrite, crashes, or is
found without being there.
"""

import argparse
import copy
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from multiprocessing import get_context
from typing import Any, Final

import torch
from fuzz_grammar.cases import CAPTURED, Case, Size, draw
from fuzz_grammar.spec import Spec, repair
from parity import Gap, Verdict, exactly, judge, tensors_of
from site_facts import all_mismatches

import attnopt
from attnopt.finder.faults import FAULT

TIMEOUT: Final = 150.0
"""Seconds that one case may take."""
DRAWS: Final = 2
MORE_DRAWS: Final = 40
"""Where two draws differ too much: the largest of few errors is chance, of many it is not."""
ATTEMPTS: Final = 5
SLACK_PER_SIZE: Final = 10.0
"""One size alone has few numbers; all sizes together are judged without slack."""
REFUSED_SIZE: Final = "the captured graph takes"
"""How a program says that a size differs from what its capture allows."""
FAILURES: Final = ("missed", "false positive", "facts", "wrong rewrite", "wrong capture", "crash")


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a module: the sites it found, and the module before and after."""

    sites: tuple[Any, ...]
    near_misses: tuple[str, ...]
    refused: tuple[str, ...]
    rewritten: int
    captured: Callable[..., Any]
    exact: Callable[..., Any]


Compiler = Callable[[Case], Compiled]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a case."""

    category: str
    text: str


@dataclass(frozen=True)
class Result:
    """How a case went."""

    case: Case
    expected: int
    found: int
    rewritten: int
    problems: tuple[Problem, ...] = ()
    seconds: float = 0.0
    unexportable: tuple[str, ...] = ()
    narrowed: int = 0

    @property
    def categories(self) -> set[str]:
        return {problem.category for problem in self.problems}

    @property
    def failed(self) -> bool:
        return bool(self.categories & set(FAILURES))


def compile_exactly(case: Case) -> Compiled:
    """Capture, find and rewrite with attnopt."""
    program = attnopt.capture(case.module, (), case.inputs(CAPTURED, 0))
    sites, near = program.sites, program.near_misses
    exact = attnopt.apply(program, "exact")
    for text in (*map(str, near), *map(str, exact.refused)):
        if FAULT in text:
            raise RuntimeError(text)
    return Compiled(
        sites=tuple(sites),
        near_misses=tuple(f"{miss.module} {miss.node}: {miss.why}" for miss in near),
        refused=tuple(str(no) for no in exact.refused),
        rewritten=attention_nodes(exact),
        captured=program,
        exact=exact,
    )


def attention_nodes(program: Any) -> int:
    """Count the canonical attentions in a program and its parts."""
    own = sum(str(n.target).startswith("attnopt.attention") for n in program.graph.nodes)
    return own + sum(attention_nodes(part) for part in program.parts.values())


def check(case: Case, compiler: Compiler = compile_exactly) -> Result:
    """Run one case; a case that torch itself cannot export is replaced by another one.

    So is one for which it takes forever: its simplification of sizes may not come to an end.
    """
    start, unexportable, result = time.monotonic(), [], _in_time(case, compiler)
    while result.failed and case.attempt < ATTEMPTS:
        reason = export_failure(case)
        if reason is None:
            break
        unexportable.append(reason)
        only = "attention" if case.lookalike is None else case.lookalike
        case = draw(case.seed, case.index, only=only, attempt=case.attempt + 1)
        result = _in_time(case, compiler)
    seconds = time.monotonic() - start
    return replace(result, seconds=seconds, unexportable=tuple(unexportable))


def _in_time(case: Case, compiler: Compiler) -> Result:
    try:
        with limited(TIMEOUT):
            return _check(case, compiler)
    except OutOfTime as error:
        return Result(case, len(case.expected), 0, 0, (Problem("crash", str(error)),))


def _check(case: Case, compiler: Compiler) -> Result:
    expected = case.expected
    try:
        compiled = compiler(case)
    except Exception as error:  # a compiler that raises anything is a finding
        return Result(case, len(expected), 0, 0, (Problem("crash", shown(error)),))
    found = len(compiled.sites)
    problems = [*_counted(case, compiled)]
    if found == len(expected):
        problems += [Problem("facts", f) for f in all_mismatches(compiled.sites, expected)]
    if compiled.rewritten < found:
        problems += [Problem("refused", why) for why in compiled.refused or ("no reason",)]
    wrong, narrowed = _compared(case, compiled)
    problems += wrong
    return Result(
        case, len(expected), found, compiled.rewritten, tuple(problems), narrowed=narrowed
    )


def _counted(case: Case, compiled: Compiled) -> Iterator[Problem]:
    found, expected = len(compiled.sites), len(case.expected)
    if found > expected:
        names = ", ".join(str(getattr(site, "name", site)) for site in compiled.sites)
        yield Problem("false positive", f"found {found}, there are {expected}: {names}")
    if found < expected:
        near = "; ".join(compiled.near_misses) or "no near miss"
        yield Problem("missed", f"found {found} of {expected}: {near}")


@dataclass
class Gaps:
    """The distances of the three modules from float64."""

    stock: Gap = field(default_factory=Gap)
    captured: Gap = field(default_factory=Gap)
    exact: Gap = field(default_factory=Gap)


def _compared(case: Case, compiled: Compiled) -> tuple[list[Problem], int]:
    """Run the module, its float64 copy and the rewritten one at every size."""
    reference = exactly(copy.deepcopy(case.module).double())
    pooled, problems, narrowed = Gaps(), [], 0
    sizes: list[Size] = []
    for size in case.sizes:
        one = Gaps()
        try:
            for number in range(DRAWS):
                _measure(case, compiled, reference, case.inputs(size, number), (one, pooled))
        except Exception as error:  # as above
            if 1 in (size.batch, size.length):
                narrowed += 1
                continue
            category = "narrow" if REFUSED_SIZE in str(error) else "crash"
            problems.append(Problem(category, f"at {size}: {shown(error)}"))
            continue
        sizes.append(size)
        problem, at_one = _judged(case, one, size)
        narrowed += at_one
        problems += [problem] if problem else []
    if not {problem.category for problem in problems} - {"narrow"}:
        problem, _ = _judged(case, pooled, None)
        if problem:
            for size in sizes:
                for number in range(DRAWS, MORE_DRAWS):
                    _measure(case, compiled, reference, case.inputs(size, number), (pooled,))
            problem, _ = _judged(case, pooled, None)
        problems += [problem] if problem else []
    return problems, narrowed


def _measure(
    case: Case,
    compiled: Compiled,
    reference: Callable[..., Any],
    inputs: dict,
    gaps: Iterable[Gaps],
) -> None:
    with torch.no_grad():
        stock = tensors_of(case.module(**inputs))
        captured = tensors_of(_named("captured", compiled.captured)(**inputs))
        exact = tensors_of(_named("exact", compiled.exact)(**inputs))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    want, valid = tensors_of(reference(**wide)), case.valid(inputs)
    compared = 1 if valid is not None and not valid.all() else len(want)
    for at in range(compared):
        where = valid if compared == 1 else None
        for gap in gaps:
            gap.stock.add(stock[at], want[at], where)
            gap.captured.add(captured[at], want[at], where)
            gap.exact.add(exact[at], want[at], where)


def _named(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Say in an error which of the two programs raised it."""

    def run(**inputs: Any) -> Any:
        try:
            return call(**inputs)
        except Exception as error:  # raised again, with its stage
            error.args = (f"{stage}: {error}",)
            raise

    return run


def _judged(case: Case, gaps: Gaps, size: Size | None) -> tuple[Problem | None, int]:
    """Judge one size (with slack), or all of them; what export itself breaks at 1 is not ours."""
    slack, depth = 1.0 if size is None else SLACK_PER_SIZE, max(len(case.expected), 1)
    verdict = judge(gaps.exact, gaps.stock, case.dtype, slack=slack, depth=depth)
    if verdict.passed:
        return None, 0
    source = judge(gaps.captured, gaps.stock, case.dtype, slack=slack, depth=depth)
    if source.passed:
        return Problem("wrong rewrite", _verdict_text(verdict, size)), 0
    if size is not None and 1 in (size.batch, size.length):
        return None, 1
    return Problem("wrong capture", _verdict_text(source, size)), 0


def _verdict_text(verdict: Verdict, size: Size | None) -> str:
    return f"{size or 'all sizes'}: {verdict}"


def shown(error: BaseException) -> str:
    """Return an error with the last lines of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first[:300]} ({places})"


def export_failure(case: Case) -> str | None:
    """Say why torch cannot export a case with dynamic sizes; None where it can."""
    inputs = case.inputs(CAPTURED, 0)
    static = case.spec is not None and case.spec.static_length
    try:
        with limited(TIMEOUT):
            torch.export.export(
                case.module,
                (),
                inputs,
                dynamic_shapes={name: dynamic(name, case, static) for name in inputs},
                strict=False,
            )
    except (Exception, OutOfTime) as error:
        return shown(error)
    return None


def dynamic(name: str, case: Case, static: bool) -> dict[int, Any]:
    """Return which axes of an input vary."""
    size = torch.export.Dim.DYNAMIC
    if static:
        return {0: size}
    if name == "dense":
        pooled = case.spec is not None and case.spec.source == "pool"
        return {0: size, 3: size} if pooled else {0: size, 2: size, 3: size}
    return {0: size, 1: size}


def shrunk(case: Case, compiler: Compiler = compile_exactly) -> Result:
    """Reset features one by one as long as the case fails in the same way."""
    best = _check(case, compiler)
    if case.spec is None or not best.problems:
        return best
    moved = True
    while moved:
        moved = False
        for smaller in simpler(best.case):
            result = _check(smaller, compiler)
            if result.categories & best.categories and export_failure(smaller) is None:
                best, moved = result, True
                break
    return best


def simpler(case: Case) -> Iterator[Case]:
    """List the cases with one feature less."""
    assert case.spec is not None
    for f in fields(Spec):
        spec = repair(replace(case.spec, **{f.name: f.default}))
        if len(spec.described()) < len(case.spec.described()):
            yield replace(case, spec=spec)


class OutOfTime(BaseException):
    """Passes through whatever turns the errors of models into refusals."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Summary:
    """All results of a run."""

    seed: int
    results: tuple[Result, ...]

    def count(self, category: str) -> int:
        return sum(category in result.categories for result in self.results)

    @property
    def sites(self) -> int:
        return sum(result.expected for result in self.results)

    @property
    def found(self) -> int:
        return sum(min(result.found, result.expected) for result in self.results)

    @property
    def found_share(self) -> float:
        return self.found / self.sites if self.sites else 1.0

    @property
    def failed(self) -> bool:
        return any(result.failed for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        names = (*FAILURES, "refused", "narrow")
        return {
            "seed": self.seed,
            "cases": len(self.results),
            "lookalikes": sum(result.case.spec is None for result in self.results),
            "sites": self.sites,
            "found": self.found,
            "found share": round(self.found_share, 4),
            "rewritten": sum(result.rewritten for result in self.results),
            **{name: self.count(name) for name in names},
            "not exportable, redrawn": sum(len(result.unexportable) for result in self.results),
            "sizes that export excludes": sum(result.narrowed for result in self.results),
            "seconds": round(sum(result.seconds for result in self.results), 1),
        }

    def lines(self) -> Iterator[str]:
        for name, value in self.as_dict().items():
            yield f"{name:28} {value}"
        for why, count in self._reasons("refused").most_common(20):
            yield f"refused {count:5}: {why}"
        for feature, failed, drawn in self.suspects():
            yield f"suspect {failed} of {drawn} with {feature} have problems"

    def _reasons(self, category: str) -> Counter[str]:
        problems = (problem for result in self.results for problem in result.problems)
        return Counter(problem.text[:120] for problem in problems if problem.category == category)

    def suspects(self) -> list[tuple[str, int, int]]:
        """List the features whose cases have problems most often."""
        drawn: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        for result in self.results:
            described = {"lookalike": result.case.lookalike}
            if result.case.spec is not None:
                described = result.case.spec.described()
            for name, value in described.items():
                drawn[f"{name}={value}"] += 1
                bad[f"{name}={value}"] += bool(result.problems)
        ranked = sorted(bad, key=lambda f: bad[f] / drawn[f], reverse=True)
        return [(f, bad[f], drawn[f]) for f in ranked if bad[f] > 1][:8]


def report(result: Result) -> Iterator[str]:
    """Describe a case that has problems, with the command that repeats it."""
    yield f"--- {result.case.kind} {result.case.described()}"
    for problem in result.problems[:6]:
        yield f"    {problem.category}: {problem.text}"
    yield f"    {result.case.command()}"


def one(seed: int, index: int, only: str | None) -> Result:
    """Draw and check one case."""
    result = check(draw(seed, index, only=only))
    # A fresh case: the built module stays in this process.
    return replace(result, case=replace(result.case))


def run(
    seed: int,
    indices: Sequence[int],
    *,
    only: str | None = None,
    jobs: int = 1,
    each: Callable[[Result], None] = lambda result: None,
) -> Summary:
    """Check many cases, in this process or in several."""
    torch.set_num_threads(1)
    results = []
    arguments = ([seed] * len(indices), indices, [only] * len(indices))
    if jobs == 1:
        stream: Iterable[Result] = map(one, *arguments)
        results = [_told(result, each) for result in stream]
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            stream = pool.map(one, *arguments, chunksize=4)
            results = [_told(result, each) for result in stream]
    return Summary(seed, tuple(results))


def _told(result: Result, each: Callable[[Result], None]) -> Result:
    each(result)
    return result


def _print_problems(result: Result) -> None:
    if result.problems:
        print("\n".join(report(result)), flush=True)


def _single(options: argparse.Namespace, seed: int) -> int:
    case = draw(seed, options.index, only=options.only, attempt=options.attempt)
    if options.spec is not None:
        given = json.loads(options.spec)
        spec = None if "lookalike" in given else Spec(**given)
        case = replace(case, spec=spec, lookalike=given.get("lookalike"))
    result = shrunk(case) if options.shrink else check(case)
    print("\n".join(report(result)))
    print(f"    found {result.found} of {result.expected}, rewritten {result.rewritten}")
    return int(result.failed)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", default="random", help="a number, or 'random'")
    parser.add_argument("--only", help="'attention', 'lookalike', or one kind of look-alike")
    parser.add_argument("--index", type=int, help="run this case alone")
    parser.add_argument("--attempt", type=int, default=0)
    parser.add_argument("--spec", help="JSON: the features of the case, instead of drawn ones")
    parser.add_argument("--shrink", action="store_true", help="reduce the cases that fail")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    seed = secrets.randbelow(10**6) if options.seed == "random" else int(options.seed)
    if options.index is not None:
        return _single(options, seed)
    if not options.json:
        print(f"seed {seed}", flush=True)
    summary = run(
        seed,
        range(options.cases),
        only=options.only,
        jobs=options.jobs,
        each=(lambda result: None) if options.json else _print_problems,
    )
    if options.shrink:
        for result in summary.results:
            if result.failed:
                print("shrunk", *report(shrunk(result.case)), sep="\n", flush=True)
    if options.json:
        print(json.dumps(summary.as_dict(), indent=2))
    else:
        print("\n".join(summary.lines()))
    return int(summary.failed)


if __name__ == "__main__":
    sys.exit(main())
