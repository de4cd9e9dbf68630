"""What every implementation of the canonical attention must do, against a definition in float64.

An implementation joins by a row in IMPLEMENTATIONS: a function with the reference's arguments that
returns the output. The definition here is written anew, key by key rule, so that it shares nothing
with what it judges.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from attnopt.ops import attention_reference
from attnopt.ops.sdpa import attend


@dataclass(frozen=True)
class Implementation:
    """A way to compute the canonical attention; `dtypes` are those that it takes."""

    name: str
    call: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name


def _reference(*args: Any, **options: Any) -> Tensor:
    return attention_reference(*args, **options)[0]


def _with_memo(*args: Any, **options: Any) -> Tensor:
    """Call twice with one memo, as two layers do; the second call uses the first one's masks."""
    memo: dict[Any, Any] = {}
    attend(*args, memo, **options)
    return attend(*args, memo, **options)


IMPLEMENTATIONS: Final = (
    Implementation("reference", _reference),
    Implementation("sdpa", attend),
    Implementation("sdpa with memo", _with_memo),
)

TOLERANCE: Final = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
"""Largest error as a share of the largest value."""

LENGTHS: Final = (1, 7, 63, 1000)
SQUARE_AND_NOT: Final = ((1, 1), (7, 7), (63, 63), (1, 63), (7, 63), (63, 7))

Rule = Callable[[Tensor, Tensor], Tensor]
"""Whether the query at position i sees key j."""


@dataclass(frozen=True)
class Kind:
    """A kind of mask: the options that say it, and the rule that they mean."""

    name: str
    options: dict[str, Any]
    rule: Rule

    def __str__(self) -> str:
        return self.name


