"""Check every way to deploy one model of the zoo against the stock model, each check by itself.

    python tests/zoo_deploy.py SHELF llama bert

tests/bench/deploy.py calls `check` in a process for each model, which writes a line before and
after each check, so that what was measured outlives a crash. Called as a script this is the fresh
process that loads what `stored` put on the shelf.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
import transformers
import zoo
import zoo_parity
from torch import Tensor, nn
from transformers import GenerationMixin

import attnopt

TOKENS: Final = 64
STEPS: Final = 16
"""How many tokens the exporter decodes for its own comparison."""
LIMIT: Final = 1e-4
"""How much a logit of ONNX Runtime may differ."""
DRAWS: Final = 2
"""Calls that are compared bit by bit: one padded at the left, one at the right."""
POSITIONS: Final = {"whisper": 128}
"""Models that have fewer positions than the prompt and the tokens take."""
MARK: Final = "@deploy "
"""Begins a line of results; libraries write to stdout, too."""

Facts = dict[str, Any]
Named = dict[str, Tensor]


class DiffersError(Exception):
    """A check that came out unequal, with what was measured."""

    def __init__(self, why: str, **facts: Any) -> None:
        super().__init__(why)
        self.facts = facts


class NotApplicableError(Exception):
    """A check that a model has no use for."""


class RefusedError(DiffersError):
    """A check that pass exact refuses, with its reason."""


class LimitError(DiffersError):
    """A check that fails in the same way without attnopt: what torch cannot do with the model."""


STATUS: Final = {RefusedError: "refused", LimitError: "limit"}


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


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens of every row, and the logits that they were chosen by."""

    tokens: Tensor
    logits: Tensor

    @property
    def distinct(self) -> int:
        """How many different tokens the least varied row has."""
        return min(len(set(row.tolist())) for row in self.tokens)


