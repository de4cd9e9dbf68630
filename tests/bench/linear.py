"""Linear attention: what it costs a language model, before and after healing, and what it saves.

python tests/bench/linear.py
python tests/bench/linear.py --parts quality
python tests/bench/linear.py --parts layers prefill decoding
python tests/bench/linear.py --steps 12 --site-steps 8 --length 256 --held-out 16 --dry

Half of the layers of the bundled code-llama become hybrids: those that lose least, and less than a
window of as many bytes would, as calibration rows tell. Beside them stand the same layers with that
window alone, its first tokens kept or not, healed by the same recipe on the same rows, and the same
layers without their attention. `layers` converts every layer alone, without healing. Prefill is
timed against dense scaled_dot_product_attention, decoding by texts of growing length. What a run
measures takes the place of the same parts in the results. Exit status 1 where a condition of JUDGED
is missed.
"""

import argparse
import gc
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import RESULTS, Timing, as_row, compare, machine, write
from torch import Tensor
from torch.nn import functional

import attnopt
from attnopt.branches import branches
from attnopt.data import Source, Split, split_of
from attnopt.healing import Recipe, healed
from attnopt.moments import Statistics
from attnopt.nouns import Choice, Plan
from attnopt.ops import linear_attention_reference
from attnopt.ops.chunks import attend_linear
from attnopt.passes import linear
from attnopt.program import Program
from attnopt.verifying import Paired, losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
JUDGED: Final = {"kept": 0.9, "exponent": 1.1, "dense_from": 2048, "constant": 1.25}
# What is close to its source already takes small steps; maps, which are new, large ones.
RECIPE: Final = {
    "site_lr": 3e-4, "added_lr": 3e-2, "lr": 1e-4, "batch": 4, "every": 20, "patience": 99
}  # fmt: skip
CALIBRATED: Final = 16
HEADS, WIDTH, FEATURES, WINDOW = 8, 64, 64, 64
FIRST: Final = 4
# Rounds of steps that are not timed.
WARMING: Final = 20


