"""How strong a rewrite is at a step of healing: its ops are annealed, and may add to the loss.

What is looked at, judged and stored is always the rewrite at full strength.
"""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.inlining import inline_attention
from attnopt.ops.training import Training, trainings
from attnopt.ops.variants import direct_calls, fast_copy


@dataclass
class Pace:
    """The strength of a student's ops, 0 to 1, and what their calls of a step added to the loss."""

    share: float = 1.0
    _steps: bool = False
    _losses: list[Tensor] = field(default_factory=list)

    @contextmanager
    def at(self, share: float) -> Generator[None]:
        """Take a step at a share of the way to full strength."""
        self.share, self._steps = share, True
        self._losses.clear()
        try:
            yield
        finally:
            self.share, self._steps = 1.0, False
            self._losses.clear()

    def added(self) -> Tensor:
        """Return the mean of what calls added since this was last asked for; 0 for nothing."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def prepare(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """Be a backend: run a graph op by op at this pace."""
        inline_attention(graph_module, remember=True, kernel_of=self._kernel_of)
        return graph_module.forward

    def _kernel_of(self, node: fx.Node) -> Callable[..., Any] | None:
        fast = fast_copy(node)
        training = trainings().get(node.target)
        if training is None:
            return fast
        return self._paced(fast or _without_memo(node.target), training)

    def _paced(self, call: Callable[..., Any], training: Training) -> Callable[..., Any]:
        """Return a call that is annealed in steps, and adds its loss."""

        def paced(*args: Any, memo: Any, **options: Any) -> Any:
            if self._steps:
                options = dict(training.options(self.share, *args, **options))
                if training.loss is not None:
                    self._losses.append(training.loss(*args, **options))
            return call(*args, memo=memo, **options)

        return paced


def _without_memo(target: Any) -> Callable[..., Any]:
    call: Callable[..., Any] = direct_calls().get(target) or target

    @functools.wraps(call)
    def called(*args: Any, memo: Any, **options: Any) -> Any:
        return call(*args, **options)

    return called
