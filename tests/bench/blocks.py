"""What tiles chosen by estimates cost and save: pass blocks beside an oracle and beside dense.

    python tests/bench/blocks.py
    python tests/bench/blocks.py --only quality --rows 4
    python tests/bench/blocks.py --only times --tokens 4096 --rounds 3

`quality`: a bundled model at 1,024 tokens, tiles of 32, density 0.3: the error of each layer's
output (L2, relative, on the dense model's activations) and the held-out loss, for every estimator
and for an oracle that selects by the true mass of each tile. `estimators`: the time of an estimate
beside dense attention. `times`: attention by a plan at several densities beside dense attention and
compiled flex_attention, after their results were compared. Exit status 1 where a point of
acceptance fails.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import as_row, compare, write
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attnopt
from attnopt.data import Source, split_of
from attnopt.inlining import inline_attention
from attnopt.lowering import lowered_class
from attnopt.ops.blocks import grid_of, listed, tiles_in
from attnopt.ops.blockwise import attend_blocks
from attnopt.ops.estimators import ESTIMATORS
from attnopt.ops.plan_blocks import plan_tiles
from attnopt.ops.sdpa import attend
from attnopt.ops.selecting import select
from attnopt.ops.tiling import Tiling
from attnopt.verifying import losses

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "code-llama"
TOKENS: Final = 1024
TILE: Final = 32
STRIDE: Final = 4
DENSITY: Final = 0.3
DENSITIES: Final = (0.1, 0.2, 0.3, 0.5, 1.0)
LENGTHS: Final = (4096, 8192, 16384)
# Of a call that is timed: query heads, key heads, channels, tokens of a tile.
SHAPE: Final = (4, 2, 128, 128)
LARGEST_ERROR: Final = 1.5
LARGEST_SHARE: Final = 0.06
Plan = tuple[Tensor, Tensor, Tensor, Tensor]
Planner = Callable[..., Plan]


@dataclass(frozen=True)
class Point:
    """One point of acceptance, and whether it is met."""

    what: str
    found: str
    met: bool


# ----------------------------------------------------------------------------------------- quality


@dataclass
class Attention:
    """The attention of a model, which may be changed between calls.

    `errors` has, by method, the error and the energy of the outputs of every layer.
    """

    planner: Planner | None = None
    compared: dict[str, Planner] = field(default_factory=dict)
    errors: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    densities: dict[str, float] = field(default_factory=dict)

    def prepare(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """Be a backend: run a graph with this attention."""
        inline_attention(graph_module, remember=True, kernel_of=self._kernel_of)
        return graph_module.forward

    def _kernel_of(self, node: fx.Node) -> Callable[..., Any] | None:
        return self._attend if node.target is torch.ops.attnopt.attention.default else None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if self.planner is not None:
            return by(self.planner(q, k), q, k, v, **options)
        dense = attend(q, k, v, **options)
        for name, planner in self.compared.items():
            plan = planner(q, k)
            found = by(plan, q, k, v, **options)
            error = float((found - dense).double().square().sum())
            self.errors.setdefault(name, []).append((error, float(dense.double().square().sum())))
            self.densities[name] = density(plan, q.shape[2], TILE)
        return dense


def by(plan: Plan, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attend by a plan."""
    tile = {"q_tile": TILE, "k_tile": TILE}
    return attend_blocks(q, k, v, *plan, **tile, **{"memo": {}, **options})


def estimated(name: str, amount: float) -> Planner:
    """Return a planner that estimates."""

    def planner(q: Tensor, k: Tensor) -> Plan:
        return plan_tiles(
            q, k, estimator=name, rule="topk", amount=amount, tile=TILE, causal=True, stride=STRIDE
        )

    return planner


