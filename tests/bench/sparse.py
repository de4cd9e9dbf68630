"""Windows on the CPU: the op beside flex_attention and dense attention, and whole models.

    python tests/bench/sparse.py
    python tests/bench/sparse.py --only op --lengths 1024 2048 4096 --most 7

Random weights, float32. `op`: prefill of one attention with a window of 512. `decode`: a step of a
model whose heads all have that window, after contexts of several lengths, and what its state holds.
`models`: prefill of a Mistral- and a Gemma-3-shaped model beside their stock sdpa implementation.
Every result is compared before it is timed. Exit status 1 where a point of acceptance fails.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from harness import as_row, compare, write
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnopt
from attnopt.nouns import Choice, Plan
from attnopt.ops.sdpa import attend

WINDOW: Final = 512
LENGTHS: Final = (1024, 2048, 4096, 8192, 16384)
MODEL_LENGTH: Final = 8192
EXPONENT: Final = 1.1
OF_FLEX: Final = 0.95
OF_DENSE: Final = 3.0
OF_STOCK: Final = 1.5
STEADY: Final = 1.15
TOLERANCE: Final = 1e-3

Row = dict[str, Any]


def operands(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries of 8 heads, and keys and values of 2."""
    generator = torch.Generator().manual_seed(length)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, heads, length, 64, generator=generator) for heads in (8, 2, 2)
    )


def flex(length: int) -> Callable[..., Tensor]:
    """Compile flex_attention for the window."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < WINDOW)

    blocks = create_block_mask(seen, None, None, length, length, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    return partial(compiled, block_mask=blocks, enable_gqa=True)


def op(lengths: tuple[int, ...], most: int) -> tuple[list[Row], list[Row]]:
    """Time one attention at several lengths."""
    rows: list[Row] = []
    ours: list[float] = []
    for length in lengths:
        q, k, v = operands(length)
        dense = F.scaled_dot_product_attention
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(attend, q, k, v, {}, causal=True, window=WINDOW),
            "flex": partial(flex(length), q, k, v),
            "dense": partial(dense, q, k, v, is_causal=True, enable_gqa=True),
        }
        torch.testing.assert_close(calls["ours"](), calls["flex"](), rtol=0, atol=1e-4)
        timing = compare(calls, base="ours", most=most)
        ours.append(timing.median("ours"))
        over = {name: timing.speedup("ours", name) for name in ("flex", "dense")}
        rows.append({"case": "op", "tokens": length, "ms": round(1e3 * ours[-1], 3)})
        rows[-1] |= {f"over {name}": as_row(x) for name, x in over.items()}
        shown = "   ".join(f"{name} {x}" for name, x in over.items())
        print(f"op {length:6} {1e3 * ours[-1]:9.2f} ms   {shown}")
    flexible = f"at least {OF_FLEX} of flex_attention"
    points = [_point(f"{r['tokens']} tokens: {flexible}", r["over flex"], OF_FLEX) for r in rows]
    if len(ours) > 1:
        x, y = ([math.log(n) for n in values] for values in (lengths, ours))
        grows = _slope(x, y)
        points.append({"point": "time grows linearly", "found": round(grows, 3),
                       "met": grows <= EXPONENT})  # fmt: skip
    at = [r for r in rows if r["tokens"] == 8192]
    points += [_point(f"8192 tokens: {OF_DENSE} of dense", r["over dense"], OF_DENSE) for r in at]
    return rows, points


def _point(what: str, found: Row, least: float) -> Row:
    """Judge a speedup by the upper end of its interval."""
    return {"point": what, "found": found["ratio"], "met": found["high"] >= least}


def _slope(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / sum((a - mx) ** 2 for a in x)


def shape(family: str) -> torch.nn.Module:
    """Make a model with a window of 512 in the layers where its family has one."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 256,
        "max_position_embeddings": 32768, "sliding_window": WINDOW,
    }  # fmt: skip
    if family == "gemma3":
        config: Any = transformers.Gemma3TextConfig(**sizes, num_hidden_layers=6)
        cls: Any = transformers.Gemma3ForCausalLM
    else:
        config = transformers.MistralConfig(**sizes, num_hidden_layers=4)
        cls = transformers.MistralForCausalLM
    made: torch.nn.Module = cls._from_config(config, attn_implementation="sdpa").eval()
    return made


