"""Whether the gate keeps its promise: how often it accepts what lost too much, and what lost none.

python tests/bench/gate.py                  from the losses that are kept beside the results
python tests/bench/gate.py --measure        measures them anew

Simulated pairs of 96 rows are drawn from the real losses, row by row, of a checkpoint and of what
harm makes of it, shifted so that the true drop is the one that is wanted. Student's t, percentiles
and BCa are judged on the same draws.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, machine
from numpy.typing import NDArray
from scipy import stats

from attnopt.verifying.intervals import studentized
from attnopt.verifying.language import LanguageScores
from attnopt.verifying.report import Report

MODEL = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
LOSSES = RESULTS / "gate_losses.json"
ROWS = 96
PAIRS = 200
WORSE = 3.0
LIMITS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """The losses of many rows before and after some harm, in nats a token."""

    name: str
    before: Array
    after: Array

    def shifted(self, drop: float) -> Array:
        """Return the differences, moved so that their mean is a drop of the mean loss."""
        apart = self.after - self.before
        return apart - apart.mean() + drop * self.before.mean()


def main(arguments: list[str] | None = None) -> int:
    """Print one row a population, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the losses anew")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args(arguments)
    if options.measure:
        measure()
    rows = [judged(p, options.pairs) for p in (*populations(), *skewed())]
    for row in rows:
        print(json.dumps(row))
    content = {"machine": machine(), "pairs": options.pairs, "rows": rows}
    (RESULTS / "gate.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def populations() -> list[Population]:
    """Return the losses that were measured."""
    kept = json.loads(LOSSES.read_text())
    before = np.array(kept["before"])
    return [Population(name, before, np.array(after)) for name, after in kept["after"].items()]


def skewed() -> list[Population]:
    """Return differences that no checkpoint showed: heavy tails, and few rows that lose much."""
    random, before = np.random.default_rng(0), populations()[0].before
    count = len(before)
    apart = {
        "Student's t, 3 degrees": random.standard_t(3, count),
        "lognormal, sigma 1": random.lognormal(0, 1, count),
        "one row in twenty loses": (random.random(count) < 0.05) * random.exponential(1, count),
    }
    return [Population(name, before, before + 0.05 * x) for name, x in apart.items()]


def judged(population: Population, pairs: int) -> dict[str, Any]:
    """Return how often the gate accepts, at several true drops and limits."""
    unharmed = bounds(population, 0.0, pairs)
    power = {limit: float((unharmed <= limit).mean()) for limit in LIMITS}
    resolved = next((limit for limit in LIMITS if power[limit] >= 0.95), LIMITS[-1])
    at_limit = bounds(population, resolved, pairs) <= resolved
    worse = bounds(population, WORSE * resolved, pairs) <= resolved
    return {
        "population": population.name,
        "rows": ROWS,
        "pairs": pairs,
        "accepted at no drop, by max_drop": {str(limit): x for limit, x in power.items()},
        "max_drop that the rows resolve": resolved,
        "accepted at no drop": power[resolved],
        "accepted at a drop of max_drop": float(at_limit.mean()),
        "rejected at three times max_drop": 1 - float(worse.mean()),
        "upper bound below the truth, by method": {
            name: below(population, 2 * pairs, bound) for name, bound in BOUNDS.items()
        },
    }


def bounds(population: Population, drop: float, pairs: int) -> Array:
    """Return the upper bounds that the gate judges by; infinite for what it never accepts."""
    reports = [report(*pair) for pair in draws(population, drop, pairs)]
    return np.array([r.drop.ci95[1] if r.accepted else np.inf for r in reports])


def draws(population: Population, drop: float, pairs: int) -> list[tuple[Array, Array]]:
    """Draw pairs of losses with a true drop."""
    random = np.random.default_rng(1)
    apart = population.shifted(drop)
    chosen = random.integers(0, len(apart), (pairs, ROWS))
    return [(population.before[c], population.before[c] + apart[c]) for c in chosen]


def report(before: Array, after: Array, limit: float | None = None) -> Report:
    """Judge a pair as `attnopt.verify` does."""
    tensors = [torch.from_numpy(x) for x in (before, after)]
    none, counts = torch.zeros(len(before)), torch.full((len(before),), 128.0)
    return Report(LanguageScores(*tensors, counts, none, none), limit)


def below(population: Population, pairs: int, bound: Callable[[Array], float]) -> float:
    """Return how often an upper bound of the mean difference is below the true one, which is 0."""
    found = [bound(after - before) for before, after in draws(population, 0.0, pairs)]
    return float(np.mean(np.array(found) < 0))


def _student(x: Array) -> float:
    return float(x.mean() + stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)


def _means(x: Array) -> Array:
    random = np.random.default_rng(2)
    found: Array = x[random.integers(0, len(x), (2000, len(x)))].mean(1)
    return found


def _percentile(x: Array) -> float:
    return float(np.quantile(_means(x), 0.975))


def _bca(x: Array) -> float:
    means, limit = _means(x), 1.959964
    bias = stats.norm.ppf(np.clip((means < x.mean()).mean(), 1e-4, 1 - 1e-4))
    left = (x.sum() - x) / (len(x) - 1)
    left = left.mean() - left
    skew = (left**3).sum() / (6 * (left**2).sum() ** 1.5)
    share = stats.norm.cdf(bias + (bias + limit) / (1 - skew * (bias + limit)))
    return float(np.quantile(means, share))


def _studentized(x: Array) -> float:
    return studentized(x, np.ones_like(x))[1]


BOUNDS = {
    "Student": _student,
    "percentile": _percentile,
    "BCa": _bca,
    "studentized bootstrap (the gate's)": _studentized,
}


def measure() -> None:
    """Measure the losses of the checkpoint as it is and harmed, and keep them."""
    import transformers

    from attnopt.data import Source, split_of
    from attnopt.verifying import losses

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    rows = split_of(Source("stdlib", 1, 128), tokenizer, held_out=768).held_out
    load = transformers.AutoModelForCausalLM.from_pretrained
    before = losses(load(MODEL, dtype=torch.float32), rows, "source")
    after: dict[str, list[float]] = {}
    for name, harm in HARMS.items():
        model = load(MODEL, dtype=torch.float32)
        with torch.no_grad():
            harm(model)
        after[name] = _kept(losses(model, rows, name))
        print(f"{name}: {np.mean(after[name]) - float(before.mean()):+.4f}", file=sys.stderr)
    LOSSES.write_text(json.dumps({"before": _kept(before), "after": after}) + "\n")


def _noise(model: Any) -> None:
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight) * weight.std() * 0.05)


def _without_a_head(model: Any) -> None:
    """Remove the first head of the third layer."""
    attention = model.model.layers[2].self_attn
    attention.o_proj.weight[:, : attention.head_dim] = 0


def _without_words(model: Any) -> None:
    """Forget one token in fifty: few rows lose much."""
    model.get_output_embeddings().weight[::50] *= 0.5


HARMS = {
    "noise of 5 % in all weights": _noise,
    "one head less": _without_a_head,
    "one token in fifty harder to say": _without_words,
}


def _kept(values: torch.Tensor) -> list[float]:
    return [round(float(x), 5) for x in values]


if __name__ == "__main__":
    sys.exit(main())
