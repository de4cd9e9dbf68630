"""Whether ONNX Runtime computes what the program does.

A model without states is called with random inputs. A language model reads a prompt and goes on:
the program decodes greedily, and the file gets the same tokens call by call, so that a difference
of logits is one of arithmetic, and equal choices at every step are equal texts. A model without
logits goes on with tokens that are made of its first output in the same way.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from attnopt import debug
from attnopt.backends.ort import session
from attnopt.backends.ort.operators import Provider
from attnopt.backends.ort.parts import LEAST
from attnopt.backends.ort.providers import NAMES, runs_here
from attnopt.backends.ort.signature import PlainSignature, Signature
from attnopt.program import Program

# How much logits may differ, relative to the largest of them (or to 1): float32, many layers.
_AGREES = 1e-4
_TIMEOUT = 3600.0
_CAPTURED = "the captured sizes"
# Cases of two calls need a decoder that reads several tokens from a cache.
_CAUSAL_ONLY = ("a prompt in two calls",)


@dataclass(frozen=True)
class Case:
    """A prompt: the lengths of its calls, its rows, and how far the last row is padded."""

    name: str
    calls: tuple[int, ...]
    rows: int = 1
    padded: int = 0
    on_the_right: bool = False

    def mask(self, steps: int) -> Tensor:
        """Return which tokens of the prompt and of so many steps are real."""
        length = sum(self.calls)
        mask = torch.ones(self.rows, length + steps, dtype=torch.long)
        start = length - self.padded if self.on_the_right else 0
        mask[-1, start : start + self.padded] = 0
        return mask


CASES = (
    Case("a prompt", calls=(11,)),
    Case("one token", calls=(1,)),
    Case("a prompt in two calls", calls=(4, 5)),
    Case("two rows, one padded on the left", calls=(7,), rows=2, padded=3),
    Case("two long rows, one padded on the left", calls=(LEAST + 3,), rows=2, padded=3),
)
RIGHT_PADDED = (
    *CASES[:-2],
    *(
        replace(case, name=case.name.replace("left", "right"), on_the_right=True)
        for case in CASES[-2:]
    ),
)
LONG: Final = 2 * LEAST
"""Positions of a model whose long calls are compared: enough for such a case and what it writes."""


@dataclass(frozen=True)
class Compared:
    """A case as it came out; `equal` of `tokens` decoded tokens are the same in every row."""

    case: str
    tokens: int
    equal: int
    largest_logit: float
    max_delta_logit: float

    @property
    def agrees(self) -> bool:
        """Whether all tokens are equal and no logit is off by more than rounding."""
        allowed = _AGREES * max(1.0, self.largest_logit)
        return self.equal == self.tokens and self.max_delta_logit <= allowed


@dataclass(frozen=True)
class Parity:
    """All cases; or, where the file could not be run, why."""

    cases: tuple[Compared, ...]
    failure: str = ""
    left_out: tuple[str, ...] = ()
    provider: Provider = "cpu"

    @property
    def accepted(self) -> bool:
        """Whether the file ran and agrees in every case."""
        return not self.failure and all(c.agrees for c in self.cases)

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        cases = [{**asdict(c), "agrees": c.agrees} for c in self.cases]
        told = {
            "provider": self.provider,
            "failure": self.failure,
            "left_out": list(self.left_out),
        }
        return {"accepted": self.accepted, **told, "cases": cases}


@dataclass(frozen=True)
class Run:
    """A case that the program decoded: its tokens, its mask, the size of each call, its logits.

    `encoder` has what an encoder read.
    """

    tokens: Tensor
    mask: Tensor
    sizes: tuple[int, ...]
    logits: Tensor
    encoder: Mapping[str, Tensor] = field(default_factory=dict)


def compare(
    model: Any,
    program: Program,
    signatures: Mapping[Path, Signature],
    steps: int,
    cases: Sequence[Case] = CASES,
    ep: Provider = "cpu",
) -> Parity:
    """Run a model of the program, and have ONNX Runtime compute the same.

    It computes on the provider that the file is for; where that does not run here, on the CPU.
    """
    provider: Provider = ep if ep == "cpu" or runs_here(ep) else "cpu"
    found = _compare(model, program, signatures, steps, cases, provider)
    if provider == ep:
        return found
    told = f"provider {ep}, which does not run here: compared on {provider}"
    return replace(found, left_out=(*found.left_out, told))


def _compare(
    model: Any,
    program: Program,
    signatures: Mapping[Path, Signature],
    steps: int,
    cases: Sequence[Case],
    provider: Provider,
) -> Parity:
    *encode, file = signatures
    signature = signatures[file]
    if isinstance(signature, PlainSignature):
        return _compare_calls(model, program, signature, file, provider)
    decode: Any = _decoded
    cases = [c for c in cases if not c.padded or "attention_mask" in signature.inputs]
    if encode:
        first = signatures[encode[0]]
        assert isinstance(first, PlainSignature)
        decode = partial(_decoded_pair, first)
        cases = [c for c in cases if c.name not in _CAUSAL_ONLY]
    left_out: tuple[str, ...] = ()
    most = room(program.config)
    short = [c for c in cases if sum(c.calls) < LEAST]
    if most < LONG:
        cases, left_out = short, (f"longer calls: the model has {most} positions",)
    steps = min(steps, most - max(sum(c.calls) for c in short))
    runs: list[Run] = []
    for number, case in enumerate(cases, 1):
        own = min(steps, most - sum(case.calls))
        runs.append(decode(model, program, signature, case, own))
        debug.advance("parity", number, len(cases))
    logits = run_onnxruntime([file, *encode], runs, **_on(provider))
    if isinstance(logits, str):
        return Parity((), logits, left_out, provider)
    pairs = zip(cases, runs, logits, strict=True)
    compared = tuple(_compared(case, run, found) for case, run, found in pairs)
    return Parity(compared, left_out=left_out, provider=provider)


def _on(provider: Provider) -> dict[str, Provider]:
    return {} if provider == "cpu" else {"provider": provider}


def _compare_calls(
    model: Any, program: Program, signature: PlainSignature, file: Path, provider: Provider
) -> Parity:
    """Compare all outputs, at the sizes of the capture and at others."""
    other = signature.other_sizes()
    sizes = {_CAPTURED: signature.captured}
    if other is not None:
        sizes["other sizes"] = other
    calls: list[dict[str, Tensor]] = []
    wanted: list[dict[str, Tensor]] = []
    left_out: list[str] = []
    for seed, (name, given) in enumerate(list(sizes.items())):
        call = signature.call(given, program.config, seed)
        try:
            with torch.no_grad():
                flat = model.flat(program.form.flatten((), dict(call)))
        except RuntimeError as error:
            if name == _CAPTURED:
                raise
            # A source may take one size only, and say so no earlier than here.
            del sizes[name]
            left_out.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        calls.append(call)
        wanted.append(dict(zip(signature.output_names, flat, strict=True)))
        debug.advance("parity", seed + 1, len(sizes))
    found = run_onnxruntime_plainly(file, calls, signature.output_names, **_on(provider))
    if isinstance(found, str):
        return Parity((), found, provider=provider)
    cases = zip(sizes, wanted, found, strict=True)
    compared = tuple(_compared_outputs(name, want, got) for name, want, got in cases)
    return Parity(compared, left_out=tuple(left_out), provider=provider)


def _compared_outputs(name: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> Compared:
    largest, delta = 0.0, 0.0
    for output, want in wanted.items():
        got = found[output]
        if got.shape != want.shape:
            return Compared(name, 0, 0, largest, float("inf"))
        difference = (got.double() - want.double()).abs()
        if want.numel():
            largest = max(largest, float(want.double().abs().max()))
            delta = max(delta, float(difference.max() if difference.isfinite().all() else math.inf))
    return Compared(name, 0, 0, largest, delta)


def room(config: Any) -> int:
    """Return how many tokens a model takes, as far as its configuration says so."""
    if config is None:
        return 10**9
    text = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next((int(n) for n in (getattr(text, x, None) for x in names) if n), 10**9)


def _decoded(model: Any, program: Program, signature: Signature, case: Case, steps: int) -> Run:
    """Decode greedily with the program."""
    tokens = _prompt(program.config, case)
    mask = case.mask(steps)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = None
    new_only = not any(s.grows for s in program.states)

    def call(start: int, tokens: Tensor) -> Tensor:
        nonlocal cache
        stop = tokens.shape[1]
        given = {
            "input_ids": tokens[:, start:],
            "attention_mask": mask[:, start if new_only else 0 : stop],
            "position_ids": positions[:, start:stop],
        }
        result = model(**{n: given[n] for n in signature.inputs}, **{_cache_name(model): cache})
        cache = result[_cache_name(model)]
        return _main(result)

    return _decoding(call, tokens, mask, (*case.calls, *[1] * steps))


def _decoded_pair(
    first: PlainSignature, model: Any, program: Program, signature: Signature, case: Case,
    steps: int,
) -> Run:  # fmt: skip
    """Decode greedily with an encoder and a decoder; the last row's encoder input is padded."""
    tokens = _prompt(program.config, case)
    sizes = {name: size + sum(case.calls) for name, size in first.captured.items()}
    batch = first.taken.shapes["decoder_input_ids"][0]
    if isinstance(batch, str):
        sizes[batch] = case.rows
    read = first.call(_same_rows(first, sizes, case.rows), program.config, seed=len(tokens))
    encoder = {n: x for n, x in read.items() if not n.startswith("decoder_")}
    mask = torch.ones(case.rows, tokens.shape[1] + steps, dtype=torch.long)
    cache, hidden = None, None

    def call(start: int, tokens: Tensor) -> Tensor:
        nonlocal cache, hidden
        stop = tokens.shape[1]
        given = {
            **encoder,
            "decoder_input_ids": tokens[:, start:],
            "decoder_attention_mask": mask[:, :stop],
        }
        if cache is None:
            result = model(**{n: given[n] for n in first.inputs})
            hidden = result.encoder_last_hidden_state
        else:
            given = {n: given[n] for n in signature.inputs if n in given}
            result = model(**given, encoder_outputs=(hidden,), past_key_values=cache)
        cache = result.past_key_values
        return _main(result)

    run = _decoding(call, tokens, mask, (*case.calls, *[1] * steps))
    return replace(run, encoder=encoder)