def main(arguments: list[str] | None = None) -> int:
    """Measure quality, prefill and decoding, and print them."""
    options = _options(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name in options.parts:
        for row in PARTS[name](options):
            rows.append({"part": name, **row})
            print(" ".join(f"{n}={x}" for n, x in rows[-1].items()), flush=True)
    missed = _missed(rows)
    for line in missed:
        print(f"missed: {line}")
    if not options.dry:
        _write(rows, options.parts)
    return 1 if missed else 0


def _write(rows: list[dict[str, Any]], parts: list[str]) -> None:
    """Put rows in the place of those of the same parts, each with the command that made it."""
    command = machine()["command"]
    rows = [{**row, "command": command} for row in rows]
    place = RESULTS / "linear.json"
    known = json.loads(place.read_text())["rows"] if place.is_file() else []
    rows += [row for row in known if row["part"] not in parts]
    write("linear", sorted(rows, key=lambda row: list(PARTS).index(row["part"])))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--layers", type=float, default=0.5, help="a share, or a number from 1")
    parser.add_argument("--window", type=int, default=56)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=48, help="rows that judge")
    parser.add_argument("--steps", type=int, default=80, help="of healing; 0: none")
    parser.add_argument("--site-steps", type=int, default=60, help="of them site by site")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--texts", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=15, help="of timing prefill, at most")
    parser.add_argument("--steps-rounds", type=int, default=2000, help="of timing steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def _missed(rows: list[dict[str, Any]]) -> list[str]:
    """List the conditions that are not met."""
    found: list[str] = []
    for row in rows:
        name = row.get("student")
        if name == "hybrid" and row["kept"] < JUDGED["kept"]:
            found.append(f"the hybrid keeps {row['kept']:.1%} of the gap")
        if name in ("window", "window, first") and row["hybrid_lower_by"]["ci95"][0] <= 0:
            found.append(f"the loss of the {name} is not measurably above the hybrid's")
        if row.get("exponent", 0.0) > JUDGED["exponent"]:
            found.append(f"prefill grows with the power {row['exponent']}")
        long = row["part"] == "prefill" and row.get("tokens", 0) > JUDGED["dense_from"]
        if long and row["over_dense"]["ratio"] <= 1:
            found.append(f"dense attention is faster at {row['tokens']} tokens")
        if row.get("growth", 0.0) > JUDGED["constant"]:
            found.append(f"a step takes {row['growth']} times as long at the longest text")
    return found


# ----------------------------------------------------------------------------------------- quality


@dataclass(frozen=True)
class Bed:
    """A language model, its rows, and what was calibrated on a few of those that are not judged."""

    teacher: Program
    text: Split
    stats: Statistics

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Bed":
        """Capture the bundled model, and read its rows."""
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
        teacher = attnopt.apply(attnopt.capture(MODEL), "exact")
        source = Source("stdlib", options.rows, options.length, seed=options.seed + 1)
        text = split_of(source, tokenizer, held_out=2 * options.held_out)
        few = Split(text.calibration[:CALIBRATED], text.held_out, "", "")
        return cls(teacher, text, attnopt.calibrate(teacher, few))

    @property
    def judged(self) -> Tensor:
        """The rows that healing neither learns from nor is watched by."""
        held = self.text.held_out
        return held[: len(held) - len(held) // 2]

    def student(self, choices: Sequence[Choice]) -> Program:
        """Rewrite the model."""
        return attnopt.apply(self.teacher, Plan(tuple(choices), statistics=self.stats))

    def healed(self, student: Program, options: argparse.Namespace) -> Program:
        """Heal a student as every other is healed."""
        settings = {**RECIPE, "site_steps": options.site_steps, "seed": options.seed}
        return healed(student, self.teacher, self.text, Recipe(options.steps, **settings)).program


def _quality(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Heal each student in the same way."""
    bed = Bed.of(options)
    chosen = linear.choose(
        bed.teacher, bed.stats, options.layers, over_window=True, window=options.window,
        features=options.features,
    )  # fmt: skip
    names = [c.site for c in chosen]
    base = losses(bed.teacher, bed.judged, "source")
    removed = losses(_without(bed.teacher, names), bed.judged, "removed")
    yield {"student": "source", "loss": _mean(base), "tokens": options.length}
    why = {c.site: c.why for c in chosen}
    yield {"student": "without attention", "loss": _mean(removed), "layers": why}
    hybrid: tuple[Tensor, Tensor] | None = None
    for name, choices in _plans(bed, chosen).items():
        student = bed.student(choices)
        before = losses(student, bed.judged, name)
        row = {"student": name, "bytes": _bytes(student), "before": _mean(before)}
        start = time.perf_counter()
        student = bed.healed(student, options) if options.steps else student
        after = losses(student, bed.judged, name) if options.steps else before
        kept = 1 - float((after - base).mean()) / float((removed - base).mean())
        row |= {"seconds": round(time.perf_counter() - start)}
        row |= {"after": _mean(after), "kept": round(kept, 5)}
        if hybrid is None:
            hybrid = before, after
            found = branches(student, bed.judged)
            row |= {"linear": found.content(), "told": list(found.told)}
        else:
            row["hybrid_lower_before_by"] = _paired(before - hybrid[0])
            row["hybrid_lower_by"] = _paired(after - hybrid[1])
        yield row


def _plans(bed: Bed, chosen: Sequence[Choice]) -> dict[str, tuple[Choice, ...]]:
    """Return the hybrids, and windows of as many bytes in the same layers."""
    sites = {s.name: s for s in bed.teacher.sites}
    windows = tuple(linear.as_window(sites[c.site], linear.Config(**c.config)) for c in chosen)
    return {"hybrid": tuple(chosen), "window": windows, "window, first": _with_first(windows)}


def _with_first(windows: Sequence[Choice]) -> tuple[Choice, ...]:
    """Let windows keep the first tokens, with as many bytes as before."""
    sizes = ({"window": w.config["window"] - FIRST, "first": FIRST} for w in windows)
    return tuple(replace(w, config=x) for w, x in zip(windows, sizes, strict=True))


def _layers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Convert each layer alone, without healing."""
    bed = Bed.of(options)
    base = losses(bed.teacher, bed.judged, "source")
    every = linear.choose(
        bed.teacher, bed.stats, len(bed.teacher.sites), over_window=True, window=options.window,
        features=options.features,
    )  # fmt: skip
    for choice in every:
        found = {
            name: losses(bed.student(choices), bed.judged, name)
            for name, choices in _plans(bed, [choice]).items()
        }
        yield {
            "site": choice.site,
            "why": choice.why,
            **{f"{name} loses": _paired(x - base) for name, x in found.items()},
            "hybrid_lower_by": _paired(found["window"] - found["hybrid"]),
        }


def _mean(found: Tensor) -> float:
    return round(float(found.mean()), 5)


def _paired(differences: Tensor) -> dict[str, Any]:
    """Return a mean over rows with its interval."""
    found = Paired.of(differences)
    return {"mean": round(found.mean, 5), "ci95": [round(x, 5) for x in found.ci95]}


def _without(program: Program, names: list[str]) -> Program:
    """Return a program whose attentions of these names write nothing."""
    last = [s.projections["o"].parameter for s in program.sites if s.name in names]
    return program.with_weights({n: torch.zeros_like(program.weights[n]) for n in last})


def _bytes(program: Program) -> int:
    """Return what the states of constant size take for a text, in float32."""
    sizes = ([n for n in s.shape if isinstance(n, int)] for s in program.states if s.grows is None)
    return sum(4 * math.prod(shape) for shape in sizes)


# ----------------------------------------------------------------------------------------- prefill


def _prefill(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time attention alone at growing lengths, and fit the power with which its time grows."""
    rows: list[dict[str, Any]] = []
    _check()
    for tokens in options.lengths:
        q, k, v, own, settings = _call(tokens)
        with torch.no_grad():
            timing = compare(
                {
                    "linear": lambda: attend_linear(q, k, v, *own, **settings),  # noqa: B023
                    "dense": lambda: functional.scaled_dot_product_attention(
                        q,  # noqa: B023
                        k,  # noqa: B023
                        v,  # noqa: B023
                        is_causal=True,
                    ),
                },
                base="dense",
                most=options.rounds,
            )
        rows.append(
            {
                "tokens": tokens,
                "ms": round(1e3 * timing.median("linear"), 3),
                "dense_ms": round(1e3 * timing.median("dense"), 3),
                "over_dense": as_row(timing.speedup("linear", "dense")),
            }
        )
    if len(rows) > 1:
        x, y = (torch.tensor([math.log(r[n]) for r in rows]) for n in ("tokens", "ms"))
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        rows.append({"exponent": round(slope, 3)})
    return rows


def _call(tokens: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=g) for _ in range(3))
    own = [torch.randn(HEADS, WIDTH + 1, FEATURES, generator=g) * WIDTH**-0.5 for _ in range(2)]
    return q, k, v, own, {"feature": "centroids", "window": WINDOW, "causal": True}


def _check() -> None:
    """Compare with the definition before anything is timed."""
    q, k, v, own, settings = _call(700)
    found = attend_linear(q, k, v, *own, **settings)
    want = linear_attention_reference(
        *(x.double() for x in (q, k, v)), *(x.double() for x in own), **settings
    )
    assert torch.allclose(found.double(), want, atol=1e-4)


# ---------------------------------------------------------------------------------------- decoding


def _decoding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a step of a model whose layers are all linear, by how much it has seen."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=2 * max(options.texts),
    )  # fmt: skip
    torch.manual_seed(options.seed)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    teacher = attnopt.apply(attnopt.capture(model), "exact")
    ids = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0))
    stats = attnopt.calibrate(teacher, ids)
    choices = tuple(Choice(s.name, "linear", {}) for s in teacher.sites)
    program = attnopt.apply(teacher, Plan(choices, statistics=stats))
    run = attnopt.lower(program, "eager")
    states, calls = {}, {}
    token = torch.zeros(1, 1, dtype=torch.long)
    for seen in options.texts:
        text = torch.randint(512, (1, seen), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            cache = run(input_ids=text).past_key_values
        layers = (layer.tensors.values() for layer in cache.layers)
        states[seen] = sum(x.numel() * x.element_size() for held in layers for x in held)
        # A step returns a new cache and leaves the old one as it is.
        calls[str(seen)] = lambda cache=cache: run(input_ids=token, past_key_values=cache)
    first, last = str(options.texts[0]), str(options.texts[-1])
    with torch.no_grad():
        timing = _interleaved(calls, options.steps_rounds)
    rows: list[dict[str, Any]] = [
        {
            "seen": seen,
            "step_ms": round(1e3 * timing.median(str(seen)), 3),
            "state_bytes": states[seen],
            "over_first": as_row(timing.speedup(first, str(seen))),
        }
        for seen in options.texts
    ]
    assert len(set(states.values())) == 1
    growth = timing.speedup(first, last)
    told = {"growth": round(growth.ratio, 4), "growth_ci95": [growth.low, growth.high]}
    return [*rows, {**told, "rounds": options.steps_rounds}]


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> Timing:
    """Time one call of each in every round, so that what slows the machine slows all alike."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    for number in range(-WARMING, rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            start = time.perf_counter()
            calls[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    gc.enable()
    return Timing({name: tuple(found) for name, found in seconds.items()})


PARTS: Final[dict[str, Callable[[argparse.Namespace], Iterable[dict[str, Any]]]]] = {
    "quality": _quality,
    "layers": _layers,
    "prefill": _prefill,
    "decoding": _decoding,
}


if __name__ == "__main__":
    sys.exit(main())
