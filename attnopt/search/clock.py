"""How long a program takes: the sum of the times of its ops, each measured once by its shapes.

Ops of the same shapes take the same time wherever they stand, so that two rewrites differ by the
ops that they do not share, and by no noise.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from attnopt.program import Program
from attnopt.running import Run
from attnopt.search.scores import Scores

_REPEATS: Final = 7
_LEAST: Final = 2e-4


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
        result = call(target, args, kwargs)
        if isinstance(target, OpOverload | OpOverloadPacket):
            key = f"op {target} {_shapes(args)} {_shapes(kwargs)} {torch.get_num_threads()}"
            self.total += self.scores.get(key, lambda: _time(call, target, args, kwargs))
        return result


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
