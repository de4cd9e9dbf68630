"""An op that a compiler does not look into, as its loops depend on the values of tensors.

The gradient is an op of its own, which runs the forward once more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of options, those that an op does not take None for.
OFF = {"mean_if_blind": False, "causal": False}


@dataclass(frozen=True)
class Sealed:
    """What a sealed op takes, and what it runs: `run(**arguments)`, without those that are None.

    `takes` is its schema: tensors first, by position, as autograd has no formula for those that
    come by name. Those in `learned` get gradients. The result has the shape of q and the width of
    v; with `by_token` it lies in memory as (B, T, H, E).
    """

    name: str
    takes: tuple[str, ...]
    options: str
    learned: tuple[str, ...]
    run: Callable[..., Tensor]
    by_token: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(taken.split()[-1] for taken in self.takes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(option.split()[-1] for option in self.options.split(", "))

    def arguments(self, *given: Tensor | None, **options: Any) -> list[Any]:
        """Return the arguments of the op by position, from those of a fast copy."""
        known = dict(zip(self.tensors, given, strict=False)) | options
        tensors = [known.get(name) for name in self.tensors]
        return [*tensors, *(known.get(name, OFF.get(name)) for name in self.names)]

    def define(self, library: torch.library.Library) -> tuple[Any, Any]:
        """Register the op and that of its gradients; return both."""
        taken = ", ".join(self.takes)
        results = ", ".join(["Tensor"] * len(self.learned))
        library.define(f"{self.name}({taken}, {self.options}) -> Tensor")
        library.define(
            f"{self.name}_backward(Tensor gradient, {taken}, {self.options}) -> ({results})"
        )
        full = f"attnopt::{self.name}"
        library.impl(self.name, self._forward, "CompositeExplicitAutograd")
        library.impl(f"{self.name}_backward", self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(full, self._shaped, lib=library)
        torch.library.register_fake(f"{full}_backward", self._backward_shaped, lib=library)
        torch.library.register_autograd(
            full, self._gradients, setup_context=self._save, lib=library
        )
        forward, backward = (
            getattr(torch.ops.attnopt, self.name + end) for end in ("", "_backward")
        )
        return forward.default, backward.default

    def _forward(self, *args: Any) -> Tensor:
        given = dict(zip((*self.tensors, *self.names), args, strict=True))
        found = self.run(**{n: x for n, x in given.items() if x is not None})
        return _by_token(found) if self.by_token else found.contiguous()

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: len(self.takes)])
        ctx.options = inputs[len(self.takes) :]

    def _gradients(self, ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        backward = getattr(torch.ops.attnopt, f"{self.name}_backward").default
        learned = dict(zip(self.learned, backward(gradient, *tensors, *ctx.options), strict=True))
        return tuple(
            learned[name] if name in learned and tensor is not None else None
            for name, tensor in zip(self.tensors, tensors, strict=True)
        ) + (None,) * len(self.names)

    def _backward(self, gradient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradients of what is learned; an empty tensor for what there is none of."""
        given = dict(zip(self.tensors, args, strict=False))
        with torch.enable_grad():
            for name in self.learned:
                if given[name] is not None:
                    given[name] = given[name].detach().requires_grad_()
            found = self._forward(*given.values(), *args[len(self.takes) :])
            there = [given[name] for name in self.learned if given[name] is not None]
            made = iter(torch.autograd.grad(found, there, gradient))
        return tuple(
            gradient.new_empty(0) if given[name] is None else next(made).contiguous()
            for name in self.learned
        )

    def _backward_shaped(self, gradient: Tensor, *args: Any) -> tuple[Tensor, ...]:
        given = dict(zip(self.tensors, args, strict=False))
        tensors = [given[name] for name in self.learned]
        return tuple(gradient.new_empty(0 if t is None else t.shape) for t in tensors)

    def _shaped(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        shape = v.new_empty(*q.shape[:3], v.shape[3])
        return _by_token(shape) if self.by_token else shape


def _by_token(x: Tensor) -> Tensor:
    """Return (B, H, T, D) as it lies in memory by token: (B, T, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