def oracle(amount: float) -> Planner:
    """Return a planner that knows the true mass of every tile."""

    def planner(q: Tensor, k: Tensor) -> Plan:
        length = k.shape[2]
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
        hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
        mass = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mass = mass.unflatten(-1, (-1, TILE)).sum(-1).unflatten(-2, (-1, TILE)).sum(-2)
        tiling = Tiling(length, length, TILE, TILE, True, True, q.device)
        forced = tiling.first_shown() | tiling.diagonal()
        grid = select(mass.log(), tiling.allowed(), forced, "topk", amount)
        return (*listed(grid & ~tiling.whole()), *listed(grid & tiling.whole()))

    return planner


def amount_for(wanted: float, tiles: int) -> float:
    """Return the share of a row that gives a density, forced tiles included."""
    amounts = [a / 1000 for a in range(1, 1001)]
    rows = range(1, tiles + 1)

    def made(amount: float) -> float:
        kept = sum(max(math.ceil(amount * n - 1e-6), min(2, n)) for n in rows)
        return kept / sum(rows)

    return max((a for a in amounts if made(a) <= wanted), default=amounts[0])


def density(plan: Plan, tokens: int, tile: int) -> float:
    """Return the share of the tiles at or below the diagonal that a plan visits."""
    count = tiles_in(tokens, tile)
    grid = grid_of(plan[0], plan[1], count) | grid_of(plan[2], plan[3], count)
    return float(grid.sum()) / (grid.shape[0] * grid.shape[1] * count * (count + 1) / 2)


def quality(rows: int) -> Iterator[dict[str, Any]]:
    """Measure errors by layer, and losses."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    split = split_of(Source("stdlib", 1, TOKENS, seed=0), tokenizer, held_out=rows)
    program = attnopt.apply(attnopt.capture(MODEL), "exact").cast(torch.float32)
    own = Attention()
    model = lowered_class(program)(program, own).eval()
    amount = amount_for(DENSITY, TOKENS // TILE)
    own.compared = {"oracle": oracle(amount)} | {e: estimated(e, amount) for e in ESTIMATORS}
    base = losses(model, split.held_out, "dense", tokens=TOKENS)
    methods, own.compared = own.compared, {}
    yield {"what": "quality", "method": "dense", "loss": round(float(base.mean()), 5), "rows": rows}
    layers = len(program.sites)
    whole = total_error(own.errors["oracle"])
    for name, planner in methods.items():
        own.planner = planner
        excess = float((losses(model, split.held_out, name, tokens=TOKENS) - base).mean())
        pairs = own.errors[name]
        each = [round(total_error(pairs[n::layers]), 4) for n in range(layers)]
        yield {
            "what": "quality",
            "method": name,
            "density": round(own.densities[name], 4),
            "error": round(total_error(pairs), 4),
            "error by layer": each,
            "over oracle": round(total_error(pairs) / whole, 3),
            "excess loss": round(excess, 5),
        }


def total_error(pairs: list[tuple[float, float]]) -> float:
    """Return the relative error of several outputs together."""
    return math.sqrt(sum(e for e, _ in pairs) / sum(n for _, n in pairs))


# ------------------------------------------------------------------------------------------- times


def drawn(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a call of one row."""
    heads, key_heads, width, _ = SHAPE
    chance = torch.Generator().manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, h, tokens, width, generator=chance) for h in (heads, key_heads, key_heads)
    )


