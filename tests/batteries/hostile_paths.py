"""Names and links that lead out of a directory: each is refused, and nothing outside is opened.

A canary lies where each of them leads: weights that would load well if they were followed. The
kernel tells (inotify) whether anything opened it. The control follows the same names with plain
Transformers, and shows that some do lead there.
"""

import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from subjects import TIERS, Subjects, edit, forge_manifest, main, save_checkpoint, weight_files
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import attnopt
from attnopt.cli import main as command

FULL: Final = 80
_INDEX: Final = "model.safetensors.index.json"
_PROGRAM: Final = "attnopt/program.json"
_CANARY: Final = "canary.safetensors"
_LIMIT: Final = 15
_MEMORY: Final = 4 * 2**30

# {outside} is the folder of the canary beside the directory, {first} a weight file inside.
NAMES: Final = {
    "parent": "../outside/canary.safetensors",
    "parent after a folder": "attnopt/../../outside/canary.safetensors",
    "parent after a dot": "./../outside/canary.safetensors",
    "parent after a file": "{first}/../../outside/canary.safetensors",
    "absolute": "{outside}/canary.safetensors",
    "absolute, two slashes": "/{outside}/canary.safetensors",
    "backslashes": "..\\outside\\canary.safetensors",
    "drive": "C:\\outside\\canary.safetensors",
    "drive without a slash": "C:canary.safetensors",
    "share": "\\\\server\\share\\canary.safetensors",
    "percent dots": "%2e%2e/outside/canary.safetensors",
    "percent slash": "..%2foutside%2fcanary.safetensors",
    "nul": "{first}\0/../../outside/canary.safetensors",
    "url": "file://{outside}/canary.safetensors",
    "home": "~/canary.safetensors",
    "variable": "$OUTSIDE/canary.safetensors",
    "device": "/dev/zero",
    "process": "/proc/self/cwd/outside/canary.safetensors",
    "stream": "{first}:canary.safetensors",
    "wide dots": "\uff0e\uff0e\uff0foutside\uff0fcanary.safetensors",
    "surrogate": "\ud800.safetensors",
    "newline": "{first}\n../outside/canary.safetensors",
    "very long": "x" * 5000 + ".safetensors",
    "nothing": "",
    "the parent itself": "..",
    "a folder": "attnopt",
    "other case": "{FIRST}",
}


@dataclass(frozen=True)
class Stage:
    """A fresh copy of an artifact (or a plain checkpoint) with a canary beside it."""

    root: Path
    outside: Path
    tier: int | None

    def name(self, text: str) -> str:
        first = weight_files(self.root)[0].relative_to(self.root).as_posix()
        if "{FIRST}" in text:
            upper = self.root / first.upper()
            upper.parent.mkdir(exist_ok=True)
            shutil.copy(self.outside / _CANARY, upper)
            return first.upper()
        return text.replace("{first}", first).replace("{outside}", str(self.outside))


def redirect(stage: Stage, text: str) -> None:
    """Let the index, or the table of a stored program, name another file than the first."""
    name = stage.name(text)
    if stage.tier == 2:
        edit(stage.root / _PROGRAM, lambda c: _in_program(c, name))
    else:
        edit(stage.root / _INDEX, lambda c: _in_index(c, name))


def _in_index(content: Any, name: str) -> None:
    first = min(content["weight_map"].values())
    content["weight_map"] = {
        tensor: name if file == first else file for tensor, file in content["weight_map"].items()
    }


def _in_program(content: Any, name: str) -> None:
    first = min(file for file, _ in content["weights"].values())
    for place in content["weights"].values():
        place[0] = name if place[0] == first else place[0]


def in_manifest(stage: Stage, text: str) -> None:
    """Let the manifest list another file instead of the first weights."""
    name = stage.name(text)

    def change(content: Any) -> None:
        first = weight_files(stage.root)[0].relative_to(stage.root).as_posix()
        content["files"][name] = content["files"].pop(first)

    edit(stage.root / "attnopt/manifest.json", change)


