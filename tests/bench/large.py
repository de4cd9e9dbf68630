"""Calibrate, rewrite and save a checkpoint larger than the memory that this may take.

    python tests/bench/large.py --folder /some/where --shape 7b
    python tests/bench/large.py --folder /some/where --shape small --pass dha --keep

A checkpoint of random bfloat16 weights is written shard by shard. A process of its own then
captures it, calibrates it on one short batch, rewrites it and saves it; its peak memory is read
from the system: all of it (VmHWM), and what no file holds (RssAnon, sampled). Then the result is
compared with its source: names and shapes, and the tensors of one layer. Exit status 1 where the
peak is above the limit.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from harness import write
from torch import Tensor

LIMIT: Final = 6.0
"""GiB that a process may take."""

SHAPES: Final = {
    "7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 2816, "vocab_size": 8000,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 100,
    },
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Write the checkpoint, run the work, compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with room for two checkpoints")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--kv-heads", type=int, help="key and value heads of the source")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pass", dest="rewrite", default="dha")
    parser.add_argument("--share", type=float, default=0.5, help="what goes: of heads, or units")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--limit", type=float, default=LIMIT, help="GiB of memory")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--only", choices=["work"], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.only == "work":
        return work(given)
    source, out = given.folder / "source", given.folder / "out"
    started = time.perf_counter()
    if not (source / "config.json").is_file():
        make(source, given.shape, given.kv_heads)
    print(f"source: {gigabytes(source):.2f} GiB, {time.perf_counter() - started:.0f} s", flush=True)
    child = [sys.executable, __file__, *arguments, "--only", "work"]
    subprocess.run(child, check=True)
    row: dict[str, Any] = json.loads((given.folder / "measured.json").read_text())
    row["checked"] = compared(source, out)
    row["source_gib"], row["out_gib"] = round(gigabytes(source), 2), round(gigabytes(out), 2)
    row["limit_gib"] = given.limit
    row["passed"] = row["peak_gib"] <= given.limit
    print(json.dumps(row, indent=1))
    if given.shape == "7b":
        write("large", [row])
    if not given.keep:
        for place in (source, out, given.folder / "statistics"):
            shutil.rmtree(place, ignore_errors=True)
    return int(not row["passed"])


def make(folder: Path, shape: str, kv_heads: int | None) -> None:
    """Write config.json and the shards of a Llama, a layer a shard, of random weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    sizes = dict(SHAPES[shape])
    if kv_heads is not None:
        sizes["num_key_value_heads"] = kv_heads
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards(config)):
        name = f"model-{number:05}.safetensors"
        tensors = {n: drawn(shape, generator) for n, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def shards(config: Any) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield names and shapes: the embedding, each layer, what comes after them."""
    wide, inner = config.hidden_size, config.intermediate_size
    kv = wide // config.num_attention_heads * config.num_key_value_heads
    yield {"model.embed_tokens.weight": (config.vocab_size, wide)}
    for layer in range(config.num_hidden_layers):
        root = f"model.layers.{layer}."
        yield {
            f"{root}self_attn.q_proj.weight": (wide, wide),
            f"{root}self_attn.k_proj.weight": (kv, wide),
            f"{root}self_attn.v_proj.weight": (kv, wide),
            f"{root}self_attn.o_proj.weight": (wide, wide),
            f"{root}mlp.gate_proj.weight": (inner, wide),
            f"{root}mlp.up_proj.weight": (inner, wide),
            f"{root}mlp.down_proj.weight": (wide, inner),
            f"{root}input_layernorm.weight": (wide,),
            f"{root}post_attention_layernorm.weight": (wide,),
        }
    yield {"model.norm.weight": (wide,), "lm_head.weight": (config.vocab_size, wide)}


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw a matrix that keeps the size of what it is multiplied with; norms are 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    made = torch.empty(shape).normal_(0, shape[1] ** -0.5, generator=generator)
    return made.to(torch.bfloat16)


def work(given: argparse.Namespace) -> int:
    """Capture, calibrate, rewrite and save; write what it took."""
    import attnopt

    watch = Watch()
    program = attnopt.apply(attnopt.capture(given.folder / "source"), "exact")
    watch.lap("capture")
    drawn_by = torch.Generator().manual_seed(1)
    ids = torch.randint(program.config.vocab_size, (1, given.tokens), generator=drawn_by)
    statistics = attnopt.calibrate(program, ids, given.folder / "statistics")
    watch.lap("calibrate")
    choices = tuple(choices_of(program, given, statistics))
    rewritten = attnopt.apply(program, attnopt.Plan(choices, statistics=statistics))
    watch.lap("rewrite")
    attnopt.save(rewritten, given.folder / "out")
    watch.lap("save")
    row = {
        "shape": given.shape,
        "pass": given.rewrite,
        "settings": dict(choices[0].config),
        "tokens": given.tokens,
        "sites": len(choices),
        "threads": torch.get_num_threads(),
        **watch.content(),
    }
    (given.folder / "measured.json").write_text(json.dumps(row))
    return 0


def choices_of(program: Any, given: argparse.Namespace, statistics: Any) -> Iterator[Any]:
    """Say what is to be done at every site: fewer key heads, or fewer parameters as planned."""
    import attnopt

    told = {k: json.loads(v) for k, v in (s.split("=", 1) for s in given.setting)}
    if given.rewrite == "amp":
        plan = attnopt.plan(program, {"params": 1 - given.share}, statistics=statistics)
        for choice in plan.choices:
            yield attnopt.Choice(choice.site, "amp", {**choice.config, "refit": False, **told})
        return
    for site in program.sites:
        kept = max(1, round(site.kv_heads * (1 - given.share)))
        config = {"kv_heads": kept, "refit": False, **told}
        yield attnopt.Choice(site.name, given.rewrite, config)


class Watch:
    """Time and memory of this process, stage by stage."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, dict[str, float]] = {}
        self.anonymous = self.most = 0.0
        threading.Thread(target=self._sample, daemon=True).start()

    def lap(self, stage: str) -> None:
        """Note the end of a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.started, 1)
        self.peaks[stage] = {
            "peak_so_far": round(memory("VmHWM"), 3),
            "anonymous": round(self.anonymous, 3),
        }
        print(f"{stage}: {self.seconds[stage]} s, {self.peaks[stage]} GiB", flush=True)
        self.most, self.anonymous = max(self.most, self.anonymous), 0.0
        self.started = time.perf_counter()

    def content(self) -> dict[str, Any]:
        """Return the peaks in GiB."""
        return {
            "peak_gib": round(memory("VmHWM"), 3),
            "anonymous_gib": round(self.most, 3),
            "stages": self.peaks,
            "seconds": self.seconds,
        }

    def _sample(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, memory("RssAnon"))
            time.sleep(0.02)


def memory(kind: str) -> float:
    """Return one line of the system's account of this process, in GiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{kind}:")[1].split()[0]) / 2**20


def compared(source: Path, out: Path) -> dict[str, Any]:
    """Load the result's shapes with the stock class, and compare a layer that both have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from attnopt.artifacts.manifest import check_manifest
    from attnopt.artifacts.programs import tensor_places
    from attnopt.tensorfiles import TensorFile

    check_manifest(out)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    places, before = tensor_places(out), tensor_places(source)
    for name, tensor in model.state_dict().items():
        path, stored = places[name]
        assert TensorFile(path).describe(stored).shape == tuple(tensor.shape), name
    same = 0
    for name in [n for n in places if ".layers.1." in n or n.startswith("lm_head")]:
        made, old = (TensorFile(at[name][0])[at[name][1]] for at in (places, before))
        assert bool(made.isfinite().all()), name
        same += int(made.shape == old.shape and torch.equal(made, old))
    return {"tensors": len(places), "equal_of_one_layer_and_the_head": same}


def gigabytes(folder: Path) -> float:
    """Return the size of a directory."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**30


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
