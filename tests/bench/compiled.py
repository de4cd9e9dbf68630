"""What `torch.compile(backend="attnopt")` costs and gains over plain inductor.

    python tests/bench/compiled.py
    python tests/bench/compiled.py --rounds 3 --lengths 128 1024
    python tests/bench/compiled.py --only table --shapes gpt2 bert

Compilation is timed in processes of their own with empty caches, one backend after the other, in
seconds of all their processors; running is timed side by side in this process, for a deep model
and for the models of exact.py. Weights are random. Exit status 1 where compilation takes over 15 %
more, running over 2 % longer, or five lengths need more than two recompilations.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import exact
import torch
import transformers
from harness import Timing, as_row, compare, machine, write

BACKENDS: Final = ("inductor", "attnopt")
MOST_COMPILE: Final = 1.15
LEAST_SPEED: Final = 0.98
MOST_RECOMPILED: Final = 2
FIVE: Final = (64, 100, 128, 200, 256)
LAYERS: Final = 12


def model(attention: str) -> torch.nn.Module:
    """Make a model of 12 layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=1000, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def tokens(length: int) -> torch.Tensor:
    """Draw a call."""
    return torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def compile_once(backend: str, attention: str) -> dict[str, float]:
    """Compile and run once, in this process; return the seconds of its processors."""
    import attnopt.backends.dynamo  # noqa: F401 - importing is not compiling

    made = model(attention)
    before = sum(os.times()[:4])
    torch.compile(made, backend=backend)(input_ids=tokens(128))
    return {"seconds": sum(os.times()[:4]) - before}


def compile_times(attention: str, rounds: int) -> dict[str, list[float]]:
    """Time both backends in turn, each in a fresh process without caches."""
    found: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(rounds):
        for name in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                words = [sys.executable, __file__, "--once", name, "--attention", attention]
                fresh = {
                    **os.environ,
                    "TORCHINDUCTOR_CACHE_DIR": cache,
                    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
                }
                done = subprocess.run(words, env=fresh, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
    return found


@torch.no_grad()
def graphs(attention: str) -> dict[str, int]:
    """Count what five lengths are compiled into."""
    found: dict[str, int] = {}
    for name in BACKENDS:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(model(attention), backend=name)
        for length in FIVE:
            run(input_ids=tokens(length))
        found[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return found


@torch.no_grad()
def running(made: torch.nn.Module, call: exact.Call, most: int) -> Timing:
    """Time the two side by side."""
    torch._dynamo.reset()
    runs = {name: torch.compile(made, backend=name, dynamic=False) for name in BACKENDS}
    want = valid(made(**call)[0], call)
    for run in runs.values():
        torch.testing.assert_close(valid(run(**call)[0], call), want, rtol=1e-3, atol=1e-4)
    calls = {name: lambda r=run: r(**call) for name, run in runs.items()}
    return compare(calls, base="attnopt", most=most)


def valid(result: torch.Tensor, call: exact.Call) -> torch.Tensor:
    """Return a result without the padding's."""
    mask = call.get("attention_mask")
    return result if mask is None else result[mask.bool()]


def table(shapes: list[str], lengths: list[int], most: int) -> Iterator[dict[str, Any]]:
    """Time every model of the table of exact.py."""
    for shape in exact.SHAPES:
        for length in lengths if shape.name in shapes else ():
            made, call = shape.make("sdpa", length), shape.call(length)
            timing = running(made, call, most)
            speed = timing.speedup("attnopt", "inductor")
            passed = speed.high >= LEAST_SPEED
            shown = f"{1e3 * timing.median('attnopt'):>9.2f} ms {speed!s:>28}"
            verdict = "" if passed else "  FAILED"
            print(f"  {shape.name:<14}{length:>7}{shown}{verdict}", flush=True)
            yield {
                "model": shape.name,
                "tokens": length,
                "rounds": len(timing.seconds["attnopt"]),
                "speedup": as_row(speed),
                "passed": passed,
            }


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="compilations of each backend")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    parser.add_argument("--shapes", nargs="+", default=[s.name for s in exact.SHAPES])
    parser.add_argument("--only", choices=("deep", "table"), help="one half of the measurements")
    parser.add_argument("--once", choices=BACKENDS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if given.once:
        print(json.dumps(compile_once(given.once, given.attention[0])))
        return 0
    print("\n".join(f"{k}: {v}" for k, v in machine().items()))
    rows: list[dict[str, Any]] = []
    if given.only != "table":
        rows += [measure(attention, given) for attention in given.attention]
    if given.only != "deep":
        rows += table(given.shapes, given.lengths, given.most)
    write("compiled" if given.only is None else f"compiled_{given.only}", rows)
    return int(not all(row["passed"] for row in rows))


def measure(attention: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one spelling of the source."""
    compiling = compile_times(attention, given.rounds)
    plain, ours = (statistics.median(compiling[name]) for name in BACKENDS)
    print(f"{attention}, {LAYERS} layers: compiling {plain:.1f} s plain, {ours:.1f} s with attnopt")
    print(f"  {ours / plain - 1:+.1%} (rounds: {json.dumps(rounded(compiling))})", flush=True)
    count = graphs(attention)
    print(f"  graphs for the lengths {FIVE}: {count}", flush=True)
    speeds: dict[int, Any] = {}
    for length in given.lengths:
        timing = running(model(attention), {"input_ids": tokens(length)}, given.most)
        speeds[length] = timing.speedup("attnopt", "inductor")
        print(f"  {length} tokens: {speeds[length]} times as fast as plain inductor", flush=True)
    passed = (
        ours <= MOST_COMPILE * plain
        and count["attnopt"] - 1 <= MOST_RECOMPILED
        and all(speed.high >= LEAST_SPEED for speed in speeds.values())
    )
    return {
        "attention": attention,
        "compile_seconds": rounded(compiling),
        "graphs": count,
        "speedup": {str(length): as_row(speed) for length, speed in speeds.items()},
        "passed": passed,
    }


def rounded(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """Round seconds for reading."""
    return {name: [round(x, 2) for x in seconds] for name, seconds in found.items()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
