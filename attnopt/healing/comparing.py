"""How far each rewritten attention is from the teacher's on what the teacher puts into it."""

from collections.abc import Mapping
from typing import Any

import torch

from attnopt.calibrating import kept_tokens
from attnopt.healing.functional import Functional, wide_weights
from attnopt.healing.objectives import relative
from attnopt.healing.regions import cut, regions_of
from attnopt.program import Program


@torch.no_grad()
def site_losses(program: Program, teacher: Program, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return what the first stage of healing begins with, by site: relative squared errors."""
    device = torch.device("cpu")
    pieces = cut(program, teacher, regions_of(program, (), teacher))
    given, known = wide_weights(program, device), wide_weights(teacher, device)
    theirs = Functional.of(pieces.teacher, device).flat(batch, known)
    inputs = dict(zip(pieces.inputs, theirs, strict=False))
    ours = Functional.of(pieces.student, device).flat(batch, given, inputs)
    kept = kept_tokens(batch)
    return {
        region.name: float(relative(a, b, kept))
        for region, a, b in zip(pieces.regions, ours, theirs[len(inputs) :], strict=True)
    }
