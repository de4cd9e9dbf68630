"""How long a program takes: the sum of the times of its ops, each measured once by its shapes.

Ops of the same shapes take the same time wherever they stand, so that two rewrites differ by the
ops that they do not share, and by no noise. Ops that attention is rewritten to are timed as the
fast copies that run. How long some of them take depends on what gates or plans say, too.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from attnopt.ops import block_attention, routed_attention
from attnopt.ops.variants import direct_calls, fast_copies
from attnopt.program import Program
from attnopt.running import Run
from attnopt.search.scores import Scores

_REPEATS: Final = 7
_LEAST: Final = 2e-4
_BY_VALUE: Final = (routed_attention, block_attention)


class Clock:
    """Times programs on one call, with the times of ops kept among the scores."""

    def __init__(self, scores: Scores, call: Mapping[str, Any]) -> None:
        self._scores = scores
        self._call = call

    def seconds(self, program: Program) -> float:
        """Return the sum over the ops of a program."""
        timed = _Timed(program.main.cast(torch.float32), self._call, self._scores)
        with torch.no_grad():
            for node in timed.program.graph.find_nodes(op="output"):
                timed.until(node)
        return timed.total


class _Timed(Run):
    """A run that adds up the times of its ops."""

    def __init__(self, program: Program, call: Mapping[str, Any], scores: Scores) -> None:
        super().__init__(program, call)
        self.scores = scores
        self.total = 0.0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an op, and time it where its shapes are new."""
        call = super().call_function
        copy = fast_copies().get(target)
        if copy is not None:
            kwargs = {**kwargs, "memo": self.masks}
        fast = direct_calls().get(target) if copy is None else copy
        if fast is not None:
            call = _directly(fast)
        result = call(target, args, kwargs)
        if isinstance(target, OpOverload | OpOverloadPacket):
            said = {n: x for n, x in kwargs.items() if n != "memo"}
            key = f"op {target} {_shapes(args)} {_shapes(said)} {torch.get_num_threads()}"
            if fast is not None:
                key = f"fast {key} {_amounts(args) if target in _BY_VALUE else ''}".rstrip()
            self.total += self.scores.get(key, lambda: _time(call, target, args, kwargs))
        return result


def _directly(function: Any) -> Any:
    """Return a call of what stands in for an op."""
    return lambda _, args, kwargs: function(*args, **kwargs)


def _amounts(args: Any) -> str:
    """Say how much gates let through, or how much a plan visits, beside the first three."""
    given = [x for x in args[3:] if isinstance(x, Tensor)]
    return " ".join(f"{float(x.float().mean()):.2g}" for x in given)


def _shapes(value: Any) -> Any:
    """Return arguments with tensors as their types and shapes."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return {name: _shapes(v) for name, v in value.items()}
    return [_shapes(v) for v in value] if isinstance(value, list | tuple) else str(value)


def _time(call: Any, target: Any, args: Any, kwargs: Any) -> float:
    """Return the median seconds of a call, each sample long enough for the clock."""
    start = time.perf_counter()
    call(target, args, kwargs)
    once = max(time.perf_counter() - start, 1e-7)
    count = max(1, round(_LEAST / once))
    samples: list[float] = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            call(target, args, kwargs)
        samples.append((time.perf_counter() - start) / count)
    return statistics.median(samples)
