"""What pruned and fused models really save: time beside operations, cache and file beside the plan.

    python tests/bench/savings.py

A decoder of random weights, wide enough that products and not overheads take the time, is rewritten
in several ways. A prompt of 512 tokens is timed beside the source, call by call in turn; the ratio
of the medians is compared with that of the operations. Cache and file sizes must be those planned,
and plain Transformers must load the file in a process of its own with the program's logits. Exit
status 1 where time is off by more than a tenth, or anything else at all.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import as_row, compare, write
from torch import Tensor

import attnopt
from attnopt.costs import Workload, count_costs
from attnopt.lowering import lower
from attnopt.nouns import Choice

TOKENS: Final = 512
SIZES: Final = {
    "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": 4096,
}  # fmt: skip
LOADING: Final = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[3])
assert "attnopt" not in sys.modules
"""


def rewrites(program: Any) -> Iterator[tuple[str, tuple[Choice, ...]]]:
    """Yield what is measured: heads, neurons, both, fused key and value heads."""
    sites, mlps = program.sites, program.mlps
    half = tuple(Choice(s.name, "amp", {"groups": s.kv_heads // 2}) for s in sites)
    neurons = tuple(Choice(m.name, "amp", {"neurons": m.neurons // 2}) for m in mlps)
    third = tuple(Choice(s.name, "amp", {"groups": s.kv_heads // 3}) for s in sites)
    less = tuple(Choice(m.name, "amp", {"neurons": round(m.neurons * 0.3)}) for m in mlps)
    fused = tuple(Choice(s.name, "dha", {"kv_heads": s.kv_heads // 4}) for s in sites)
    yield "heads -50 %", half
    yield "neurons -50 %", neurons
    yield "both -30 %", third + less
    yield "key heads 4:1", fused


def main(arguments: list[str] | None = None) -> int:
    """Print one row a rewrite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, TOKENS))
    program = attnopt.apply(attnopt.capture(model, (), {"input_ids": ids[:, :16]}), "exact")
    statistics = attnopt.calibrate(program, torch.randint(SIZES["vocab_size"], (8, 256)))
    rows: list[dict[str, Any]] = []
    failed = False
    for name, choices in rewrites(program):
        result = attnopt.apply(program, attnopt.Plan(choices, statistics=statistics))
        row = {"rewrite": name, **timed(program, result, ids, options.most), **sized(result)}
        row["loaded_difference"] = loaded_difference(result, ids)
        off = row["speedup"]["ratio"] * row["operations"] - 1
        row["off"] = round(off, 4)
        fine = abs(off) <= 0.1 and row["cache_as_planned"] and row["file_as_planned"]
        failed |= not fine or row["loaded_difference"] > 1e-4
        rows.append(row)
        print(
            f"{name:16} operations {row['operations']:.3f}, time {1 / row['speedup']['ratio']:.3f} "
            f"({off:+.1%}), cache {row['cache_bytes']} bytes a token, loads with a difference of "
            f"{row['loaded_difference']:.1e}",
            flush=True,
        )
    write("savings", rows)
    return int(failed)


def timed(program: Any, result: Any, ids: Tensor, most: int) -> dict[str, Any]:
    """Time a prompt in the source and in the result, in turn."""
    models = [lower(p, "eager") for p in (result, program)]
    workload = Workload(1, TOKENS, 0)
    operations = count_costs(result, workload).flops / count_costs(program, workload).flops

    def call(model: Any) -> Any:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        return run

    calls = {"result": call(models[0]), "source": call(models[1])}
    found = compare(calls, base="source", most=most).speedup("result", "source")
    return {"operations": round(operations, 4), "speedup": as_row(found)}


def sized(result: Any) -> dict[str, Any]:
    """Compare cache and file with what the sites and weights say."""
    _, carry = result.step({"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    cache = sum(t.numel() * t.element_size() for t in carry.tensors.values()) // 8
    planned = sum(s.kv_heads * (s.head_dim + s.v_head_dim) for s in result.sites) * 4
    bound = {b.name for b in result.bindings.values() if b.kind == "parameter"}
    weights = sum(result.weights[n].numel() * result.weights[n].element_size() for n in bound)
    with tempfile.TemporaryDirectory() as folder:
        out = attnopt.save(result, Path(folder) / "out")
        size = (out / "model.safetensors").stat().st_size
    return {
        "cache_bytes": cache,
        "cache_as_planned": cache == planned,
        "file_bytes": size,
        "file_as_planned": 0 <= size - weights < 16384,
    }


def loaded_difference(result: Any, ids: Tensor) -> float:
    """Load the result in plain Transformers, in a process of its own; compare logits."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        attnopt.save(result, root / "out", tier=0)
        torch.save(ids, root / "ids.pt")
        command = [sys.executable, "-c", LOADING, *map(str, (root / "out", root / "ids.pt"))]
        subprocess.run([*command, str(root / "logits.pt")], check=True, capture_output=True)
        got = torch.load(root / "logits.pt", weights_only=True)
    want = result(input_ids=ids).logits
    return float((got - want).abs().max() / want.square().mean().sqrt())


if __name__ == "__main__":
    sys.exit(main())
