"""How far a rewritten model is from float64, compared with how far the stock model is.

A rewrite passes where its RMS error is at most 1.25 times and its largest error at most twice the
stock model's own, both against the same model in float64, over all draws of the inputs together.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RMS_RATIO: Final = 1.25
PEAK_RATIO: Final = 2.0
FLOOR_ULPS: Final = {torch.float64: 64.0, torch.float32: 2.0, torch.bfloat16: 0.25}
"""Units in the last place, of the output's RMS or peak, below which no ratio is taken."""


class Float64Everywhere(TorchFunctionMode):
    """Make the float32 islands of a model (softmax in float32, `.float()`) float64 as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        widened = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*[_wide(value) for value in args], **widened)


_WIDE: Final = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _wide(value: Any) -> Any:
    return _WIDE.get(value, value) if isinstance(value, torch.dtype) else value


@dataclass
class Gap:
    """The distance from float64, pooled over outputs and draws."""

    squares: float = 0.0
    wanted_squares: float = 0.0
    count: int = 0
    peak: float = 0.0
    wanted_peak: float = 0.0
    finite: bool = True

    def add(self, got: Tensor, want: Tensor, valid: Tensor | None = None) -> None:
        """Pool one output; `valid` marks the positions (leading axes) that count."""
        if got.shape != want.shape:
            raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(want.shape)}")
        self.finite = self.finite and bool(torch.isfinite(got).all())
        got, want = got.double(), want.double()
        if valid is not None:
            got, want = got[valid], want[valid]
        if not got.numel():
            return
        difference = got - want
        self.squares += float(difference.square().sum())
        self.wanted_squares += float(want.square().sum())
        self.count += got.numel()
        self.peak = _larger(self.peak, float(difference.abs().max()))
        self.wanted_peak = _larger(self.wanted_peak, float(want.abs().max()))

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(self.count, 1))

    @property
    def wanted_rms(self) -> float:
        return math.sqrt(self.wanted_squares / max(self.count, 1))


def _larger(one: float, other: float) -> float:
    """Return the larger of two numbers, or NaN where either is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


@dataclass(frozen=True)
class Verdict:
    """How a rewrite compares: ratios of its errors to the stock model's (1.0 below the floor)."""

    rms_ratio: float
    peak_ratio: float
    finite: bool
    stock_rms: float = math.nan
    rewritten_rms: float = math.nan

    @property
    def passed(self) -> bool:
        return self.finite and self.rms_ratio <= RMS_RATIO and self.peak_ratio <= PEAK_RATIO

    def __str__(self) -> str:
        finite = "" if self.finite else ", not finite"
        return (
            f"RMS {self.rms_ratio:.3g}x ({self.rewritten_rms:.2e} against {self.stock_rms:.2e}), "
            f"max {self.peak_ratio:.3g}x{finite}"
        )


def judge(
    rewritten: Gap,
    stock: Gap,
    dtype: torch.dtype = torch.float32,
    *,
    slack: float = 1.0,
    depth: int = 1,
) -> Verdict:
    """Compare the two distances from float64.

    `slack` widens floors and ratios for few numbers, `depth` the floors alone: of that many
    attentions in a row, each rounds what the one before has rounded.
    """
    ulp = slack * math.sqrt(depth) * FLOOR_ULPS[dtype] * torch.finfo(dtype).eps
    return Verdict(
        rms_ratio=_ratio(rewritten.rms, slack * stock.rms, ulp * stock.wanted_rms),
        peak_ratio=_ratio(rewritten.peak, slack * stock.peak, 2 * ulp * stock.wanted_peak),
        finite=rewritten.finite or not stock.finite,
        stock_rms=stock.rms,
        rewritten_rms=rewritten.rms,
    )


def _ratio(error: float, reference: float, floor: float) -> float:
    if error <= floor:
        return 1.0
    return error / reference if reference else math.inf


def tensors_of(output: Any) -> list[Tensor]:
    """Flatten an output into its floating-point tensors, caches left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        pairs = [value for name, value in output.items() if "past_key_values" not in str(name)]
        return [tensor for value in pairs for tensor in tensors_of(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []


def exactly(model: torch.nn.Module) -> Callable[..., Any]:
    """Return a call of a float64 model whose float32 islands are float64, too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), _float64_by_default(), Float64Everywhere():
            return model(*args, **kwargs)

    return call


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    """Make tensors that name no dtype float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