def _same_rows(first: PlainSignature, sizes: Mapping[str, int], rows: int) -> dict[str, int]:
    """Set the size of every input's first axis."""
    leading = {shape[0] for shape in first.taken.shapes.values()}
    return {name: rows if name in leading else size for name, size in sizes.items()}


def _decoding(
    call: Callable[[int, Tensor], Tensor], tokens: Tensor, mask: Tensor, sizes: tuple[int, ...]
) -> Run:
    """Call by sizes; what the last of the prompt and every later call say is the next token."""
    logits: list[Tensor] = []
    start, prompt = 0, tokens.shape[1]
    for size in sizes:
        with torch.no_grad():
            logits.append(call(start, tokens[:, : start + size]))
        start += size
        if start >= prompt and len(logits) < len(sizes):
            tokens = torch.cat([tokens, logits[-1][:, -1:].argmax(-1)], dim=1)
    return Run(tokens, mask, sizes, torch.cat(logits, dim=1))


def _main(result: Any) -> Tensor:
    """Return the logits, or the first tensor of another result."""
    found: Tensor = result[0] if result.get("logits") is None else result["logits"]
    return found


def _cache_name(model: Any) -> str:
    made = model.program.form.made_of
    return str(getattr(made, "argument", "past_key_values"))


def _prompt(config: Any, case: Case) -> Tensor:
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    chance = torch.Generator().manual_seed(sum(case.calls))
    return torch.randint(vocabulary, (case.rows, sum(case.calls)), generator=chance)


