"""Cases: a module, its inputs at any size, and what a finder must say about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any, Final

import torch
from site_facts import ANY, Expected
from torch import Tensor, nn

from fuzz_grammar.lookalikes import LOOKALIKES, WIDTH, lookalike
from fuzz_grammar.masks import expected_mask
from fuzz_grammar.models import cross_of, model
from fuzz_grammar.spec import IMAGE, POOL_QUERIES, STATIC_LENGTH, Spec, robust, sample

SHARE_OF_LOOKALIKES: Final = 0.2
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Size:
    """Batch, length of the queries, length of the context."""

    batch: int
    length: int
    context: int


CAPTURED: Final = Size(2, STATIC_LENGTH, 9)
SIZES: Final = (CAPTURED, Size(3, 7, 5), Size(2, 63, 31), Size(1, 1, 1))
STATIC_SIZES: Final = (CAPTURED, Size(3, STATIC_LENGTH, 9), Size(1, STATIC_LENGTH, 9))


@dataclass(frozen=True)
class Case:
    """What (seed, index) stands for, or a reduced form of it."""

    seed: int
    index: int
    spec: Spec | None = None
    lookalike: str | None = None
    attempt: int = 0

    @property
    def kind(self) -> str:
        return self.lookalike or "attention"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.dtype] if self.spec else torch.float32

    @cached_property
    def module(self) -> nn.Module:
        """Build the module, in eval mode, with weights that depend on seed and index only."""
        with torch.random.fork_rng():
            torch.manual_seed((self.seed * 100_003 + self.index) % 2**63)
            if self.spec is None:
                built = lookalike(self.kind, Random(f"{self.seed}/{self.index}/module"))
            else:
                built = model(self.spec)
        return built.to(self.dtype).eval().requires_grad_(False)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes to run, the captured one first."""
        return STATIC_SIZES if self.spec and self.spec.static_length else SIZES

    def inputs(self, size: Size, draw: int) -> dict[str, Tensor]:
        """Draw the keyword arguments of the module."""
        generator = torch.Generator().manual_seed(draw * 7919 + self.index)
        if self.spec is None:
            return {"x": torch.randn(size.batch, size.length, WIDTH, generator=generator)}
        given = _tokens(self.spec, size, generator)
        if self.spec.padding != "none":
            given["padding"] = _padding(self.spec, size, generator)
        if self.spec.bias == "dense_input":
            given["dense"] = _normal(
                generator,
                size.batch,
                self.spec.heads,
                _queries(self.spec, size),
                _keys(self.spec, size),
            )
        return {
            name: t.to(self.dtype) if t.is_floating_point() and name != "padding" else t
            for name, t in given.items()
        }

    def valid(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Mark the positions to compare: padding rows see arbitrary things."""
        if self.spec is None or self.spec.padding == "none":
            return None
        if self.spec.source in ("self", "raw"):
            return inputs["padding"].to(torch.bool)
        return None

    @cached_property
    def expected(self) -> tuple[Expected, ...]:
        """The sites, in order of execution."""
        if self.spec is None:
            return ()
        layer = [facts(self.spec)]
        if self.spec.stack == "decoder":
            layer.append(facts(cross_of(self.spec)))
        return tuple(layer * self.spec.layers * (2 if self.spec.twice else 1))

    def described(self) -> str:
        """Return what is not the simplest, as JSON."""
        shown = {"lookalike": self.lookalike} if self.spec is None else self.spec.described()
        return json.dumps(shown)

    def command(self) -> str:
        """Return the command that runs this case alone."""
        start = f"python tests/fuzz.py --seed {self.seed} --index {self.index}"
        start += f" --attempt {self.attempt}" if self.attempt else ""
        same = draw(self.seed, self.index, attempt=self.attempt) == self
        return start if same else f"{start} --spec '{self.described()}'"


def draw(seed: int, index: int, *, only: str | None = None, attempt: int = 0) -> Case:
    """Return the case that (seed, index) stands for; `attempt` numbers its replacements."""
    rng = Random(f"{seed}/{index}/{attempt}")
    chosen = rng.choice(sorted(LOOKALIKES)) if rng.random() < SHARE_OF_LOOKALIKES else None
    if only in LOOKALIKES:
        chosen = only
    elif only == "attention":
        chosen = None
    elif only == "lookalike":
        chosen = chosen or rng.choice(sorted(LOOKALIKES))
    spec = None if chosen else sample(rng)
    return Case(seed, index, spec=spec, lookalike=chosen, attempt=attempt)


def facts(spec: Spec) -> Expected:
    """State the facts of the attention that a spec spells."""
    mask: Any = expected_mask(spec)
    bias: Any = {
        "none": "none",
        "alibi": "alibi",
        "alibi_keys": "alibi",
        "alibi_abs": ("alibi", "relative", "table"),
        "t5": ("relative", "table"),
        "table": ("relative", "table"),
        "dense_parameter": ("dense", "table"),
        "dense_input": "dense",
    }[spec.bias]
    if spec.layout == "blocked" or spec.partition == "shifted" or spec.bias == "dense_input":
        mask, bias = ANY, ANY
    return Expected(
        heads=spec.heads,
        kv_heads=spec.heads if spec.projection == "mla" else spec.kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        scale=_scale(spec),
        mask=mask,
        kind=ANY if spec.source == "raw" else "self" if spec.source == "self" else "cross",
        softcap=spec.softcap or None,
        sinks=spec.sinks != "none",
        padded=spec.padding != "none",
        bias=bias,
    )


def _scale(spec: Spec) -> Any:
    if spec.qk_norm == "cosine_learned":
        return ANY
    if spec.dtype == "bfloat16" and spec.scale_place in ("buffer", "tensor"):
        return ANY
    return spec.scale_number


def _tokens(spec: Spec, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    if spec.source == "raw":
        heads = (spec.heads, spec.kv_heads, spec.kv_heads)
        channels = (spec.head_dim, spec.head_dim, spec.v_head_dim)
        return {
            name: _normal(generator, size.batch, size.length, h, c)
            for name, h, c in zip("qkv", heads, channels, strict=True)
        }
    if spec.partition != "none":
        return {"x": _normal(generator, size.batch, *IMAGE, spec.width)}
    given = {"x": _normal(generator, size.batch, size.length, spec.width)}
    if spec.source == "cross" or spec.stack == "decoder":
        given["context"] = _normal(generator, size.batch, size.context, spec.width)
    return given


def _keys(spec: Spec, size: Size) -> int:
    return size.context if spec.source == "cross" else size.length


def _queries(spec: Spec, size: Size) -> int:
    return POOL_QUERIES if spec.source == "pool" else size.length


def _padding(spec: Spec, size: Size, generator: torch.Generator) -> Tensor:
    """Pad the last row: anywhere where the source keeps rows that see nothing finite."""
    keys = _keys(spec, size)
    mask = torch.ones(size.batch, keys, dtype=torch.bool)
    if keys > 2:
        mask[-1] = torch.rand(keys, generator=generator) > 0.4
        side = int(torch.randint(0, 3, (), generator=generator))
        if side < 2 or not robust(spec):
            mask[-1] = True
        if not robust(spec):
            mask[-1, -1] = False
        elif side < 2:
            mask[-1, slice(0, 3) if side else slice(-3, None)] = False
        mask[-1, keys // 2] = True
    kinds = {"int64": torch.int64, "bool": torch.bool, "float": torch.float32}
    return mask.to(kinds[spec.pad_dtype])


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)
