"""Bench two models side by side: the prompt, every further token, cache and memory."""

import contextlib
import gc
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt import debug
from attnopt.program import Program
from attnopt.timing import Interval, compare, ratio


@dataclass(frozen=True)
class Load:
    """What is run: rows of a prompt of so many tokens, then so many tokens one by one."""

    rows: int = 1
    tokens: int = 512
    new: int = 32


@dataclass(frozen=True)
class Row:
    """One quantity of both models, and how many times better A is, where that was timed."""

    name: str
    unit: str
    a: float | None
    b: float | None
    gain: Interval | None = None


@dataclass(frozen=True)
class Bench:
    """The table, and how far the results of the two models are apart, relative to their size."""

    rows: tuple[Row, ...]
    difference: float
    rounds: int

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {"rows": [asdict(r) for r in self.rows], "difference": self.difference} | {
            "rounds": self.rounds
        }


def stock(program: Program) -> nn.Module:
    """Return the stock model that a program's weights fit, with its `sdpa` attention."""
    from attnopt.artifacts.saving import stock_model
    from attnopt.nouns import No

    model: Any = stock_model(program)
    if isinstance(model, No):
        raise ValueError(f"nothing stock to compare with ({model}); name a second model")
    with contextlib.suppress(ValueError):  # a class without sdpa keeps eager
        model.set_attn_implementation("sdpa")
    made: nn.Module = model
    return made


def bench(
    a: nn.Module, b: nn.Module, example: Mapping[str, Tensor] | Load, *, rounds: int = 40
) -> Bench:
    """Compare two models on a load of tokens, or on an example call, after comparing results."""
    if isinstance(example, Load):
        return _bench_language(a, b, example, rounds)
    return _bench_call(a, b, example, rounds)


@torch.no_grad()
def _bench_call(a: nn.Module, b: nn.Module, call: Mapping[str, Tensor], rounds: int) -> Bench:
    difference = _difference(a(**call), b(**call))
    calls = {"a": lambda: a(**call), "b": lambda: b(**call)}
    timing = compare(calls, base="b", most=rounds)
    rows = [
        Row(
            "call",
            "ms",
            1e3 * timing.median("a"),
            1e3 * timing.median("b"),
            timing.speedup("a", "b"),
        ),
        _memory(calls),
    ]
    return Bench(tuple(rows), difference, len(timing.seconds["a"]))


@torch.no_grad()
def _bench_language(a: nn.Module, b: nn.Module, load: Load, rounds: int) -> Bench:
    models: dict[str, Any] = {"a": a, "b": b}
    vocabulary = int(models["a"].config.get_text_config(decoder=True).vocab_size)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (load.rows, load.tokens), generator=chance)
    results = {name: model(input_ids=ids, use_cache=True) for name, model in models.items()}
    difference = _difference(results["a"].logits, results["b"].logits)
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        calls[f"{name} prompt"] = _first(model, ids)
        calls[f"{name} whole"] = _whole(model, ids, load.new)
    timing = compare(calls, base="b whole", most=rounds)
    debug.advance("bench", 1, 2)
    prompt = {n: timing.seconds[f"{n} prompt"] for n in models}
    step = {n: _steps(timing.seconds[f"{n} whole"], prompt[n], load.new) for n in models}
    rows = [
        _timed("prompt", "ms", prompt),
        _timed("each further token", "ms", step),
        _rate(step, load.rows),
        Row(
            "cache",
            "bytes a token",
            _cache_bytes(results["a"], ids),
            _cache_bytes(results["b"], ids),
        ),
        _memory({n: calls[f"{n} whole"] for n in models}),
    ]
    return Bench(tuple(rows), difference, len(prompt["a"]))


def _first(model: Any, ids: Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids, use_cache=True)


def _whole(model: Any, ids: Tensor, new: int) -> Callable[[], Any]:
    """Return a call that reads a prompt and goes on greedily."""

    def run() -> None:
        result = model(input_ids=ids, use_cache=True)
        for _ in range(new):
            token = result.logits[:, -1:].argmax(-1)
            result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)

    return run


def _steps(whole: Sequence[float], prompt: Sequence[float], new: int) -> list[float]:
    """Return the seconds of a further token in each round; a round of pure noise counts as tiny."""
    return [max(w - p, 1e-9) / new for w, p in zip(whole, prompt, strict=True)]


def _timed(name: str, unit: str, seconds: Mapping[str, Sequence[float]]) -> Row:
    a, b = (1e3 * _median(seconds[n]) for n in ("a", "b"))
    return Row(name, unit, a, b, ratio(seconds["b"], seconds["a"]))


def _rate(step: Mapping[str, Sequence[float]], rows: int) -> Row:
    a, b = (rows / _median(step[n]) for n in ("a", "b"))
    return Row("decoding", "tokens/s", a, b, ratio(step["b"], step["a"]))


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).double().quantile(0.5))


def _cache_bytes(result: Any, ids: Tensor) -> float:
    """Weigh the keys and values that a call returned."""
    total = 0
    for layer in getattr(result.past_key_values, "layers", ()):
        held = getattr(layer, "tensors", {})
        for tensor in (
            getattr(layer, "keys", None),
            getattr(layer, "values", None),
            *held.values(),
        ):
            total += tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
    return total / ids.numel()


def _difference(a: Any, b: Any) -> float:
    """Return the largest difference of two results, relative to the size of the second (RMS)."""
    from attnopt.frontend.skeletons import take_apart

    flat: list[list[Tensor]] = []
    for result in (a, b):
        found: dict[str, Any] = {}
        take_apart(result, found.setdefault)
        flat.append([t for t in found.values() if isinstance(t, Tensor) and t.is_floating_point()])
    worst = 0.0
    for x, y in zip(*flat, strict=False):
        if x.shape == y.shape and y.numel():
            size = float(y.double().square().mean().sqrt()) or 1.0
            worst = max(worst, float((x.double() - y.double()).abs().max()) / size)
    return worst


def _memory(calls: Mapping[str, Callable[[], Any]]) -> Row:
    """Measure by how much a call raises the memory of the process, or of the GPU."""
    found: dict[str, float | None] = {}
    for name, call in calls.items():
        gc.collect()
        with _peak() as peak:
            call()
        found[name] = peak[0] if peak else None
    return Row("peak memory above the weights", "MiB", found["a"], found["b"])


@contextlib.contextmanager
def _peak() -> Generator[list[float]]:
    """Yield a list that gets the peak inside the block in MiB, where the system can say it."""
    peak: list[float] = []
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        yield peak
        return
    reset.write_text("5")  # forgets the largest size so far
    start = _status("VmRSS")
    yield peak
    peak.append(max(0.0, (_status("VmHWM") - start) / 2**10))


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1])
    return 0.0
