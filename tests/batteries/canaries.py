"""Pickles and code in a directory: none of it runs, whoever reads the directory.

Each canary writes a file when it runs. The control runs each by itself first, as a careless reader
would, and shows that it is alive.
"""

import importlib.util
import io
import json
import pickle
import random
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy
import torch
import yaml
from jinja2 import Environment
from subjects import TIERS, Subjects, edit, forge_manifest, main, weight_files
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import attnopt
from attnopt.cli import main as command

FULL: Final = 25


class Bomb:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@dataclass(frozen=True)
class Canary:
    """Files that write a mark when they run: how they are laid, and what would run them."""

    name: str
    lay: Callable[[Path, Path], object]
    run: Callable[[Path], object]


def _pickled(name: str) -> Canary:
    def lay(root: Path, mark: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(pickle.dumps({"lm_head.weight": Bomb(mark)}))

    return Canary(name, lay, lambda root: pickle.loads((root / name).read_bytes()))


def _by_torch(name: str) -> Canary:
    def lay(root: Path, mark: Path) -> None:
        torch.save({"lm_head.weight": Bomb(mark)}, root / name)

    return Canary(f"{name} of torch", lay, lambda root: torch.load(root / name, weights_only=False))


def _instead(name: str) -> Canary:
    """A pickle in place of the weights, which are gone."""
    laid = _by_torch(name)

    def lay(root: Path, mark: Path) -> None:
        for place in weight_files(root):
            place.unlink()
        (root / "model.safetensors.index.json").unlink(missing_ok=True)
        laid.lay(root, mark)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (root / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return Canary(f"{name} instead of weights", lay, laid.run)


def _disguised() -> Canary:
    """A pickle that calls itself safetensors."""

    def lay(root: Path, mark: Path) -> None:
        torch.save({"lm_head.weight": Bomb(mark)}, weight_files(root)[0])

    def run(root: Path) -> object:
        held = io.BytesIO(weight_files(root)[0].read_bytes())
        return torch.load(held, weights_only=False)

    return Canary("weights that are a pickle", lay, run)


def _array(name: str) -> Canary:
    def lay(root: Path, mark: Path) -> None:
        held = numpy.array([Bomb(mark)], dtype=object)
        (numpy.savez if name.endswith("npz") else numpy.save)(root / name, held, allow_pickle=True)

    def run(root: Path) -> object:
        found = numpy.load(root / name, allow_pickle=True)
        return list(found.values()) if name.endswith("npz") else found

    return Canary(name, lay, run)


def _zipped(name: str) -> Canary:
    def lay(root: Path, mark: Path) -> None:
        inner = io.BytesIO()
        torch.save(Bomb(mark), inner)
        with zipfile.ZipFile(root / name, "w") as file:
            file.writestr("inner.pt", inner.getvalue())

    def run(root: Path) -> object:
        with zipfile.ZipFile(root / name) as file:
            return torch.load(io.BytesIO(file.read("inner.pt")), weights_only=False)

    return Canary(f"{name} with a pickle in it", lay, run)


def _code(mark: Path) -> str:
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"


def _module(name: str, config: dict[str, Any] | None = None, of: str = "config.json") -> Canary:
    """Code of the author's, and the setting that names it."""

    def lay(root: Path, mark: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(_code(mark))
        if config is not None and (root / of).exists():
            edit(root / of, lambda c: c.update(config))

    def run(root: Path) -> None:
        specification = importlib.util.spec_from_file_location("canary", root / name)
        assert specification is not None
        assert specification.loader is not None
        specification.loader.exec_module(importlib.util.module_from_spec(specification))

    said = "" if config is None else f", named in {of}"
    return Canary(f"{name}{said}", lay, run)


def _library(name: str) -> Canary:
    """A shared library; that it would run is the linker's word, so the control reads its mark."""

    def lay(root: Path, mark: Path) -> None:
        (root / name).write_bytes(b"\x7fELF" + str(mark).encode())

    return Canary(name, lay, lambda root: Path((root / name).read_bytes()[4:].decode()).touch())


def _tagged(name: str) -> Canary:
    """YAML with a tag that calls a function."""

    def lay(root: Path, mark: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        call = f"!!python/object/apply:os.mknod [{str(mark)!r}]"
        (root / name).write_text(f"attnopt: 1\ngoal: {call}\nprovenance: {{}}\nchoices: []\n")

    return Canary(
        f"{name} with a tag", lay, lambda root: yaml.unsafe_load((root / name).read_text())
    )


def _template() -> Canary:
    """A chat template that reaches for the functions of Python."""

    def lay(root: Path, mark: Path) -> None:
        reach = "cycler.__init__.__globals__.os.mknod"
        (root / "chat_template.jinja").write_text(f"{{{{ {reach}({str(mark)!r}) }}}}")

    def run(root: Path) -> object:
        return Environment().from_string((root / "chat_template.jinja").read_text()).render()

    return Canary("chat_template.jinja", lay, run)


CANARIES: Final = (
    _instead("pytorch_model.bin"),
    _disguised(),
    *(_by_torch(f"model{suffix}") for suffix in (".pt", ".pth", ".ckpt", ".bin")),
    *map(_pickled, ("weights.pkl", "optimizer.pt", "scheduler.pt", "training_args.bin")),
    *map(_pickled, ("tokenizer.pkl", "attnopt/statistics.pkl", "MODEL.BIN", "model.joblib")),
    *map(_array, ("weights.npy", "weights.npz")),
    *map(_zipped, ("archive.zip", "program.pt2")),
    _module("modeling_x.py", {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}),
    _module("configuration_x.py", {"auto_map": {"AutoConfig": "configuration_x.Config"}}),
    _module(
        "tokenization_x.py",
        {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}, "tokenizer_class": "T"},
        "tokenizer_config.json",
    ),
    _module("custom_generate/generate.py"),
    _module("setup.py"),
    _library("kernel.so"),
    _tagged("attnopt/plan.yaml"),
    _template(),
)


def ways(root: Path, tier: int | None) -> Iterator[Callable[[], object]]:
    """Yield every way in which a directory is read."""
    yield lambda: attnopt.load(root)
    yield lambda: attnopt.load(root, strict=False)
    yield lambda: attnopt.capture(root)
    yield lambda: attnopt.Plan.load(root / "attnopt/plan.yaml")
    if tier == 2:
        yield lambda: AutoConfig.from_pretrained(root)
        yield lambda: AutoModelForCausalLM.from_pretrained(root)
    yield lambda: AutoTokenizer.from_pretrained(root, trust_remote_code=False)
    optimize = [
        "--plan",
        str(root / "attnopt/plan.yaml"),
        "--data",
        "stdlib:4x16",
        "--held-out",
        "2",
    ]
    for arguments in (
        ["inspect", str(root)],
        ["diff", str(root), str(root)],
        ["generate", str(root), "w3 w4", "--max-new-tokens", "2"],
        ["optimize", str(root), "-o", str(root.parent / "optimized"), *optimize],
    ):
        yield lambda a=arguments: by_command(a)


def by_command(arguments: list[str]) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        command(arguments)


def is_alive(canary: Canary, root: Path, mark: Path) -> bool:
    """Run a canary by itself, and tell whether it wrote its mark."""
    with suppress(Exception):  # the rest of what reads it may fail, after it has run
        canary.run(root)
    alive = mark.exists()
    mark.unlink(missing_ok=True)
    return alive


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Lay so many canaries into a plain checkpoint and an artifact of each tier; read them all."""
    models: dict[int | None, Path] = {None: subjects.source}
    for tier in TIERS:
        models[tier] = subjects.artifact(tier, subjects.folder / f"artifact{tier}")
    chosen = CANARIES
    if points < len(CANARIES):
        chosen = tuple(random.Random(seed).sample(CANARIES, points))
    counts = {"canaries": len(chosen), "alive": 0, "reads": 0, "answered": 0, "refused": 0}
    failures: list[str] = []
    mark = subjects.folder / "fired"
    for number, canary in enumerate(chosen):
        alive = True
        for tier in (None, TIERS[number % len(TIERS)]):  # the tiers take turns
            root = subjects.folder / "stage" / "model"
            shutil.rmtree(root.parent, ignore_errors=True)
            shutil.copytree(models[tier], root)
            canary.lay(root, mark)
            if tier is not None:
                forge_manifest(root)
            alive = alive and is_alive(canary, root, mark)
            for read in ways(root, tier):
                counts["reads"] += 1
                try:
                    read()
                    counts["answered"] += 1
                except Exception:  # how it is refused is what other batteries look at
                    counts["refused"] += 1
                if mark.exists():
                    failures.append(f"{canary.name}, tier {tier}: fired")
                    mark.unlink()
        counts["alive"] += alive
        if not alive:
            failures.append(f"{canary.name}: dead, so it proves nothing")
    return {**counts, "fired": sum("fired" in f for f in failures), "failures": failures}


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