def tokens(length: int) -> Tensor:
    """Draw a text."""
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


def models(length: int, most: int) -> tuple[list[Row], list[Row]]:
    """Time prefill of whole models beside their stock implementation."""
    rows: list[Row] = []
    points: list[Row] = []
    for family in ("mistral", "gemma3"):
        source = shape(family)
        program = attnopt.apply(attnopt.capture(source, (tokens(64),)), "exact")
        model, ids = attnopt.lower(program, "eager"), tokens(length)
        last = {"logits_to_keep": 1, "use_cache": True}
        stock = partial(source, ids, **last)
        mine = partial(model, ids)
        gap = float((stock().logits[:, -1] - mine().logits[:, -1]).abs().max())
        assert gap < TOLERANCE, f"{family}: results differ by {gap:.2g}"
        whole = partial(source, ids)
        timing = compare({"ours": mine, "stock": whole}, base="stock", most=most)
        speed = timing.speedup("ours", "stock")
        rows.append({"case": family, "tokens": length, "difference": gap, **as_row(speed)})
        what = f"{family}: {OF_STOCK} times as fast as its stock sdpa at {length}"
        points.append(_point(what, as_row(speed), OF_STOCK))
        print(f"{family:8} {length} tokens: {speed}, difference {gap:.1e}")
    return rows, points


def decode(lengths: tuple[int, ...], most: int) -> tuple[list[Row], list[Row]]:
    """Time a step after several contexts, and weigh the state."""
    source = shape("mistral")
    source.config.sliding_window = None
    program = attnopt.apply(attnopt.capture(source, (tokens(64),)), "exact")
    config = {"window": WINDOW, "first": 16, "full": []}
    plan = Plan(tuple(Choice(s.name, "window", config) for s in program.sites))
    windowed = attnopt.apply(program, plan)
    model = attnopt.lower(windowed, "eager")
    calls: dict[str, Callable[[], Any]] = {}
    held: list[int] = []
    step = tokens(1)
    for length in lengths:
        cache = model(tokens(length)).past_key_values
        held.append(sum(x.numel() for layer in cache.layers for x in layer.tensors.values()))
        calls[str(length)] = partial(model, step, past_key_values=cache)
    timing = compare(calls, base=str(lengths[0]), most=most)
    slower = timing.speedup(str(lengths[0]), str(lengths[-1]))
    rows = [
        {"case": "decode", "tokens": n, "ms": round(1e3 * timing.median(str(n)), 3), "elements": h}
        for n, h in zip(lengths, held, strict=True)
    ]
    print(f"decode: {lengths[-1]} takes {slower} of {lengths[0]}; state {held}")
    return rows, [
        {"point": "a step takes as long after any context", "found": slower.ratio,
         "met": slower.low <= STEADY},
        {"point": "the state is as large after any context", "found": max(held) / min(held),
         "met": max(held) == min(held)},
    ]  # fmt: skip


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("op", "decode", "models"))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--model-length", type=int, default=MODEL_LENGTH)
    parser.add_argument("--most", type=int, default=25, help="rounds at most")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    lengths = tuple(options.lengths)
    parts: dict[str, Callable[[], tuple[list[Row], list[Row]]]] = {
        "op": lambda: op(lengths, options.most),
        "decode": lambda: decode(lengths, options.most),
        "models": lambda: models(options.model_length, options.most),
    }
    rows: list[Row] = []
    points: list[Row] = []
    for name, part in parts.items():
        if options.only is None or name in options.only:
            measured, judged = part()
            rows += measured
            points += judged
    for point in points:
        print(f"{'met ' if point['met'] else 'FAIL'} {point['point']}: {point['found']:.3f}")
    if not options.dry:
        write("sparse", rows + points)
    return 0 if all(point["met"] for point in points) else 1


if __name__ == "__main__":
    sys.exit(main())