def _linked(place: Path, to: Path) -> None:
    place.unlink()
    place.symlink_to(to)


def _chained(stage: Stage) -> None:
    middle = stage.root / "notes.safetensors"
    middle.symlink_to(stage.outside / _CANARY)
    _linked(
        weight_files(stage.root)[0],
        Path(os.path.relpath(middle, weight_files(stage.root)[0].parent)),
    )


def _parent_linked(stage: Stage) -> None:
    if not (stage.root / "attnopt").exists():
        (stage.root / "attnopt").mkdir()
        edit(stage.root / _INDEX, lambda c: _in_index(c, "attnopt/canary.safetensors"))
    moved = stage.outside / "attnopt"
    shutil.move(stage.root / "attnopt", moved)
    shutil.copy(stage.outside / _CANARY, moved / _CANARY)
    (stage.root / "attnopt").symlink_to(moved)


def _hard_linked(stage: Stage) -> None:
    first = weight_files(stage.root)[0]
    first.unlink()
    os.link(stage.outside / _CANARY, first)


def _replaced(place: Path, make: Callable[[Path], object]) -> None:
    place.unlink()
    make(place)


def _socket(place: Path) -> None:
    import socket

    home = os.getcwd()
    os.chdir(place.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(home)


def _table(root: Path) -> Path:
    """Return the file that says where the weights are."""
    return root / (_PROGRAM if (root / _PROGRAM).exists() else _INDEX)


LINKS: Final[dict[str, Callable[[Stage], object]]] = {
    "weights linked outside": lambda s: _linked(weight_files(s.root)[0], s.outside / _CANARY),
    "weights linked in two steps": _chained,
    "weights linked to a device": lambda s: _linked(weight_files(s.root)[0], Path("/dev/zero")),
    "weights are a pipe": lambda s: _replaced(weight_files(s.root)[0], os.mkfifo),
    "weights are a socket": lambda s: _replaced(weight_files(s.root)[0], _socket),
    "weights are a folder": lambda s: _replaced(weight_files(s.root)[0], Path.mkdir),
    "weights link to nothing": lambda s: _linked(weight_files(s.root)[0], Path("absent")),
    "weights link to themselves": lambda s: _linked(
        weight_files(s.root)[0], Path(weight_files(s.root)[0].name)
    ),
    "folder linked outside": _parent_linked,
    "table linked outside": lambda s: _linked(_table(s.root), s.outside / _table(s.root).name),
    "table linked to a device": lambda s: _linked(_table(s.root), Path("/dev/zero")),
    "table is a pipe": lambda s: _replaced(_table(s.root), os.mkfifo),
    "config linked outside": lambda s: _linked(s.root / "config.json", s.outside / "config.json"),
    "config linked to a device": lambda s: _linked(s.root / "config.json", Path("/dev/zero")),
    "config is a pipe": lambda s: _replaced(s.root / "config.json", os.mkfifo),
    "generation config linked outside": lambda s: _linked(
        s.root / "generation_config.json", s.outside / "generation_config.json"
    ),
}

# What only artifacts have.
OWN: Final[dict[str, Callable[[Stage], object]]] = {
    "plan linked outside": lambda s: _linked(s.root / "attnopt/plan.yaml", s.outside / "plan.yaml"),
    "plan linked to a device": lambda s: _linked(s.root / "attnopt/plan.yaml", Path("/dev/zero")),
    "plan is a pipe": lambda s: _replaced(s.root / "attnopt/plan.yaml", os.mkfifo),
    "manifest is a pipe": lambda s: _replaced(s.root / "attnopt/manifest.json", os.mkfifo),
    "manifest linked to a device": lambda s: _linked(
        s.root / "attnopt/manifest.json", Path("/dev/zero")
    ),
    "manifest linked outside": lambda s: _linked(
        s.root / "attnopt/manifest.json", s.outside / "manifest.json"
    ),
}


def _in_config(**entries: Any) -> Callable[[Stage], object]:
    def change(stage: Stage) -> None:
        filled = json.loads(json.dumps(entries).replace("{outside}", str(stage.outside)))
        edit(stage.root / "config.json", lambda c: c.update(filled))

    return change


# What config.json can name.
SETTINGS: Final[dict[str, Callable[[Stage], object]]] = {
    "code in the parent": _in_config(auto_map={"AutoModelForCausalLM": "../outside/evil.Model"}),
    "code at a path": _in_config(auto_map={"AutoModelForCausalLM": "{outside}/evil.Model"}),
    "code of a repository": _in_config(auto_map={"AutoConfig": "some/where--evil.Config"}),
    "weights in the parent": _in_config(transformers_weights="../outside/canary.safetensors"),
    "weights at a path": _in_config(transformers_weights="{outside}/canary.safetensors"),
    "a kernel of a repository": _in_config(attn_implementation="some/where"),
}


@contextmanager
def watched(places: list[Path]) -> Iterator[Callable[[], bool]]:
    """Yield what tells whether any of these files was opened or read since."""
    library = ctypes.CDLL(None, use_errno=True)
    handle = library.inotify_init1(os.O_NONBLOCK)
    for place in places:
        opened, read = 0x20, 0x1
        assert library.inotify_add_watch(handle, os.fsencode(place), opened | read) >= 0

    def touched() -> bool:
        try:
            return bool(os.read(handle, 4096))
        except BlockingIOError:
            return False

    try:
        yield touched
    finally:
        os.close(handle)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where something waits for a pipe, or reads a device for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ways(stage: Stage) -> dict[str, Callable[[], object]]:
    """Return every way in which a directory of this kind is read."""
    found: dict[str, Callable[[], object]] = {
        "capture": lambda: attnopt.capture(stage.root),
        "inspect": lambda: by_command("inspect", str(stage.root)),
        "diff": lambda: by_command("diff", str(stage.root), str(stage.root)),
    }
    if stage.tier is not None:
        found["load"] = lambda: attnopt.load(stage.root)
        found["load, not strict"] = lambda: attnopt.load(stage.root, strict=False)
    if stage.tier == 2:
        found["Auto"] = lambda: AutoModelForCausalLM.from_pretrained(stage.root)
    return found


def by_command(*arguments: str) -> None:
    """Run the command line; its refusal is a ValueError here, and a traceback is none."""
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        status = command([*arguments])
    if status != 0:
        assert "Traceback" not in told.getvalue(), told.getvalue()
        raise ValueError(told.getvalue())


@dataclass(frozen=True)
class Case:
    """One hostile thing in a directory of one kind, and which ways may pass over it unread."""

    name: str
    tier: int | None
    harm: Callable[[Stage], object]
    passes_over: frozenset[str] = frozenset()
    forged: bool = True


def cases() -> Iterator[Case]:
    """Yield every case; what is refused in one kind of directory is tried in all."""
    for tier in (None, 0, 1, 2):
        for name, text in NAMES.items():
            yield Case(f"name: {name}", tier, lambda s, t=text: redirect(s, t))
        for name, harm in LINKS.items():
            yield Case(f"link: {name}", tier, harm, _unread(name, tier), forged=False)
        for name, harm in SETTINGS.items():
            yield Case(f"config: {name}", tier, harm, frozenset({"diff"}))
        if tier is not None:
            yield from _of_artifacts(tier)


def _unread(name: str, tier: int | None) -> frozenset[str]:
    """Return the ways that do not read what a link stands for."""
    if "generation" in name:
        return frozenset({"diff"})
    only_notes = name.startswith("folder") and tier in (0, 1)
    return frozenset({"capture", "inspect"}) if only_notes else frozenset()


def _of_artifacts(tier: int) -> Iterator[Case]:
    unread = {"diff"} if tier == 2 else {"diff", "capture", "inspect"}
    loose = frozenset({"load, not strict", *unread})
    for name, text in NAMES.items():
        harm: Callable[[Stage], object] = lambda s, t=text: in_manifest(s, t)  # noqa: E731  # bound
        yield Case(f"manifest: {name}", tier, harm, loose, forged=False)
    for name, harm in OWN.items():
        yield Case(f"link: {name}", tier, harm, frozenset(unread), forged=False)
    yield Case("link: weights hard-linked outside", tier, _hard_linked, loose, forged=False)


def staged(case: Case, models: dict[int | None, Path], folder: Path) -> Stage:
    """Copy a directory, lay the canary beside it, and do the harm."""
    shutil.rmtree(folder, ignore_errors=True)
    root, outside = folder / "model", folder / "outside"
    shutil.copytree(models[case.tier], root)
    outside.mkdir()
    for place in (p for p in root.rglob("*.*") if p.is_file() and p not in weight_files(root)):
        shutil.copy(place, outside)
    held = load_file(weight_files(root)[0])
    save_file({n: t + 1 for n, t in held.items()}, outside / _CANARY, {"format": "pt"})
    stage = Stage(root, outside, case.tier)
    case.harm(stage)
    if case.forged and case.tier is not None:
        forge_manifest(root)
    return stage


def attempt(case: Case, way: str, read: Callable[[], object], stage: Stage) -> str:
    """Read a directory in one way; return how it ended."""
    outside = [p for p in stage.outside.rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    with watched(outside) as touched:
        try:
            with limited(_LIMIT):
                read()
            end = "accepted"
        except (ValueError, FileNotFoundError) as error:
            codec = isinstance(error, UnicodeError) or not str(error)
            end = f"FAILED {type(error).__name__}: {error}" if codec else "refused"
        except Exception as error:  # any other class is what the battery looks for
            end = f"FAILED {type(error).__name__}: {error}"
        if touched():
            return "FAILED: something outside was opened"
    if end == "accepted" and way not in case.passes_over:
        return "FAILED: accepted"
    return end


def is_unread(case: Case, way: str) -> bool:
    """Tell which attempts teach nothing: a slow capture does not read it, or attnopt does not."""
    if way == "Auto":  # Transformers itself reads config.json, to find the class
        return case.name.startswith("link: config")
    return way in case.passes_over and way in ("capture", "inspect")


def followed_by_transformers(models: dict[int | None, Path], folder: Path) -> int:
    """Count the names that plain Transformers follows to the canary: the battery is live."""
    count = 0
    for name, text in NAMES.items():
        if name in ("device", "process"):
            continue
        stage = staged(Case(name, None, lambda s, t=text: redirect(s, t)), models, folder)
        with watched([stage.outside / _CANARY]) as touched:
            with suppress(Exception):  # whatever plain Transformers makes of it
                LlamaForCausalLM.from_pretrained(stage.root)
            count += touched()
    return count


@contextmanager
def bounded() -> Iterator[None]:
    """Let this process have so much more memory than now: who reads a device is stopped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Try so many hostile things in every kind of directory that can have them, in every way."""
    models: dict[int | None, Path] = {None: subjects.folder / "plain"}
    save_checkpoint(models[None], seed=1, max_shard_size=14_000)
    for tier in TIERS:
        models[tier] = subjects.artifact(tier, subjects.folder / f"artifact{tier}")
    listed = list(cases())
    names = sorted({case.name for case in listed})
    chosen = set(names if points >= FULL else random.Random(seed).sample(names, points))
    ends: Counter[str] = Counter()
    failures: list[str] = []
    folder = subjects.folder / "stage"
    for case in (c for c in listed if c.name in chosen):
        stage = staged(case, models, folder)
        for way, read in ways(stage).items():
            if is_unread(case, way):
                continue
            with bounded():
                end = attempt(case, way, read, stage)
            ends[f"{way}: {end.split(':')[0]}"] += 1
            if end.startswith("FAILED"):
                failures.append(f"{case.name}, tier {case.tier}, {way}: {end[:200]}")
    return {
        "hostile": len(chosen),
        "refused": len(chosen - {f.split(", tier")[0] for f in failures}),
        "attempts": sum(ends.values()),
        "ends": dict(sorted(ends.items())),
        "followed by plain Transformers": followed_by_transformers(models, folder),
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