def run_onnxruntime(
    files: list[Path], runs: list[Run], provider: Provider = "cpu"
) -> list[Tensor] | str:
    """Return the logits of every run, or how the process failed.

    The second file is that of the encoder and the first decoder tokens.
    """
    given: dict[str, Any] = {"provider": np.array(NAMES[provider])}
    for number, run in enumerate(runs):
        given[f"tokens.{number}"] = run.tokens.numpy()
        given[f"mask.{number}"] = run.mask.numpy()
        given[f"sizes.{number}"] = np.array(run.sizes)
        for name, tensor in run.encoder.items():
            given[f"encoder.{number}.{name}"] = tensor.numpy()
    found = _in_a_process(files, given)
    if isinstance(found, str):
        return found
    return [found[f"logits.{n}"] for n in range(len(runs))]


def run_onnxruntime_plainly(
    file: Path, calls: list[dict[str, Tensor]], outputs: list[str], provider: Provider = "cpu"
) -> list[dict[str, Tensor]] | str:
    """Return the outputs of every call by name, or how the process failed."""
    given = {
        f"input.{number}.{name}": tensor.numpy()
        for number, call in enumerate(calls)
        for name, tensor in call.items()
    }
    given["provider"] = np.array(NAMES[provider])
    found = _in_a_process([file], given)
    if isinstance(found, str):
        return found
    return [{name: found[f"output.{n}.{name}"] for name in outputs} for n in range(len(calls))]


def _in_a_process(files: list[Path], given: dict[str, Any]) -> dict[str, Tensor] | str:
    with tempfile.TemporaryDirectory() as folder:
        calls, results = Path(folder) / "calls.npz", Path(folder) / "results.npz"
        np.savez(calls, **given)
        places = map(str, (session.__file__, calls, results, *files))
        words = [sys.executable, "-P", *places]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT)
        except subprocess.TimeoutExpired:
            return f"ONNX Runtime took more than {_TIMEOUT:.0f} s"
        if done.returncode != 0:
            return _told(done.returncode, done.stderr)
        with np.load(results, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}


def _told(status: int, errors: str) -> str:
    ended = f"by signal {-status}" if status < 0 else f"with status {status}"
    lines = errors.strip().splitlines()
    return f"ONNX Runtime ended {ended}: {lines[-1] if lines else 'it said nothing'}"


def _compared(case: Case, run: Run, found: Tensor) -> Compared:
    """Compare the tokens of all decoding calls, and the logits wherever a token is."""
    steps = len(run.sizes) - len(case.calls)
    same = (found.argmax(-1) == run.logits.argmax(-1)).all(0)[found.shape[1] - steps :]
    valid = run.mask.bool()
    delta = (found - run.logits)[valid].abs().amax()
    return Compared(
        case=case.name,
        tokens=steps,
        equal=int(same.sum()),
        largest_logit=float(run.logits[valid].abs().amax()),
        max_delta_logit=float(delta) if bool(delta.isfinite()) else float("inf"),
    )
