"""The inputs and outputs of a causal language model, by the names that ONNX Runtime GenAI expects.

`past_length` is no input: the graph reads it from the shape of a past.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from attnopt.nouns import No
from attnopt.program import Program, State

_TOKENS = ("input_ids", "attention_mask", "position_ids")
# Sizes of the example: unlike each other, and no special case.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


@dataclass(frozen=True)
class Signature:
    """What goes in and what comes out, by the program's names and by those of the file."""

    inputs: tuple[str, ...]
    states: tuple[State, ...]

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs."""
        return [*self.inputs, *(f"past_key_values.{s.layer}.{s.role}" for s in self.states)]

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs."""
        return ["logits", *(f"present.{s.layer}.{s.role}" for s in self.states)]

    def example(self) -> dict[str, Tensor]:
        """Return an example call by the program's names."""
        total = _PAST + _SEQUENCE
        tokens = {
            "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
            "attention_mask": torch.ones(_BATCH, total, dtype=torch.long),
            "position_ids": torch.arange(_PAST, total).repeat(_BATCH, 1),
        }
        sizes = {"batch": _BATCH, "past": _PAST}
        made = {name: tokens[name] for name in self.inputs}
        for state in self.states:
            shape = [sizes[s] if isinstance(s, str) else s for s in state.shape]
            made[state.placeholder] = torch.zeros(shape)
        return made

    def dynamic(self) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary; heads and their widths are static."""
        batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
        second = {"input_ids": sequence, "position_ids": sequence, "attention_mask": Dim.DYNAMIC}
        axes: dict[str, dict[int, Any]] = {n: {0: batch, 1: second[n]} for n in self.inputs}
        for state in self.states:
            assert state.grows is not None
            axes[state.placeholder] = {0: batch, state.grows: past}
        return axes


def signature_of(program: Program) -> Signature | No:
    """Return the signature of a program, or why it has none yet."""
    if program.parts or not program.states:
        return No("only a causal language model captured whole, with its cache, is exported so far")
    kept = [s.name for s in program.states if s.grows is None or s.role not in ("key", "value")]
    if kept:
        return No("a state is neither the keys nor the values of a cache", kept[0])
    given = {b.name for b in program.bindings.values() if b.kind == "input"}
    foreign = sorted(given - set(_TOKENS))
    if foreign or "input_ids" not in given:
        return No(f"its inputs are not among {', '.join(_TOKENS)}", ", ".join(foreign))
    (output,) = program.graph.find_nodes(op="output")
    results: Any = output.args[0]
    if len(results) != 1 + len(program.states):
        return No("it returns more than logits and its cache")
    return Signature(tuple(n for n in _TOKENS if n in given), program.states)
