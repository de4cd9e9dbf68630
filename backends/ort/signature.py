"""What goes into an ONNX file and comes out of it, and by which names.

A causal language model has those that ONNX Runtime GenAI expects; every other model has those of
its source. `past_length` is no input: the graph reads it from the shape of a past.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import Dim

from attnopt.finder.ops import hint
from attnopt.frontend.calls import Inputs, Outputs
from attnopt.frontend.skeletons import Made, Slot
from attnopt.nouns import No
from attnopt.program import Program, State

_TOKENS = ("input_ids", "attention_mask", "position_ids")
# Sizes of the example: unlike each other, and no special case.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


class Signature(Protocol):
    """What goes in and what comes out, by the program's names and by those of the file."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The program's inputs, states left out."""
        ...

    @property
    def states(self) -> tuple[State, ...]:
        """The states that the file takes and gives."""
        ...

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs."""
        ...

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs."""
        ...

    def example(self) -> dict[str, Tensor]:
        """Return an example call by the program's names."""
        ...

    def dynamic(self, *, loosely: bool = False) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary; loosely: let the exporter say how they hang together."""
        ...


@dataclass(frozen=True)
class CausalSignature:
    """A causal language model with its cache."""

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

    def dynamic(self, *, loosely: bool = False) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary; heads and their widths are static."""
        batch, sequence, past = Dim("batch"), Dim("sequence"), Dim("past")
        second = {"input_ids": sequence, "position_ids": sequence, "attention_mask": Dim.DYNAMIC}
        axes: dict[str, dict[int, Any]] = {n: {0: batch, 1: second[n]} for n in self.inputs}
        for state in self.states:
            assert state.grows is not None
            axes[state.placeholder] = {0: batch, state.grows: past}
        return axes


@dataclass(frozen=True)
class PlainSignature:
    """A model without states: its source's inputs and outputs, by their names there."""

    taken: Inputs
    results: tuple[str, ...]
    captured: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    states: tuple[State, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The program's inputs."""
        return tuple(self.taken.shapes)

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs."""
        return list(self.taken.shapes)

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs."""
        return list(self.results)

    def example(self) -> dict[str, Tensor]:
        """Return an example call of the sizes of the capture."""
        return self.call(self.captured)

    def dynamic(self, *, loosely: bool = False) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary, those of one size by one name."""
        dims: dict[str, Any] = {
            name: Dim.AUTO if loosely else Dim("batch" if i == 0 else f"size_{i}")
            for i, name in enumerate(self.captured)
        }
        return {
            name: {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in self.taken.shapes.items()
        }

    def call(
        self, sizes: Mapping[str, int], config: Any = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Return a random call of these sizes; the last row's mask ends early."""
        chance = torch.Generator().manual_seed(seed)
        made: dict[str, Tensor] = {}
        for name, shape in self.taken.shapes.items():
            size = tuple(sizes[s] if isinstance(s, str) else int(s) for s in shape)
            made[name] = _values(name, size, self.dtypes[name], config, chance)
        return made

    def other_sizes(self) -> Mapping[str, int] | None:
        """Return sizes that were not captured and that the graph takes, if there are any."""
        for times, more in ((2.0, 0), (1.0, 1), (1.0, 2), (0.5, 0)):
            sizes = {name: int(times * size) + more for name, size in self.captured.items()}
            try:
                self.taken.check(self.call(sizes))
            except ValueError:
                continue
            if sizes != self.captured:
                return sizes
        return None


def _values(
    name: str, size: tuple[int, ...], dtype: torch.dtype, config: Any, chance: torch.Generator
) -> Tensor:
    """Make up an input: numbers, tokens, or a mask whose last row hides its end."""
    if dtype.is_floating_point:
        return torch.randn(size, generator=chance).to(torch.float32)
    if "mask" in name and len(size) == 2:
        mask = torch.ones(size, dtype=dtype)
        mask[-1, max(1, 2 * size[1] // 3) :] = 0
        return mask
    if dtype == torch.bool:
        return torch.rand(size, generator=chance) < 0.5
    text = None if config is None else config.get_text_config()
    most = int(getattr(text, "vocab_size", 0) or 2) if name.endswith("input_ids") else 2
    return torch.randint(most, size, generator=chance).to(dtype)


def signature_of(program: Program) -> Signature | No:
    """Return the signature of a program, or why it has none yet."""
    if program.parts:
        return No("it was captured in parts; only the graph of a whole model is exported so far")
    return _causal(program) if program.states else _plain(program)


def _plain(program: Program) -> PlainSignature | No:
    made = program.form.made_of
    if not isinstance(made, tuple):
        return No("how its source is called is code of the source")
    inputs, outputs = made
    assert isinstance(inputs, Inputs)
    assert isinstance(outputs, Outputs)
    (output,) = program.graph.find_nodes(op="output")
    flat: Any = output.args[0]
    if not all(isinstance(x.meta.get("val"), Tensor) for x in flat if hasattr(x, "meta")):
        return No("it returns sizes or numbers besides tensors")
    named = dict(_named(outputs.skeleton))
    names = tuple(named.get(number, f"output_{number}") for number in range(len(flat)))
    placeholders = {n.name: n for n in program.placeholders}
    sizes: dict[str, int] = {}
    for name, shape in inputs.shapes.items():
        seen = placeholders[name].meta["val"].shape
        sizes |= {w: hint(s) for w, s in zip(shape, seen, strict=True) if isinstance(w, str)}
    return PlainSignature(inputs, names, sizes, inputs.dtypes)


def _named(skeleton: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """Yield the number and the name of every tensor in what a source returns."""
    if isinstance(skeleton, Slot):
        yield int(skeleton.key), path or "output"
    items: Any = ()
    if isinstance(skeleton, Made):
        items = skeleton.arguments.items()
    elif isinstance(skeleton, dict):
        items = skeleton.items()
    elif isinstance(skeleton, list | tuple):
        items = enumerate(skeleton)
    for key, inner in items:
        yield from _named(inner, f"{path}.{key}" if path else f"{key}")


def _causal(program: Program) -> CausalSignature | No:
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
    return CausalSignature(tuple(n for n in _TOKENS if n in given), program.states)
