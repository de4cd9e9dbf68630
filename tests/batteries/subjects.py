"""What the batteries harm: one tiny model as an artifact of each tier, in seven weight files."""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import attnopt
from attnopt.artifacts.manifest import write_manifest
from attnopt.artifacts.saving import Result
from attnopt.program import Program

SHARDS: Final = 7
TIERS: Final = (0, 1, 2)
_SIZES: Final = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 61,
    "max_position_embeddings": 127,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Subjects:
    """A plain checkpoint, and what is saved of it in each tier."""

    folder: Path

    @cached_property
    def source(self) -> Path:
        """A plain checkpoint with a tokenizer."""
        place = self.folder / "source"
        save_checkpoint(place, seed=0)
        words = {f"w{i}": i for i in range(_SIZES["vocab_size"])}
        inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1").save_pretrained(place)
        return place

    @cached_property
    def program(self) -> Program:
        return attnopt.apply(attnopt.capture(self.source), "exact")

    @cached_property
    def _uneven(self) -> Program:
        """A program whose second layer has half the key and value heads of the first."""
        rows = torch.randint(2, 61, (16, 24), generator=torch.Generator().manual_seed(1))
        plan = attnopt.plan(self.program, {"kv_cache": "50%"}, data=rows)
        plan = replace(plan, choices=plan.choices[1:], goal={})
        return attnopt.optimize(self.program, plan=plan, data=rows).program

    def filled(self, tier: int, value: float) -> Result:
        """Return what is saved in a tier, every parameter filled with one value."""
        program = self._uneven if tier == 1 else self.program
        names = {b.name for b in program.bindings.values() if b.kind == "parameter"}
        weights = {n: torch.full_like(program.weights[n], value) for n in names}
        made = program.with_weights(weights)
        return Result(made, made, attnopt.Plan(()))

    def save(self, result: Result, tier: int, out: Path) -> None:
        """Save in seven weight files."""
        shard = {0: 14_000, 1: 13_000, 2: 15_000}[tier]
        attnopt.save(result, out, tier=tier, max_shard_size=shard)  # type: ignore[arg-type]

    def artifact(self, tier: int, out: Path, value: float = 1.0) -> Path:
        """Save an artifact of a tier, and prove that it has seven weight files."""
        self.save(self.filled(tier, value), tier, out)
        assert len(weight_files(out)) == SHARDS, f"tier {tier}: {len(weight_files(out))} files"
        return out


def save_checkpoint(place: Path, *, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**_SIZES)).eval().save_pretrained(place, **options)


def weight_files(out: Path) -> list[Path]:
    """List the weight files of an artifact of any tier."""
    return sorted([*out.glob("model*.safetensors"), *out.glob("attnopt/weights*.safetensors")])


def digest(root: Path) -> str:
    """Return one hash of all files below a directory, their names among them."""
    whole = hashlib.sha256()
    for place in sorted(p for p in root.rglob("*") if p.is_file()):
        whole.update(f"{place.relative_to(root).as_posix()}\0".encode())
        whole.update(hashlib.sha256(place.read_bytes()).digest())
    return whole.hexdigest()


def value_of(out: Path) -> set[float]:
    """Load an artifact strictly and return the values that its parameters have."""
    return {float(v) for p in attnopt.load(out).parameters() for v in p.detach().unique()}


def edit(place: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file: in place, or to what the change returns."""
    content = json.loads(place.read_text())
    changed = change(content)
    place.write_text(json.dumps(content if changed is None else changed))


def forge_manifest(out: Path) -> None:
    """List the files of an artifact as they are now, as who prepared it would."""
    write_manifest(out)


@contextmanager
def workplace() -> Iterator[Subjects]:
    """Yield the subjects in a folder that goes away at the end."""
    with tempfile.TemporaryDirectory(prefix="attnopt-battery-") as folder:
        yield Subjects(Path(folder).resolve())


def main(battery: Callable[[Subjects, int, int], dict[str, Any]], points: int) -> int:
    """Run a battery from the command line, and print its counts as one line of JSON."""
    parser = argparse.ArgumentParser(description=sys.modules[battery.__module__].__doc__)
    parser.add_argument("--points", type=int, default=points, help=f"how many ({points} in full)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet()
    with workplace() as subjects:
        counts = battery(subjects, arguments.points, arguments.seed)
    print(json.dumps({"battery": Path(sys.argv[0]).stem, "seed": arguments.seed, **counts}))
    return 0 if not counts["failures"] else 1


def quiet() -> None:
    """Keep the bars of Transformers off the screen."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