def estimators(tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Time every estimate beside dense attention."""
    q, k, v = drawn(tokens)

    def estimating(name: str) -> Callable[[], Plan]:
        return lambda: plan_tiles(
            q, k, estimator=name, rule="topk", amount=DENSITY, tile=SHAPE[3], causal=True
        )

    calls: dict[str, Callable[[], Any]] = {name: estimating(name) for name in ESTIMATORS}
    calls["dense"] = lambda: attend(q, k, v, causal=True)
    timing = compare(calls, base="dense", most=rounds)
    for name in ESTIMATORS:
        yield {
            "what": "estimator",
            "method": name,
            "tokens": tokens,
            "milliseconds": round(1e3 * timing.median(name), 2),
            "share of dense": round(timing.median(name) / timing.median("dense"), 4),
        }


def times(tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Time attention by plans of several densities."""
    q, k, v = drawn(tokens)
    flex = torch.compile(flex_attention)
    for wanted in DENSITIES:
        plan = random_plan(tokens, wanted)
        mask = flex_mask(plan, tokens)
        calls: dict[str, Callable[[], Any]] = {
            "dense": lambda: attend(q, k, v, causal=True),
            "tiles": lambda plan=plan: tiled(plan, q, k, v),
            "flex": lambda mask=mask: flex(q, k, v, block_mask=mask, enable_gqa=True),
        }
        torch.testing.assert_close(calls["tiles"](), calls["flex"](), rtol=1e-4, atol=1e-4)
        timing = compare(calls, base="dense", most=rounds)
        yield {
            "what": "time",
            "tokens": tokens,
            "density": round(density(plan, tokens, SHAPE[3]), 4),
            "dense milliseconds": round(1e3 * timing.median("dense"), 1),
            "tiles over dense": as_row(timing.speedup("tiles", "dense")),
            "flex over dense": as_row(timing.speedup("flex", "dense")),
        }


def tiled(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by a plan of the tiles that are timed."""
    return attend_blocks(q, k, v, *plan, q_tile=SHAPE[3], k_tile=SHAPE[3], causal=True, memo={})


def random_plan(tokens: int, wanted: float) -> Plan:
    """Select at random, with the first tile and the diagonal."""
    tiling = Tiling(tokens, tokens, SHAPE[3], SHAPE[3], True, True, torch.device("cpu"))
    scores = torch.rand(1, SHAPE[1], tiling.rows, tiling.columns)
    forced = tiling.first_shown() | tiling.diagonal()
    amount = amount_for(wanted, tiling.rows)
    grid = select(scores, tiling.allowed(), forced, "topk", amount)
    return (*listed(grid & ~tiling.whole()), *listed(grid & tiling.whole()))


def flex_mask(plan: Plan, tokens: int) -> BlockMask:
    """Return the same plan as FlexAttention says it."""
    lists = [x.repeat_interleave(SHAPE[0] // SHAPE[1], dim=1) for x in plan]
    return BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=SHAPE[3],
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(tokens, tokens),
    )


# ------------------------------------------------------------------------------------------ points


def points(rows: list[dict[str, Any]]) -> list[Point]:
    """Judge what was measured."""
    judged: list[Point] = []
    over = {
        r["method"]: r["over oracle"]
        for r in rows
        if r["what"] == "quality" and r["method"] in ESTIMATORS and r["density"] <= DENSITY
    }
    if over:
        best = min(over, key=lambda name: over[name])
        what = f"the best estimator ({best}) at most {LARGEST_ERROR} of the oracle's error"
        judged.append(Point(what, f"{over[best]:.3f}", over[best] <= LARGEST_ERROR))
    for row in rows:
        if row["what"] == "estimator" and row["tokens"] >= LENGTHS[-1]:
            what = f"{row['method']} at most {LARGEST_SHARE:.0%} of dense at {row['tokens']:,}"
            share = row["share of dense"]
            judged.append(Point(what, f"{share:.1%}", share <= LARGEST_SHARE))
    return judged


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line a row, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["quality", "estimators", "times"])
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of 1,024 tokens")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: list[dict[str, Any]] = []

    def take(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            print(row, flush=True)
            found.append(row)

    if options.only in (None, "quality"):
        take(quality(options.rows))
    if options.only in (None, "estimators"):
        take(estimators(max(options.tokens), options.rounds))
    if options.only in (None, "times"):
        for tokens in options.tokens:
            take(times(tokens, options.rounds))
    judged = points(found)
    write("blocks", [*found, *({"point": p.what, "found": p.found, "met": p.met} for p in judged)])
    for point in judged:
        print(f"{'met ' if point.met else 'FAIL'} {point.what}: {point.found}")
    return 0 if all(point.met for point in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
