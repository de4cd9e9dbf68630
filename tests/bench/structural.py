"""What fewer heads and neurons cost: pass dha and pass amp beside the published methods.

    python tests/bench/structural.py
    python tests/bench/structural.py --draws 1 --only heads --rows 48

Excess held-out loss (nats a token over the source) of a checkpoint, by method and by draw of the
calibration text; the held-out rows are the same for all. `kv` fuses key and value heads at several
ratios; `heads`, `mlp` and `both` remove shares of heads, of neurons and of the parameters of both.
Exit status 1 where a point of acceptance fails: what must be at most some share of a published
method's excess, or no worse than another choice with the same compensation. Worse is what is worse
in the 95 % interval over the rows and in that over the draws.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from baselines import amp_published, flap_published, kv_merges
from baselines.removing import HEADS, NEURONS, Method, pruned, targets
from harness import write
from torch import Tensor

import attnopt
from attnopt.calibrating import Statistics
from attnopt.data import Source, Split, split_of
from attnopt.heads import removable
from attnopt.nouns import Choice, Plan
from attnopt.program import Program
from attnopt.verifying import Paired, losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
RATIOS: Final = (2, 4, 8)
REMOVED: Final = {
    "heads": ((HEADS,), (0.25, 0.5)),
    "mlp": ((NEURONS,), (0.25, 0.5)),
    "both": ((HEADS, NEURONS), (0.3,)),
}
OURS: Final = "ours"


@dataclass(frozen=True)
class Draw:
    """A program, and what calibration saw of it with one draw of the text."""

    program: Program
    stats: Statistics
    split: Split
    model: Path


@dataclass(frozen=True)
class Setting:
    """One method at one strength; `blind` methods read no data, so that one draw is enough."""

    strength: str
    method: str
    losses: Callable[[Draw], Tensor]
    blind: bool = False

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.strength} {self.method}"


@dataclass(frozen=True)
class Point:
    """One point of acceptance, and whether it is met."""

    what: str
    found: str
    met: bool


Rows = dict[str, list[Tensor]]
"""The excess of each held-out row, by setting and by draw."""


# ---------------------------------------------------------------------------------------- settings


def settings(only: str | None, budgets: bool) -> list[Setting]:
    """List all that is measured, or that of one kind."""
    found: list[Setting] = []
    if only in (None, "kv"):
        for ratio in RATIOS:
            found += _fusing(ratio)
            found += [_budgeted(ratio, tier) for tier in LOOSER] if budgets else []
    for kind, (units, shares) in REMOVED.items():
        if only in (None, kind):
            for share in shares:
                found += _removing(f"{kind} -{share:.0%}", units, share)
    return found


def _fusing(ratio: int) -> Iterator[Setting]:
    """List the closed form and the published merges, with and without a refit."""
    strength = f"kv {ratio}:1"

    def fused(draw: Draw, refit: bool) -> Tensor:
        config = {"refit": refit}
        choices = [
            Choice(s.name, "dha", {"kv_heads": s.kv_heads // ratio, **config})
            for s in draw.program.sites
        ]
        return measured(draw, applied(draw, choices))

    def merged(draw: Draw, merge: str, refit: bool) -> Tensor:
        left = draw.program.sites[0].kv_heads // ratio
        made = kv_merges.merged(draw.program, draw.stats, merge, left, refit=refit)
        return measured(draw, made)

    yield Setting(strength, OURS, lambda d: fused(d, True))
    yield Setting(strength, "ours, no refit", lambda d: fused(d, False))
    for merge in kv_merges.MERGES:
        blind = not merge.startswith("procrustes")
        yield Setting(strength, merge, lambda d, m=merge: merged(d, m, False), blind)
        yield Setting(strength, f"{merge} + refit", lambda d, m=merge: merged(d, m, True))


LOOSER: Final = {1: "ours, budgets by layer", 2: "ours, keys and values apart"}


def _budgeted(ratio: int, tier: int) -> Setting:
    """Give every layer its own numbers of heads, at the bytes of a uniform plan."""

    def planned(draw: Draw) -> Tensor:
        goal = {"kv_cache": 1 / ratio}
        plan = attnopt.plan(draw.program, goal, None, ["dha"], statistics=draw.stats, tier=tier)
        return measured(draw, attnopt.apply(draw.program, plan))

    return Setting(f"kv {ratio}:1", LOOSER[tier], planned)


def _removing(strength: str, units: tuple[str, ...], share: float) -> Iterator[Setting]:
    """List our choice, the published methods, and other scores with our compensation."""

    def scored(draw: Draw, score: str, refit: bool = True) -> Tensor:
        return measured(draw, applied(draw, budget(draw.program, units, share, score, refit)))

    def published(draw: Draw, method: Method) -> Tensor:
        return measured(draw, pruned(method, draw.program, draw.stats, share, units))

    def flap_with_bias(draw: Draw) -> Tensor:
        stays = flap_published.chosen(draw.program, draw.stats, share, units)
        model = transformers.AutoModelForCausalLM.from_pretrained(draw.model, dtype=torch.float32)
        with flap_published.compensated(model.eval(), draw.program, draw.stats, stays) as lent:
            return measured(draw, lent)

    yield Setting(strength, OURS, lambda d: scored(d, "obs"))
    yield Setting(strength, "ours, no refit", lambda d: scored(d, "obs", refit=False))
    yield Setting(strength, "AMP as published", lambda d: published(d, amp_published.chosen))
    yield Setting(strength, "FLAP as published", flap_with_bias)
    yield Setting(strength, "FLAP without its bias", lambda d: published(d, flap_published.chosen))
    for score in others(units):
        yield Setting(strength, f"{score} + compensation", lambda d, s=score: scored(d, s))


def others(units: tuple[str, ...]) -> tuple[str, ...]:
    """List the other scores of pass amp; those of heads are the same with and without columns."""
    return ("amp", *(("amp_w",) if NEURONS in units else ()), "flap", "l2", "random")


def budget(
    program: Program, units: tuple[str, ...], share: float, score: str, refit: bool
) -> list[Choice]:
    """Remove a share of the parameters of every layer: whole heads, and neurons for the rest."""
    common = {"score": score, "compensate": True, "refit": refit}
    choices: list[Choice] = []
    sites = targets(program, units)[: len(program.sites)] if HEADS in units else []
    for site in sites:
        groups = min(round(share * site.kv_heads), site.kv_heads - 1)
        choices.append(Choice(site.name, "amp", {"groups": groups, **common}))
    if NEURONS not in units:
        return choices
    for i, mlp in enumerate(program.mlps):
        size, _ = removable(mlp, program.weights)
        rest = share * mlp.neurons * size
        if sites:
            site = sites[i]
            groups = choices[i].config["groups"]
            rest += (share * site.kv_heads - groups) * removable(site, program.weights)[0]
        choices.append(Choice(mlp.name, "amp", {"neurons": max(round(rest / size), 0), **common}))
    return choices


def applied(draw: Draw, choices: list[Choice]) -> Program:
    """Carry choices out with the statistics of a draw."""
    return attnopt.apply(draw.program, Plan(tuple(choices), statistics=draw.stats))


def measured(draw: Draw, program: Any) -> Tensor:
    """Return the loss of each held-out row."""
    return losses(program, draw.split.held_out, "rewritten")


# ------------------------------------------------------------------------------------------ points


def points(found: Rows) -> list[Point]:
    """Judge what was measured; what was not is not judged."""
    judged: list[Point] = []
    for ratio in RATIOS:
        judged += _at_most(found, f"kv {ratio}:1", "procrustes", 0.5)
    judged += _at_most(found, "kv 4:1", "mean", 0.25)
    for ratio in RATIOS:
        for looser in LOOSER.values():
            judged += _no_worse(found, f"kv {ratio}:1", OURS, looser, swapped=True)
    for kind, (units, shares) in REMOVED.items():
        for share in shares:
            strength = f"{kind} -{share:.0%}"
            judged += _at_most(found, strength, "AMP as published", 0.5)
            for score in others(units):
                judged += _no_worse(found, strength, OURS, f"{score} + compensation")
    return judged


def _at_most(found: Rows, strength: str, other: str, limit: float) -> Iterator[Point]:
    """Judge our excess as a share of another's."""
    mine, theirs = found.get(f"{strength} {OURS}"), found.get(f"{strength} {other}")
    if mine and theirs:
        ratio = mean(mine) / mean(theirs)
        what = f"{strength}: ours at most {limit} of {other}"
        yield Point(what, f"{ratio:.3f}", ratio <= limit)


