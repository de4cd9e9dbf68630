"""A run on disk: safetensors and JSON only, written in one step, read back bit for bit."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt.artifacts.staging import recovered, staged
from attnopt.untrusted import read_json

_NOTES, _TENSORS = "healing.json", "healing.safetensors"
_FORMAT = 1


@dataclass
class Progress:
    """How far a run has come, what was seen on the way, and where the best weights were."""

    stage: int = 0
    step: int = 0
    rows: int = 0
    tokens: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=lambda: [[], []])
    best: float = float("inf")
    best_at: int = 0
    stale: int = 0
    stopped: str = ""

    @property
    def steps(self) -> int:
        """How many steps were taken in all stages."""
        return sum(map(len, self.losses))


def write(
    place: Path, progress: Progress, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]
) -> None:
    """Put a run on disk in the place of what was there."""
    from safetensors.torch import save_file

    _refuse_foreign(place)
    notes = {"format": _FORMAT, "identity": dict(identity), "progress": asdict(progress)}
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with staged(place) as staging:
        save_file(held, staging / _TENSORS)
        (staging / _NOTES).write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def read(place: Path, identity: Mapping[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """Read a run; ValueError where it is broken, or one of something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        notes = read_json(place / _NOTES)
        tensors = load_file(place / _TENSORS)
        progress = Progress(**notes["progress"])
        before = dict(notes["identity"])
        if notes["format"] != _FORMAT:
            raise ValueError(f"format {notes['format']!r}; this attnopt reads {_FORMAT}")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{place} is no run that can be resumed: {error}") from error
    now = json.loads(json.dumps(dict(identity)))
    unlike = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if unlike:
        name = unlike[0]
        raise ValueError(
            f"{place} is a run with another {name} ({_short(before.get(name))}, not "
            f"{_short(now.get(name))}): resume with what it was started with, or remove it"
        )
    return progress, tensors


def exists(place: Path) -> bool:
    """Tell whether there is a run to resume."""
    recovered(place)
    return (place / _NOTES).is_file()


def check(place: Path | None, *, resume: bool) -> None:
    """Raise ValueError where a run would be lost, or there is none to resume."""
    if place is None:
        if resume:
            raise ValueError("there is nothing to resume from: name the checkpoint directory")
        return
    if exists(place) and not resume:
        raise ValueError(
            f"{place} holds a run that was interrupted: resume it (resume=True, --resume), or "
            "remove the directory"
        )
    if resume and not exists(place):
        raise ValueError(f"{place} holds no interrupted run; leave resume out to start one")
    _refuse_foreign(place)


def remove(place: Path) -> None:
    """Remove a run that is no longer needed."""
    if exists(place):
        _refuse_foreign(place)
        shutil.rmtree(place)


def _refuse_foreign(place: Path) -> None:
    known = {_NOTES, _TENSORS}
    if place.is_dir() and {p.name for p in place.iterdir()} - known:
        raise ValueError(f"{place} holds something else than a run of healing; choose another")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
