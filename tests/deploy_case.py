"""A model of the zoo that is to be deployed, what is made of it, and how results are compared."""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import zoo
import zoo_parity
from torch import Tensor, nn
from transformers import GenerationMixin

import attnopt

TOKENS: Final = 64
DRAWS: Final = 2
"""Calls that are compared bit by bit: one padded at the left, one at the right."""
POSITIONS: Final = {"whisper": 128}
"""Models that have fewer positions than the prompt and the tokens take."""

Facts = dict[str, Any]
Named = dict[str, Tensor]


class DiffersError(Exception):
    """A check that came out unequal, with what was measured."""

    def __init__(self, why: str, **facts: Any) -> None:
        super().__init__(why)
        self.facts = facts


class NotApplicableError(Exception):
    """A check that a model has no use for."""


class RefusedError(DiffersError):
    """A check that pass exact refuses, with its reason."""


class LimitError(DiffersError):
    """A check that fails in the same way without attnopt: what torch cannot do with the model."""


@dataclass(frozen=True)
class Decoded:
    """Greedy tokens of every row, and the logits that they were chosen by."""

    tokens: Tensor
    logits: Tensor

    @property
    def distinct(self) -> int:
        """How many different tokens the least varied row has."""
        return min(len(set(row.tolist())) for row in self.tokens)


@dataclass
class Case:
    """A model of the zoo and what is made of it, each made once when it is needed."""

    name: str
    shelf: Path = field(default_factory=Path)
    inner: str = "eager"
    folder: Path = field(default_factory=Path)
    forwards: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return "lm" if self.name in zoo.LM else "base"

    @property
    def sites(self) -> int:
        return int(zoo.ZOO[self.name].sites)

    @cached_property
    def subject(self) -> zoo_parity.Subject:
        return self.another()

    def another(self) -> zoo_parity.Subject:
        """Build the same model again."""
        positions = POSITIONS.get(self.name)
        return zoo_parity.subject(self.name, "eager", self.task, positions=positions)

    @cached_property
    def program(self) -> attnopt.Program:
        program = attnopt.capture(self.subject.model, (), self.subject.kwargs)
        return attnopt.apply(program, "exact")

    @cached_property
    def lowered(self) -> nn.Module:
        return attnopt.lower(self.program, "eager")

    @cached_property
    def stock_tokens(self) -> Decoded:
        if self.task == "base":
            raise NotApplicableError("no language-model head")
        return decoded(self.subject.model, self.subject.kwargs)

    @cached_property
    def right_tokens(self) -> Decoded:
        """The stock tokens, without the cache where a stock step forgets what is masked in it."""
        if self.name not in zoo_parity.FORGETFUL:
            return self.stock_tokens
        return decoded(self.subject.model, {**self.subject.kwargs, "use_cache": False})

    def outputs(self, model: Callable[..., Any], draw: int = 0) -> Named:
        """Run a model as the parity tests do: language models in pieces, with their cache."""
        return zoo_parity.run(self.subject, model, zoo_parity.drawn(self.subject, draw))


@torch.no_grad()
def decoded(model: Any, kwargs: dict[str, Any]) -> Decoded:
    """Decode greedily with the `generate()` of Transformers."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise DiffersError(f"{type(model).__name__} has no generate()")
    torch.manual_seed(0)
    # Not model.generate: a speech model overrides it with a loop of its own.
    way = {"do_sample": False, "max_new_tokens": TOKENS, "output_logits": True}
    made: Any = GenerationMixin.generate(model, **kwargs, **way, return_dict_in_generate=True)
    return Decoded(made.sequences[:, -TOKENS:], torch.stack(made.logits, 1).float())


def same_tokens(got: Decoded, want: Decoded) -> Facts:
    """Compare tokens; where they differ, say how near the choice was at the first difference."""
    same = got.tokens == want.tokens
    facts: Facts = {"equal": int(same.sum()), "of": same.numel(), "distinct": want.distinct}
    if same.all():
        return {**facts, "logits_differ": float((got.logits - want.logits).abs().max())}
    step = int((~same).any(0).nonzero()[0])
    row = int((~same[:, step]).nonzero()[0])
    logits = want.logits[row, step]
    chosen, other = (int(x.tokens[row, step]) for x in (want, got))
    margin = float(logits[chosen] - logits[other])
    top = float(logits.abs().max())
    facts |= {"first_difference": [row, step], "margin": margin, "largest_logit": top}
    raise DiffersError(
        f"{facts['equal']} of {facts['of']} tokens equal; the first difference is in row {row} at "
        f"token {step}, by a margin of {margin:.1e} (logits to {top:.1f})",
        **facts,
    )


def same_bits(got: Named, want: Named) -> float:
    """Return the largest difference of outputs that must be equal bit by bit."""
    return max(_difference(got[name], tensor) for name, tensor in want.items())


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if (got.isnan() & want.isnan() | (got == want)).all():
        return 0.0
    delta = float((got.double() - want.double()).abs().max())
    return delta if math.isfinite(delta) and delta else math.inf


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    # A compiler says first which backend it was.
    return " ".join(lines[: 1 + lines[0].endswith("raised:")])[:300]


def error_told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "attnopt" in f.filename] or list(frames)
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__}: {first_line(error)} ({place})"


def first_error(error: BaseException) -> BaseException:
    """Return what was raised at first; compilers raise other things for it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
