"""Linear attention as ops that a compiler does not look into: their chunks depend on the lengths.

The gradient of each is an op of its own, which attends once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

_OWN: Final = "Tensor q, Tensor k, Tensor v, Tensor? map_q, Tensor? map_k, Tensor? gate, "
_SETTINGS: Final = (
    "str feature, int window, bool normalize, float least, float? scale, int[]? k_map, int[]? v_map"
)
_DEFAULTS: Final = {"feature": "hedgehog", "window": 0, "normalize": True, "least": 1e-6}
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")


@dataclass(frozen=True)
class Opaque:
    """An op by its fast copy: its tensors, the padding last of them, then its settings."""

    name: str
    call: Callable[..., Any]
    tensors: str
    settings: str
    results: int = 1

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """The names of its tensors and of its settings."""
        tensors, settings = self.tensors.split(", "), self.settings.split(", ")
        return [x.split()[-1] for x in tensors], [x.split()[-1] for x in settings]

    @property
    def ops(self) -> tuple[Any, Any]:
        """The op and that of its gradients."""
        names = (self.name, f"{self.name}_backward")
        found = [getattr(torch.ops.attnopt, name).default for name in names]
        return found[0], found[1]

    def register(self) -> "Opaque":
        """Define the op and that of its gradients."""
        takes = f"{self.tensors}, {self.settings}"
        results = ", ".join(["Tensor"] * self.results)
        grads = ", ".join(f"Tensor? grad_{i}" for i in range(self.results))
        slopes = ", ".join(["Tensor"] * (len(self.names[0]) - 1))
        _LIBRARY.define(f"{self.name}({takes}) -> ({results})")
        _LIBRARY.define(f"{self.name}_backward({grads}, {takes}) -> ({slopes})")
        _LIBRARY.impl(self.name, self._forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(f"{self.name}_backward", self._backward, "CompositeExplicitAutograd")
        whole = f"attnopt::{self.name}"
        torch.library.register_fake(whole, self._shaped, lib=_LIBRARY)
        torch.library.register_fake(f"{whole}_backward", self._backward_shaped, lib=_LIBRARY)
        torch.library.register_autograd(
            whole, self._gradients, setup_context=self._save, lib=_LIBRARY
        )
        return self

    def __call__(self, **given: Any) -> Any:
        """Call the op with arguments by name."""
        tensors, settings = self.names
        rest = [given.get(n, _DEFAULTS.get(n)) for n in settings]
        return self.ops[0](*(given.get(n) for n in tensors), *rest)

    def _run(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        tensors, settings = self.names
        found = self.call(**dict(zip((*tensors, *settings), args, strict=True)))
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def _forward(self, *args: Any) -> Any:
        # An op's results are tensors of their own; a ring without slots comes out as it went in.
        given = {id(x) for x in args}
        found = [x.clone() if id(x) in given else x.contiguous() for x in self._run(args)]
        return found[0] if self.results == 1 else tuple(found)

    def _shaped(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        found = v.new_empty(*q.shape[:3], v.shape[3])
        if self.results == 1:
            return found
        return found, *(x.new_empty(x.shape) for x in rest[4:7])

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = len(self.names[0])
        ctx.save_for_backward(*inputs[:count])
        ctx.settings = inputs[count:]

    def _gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        found = self.ops[1](*grads, *tensors, *ctx.settings)
        known = [None if t is None else x for t, x in zip(tensors[:-1], found, strict=True)]
        return *known, None, *[None] * len(ctx.settings)

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        """Return the gradient of each tensor but the padding; an empty one for what is absent."""
        grads, given = args[: self.results], args[self.results :]
        count = len(self.names[0]) - 1
        with torch.enable_grad():
            own = [None if x is None else x.detach().requires_grad_() for x in given[:count]]
            outs = self._run((*own, *given[count:]))
            pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
            made = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    [x for x in own if x is not None],
                    [g for _, g in pairs],
                    materialize_grads=True,
                )
            )
        return tuple(grads[0].new_empty(0) if x is None else next(made).contiguous() for x in own)

    def _backward_shaped(self, *args: Any) -> tuple[Tensor, ...]:
        given = args[self.results : self.results + len(self.names[0]) - 1]
        like = args[self.results]
        return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def opaque(name: str, call: Callable[..., Any], *, steps: bool) -> Opaque:
    """Register the op of a fast copy that takes a whole text, or steps of one."""
    states = "Tensor past_k, Tensor past_v, Tensor state, " if steps else ""
    own = "SymInt past_length, " if steps else "bool causal, "
    tensors = f"{_OWN}Tensor? decay, {states}Tensor? padding"
    return Opaque(name, call, tensors, own + _SETTINGS, 4 if steps else 1).register()
