"""The bundled classifier of digits: its data, how it is judged and healed, and grids to time."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import attnopt
from attnopt.healing import Recipe, healed

MODEL: Final = Path(__file__).parents[2] / "examples" / "models" / "vit-digits"
TRAINED: Final = 1437  # as examples/train_vit_digits.py splits them
RECIPE: Final = {"train": "all", "lr": 5e-4, "batch": 16, "every": 50}


def classifier() -> attnopt.Program:
    """Return the program of the classifier, its attentions as the library's op."""
    return attnopt.apply(attnopt.capture(MODEL), "exact")


def digits() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the digits that may be learnt from, and the held-out ones."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None]
    images = functional.interpolate(images, (32, 32), mode="bilinear", align_corners=False)
    images, labels = (images / 16 - 0.3) / 0.35, torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = (order[:TRAINED], order[TRAINED:])
    learnt, held = ({"pixel_values": images[i], "labels": labels[i]} for i in parts)
    return learnt, held


def judged(program: Any, teacher: Any, held: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy of a program, and of the one that it came from."""
    report = attnopt.verify(program, teacher, held).content()
    return {name: round(report[name], 4) for name in ("reference_accuracy", "accuracy")}


def taught(
    student: Any, teacher: Any, learnt: dict[str, Any], held: dict[str, Any], options: Namespace
) -> dict[str, Any]:
    """Return the accuracy of a program after it has learnt, and how that went."""
    recipe = Recipe(options.steps, **{**RECIPE, "seed": options.seed})
    start = time.perf_counter()
    result = healed(student, teacher, {"pixel_values": learnt["pixel_values"]}, recipe)
    seconds = time.perf_counter() - start
    return {
        "healed_accuracy": judged(result.program, teacher, held)["accuracy"],
        "steps": result.steps,
        "kept_from": result.best_at,
        "sites_healed": not result.skipped,
        "healing_seconds": round(seconds, 1),
    }


def grid_tokens(
    side: int, seed: int, heads: int, width: int
) -> tuple[list[Tensor], torch.Generator]:
    """Return queries, keys and values of a square grid, and the generator for what follows."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(1, side * side, heads, width, generator=generator) for _ in range(3))
    return [x.transpose(1, 2) for x in made], generator