KINDS: Final = (
    Kind("none", {}, lambda i, j: j == j),
    Kind("causal", {"causal": True}, lambda i, j: j <= i),
    Kind("window 1", {"window": 1}, lambda i, j: j == i),
    Kind("window 5", {"causal": True, "window": 5}, lambda i, j: (j <= i) & (j > i - 5)),
    Kind("window 200", {"window": 200}, lambda i, j: (j <= i) & (j > i - 200)),
    Kind(
        "window 5 and first 3",
        {"causal": True, "window": 5, "first": 3},
        lambda i, j: (j <= i) & ((j > i - 5) | (j < 3)),
    ),
    Kind(
        "window 130 and first 40",
        {"causal": True, "window": 130, "first": 40},
        lambda i, j: (j <= i) & ((j > i - 130) | (j < 40)),
    ),
    Kind(
        "both sides and first 2",
        {"window": 4, "right": 2, "first": 2},
        lambda i, j: ((j >= i - 4) | (j < 2)) & (j <= i + 2),
    ),
    Kind("both sides", {"window": 4, "right": 2}, lambda i, j: (j >= i - 4) & (j <= i + 2)),
    Kind("left only", {"window": 4, "right": 0}, lambda i, j: (j >= i - 4) & (j <= i)),
    Kind("prefix", {"causal": True, "prefix": 5}, lambda i, j: (j <= i) | (j < 5)),
    Kind("chunks", {"causal": True, "chunk": 6}, lambda i, j: (j <= i) & (j // 6 == i // 6)),
    Kind("blocks", {"chunk": 6}, lambda i, j: j // 6 == i // 6),
)


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one call, from which its tensors are drawn."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    v_heads: int | None = None
    queries: int = 7
    keys: int = 7
    width: int = 8
    v_width: int | None = None
    kind: Kind = KINDS[0]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Draw queries, keys and values."""
        sizes = (
            (self.batch, self.heads, self.queries, self.width),
            (self.batch, self.kv_heads, self.keys, self.width),
            (self.batch, self.v_heads or self.kv_heads, self.keys, self.v_width or self.width),
        )
        return tuple(  # type: ignore[return-value]
            draw(*size, seed=self.seed + n).to(self.dtype).to(device)
            for n, size in enumerate(sizes)
        )

    @property
    def all_options(self) -> dict[str, Any]:
        """Return the mask's options and the others."""
        return {**self.kind.options, **self.options}


def draw(*sizes: int, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, dtype=torch.float64, generator=generator)


def defined(q: Tensor, k: Tensor, v: Tensor, rule: Rule, options: dict[str, Any]) -> Tensor:
    """Return the output by definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    k_map = options.get("k_map") or [h * k.shape[1] // heads for h in range(heads)]
    v_map = options.get("v_map") or [h * v.shape[1] // heads for h in range(heads)]
    scale = options.get("scale")
    scores = torch.einsum("bhtd,bhsd->bhts", q, k[:, k_map])
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options.get("bias") is not None:
        scores = scores + options["bias"].double()
    place = torch.arange(queries)[:, None] + keys - queries
    seen = rule(place, torch.arange(keys)).expand(scores.shape)
    for more in (options.get("padding"), options.get("mask")):
        seen = seen if more is None else seen & more
    powers = torch.where(seen, scores.exp(), 0.0)
    total = powers.sum(-1, keepdim=True)
    if options.get("sinks") is not None:
        total = total + options["sinks"].double().exp().view(1, -1, 1, 1)
    mean = 1 / keys if options.get("mean_if_blind") else 0.0
    weights = torch.where(total > 0, powers / total, mean)
    return torch.einsum("bhts,bhse->bhte", weights, v[:, v_map])


def problems() -> Iterator[Problem]:
    """Yield what every implementation is asked for."""
    for dtype, (queries, keys) in itertools.product(TOLERANCE, SQUARE_AND_NOT):
        yield Problem(dtype=dtype, queries=queries, keys=keys)
        yield Problem(dtype=dtype, queries=queries, keys=keys, kind=KINDS[1], kv_heads=2)
    for kind, (queries, keys) in itertools.product(KINDS, ((7, 7), (63, 63), (1, 63), (13, 63))):
        yield Problem(kind=kind, queries=queries, keys=keys, kv_heads=2)
        shown = {"padding": padding(2, keys)}
        yield Problem(kind=kind, queries=queries, keys=keys, options=shown)
        mean = {"mean_if_blind": True, **shown}
        yield Problem(kind=kind, queries=queries, keys=keys, options=mean)
        if queries > 1:
            bias = {"bias": draw(1, 4, queries, keys, seed=9), **shown}
            yield Problem(kind=kind, queries=queries, keys=keys, options=bias)
    for kind in KINDS:
        large = {"kind": kind, "batch": 1, "heads": 2, "kv_heads": 1, "dtype": torch.float32}
        yield Problem(queries=1000, keys=1000, **large)
        shown = {"padding": padding(1, 1000)}
        yield Problem(queries=900, keys=1000, **large, options=shown)
        mean = {"mean_if_blind": True, **shown}
        yield Problem(queries=1000, keys=1000, **large, options=mean)
        if "window" in kind.options:
            unlike = {"padding": padding(2, 400)}
            yield Problem(queries=290, keys=400, kind=kind, kv_heads=2, options=unlike)
    yield Problem(kv_heads=2, options={"k_map": [0, 1, 0, 1], "v_map": [1, 1, 0, 1]})
    yield Problem(kv_heads=2, v_heads=4)
    yield Problem(heads=6, kv_heads=2, v_heads=3, kind=KINDS[1])
    yield Problem(v_width=5)
    yield Problem(v_width=11, kind=KINDS[1], kv_heads=1)
    yield Problem(options={"softcap": 3.0, "scale": 0.4}, kind=KINDS[1])
    capped, shared = {"softcap": 3.0}, {"sinks": draw(4, seed=5)}
    for more, (queries, keys) in itertools.product(
        (capped, shared, capped | shared), ((63, 63), (1, 63), (13, 63))
    ):
        for kind in (KINDS[1], KINDS[3], KINDS[11]):
            shown = {**more, "padding": padding(2, keys)}
            yield Problem(kind=kind, queries=queries, keys=keys, kv_heads=2, options=shown)
        bias = {**more, "bias": draw(1, 4, queries, keys, seed=9)}
        yield Problem(queries=queries, keys=keys, kv_heads=1, v_width=5, options=bias)
    for dtype in TOLERANCE:
        long = {"kind": KINDS[1], "batch": 1, "kv_heads": 2, "dtype": dtype}
        yield Problem(queries=300, keys=300, options=capped | shared, **long)
        yield Problem(queries=300, keys=300, options=shared, **long)
    yield Problem(options={"sinks": draw(4, seed=5)}, kind=KINDS[3], queries=5, keys=9)
    sinks = {"sinks": draw(4, seed=5), "padding": padding(2, 9), "mean_if_blind": True}
    yield Problem(options=sinks, kind=KINDS[3], queries=5, keys=9)
    for mean in (False, True):
        mask = {"mask": draw(2, 1, 7, 7, seed=4) > 0, "mean_if_blind": mean}
        yield Problem(options=mask, kind=KINDS[1])
        yield Problem(options={**mask, "padding": padding(2, 7)}, kind=KINDS[1], kv_heads=2)
    yield Problem(options={"bias": draw(7, 7, seed=4)})


def padding(batch: int, keys: int) -> Tensor:
    """Return a padding mask of odd rows: the first is padded at the left, the last in between."""
    shown = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    shown[0, ..., : keys // 3] = False
    shown[-1, ..., keys // 2 : keys // 2 + 2] = False
    return shown


def error(implementation: Implementation, problem: Problem) -> float:
    """Return the largest error as a share of the largest value."""
    q, k, v = problem.tensors(implementation.device)
    options = problem.all_options
    got = implementation.call(q, k, v, **options)
    want = defined(q, k, v, problem.kind.rule, options)
    assert got.shape == want.shape
    assert got.dtype == problem.dtype
    return float((got.double() - want).abs().max() / v.double().abs().max())
