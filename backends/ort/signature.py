"""What goes into an ONNX file and comes out of it, and by which names.

A causal language model has those that ONNX Runtime GenAI expects, the halves of an encoder-decoder
those of Optimum; every other model has those of its source. `past_length` is no input: the graph
reads it from the shape of a past.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx
from torch.export import Dim

from attnopt.finder.ops import hint
from attnopt.frontend.calls import Inputs, Outputs
from attnopt.frontend.skeletons import CacheLayers, Made, Slot
from attnopt.frontend.stateful import StatefulCalls
from attnopt.nouns import No
from attnopt.program import Program, State

# Sizes of the example: unlike each other, and no special case.
_SIZES: Final = {"batch": 2, "sequence": 3, "past": 5, "total": 8, "source": 7}
_CAUSAL: Final[Mapping[str, tuple[int | str, ...]]] = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
}
_NEW_ONLY: Final = ("batch", "sequence")
_ENCODED: Final = "encoder_outputs_last_hidden_state"
_DECODER: Final[Mapping[str, tuple[int | str, ...]]] = {
    "attention_mask": ("batch", "source"),
    "decoder_input_ids": ("batch", "sequence"),
    "decoder_attention_mask": ("batch", "total"),
    _ENCODED: ("batch", "source"),
}
_TOLD: Final = {_ENCODED: "encoder_hidden_states"}


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

    @property
    def kept(self) -> tuple[int, ...]:
        """The outputs of the graph that the file gives, in order."""
        ...

    def example(self) -> dict[str, Tensor]:
        """Return an example call by the program's names."""
        ...

    def dynamic(self, *, loosely: bool = False) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary; loosely: let the exporter say how they hang together."""
        ...


@dataclass(frozen=True)
class StepSignature:
    """What goes on from states: a language model with its cache, or the decoder of a pair.

    `shapes` has the axes of each input by name, `results` each output that the file gives: its
    number in the graph and its name. What the graph hands on unchanged is not given again.
    """

    shapes: Mapping[str, tuple[int | str, ...]]
    dtypes: Mapping[str, torch.dtype]
    states: tuple[State, ...]
    results: tuple[tuple[int, str], ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The program's inputs, states left out."""
        return tuple(self.shapes)

    @property
    def input_names(self) -> list[str]:
        """The names of the file's inputs."""
        paired = is_pair(self.states)
        return [
            *(_TOLD.get(name, name) for name in self.inputs),
            *(state_name("past_key_values", s, paired=paired) for s in self.states),
        ]

    @property
    def output_names(self) -> list[str]:
        """The names of the file's outputs."""
        return [name for _, name in self.results]

    @property
    def kept(self) -> tuple[int, ...]:
        """The outputs of the graph that the file gives, in order."""
        return tuple(number for number, _ in self.results)

    def example(self) -> dict[str, Tensor]:
        """Return an example call by the program's names."""
        made = {name: self._input(name) for name in self.inputs}
        for state in self.states:
            shape = [_SIZES[s] if isinstance(s, str) else s for s in state.shape]
            made[state.placeholder] = torch.zeros(shape, dtype=_exported(state.dtype))
        return made

    def _input(self, name: str) -> Tensor:
        shape = [_SIZES[s] if isinstance(s, str) else s for s in self.shapes[name]]
        if name == "position_ids":
            return torch.arange(_SIZES["past"], _SIZES["total"]).repeat(shape[0], 1)
        make = torch.ones if "mask" in name else torch.zeros
        return make(shape, dtype=_exported(self.dtypes[name]))

    def dynamic(self, *, loosely: bool = False) -> dict[str, dict[int, Any]]:
        """Return the axes that may vary; heads and their widths are static."""
        dims: dict[str, Any] = {n: Dim(n) for n in ("batch", "sequence", "past", "source")}
        dims["total"] = Dim.DYNAMIC
        if loosely:
            dims = dict.fromkeys(dims, Dim.AUTO)
        axes = {**self.shapes, **{s.placeholder: s.shape for s in self.states}}
        return {
            name: {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in axes.items()
        }


def _exported(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a file has for one of the source: its numbers are float32."""
    return torch.float32 if dtype.is_floating_point else dtype


def is_pair(states: Sequence[State]) -> bool:
    """Tell whether these are the states of a decoder behind an encoder."""
    return any(s.role.startswith("cross") for s in states)


def state_name(prefix: str, state: State, *, paired: bool) -> str:
    """Return the name of a state in a file, as ONNX Runtime GenAI and Optimum write it."""
    if state.role in ("conv", "recurrent"):
        number = f".{state.index}" if state.index else ""
        return f"{prefix}.{state.layer}.{state.role}_state{number}"
    side = "" if not paired else "encoder." if state.role.startswith("cross") else "decoder."
    return f"{prefix}.{state.layer}.{side}{state.role.removeprefix('cross_')}"


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

    @property
    def kept(self) -> tuple[int, ...]:
        """The outputs of the graph that the file gives, in order."""
        return tuple(range(len(self.results)))

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

    def narrowed(self, written: Mapping[str, Sequence[int]]) -> "PlainSignature":
        """Return this with what a file has as numbers; a size that varies there is 0."""
        pairs = [
            (size, found)
            for name, sizes in written.items()
            for size, found in zip(self.taken.shapes[name], sizes, strict=True)
        ]
        fixed = {size: found for size, found in pairs if isinstance(size, str) and found}
        shapes = {n: tuple(fixed.get(s, s) for s in x) for n, x in self.taken.shapes.items()}
        captured = {name: size for name, size in self.captured.items() if name not in fixed}
        return replace(self, taken=replace(self.taken, shapes=shapes), captured=captured)

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
    """Return the signature of a program that is one graph, or why it has none yet."""
    if program.parts:
        return No("it was captured in parts; a file holds the graph of one")
    return _step(program) if program.states else _plain(program)


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
    if isinstance(skeleton, Slot) and skeleton.key != "cache":
        yield int(skeleton.key), path or "output"
    items: Any = ()
    if isinstance(skeleton, CacheLayers):
        yield from _named_cache(skeleton)
    elif isinstance(skeleton, Made):
        items = skeleton.arguments.items()
    elif isinstance(skeleton, dict):
        items = skeleton.items()
    elif isinstance(skeleton, list | tuple):
        items = enumerate(skeleton)
    for key, inner in items:
        yield from _named(inner, f"{path}.{key}" if path else f"{key}")


def _named_cache(cache: CacheLayers) -> Iterator[tuple[int, str]]:
    """Yield what a cache that is filled by a first call holds."""
    sides = ((cache.layers, "" if cache.cross is None else "decoder."), (cache.cross, "encoder."))
    for layers, side in sides:
        for number, layer in enumerate(layers or ()):
            for name, slot in layer.items():
                yield int(slot.key), f"present.{number}.{side}{name}"


def _step(program: Program) -> StepSignature | No:
    made = program.form.made_of
    if not isinstance(made, StatefulCalls):
        return No("how its source is called is code of the source")
    known = _CAUSAL if made.tokens == "input_ids" else _DECODER
    given = made.inputs.shapes
    foreign = sorted(set(given) - set(known))
    if foreign or made.tokens not in given:
        return No(f"its inputs are not among {', '.join(known)}", ", ".join(foreign))
    if any(s.grows not in (None, 2) for s in program.states):
        return No("a state grows along an axis that is not its third")
    if not any(s.grows for s in program.states) and _counts(program):
        return No("it counts the tokens of the past, which no state shows")
    paired = is_pair(program.states)
    (output,) = program.graph.find_nodes(op="output")
    flat: Any = output.args[0]
    names = dict(_named(made.outputs.skeleton))
    names |= {s.output: state_name("present", s, paired=paired) for s in program.states}
    results = tuple(
        (number, names.get(number, f"output_{number}"))
        for number, node in enumerate(flat)
        if isinstance(node, fx.Node) and node.op != "placeholder"
    )
    shapes = {n: (*axes, *given[n][len(axes) :]) for n, axes in known.items() if n in given}
    count = given[made.tokens][1]
    if isinstance(count, int):  # a source may take so many new tokens at a time, and no others
        shapes[made.tokens] = ("batch", count)
    if "attention_mask" in shapes and not any(s.grows for s in program.states):
        shapes["attention_mask"] = _NEW_ONLY  # a mask covers the past where a state does
    return StepSignature(shapes, made.inputs.dtypes, program.states, results)


def _counts(program: Program) -> bool:
    return any(n.users for n in program.placeholders if n.name == "past_length")
