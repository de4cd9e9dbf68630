"""How to heal: the knobs of both stages, with defaults that work on a rewritten language model."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal

Train = Literal["changed", "sites", "all"]
_TRAIN = ("changed", "sites", "all")
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """The settings of a run; `steps` counts both stages.

    `train` says which weights move: those that the rewrite changed, those of all attentions, or
    all. With a `rank` they move by a low-rank product, scaled by alpha / rank and merged at the
    end. A step sees `batch` x `accumulate` rows in every process.
    """

    steps: int
    site_steps: int | None = None  # of them site by site; None: a quarter
    lr: float = 3e-4
    site_lr: float = 1e-3  # a model of a few million weights takes four times as much
    added_lr: float | None = None  # site by site, of what the rewrite added; None: site_lr
    batch: int = 8
    accumulate: int = 1
    train: Train = "changed"
    rank: int | None = None
    alpha: float = 16.0
    top_k: int | None = None  # distil the teacher's likeliest tokens only
    temperature: float = 1.0
    lm_weight: float = 0.0  # of the loss on the text itself, beside the teacher's
    warmup: float = 0.05  # share of a stage in which the rate rises
    floor: float = 0.1  # share of the rate that is left at the end of a stage
    anneal: float = 0.5  # share of all steps until ops that are annealed have their full strength
    clip: float = 1.0
    weight_decay: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast, the weights stay wide
    device: str = "cpu"
    seed: int = 0
    every: int = 50  # steps from one look at the watched rows, and one checkpoint, to the next
    patience: int = 4  # looks without improvement before the last stage stops
    max_drop: float | None = None  # stop as soon as the gate would be passed

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "every", "patience"):
            _at_least(self, name, 1)
        for name in ("rank", "top_k"):
            _at_least(self, name, 1)
        for name in ("site_steps", "lm_weight", "weight_decay", "warmup", "floor", "max_drop"):
            _at_least(self, name, 0)
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"anneal {self.anneal!r} is a share of all steps, 0 to 1")
        for name in ("lr", "site_lr", "alpha", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r} must be above 0")
        if self.added_lr is not None and not self.added_lr > 0:
            raise ValueError(f"added_lr {self.added_lr!r} must be above 0")
        if self.site_steps is not None and self.site_steps > self.steps:
            raise ValueError(f"site_steps {self.site_steps} are more than all steps ({self.steps})")
        for name, allowed in (("train", _TRAIN), ("dtype", _DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: it is {', '.join(allowed)}")

    @property
    def first_steps(self) -> int:
        """How many steps go site by site."""
        return self.steps // 4 if self.site_steps is None else self.site_steps

    @property
    def haste(self) -> float:
        """How many times faster than other weights those learn that the rewrite added."""
        return 1.0 if self.added_lr is None else self.added_lr / self.site_lr

    def strength(self, step: int) -> float:
        """Return how strong ops that are annealed are at a step, 0 to 1."""
        whole = self.anneal * self.steps
        return 1.0 if step >= whole else step / whole

    @classmethod
    def of(cls, steps: int, settings: dict[str, Any]) -> "Recipe":
        """Make a recipe of settings by name; an unknown one is a TypeError with a suggestion."""
        allowed = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"heal has no setting {name!r}{hint} (it has {', '.join(allowed)})")
        return cls(steps, **settings)


def _at_least(recipe: Recipe, name: str, least: int) -> None:
    value = getattr(recipe, name)
    if value is not None and not value >= least:
        raise ValueError(f"{name} {value!r} must be at least {least}")
