"""What differs between two checkpoints, artifacts or plans; nothing of them is run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt.artifacts.manifest import FOLDER, files_below
from attnopt.artifacts.programs import tensor_places
from attnopt.nouns import Plan
from attnopt.untrusted import check_files, read_json

# Settings that say who wrote a config, not what the model is.
_SIGNED = ("transformers_version", "_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Setting:
    """A value that differs; None stands for one that is not there."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Changed:
    """A tensor that differs; `change` is the size of the difference, relative to A's (RMS)."""

    name: str
    a: tuple[int, ...] | None
    b: tuple[int, ...] | None
    change: float | None = None


@dataclass(frozen=True)
class Difference:
    """Everything that differs, and how many tensors are equal bit by bit."""

    settings: tuple[Setting, ...]
    choices: tuple[Setting, ...]
    tensors: tuple[Changed, ...]
    equal: int
    report: tuple[Setting, ...]

    @property
    def none(self) -> bool:
        """Whether the two are the same."""
        return not (self.settings or self.choices or self.tensors or self.report)

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "same": self.none,
            "settings": [vars(s) for s in self.settings],
            "choices": [vars(s) for s in self.choices],
            "tensors": [vars(t) for t in self.tensors],
            "equal_tensors": self.equal,
            "report": [vars(s) for s in self.report],
        }


def compare(a: Path, b: Path) -> Difference:
    """Compare two directories, or two plan files; ValueError where one is neither."""
    if a.is_dir() != b.is_dir():
        raise ValueError(f"{a} and {b} are a file and a directory: give two of a kind")
    for place in (a, b):
        _check_files(place)
    plans = [_plan_of(place) for place in (a, b)]
    choices = tuple(_settings(*(_choices(plan) for plan in plans)))
    if a.is_file():
        return Difference((), choices, (), 0, ())
    configs = [_flat(read_json(place / "config.json")) for place in (a, b)]
    tensors = [_Tensors.of(place) for place in (a, b)]
    changed, equal = _changed(*tensors)
    reports = [_report(place) for place in (a, b)]
    return Difference(
        tuple(_settings(*configs)), choices, changed, equal, tuple(_settings(*reports))
    )


def _check_files(place: Path) -> None:
    """Raise ValueError where a directory holds links that leave it, or special files."""
    if (place / FOLDER).is_dir():
        for _ in files_below(place):
            continue
    elif place.is_dir():
        check_files(place)


def _plan_of(place: Path) -> Plan | None:
    if place.is_file():
        return Plan.load(place)
    if not (place / "config.json").is_file():
        raise ValueError(f"{place} is neither a checkpoint (no config.json) nor a plan file")
    inside = place / FOLDER / "plan.yaml"
    return Plan.load(inside) if inside.is_file() else None


def _choices(plan: Plan | None) -> dict[str, Any]:
    """Return what a plan does at each site; a site may have several choices."""
    found: dict[str, list[str]] = {}
    for choice in plan.choices if plan is not None else ():
        settings = ", ".join(f"{k}={v}" for k, v in sorted(choice.config.items()))
        found.setdefault(choice.site, []).append(f"{choice.rewrite}({settings})")
    return {site: "; ".join(said) for site, said in found.items()}


def _report(place: Path) -> dict[str, Any]:
    report = place / FOLDER / "report.json"
    if not report.is_file():
        return {}
    content = _flat(read_json(report))
    kept = ("accepted", "measured.", "quality.")
    return {k: v for k, v in content.items() if k.startswith(kept)}


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Setting]:
    for name in sorted({*a, *b}):
        if a.get(name) != b.get(name):
            yield Setting(name, a.get(name), b.get(name))


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted names."""
    if not isinstance(content, dict):
        return {path: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key not in _SIGNED:
            found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a directory by name: the file of each, and its name there."""

    places: Mapping[str, tuple[Path, str]]

    @classmethod
    def of(cls, place: Path) -> "_Tensors":
        return cls(tensor_places(place))

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path, stored = self.places[name]
        with safe_open(str(path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor


def _changed(a: _Tensors, b: _Tensors) -> tuple[tuple[Changed, ...], int]:
    import torch

    found: list[Changed] = []
    equal = 0
    for name in sorted({*a.places, *b.places}):
        first, second = (t[name] if name in t.places else None for t in (a, b))
        a_shape, b_shape = (None if t is None else tuple(t.shape) for t in (first, second))
        if first is None or second is None or first.shape != second.shape:
            found.append(Changed(name, a_shape, b_shape))
        elif first.dtype == second.dtype and torch.equal(first, second):
            equal += 1
        else:
            size = first.double().square().mean().sqrt()
            change = (second.double() - first.double()).square().mean().sqrt() / size
            found.append(Changed(name, a_shape, b_shape, float(change)))
    return tuple(found), equal