def _no_worse(
    found: Rows, strength: str, first: str, second: str, *, swapped: bool = False
) -> Iterator[Point]:
    """Judge whether the first is worse than the second beyond noise."""
    if swapped:
        first, second = second, first
    mine, theirs = found.get(f"{strength} {first}"), found.get(f"{strength} {second}")
    if mine and theirs:
        differences = torch.stack(mine) - torch.stack(theirs)
        over = [Paired.of(differences.mean(0))]
        over += [Paired.of(differences.mean(1))] if len(differences) > 1 else []
        worse = all(interval.ci95[0] > 0 for interval in over)
        shown = "; ".join(f"{i.ci95[0]:+.4f} to {i.ci95[1]:+.4f}" for i in over)
        what = f"{strength}: {first} no worse than {second}"
        yield Point(what, f"{over[0].mean:+.4f} ({shown})", not worse)


def mean(rows: list[Tensor]) -> float:
    """Return the mean over draws and rows."""
    return float(torch.stack(rows).mean())


# --------------------------------------------------------------------------------------------- run


def run(options: argparse.Namespace) -> tuple[float, Rows]:
    """Measure everything; return the loss of the source, and the excess of each setting.

    The table is written after every draw.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    program = attnopt.apply(attnopt.capture(options.model), "exact")
    base: Tensor | None = None
    found: Rows = {}
    for number in range(options.draws):
        source = Source("stdlib", 48, 256, seed=number)
        split = split_of(source, tokenizer, held_out=options.rows)
        draw = Draw(program, attnopt.calibrate(program, split), split, options.model)
        base = measured(draw, program) if base is None else base
        for setting in settings(options.only, options.budgets):
            known = found.setdefault(setting.name, [])
            known.append(known[0] if known and setting.blind else setting.losses(draw) - base)
            shown = f"draw {number} {setting.name}: {float(known[-1].mean()):+.4f}"
            print(shown, file=sys.stderr, flush=True)
        write("structural", table(float(base.mean()), found, points(found)))
    assert base is not None
    return float(base.mean()), found


def main(arguments: list[str] | None = None) -> int:
    """Print one row a setting, the mean over the draws and each draw, and the points."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--only", choices=["kv", *REMOVED])
    parser.add_argument("--rows", type=int, default=96, help="held-out rows of 256 tokens")
    parser.add_argument("--budgets", action="store_true", help="budgets by layer, too")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base, found = run(options)
    print(f"source: {base:.4f} nats a token; {options.draws} draws, {options.rows} held-out rows")
    for name, rows in found.items():
        each = " ".join(f"{float(r.mean()):.4f}" for r in rows)
        print(f"{name:36} {mean(rows):8.4f}   ({each})")
    judged = points(found)
    for point in judged:
        print(f"{'met ' if point.met else 'FAIL'} {point.what}: {point.found}")
    return 0 if all(point.met for point in judged) else 1


def table(base: float, found: Rows, judged: list[Point]) -> list[dict[str, Any]]:
    """Turn results into rows of the table."""
    written: list[dict[str, Any]] = [{"setting": "source", "loss": base}]
    for name, rows in found.items():
        draws = [round(float(r.mean()), 5) for r in rows]
        written.append({"setting": name, "excess": round(mean(rows), 5), "draws": draws})
    return [*written, *({"point": p.what, "found": p.found, "met": p.met} for p in judged)]


if __name__ == "__main__":
    sys.exit(main())
