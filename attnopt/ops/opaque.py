"""Attention by a plan as one op that a compiler does not look into: its loops depend on the plan.

The gradient is an op of its own, which attends once more.
"""

from typing import Any, Final

import torch
from torch import Tensor

from attnopt.ops.blockwise import by_plan

# Tensors come by position: autograd has no formula for those that come by name.
_TENSORS: Final = (
    "q", "k", "v", "count", "index", "full_count", "full_index", "bias", "mask", "padding", "sinks",
)  # fmt: skip
_LEARNED: Final = ("q", "k", "v", "bias", "sinks")
_TAKES: Final = (
    "Tensor q, Tensor k, Tensor v, Tensor count, Tensor index, Tensor? full_count, "
    "Tensor? full_index, Tensor? bias, Tensor? mask, Tensor? padding, Tensor? sinks"
)
_OPTIONS: Final = (
    "int q_tile, int k_tile, float? scale, float? softcap, bool mean_if_blind, bool causal, "
    "int? window, int? right, int? prefix, int? chunk, int? first, int[]? k_map, int[]? v_map"
)
_NAMES: Final = tuple(option.split()[-1] for option in _OPTIONS.split(", "))
_OFF: Final = {"mean_if_blind": False, "causal": False}


def call(q: Tensor, k: Tensor, v: Tensor, *plan: Tensor | None, **options: Any) -> Tensor:
    """Call the op with the arguments of the fast copy."""
    given = dict(zip(_TENSORS, (q, k, v, *plan), strict=False)) | options
    tensors = [given.get(name) for name in _TENSORS]
    rest = [given.get(name, _OFF.get(name)) for name in _NAMES]
    found: Tensor = block_attention_fast(*tensors, *rest)
    return found


def _attended(*args: Any) -> Tensor:
    given = dict(zip((*_TENSORS, *_NAMES), args, strict=True))
    plan = [given.pop(name) for name in _TENSORS[:7]]
    found = by_plan(*plan, **{n: x for n, x in given.items() if x is not None}, memo={})
    return found.contiguous()


def _shaped(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(_TENSORS)])
    ctx.options = inputs[len(_TENSORS) :]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    found = iter(block_attention_fast_backward(gradient, *tensors, *ctx.options))
    learned = dict(zip(_LEARNED, found, strict=True))
    return tuple(
        learned[name] if name in _LEARNED and tensor is not None else None
        for name, tensor in zip(_TENSORS, tensors, strict=True)
    ) + (None,) * len(_NAMES)


def _backward(gradient: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of what is learned; an empty tensor for what there is none of."""
    given = dict(zip(_TENSORS, args, strict=False))
    with torch.enable_grad():
        for name in _LEARNED:
            if given[name] is not None:
                given[name] = given[name].detach().requires_grad_()
        found = _attended(*given.values(), *args[len(_TENSORS) :])
        there = [given[name] for name in _LEARNED if given[name] is not None]
        made = iter(torch.autograd.grad(found, there, gradient))
    return tuple(
        gradient.new_empty(0) if given[name] is None else next(made).contiguous()
        for name in _LEARNED
    )


def _backward_shaped(gradient: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_TENSORS, args, strict=False))
    tensors = [given[name] for name in _LEARNED]
    return tuple(gradient.new_empty(0 if t is None else t.shape) for t in tensors)


_NAME = "attnopt::block_attention_fast"
_RESULTS = ", ".join(["Tensor"] * len(_LEARNED))
_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(f"block_attention_fast({_TAKES}, {_OPTIONS}) -> Tensor")
_LIBRARY.impl("block_attention_fast", _attended, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _shaped, lib=_LIBRARY)
torch.library.register_autograd(_NAME, _gradients, setup_context=_save, lib=_LIBRARY)
_LIBRARY.define(
    f"block_attention_fast_backward(Tensor gradient, {_TAKES}, {_OPTIONS}) -> ({_RESULTS})"
)
_LIBRARY.impl("block_attention_fast_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{_NAME}_backward", _backward_shaped, lib=_LIBRARY)

block_attention_fast = torch.ops.attnopt.block_attention_fast.default
block_attention_fast_backward = torch.ops.attnopt.block_attention_fast_backward.default
