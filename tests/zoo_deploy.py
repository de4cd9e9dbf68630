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
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import zoo
import zoo_parity
from deploy_case import (
    DRAWS,
    Case,
    DiffersError,
    Facts,
    LimitError,
    Named,
    NotApplicableError,
    RefusedError,
    decoded,
    error_told,
    first_line,
    same_bits,
    same_tokens,
)
from deploy_compiling import check_compiled, check_tokens_compiled
from torch import Tensor

import attnopt

STEPS: Final = 16
"""How many tokens the exporter decodes for its own comparison."""
LIMIT: Final = 1e-4
"""How much a logit of ONNX Runtime may differ."""
MARK: Final = "@deploy "
"""Begins a line of results; libraries write to stdout, too."""
STATUS: Final = {RefusedError: "refused", LimitError: "limit"}


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
        return {"status": "refused", "reason": first_line(error)}
    except Exception as error:  # whatever it is, it is the row
        return {"status": "failed", "reason": error_told(error)}


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
