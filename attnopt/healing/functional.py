"""A program as a function of its weights, so that gradients reach whichever of them are wanted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.healing.pace import Pace
from attnopt.lowering import WEIGHTS, Ready
from attnopt.program import Program


@dataclass(frozen=True)
class Functional:
    """A program made ready to compute in float32 with weights that come with every call."""

    ready: Ready
    weights_of: Mapping[str, str]

    @classmethod
    def of(cls, program: Program, device: torch.device, pace: Pace | None = None) -> "Functional":
        """Lower a program to ops that take gradients; `pace` says how strong they are."""
        ready = Ready.of(program, None, pace or Pace(), torch.float32, device)
        held = {p: b.name for p, b in program.bindings.items() if b.kind in WEIGHTS}
        return cls(ready, held)

    def flat(
        self,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        more: Mapping[str, Tensor] | None = None,
    ) -> tuple[Any, ...]:
        """Return the flat outputs; `more` holds values of placeholders that no call names."""
        return self._run(inputs, weights, more)[0]

    def logits(self, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """Return what the source calls its logits, or its first tensor."""
        outputs, values = self._run(inputs, weights, None)
        result = self.ready.form.unflatten(outputs, values)
        found: Any = getattr(result, "logits", result)
        if isinstance(found, tuple | list):
            found = found[0]
        if not isinstance(found, Tensor):
            raise TypeError(
                f"the program gives no logits but {type(found).__name__}: only a model that "
                "returns logits, or a tensor, can be distilled"
            )
        return found

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        more: Mapping[str, Tensor] | None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = self.ready.form.flatten((), dict(inputs))
        values.update({place: weights[name] for place, name in self.weights_of.items()})
        values.update(more or {})
        return self.ready.flat(values), values


def wide_weights(program: Program, device: torch.device) -> dict[str, Tensor]:
    """Return every weight that the graph reads, floating ones in float32."""
    names = {b.name for b in program.bindings.values() if b.kind in WEIGHTS}
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        tensor = program.weights[name].detach()
        found[name] = tensor.to(device, torch.float32 if tensor.is_floating_point() else None)
    return found
