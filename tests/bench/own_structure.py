"""Masks that sources have by themselves: documents in a row, sinks and soft caps, on the CPU.

    python tests/bench/own_structure.py
    python tests/bench/own_structure.py --only documents --tokens 4096 --documents 8

Random weights, float32. `documents`: two layers of attention over texts packed in one row, beside
the source's masked scaled_dot_product_attention. `scores`: one attention with sinks or a soft cap,
over all keys or a window of 512, beside the definition in plain torch. Every result is compared
before it is timed. Exit status 1 where ours is slower.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from harness import as_row, compare, write
from torch import Tensor, nn

import attnopt
from attnopt.ops import attention_reference
from attnopt.ops.sdpa import attend

WINDOW: Final = 512
TOLERANCE: Final = 1e-4

Row = dict[str, Any]


class Packed(nn.Module):
    """Texts one after the other in a row; tokens see those before them in their own."""

    def __init__(self, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        """Attend within documents."""
        place = torch.arange(x.shape[1])
        seen = (document[:, :, None] == document[:, None]) & (place[:, None] >= place)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])
            x = x + out(found.transpose(1, 2).flatten(2))
        return x


def numbers(tokens: int, count: int) -> Tensor:
    """Return the number of its text for each token; texts are of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randperm(tokens - 1, generator=generator)[: count - 1].sort().values + 1
    return torch.bucketize(torch.arange(tokens), ends, right=True).unsqueeze(0)


def documents(tokens: int, count: int, most: int) -> list[Row]:
    """Time a model of packed texts beside itself as it was."""
    torch.manual_seed(0)
    source = Packed().eval()
    program = attnopt.capture(source, (torch.randn(1, 24, 512), numbers(24, 3)))
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    model = attnopt.lower(exact, "eager")
    given = torch.randn(1, tokens, 512), numbers(tokens, count)
    gap = float((source(*given) - model(*given)).abs().max())
    assert gap < TOLERANCE, f"results differ by {gap:.2g}"
    calls = {"ours": partial(model, *given), "source": partial(source, *given)}
    speed = compare(calls, base="source", most=most).speedup("ours", "source")
    print(f"{count} documents in {tokens} tokens: {speed}, difference {gap:.1e}")
    row = {"case": "documents", "tokens": tokens, "documents": count, "difference": gap}
    return [row | as_row(speed)]


def scores(tokens: int, most: int) -> list[Row]:
    """Time one attention of 8 heads, and 2 of keys, beside the definition."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 64, generator=generator) for heads in (8, 2, 2))
    sinks = torch.randn(8, generator=generator)
    rows: list[Row] = []
    for name, options in (("sinks", {"sinks": sinks}), ("soft cap", {"softcap": 50.0})):
        for reach in ({}, {"window": WINDOW}):
            given = {**options, **reach, "causal": True}
            calls: dict[str, Callable[[], Tensor]] = {
                "ours": partial(attend, q, k, v, {}, **given),
                "definition": lambda given=given: attention_reference(q, k, v, **given)[0],
            }
            gap = float((calls["ours"]() - calls["definition"]()).abs().max())
            assert gap < TOLERANCE, f"results differ by {gap:.2g}"
            timing = compare(calls, base="definition", most=most)
            speed = timing.speedup("ours", "definition")
            where = f"{name}, window {WINDOW}" if reach else name
            print(f"{where}, {tokens} tokens: {speed}, difference {gap:.1e}")
            row = {"case": where, "tokens": tokens, "difference": gap}
            rows.append(row | {"ms": round(1e3 * timing.median("ours"), 3), **as_row(speed)})
    return rows


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("documents", "scores"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--most", type=int, default=15, help="rounds at most")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    if options.only in (None, "documents"):
        rows += documents(options.tokens, options.documents, options.most)
    if options.only in (None, "scores"):
        rows += scores(options.tokens, options.most)
    if not options.dry:
        write("own_structure", rows)
    return 0 if all(row["high"] >= 1 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
