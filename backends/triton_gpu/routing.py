"""Which calls the kernels take, and which others do better: True, or No with the reason."""

import torch
from torch import Tensor

from attnopt.backends.triton_gpu.tiles import interprets
from attnopt.nouns import No
from attnopt.ops.options import Options
from attnopt.ops.plans import BlockPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256
"""Channels of a head, at most."""
LEAST_TILE = 16
MOST_ROWS = 64
"""Queries of the heads that share a key head, at most, for the kernel that splits the keys."""


def available() -> bool | No:
    """Tell whether kernels can run here: on a GPU, or in Triton's interpreter."""
    if torch.cuda.is_available() or interprets():
        return True
    return No(
        "Triton's kernels need a CUDA device, and this machine shows none; lower to 'inductor' or "
        "'eager' here, or set TRITON_INTERPRET=1 to run the kernels slowly on the processor",
        "triton_gpu",
    )


def fits(q: Tensor, k: Tensor, v: Tensor, given: Options) -> bool | No:
    """Tell whether the kernels can run a call."""
    if not (q.is_cuda or (interprets() and q.device.type == "cpu")):
        return No(f"the tensors are on {q.device}, and the kernels run on CUDA devices")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        kinds = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in (q, k, v)}))
        return No(f"queries, keys and values are {kinds}: the kernels take one of bf16, fp16, fp32")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        widest = max(q.shape[-1], v.shape[-1])
        return No(f"heads of {widest} channels: the kernels hold up to {WIDEST}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        return No("there is nothing to attend with, or nothing to attend to")
    if given.k_map is None and given.v_map is None and any(q.shape[1] % x.shape[1] for x in (k, v)):
        return No(f"{q.shape[1]} query heads do not share {k.shape[1]} key heads evenly")
    if given.bias is not None and wants_gradients(given.bias):
        return No("the bias is trained: the kernels give it no gradient")
    return True


def fits_plan(plan: BlockPlan, heads: int) -> bool | No:
    """Tell whether the kernels can follow a plan."""
    for name, tile in (("queries", plan.q_tile), ("keys", plan.k_tile)):
        if tile % LEAST_TILE:
            return No(f"tiles of {tile} {name}: the kernels take multiples of {LEAST_TILE}")
    if heads % plan.count.shape[1]:
        return No(f"a plan for {plan.count.shape[1]} heads does not serve {heads} query heads")
    return True


def splits_keys(q: Tensor, k: Tensor, v: Tensor) -> bool | No:
    """Tell whether a call is one of few queries, whose keys are better split."""
    if wants_gradients(q, k, v):
        return No("gradients are wanted: the kernel that splits keys gives none")
    rows = q.shape[1] // max(k.shape[1], v.shape[1]) * q.shape[2]
    if rows > MOST_ROWS:
        return No(f"{rows} queries share a key head: from {MOST_ROWS + 1} on, tiles of queries do")
    return True


def wants_gradients(*tensors: Tensor) -> bool:
    """Tell whether a call is recorded for gradients."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def favours(q: Tensor, k: Tensor, given: Options) -> bool | No:
    """Tell whether a canonical attention has something to gain from the kernels.

    Where nothing is hidden but the future, the kernels of scaled_dot_product_attention are what a
    Triton kernel is measured against.
    """
    if given.softcap is not None or given.sinks is not None:
        return True
    tensors = (given.padding, given.mask, given.bias)
    structure = {name: x for name, x in given.structure.items() if x not in (None, False)}
    plain = not structure or (structure == {"causal": True} and q.shape[2] in (1, k.shape[2]))
    if plain and all(x is None for x in tensors) and q.shape[2] > 1:
        return No("dense attention without a mask of tensors: the vendor's kernel is faster")
    return True