@dataclass
class Case:
    """A model of the zoo and what is made of it, each made once when it is needed."""

    name: str
    shelf: Path = field(default_factory=Path)
    inner: str = "eager"
    folder: Path = field(default_factory=Path)
    forwards: dict[Way, Callable[..., Any]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return "lm" if self.name in zoo.LM else "base"

    @property
    def sites(self) -> int:
        return int(zoo.ZOO[self.name].sites)

    @cached_property
    def subject(self) -> zoo_parity.Subject:
        return self.another()

    def another(self) -> zoo_parity.Subject:
        """Build the same model again."""
        positions = POSITIONS.get(self.name)
        return zoo_parity.subject(self.name, "eager", self.task, positions=positions)

    @cached_property
    def program(self) -> attnopt.Program:
        program = attnopt.capture(self.subject.model, (), self.subject.kwargs)
        return attnopt.apply(program, "exact")

    @cached_property
    def lowered(self) -> nn.Module:
        return attnopt.lower(self.program, "eager")

    def compiled_forward(self, way: Way) -> Callable[..., Any]:
        """Compile the model in a way, once."""
        if way not in self.forwards:
            torch._dynamo.reset()
            options = {"backend": "attnopt", "options": {"inner": self.inner}}
            forward = self.subject.model.forward
            self.forwards[way] = torch.compile(forward, **options, dynamic=way.dynamic)
        return self.forwards[way]

    @cached_property
    def stock_tokens(self) -> Decoded:
        if self.task == "base":
            raise NotApplicableError("no language-model head")
        return decoded(self.subject.model, self.subject.kwargs)

    @cached_property
    def right_tokens(self) -> Decoded:
        """The stock tokens, without the cache where a stock step forgets what is masked in it."""
        if self.name not in zoo_parity.FORGETFUL:
            return self.stock_tokens
        return decoded(self.subject.model, {**self.subject.kwargs, "use_cache": False})

    def outputs(self, model: Callable[..., Any], draw: int = 0) -> Named:
        """Run a model as the parity tests do: language models in pieces, with their cache."""
        return zoo_parity.run(self.subject, model, zoo_parity.drawn(self.subject, draw))


@torch.no_grad()
def decoded(model: Any, kwargs: dict[str, Any]) -> Decoded:
    """Decode greedily with the `generate()` of Transformers."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise DiffersError(f"{type(model).__name__} has no generate()")
    torch.manual_seed(0)
    # Not model.generate: a speech model overrides it with a loop of its own.
    way = {"do_sample": False, "max_new_tokens": TOKENS, "output_logits": True}
    made: Any = GenerationMixin.generate(model, **kwargs, **way, return_dict_in_generate=True)
    return Decoded(made.sequences[:, -TOKENS:], torch.stack(made.logits, 1).float())


def same_tokens(got: Decoded, want: Decoded) -> Facts:
    """Compare tokens; where they differ, say how near the choice was at the first difference."""
    same = got.tokens == want.tokens
    facts: Facts = {"equal": int(same.sum()), "of": same.numel(), "distinct": want.distinct}
    if same.all():
        return {**facts, "logits_differ": float((got.logits - want.logits).abs().max())}
    step = int((~same).any(0).nonzero()[0])
    row = int((~same[:, step]).nonzero()[0])
    logits = want.logits[row, step]
    chosen, other = (int(x.tokens[row, step]) for x in (want, got))
    margin = float(logits[chosen] - logits[other])
    top = float(logits.abs().max())
    facts |= {"first_difference": [row, step], "margin": margin, "largest_logit": top}
    raise DiffersError(
        f"{facts['equal']} of {facts['of']} tokens equal; the first difference is in row {row} at "
        f"token {step}, by a margin of {margin:.1e} (logits to {top:.1f})",
        **facts,
    )


def same_bits(got: Named, want: Named) -> float:
    """Return the largest difference of outputs that must be equal bit by bit."""
    return max(_difference(got[name], tensor) for name, tensor in want.items())


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if (got.isnan() & want.isnan() | (got == want)).all():
        return 0.0
    delta = float((got.double() - want.double()).abs().max())
    return delta if math.isfinite(delta) and delta else math.inf


# --------------------------------------------------------------------------------------- stored


def check_stored(case: Case) -> Facts:
    """Save in both tiers, with what a process that loads them must compute, bit by bit."""
    stock, lowered = case.subject.model, case.lowered
    place = case.shelf / case.name
    attnopt.save(case.program, place / "program", tier=2)
    attnopt.save(case.program, place / "natural")
    tier = _tier(place / "natural")
    for folder, model in (("program", lowered), ("natural", lowered if tier == 2 else stock)):
        wanted: dict[str, Any] = {"outputs": [case.outputs(model, d) for d in range(DRAWS)]}
        if case.task == "lm":
            wanted["tokens"] = decoded(model, case.subject.kwargs).tokens
        torch.save(wanted, place / f"{folder}.pt")
    return {"tier": tier}


def _tier(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["attnopt"]["tier"])


def reload(shelf: Path, name: str) -> Facts:
    """Load what `stored` saved, and compare it with what the models computed then."""
    return settled(lambda: {"loaded": dict(_reloaded(Case(name), shelf / name))})


def _reloaded(case: Case, place: Path) -> Iterator[tuple[str, Facts]]:
    for folder in ("program", "natural"):
        stock = _tier(place / folder) < 2
        options = {"attn_implementation": "eager"} if stock else {}
        model: Any = attnopt.load(place / folder, **options)
        if stock:
            # Kernels are chosen by these, and a stock checkpoint does not say them: whether there
            # are gradients, and where tensors lie, for those of a mapped file lie anywhere.
            model.requires_grad_(False)
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        wanted = torch.load(place / f"{folder}.pt")
        deltas = [same_bits(case.outputs(model, d), x) for d, x in enumerate(wanted["outputs"])]
        differ = 0
        if "tokens" in wanted:
            tokens = decoded(model, case.subject.kwargs).tokens
            differ = int((tokens != wanted["tokens"]).sum())
        if differ or max(deltas):
            raise DiffersError(
                f"{folder}: outputs differ by {max(deltas):.1e}, and {differ} tokens differ"
            )
        yield folder, {"difference": max(deltas), "tokens_differ": differ}


# ------------------------------------------------------------------------------------- compiled


@contextlib.contextmanager
def compiled(case: Case, way: Way) -> Iterator[Any]:
    """Give the stock model with a compiled forward, the same one for all checks of a process."""
    model = case.subject.model
    forward = case.compiled_forward(way)
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
        return f"backend 'eager' fails, too: {_told(_root(other))}" if same and not differs else ""
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
    return in_a_way(case, lambda way: compiled_facts(case, way), call_alone)


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
    cut = report.rewritten == report.found and all(CUT in reason for reason in reasons)
    if cut or all(READ in reason for reason in reasons):
        raise DiffersError(told, **facts, cut=True)
    if all(CUT in reason or ASSEMBLED in reason for reason in reasons):
        raise RefusedError(told, **facts)
    raise DiffersError(told, **facts)


# ----------------------------------------------------------------------------------------- onnx


def check_onnx(case: Case) -> Facts:
    """Export, and run the file on calls of its own beside the comparison of the exporter."""
    made = attnopt.export_onnx(case.program, case.folder / "onnx", steps=STEPS)
    cases = made.parity.cases
    told = max((c.max_delta_logit for c in cases), default=math.inf)
    facts: Facts = {"exporter": told, "largest": max((c.largest_logit for c in cases), default=0.0)}
    facts["exporter_tokens"] = [sum(c.equal for c in cases), sum(c.tokens for c in cases)]
    if made.parity.failure:
        raise DiffersError(made.parity.failure, **facts)
    # Of two files, the first one makes a whole call.
    facts["here"] = max(onnx_difference(case, made.paths[0], draw) for draw in range(DRAWS))
    worst = max(told, facts["here"])
    if not worst <= LIMIT:
        raise DiffersError(
            f"outputs differ by {worst:.1e} (values to {facts['largest']:.1f})", **facts
        )
    if not made.accepted:
        raise DiffersError("the exporter rejected its file", **facts)
    return facts


def onnx_difference(case: Case, file: Path, draw: int) -> float:
    """Return how far the file is from the stock model on one call, at valid positions."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    call = zoo_parity.drawn(case.subject, draw)
    if "position_ids" in {i.name for i in session.get_inputs()} - call.keys():
        call["position_ids"] = (call["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return distance(case, call, run_session(session, call), stock_outputs(case, call))


@torch.no_grad()
def stock_outputs(case: Case, call: dict[str, Any]) -> Named:
    torch.manual_seed(0)
    return zoo_parity.compared(case.subject.model(**call))


def run_session(session: Any, call: dict[str, Tensor]) -> Named:
    """Run a file in ONNX Runtime, from an empty cache where it takes one."""
    rows = len(next(iter(call.values())))
    given = {
        i.name: call[i.name].numpy() if i.name in call else torch.zeros(_sizes(i, rows)).numpy()
        for i in session.get_inputs()
    }
    names = [o.name for o in session.get_outputs()]
    made = dict(zip(names, map(torch.from_numpy, session.run(None, given)), strict=True))
    return {**made, "first": made[names[0]]}


def _sizes(taken: Any, rows: int) -> list[int]:
    """Return the sizes of an empty state."""
    if not taken.name.startswith("past_key_values"):
        raise DiffersError(f"the file takes {taken.name}, which the call has not")
    return [rows if i == 0 else s if isinstance(s, int) else 0 for i, s in enumerate(taken.shape)]


def distance(case: Case, call: dict[str, Any], got: Named, want: Named) -> float:
    """Return the largest difference of two results at the positions that count."""
    found = [0.0]
    for name, tensor in want.items():
        if name not in got:
            raise DiffersError(f"the file gives no {name}")
        valid = zoo_parity.valid(case.subject, call, name, tensor)
        where: Any = ... if valid is None else valid
        if got[name].shape != tensor.shape:
            return math.inf
        delta = float((got[name].double() - tensor.double())[where].abs().max())
        found.append(delta if math.isfinite(delta) else math.inf)
    return max(found)


# --------------------------------------------------------------------------------------- tokens


def check_tokens_lowered(case: Case) -> Facts:
    """Decode with the lowered program."""
    want = case.right_tokens
    return same_tokens(decoded(case.lowered, case.subject.kwargs), want)


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


def check_tokens_onnx(case: Case) -> Facts:
    """Decode with ONNX Runtime."""
    want = case.right_tokens
    return same_tokens(decoded(attnopt.lower(case.program, "ort"), case.subject.kwargs), want)


# -------------------------------------------------------------------------------------- mutants


def check_mutants(case: Case) -> Facts:
    """Ask each comparison above about a broken model: it must say that it is unequal."""
    subject = case.subject
    parity = {label: not v.passed for label, v in zoo_parity.mutant_verdicts(subject)}
    if not parity:
        raise NotApplicableError("no mutation finds anything to break")
    call = zoo_parity.drawn(subject, 0)
    want = stock_outputs(case, call)
    caught: dict[str, dict[str, bool]] = {}
    for label, broken in zoo.mutants(subject.model):
        if label not in parity:
            continue
        with broken:
            got = stock_outputs(case, call)
            noticed = {
                "parity": parity[label],
                "bits": same_bits(got, want) > 0,
                "onnx": distance(case, call, got, want) > LIMIT,
            }
            if case.task == "lm":
                tokens = decoded(subject.model, subject.kwargs).tokens
                noticed["tokens"] = not torch.equal(tokens, case.stock_tokens.tokens)
        caught[label] = noticed
    facts: Facts = {"caught": caught}
    # Tokens may stay the same where all else differs: that is told, and fails nothing.
    missed = [f"{m} by {n}" for m, by in caught.items() for n, ok in by.items() if not ok]
    facts["missed"] = missed
    unnoticed = [text for text in missed if not text.endswith(" tokens")]
    if unnoticed:
        raise DiffersError(f"not noticed: {', '.join(unnoticed)}", **facts)
    return facts


CHECKS: Final[dict[str, Callable[[Case], Facts]]] = {
    "stored": check_stored,
    "compiled": check_compiled,
    "onnx": check_onnx,
    "tokens_lowered": check_tokens_lowered,
    "tokens_compiled": check_tokens_compiled,
    "tokens_onnx": check_tokens_onnx,
    "mutants": check_mutants,
}


def measure(case: Case, check: str) -> Facts:
    """Return how one check came out, and how long it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        case.folder = Path(folder)
        found = settled(lambda: CHECKS[check](case))
    return {**found, "seconds": round(time.monotonic() - start, 2)}


def settled(work: Callable[[], Facts]) -> Facts:
    """Return what was measured: passed, failed, refused or not applicable, and why."""
    try:
        return {"status": "passed", "reason": "", **work()}
    except DiffersError as error:
        return {"status": STATUS.get(type(error), "failed"), "reason": str(error), **error.facts}
    except NotApplicableError as error:
        return {"status": "n/a", "reason": str(error)}
    except NotImplementedError as error:
        return {"status": "refused", "reason": _first_line(error)}
    except Exception as error:  # whatever it is, it is the row
        return {"status": "failed", "reason": _told(error)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    # A compiler says first which backend it was.
    return " ".join(lines[: 1 + lines[0].endswith("raised:")])[:300]


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "attnopt" in f.filename] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {_first_line(error)} ({place})"


def _root(error: BaseException) -> BaseException:
    """Return what was raised at first; compilers raise other things for it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def say(content: Any) -> None:
    """Write a line of results."""
    print(MARK + json.dumps(content), flush=True)


def prepare() -> None:
    """Settle what every process needs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def warm() -> None:
    """Have torch import what its exporters and its compiler import at their first use."""
    import onnxruntime  # noqa: F401

    example = torch.nn.Linear(2, 2)
    given = (torch.ones(2, 2),)
    torch.export.export(example, given)
    torch.compile(example, backend="eager", dynamic=True)(*given)
    with contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(example, given, dynamo=True, verbose=False)
    torch._dynamo.reset()


def check(name: str, checks: Sequence[str], inner: str, shelf: Path) -> None:
    """Run checks of one model, and write a line before and after each."""
    case = Case(name, shelf, inner)
    for each in checks:
        say({"started": each})
        say({"check": each, **measure(case, each)})


def main(arguments: Sequence[str]) -> int:
    shelf, *names = arguments
    prepare()
    for name in names:
        say({"started": name})
        say({"name": name, **reload(Path(shelf), name)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
