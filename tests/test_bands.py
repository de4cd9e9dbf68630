"""Attention by bands, with more blocks than are attended to at once."""

import pytest
import torch

from attnopt.ops import attention_reference
from attnopt.ops.sdpa import attend
from tests.conformance import draw

LENGTH = 800
STRUCTURES = {
    "window": {"causal": True, "window": 40},
    "window of two sides": {"window": 30, "right": 17},
    "chunks": {"causal": True, "chunk": 96},
    "first tokens": {"causal": True, "window": 33, "first": 5},
}


def operands() -> tuple[torch.Tensor, ...]:
    return (
        draw(2, 4, LENGTH, 8, seed=1),
        draw(2, 2, LENGTH, 8, seed=2),
        draw(2, 2, LENGTH, 6, seed=3),
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_bands_give_what_a_mask_gives(structure, padded):
    q, k, v = operands()
    options = dict(structure)
    if padded:
        options["padding"] = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
        options["padding"][0, ..., :150] = False
    wanted = attention_reference(q, k, v, **options)[0]
    found = attend(q, k, v, {}, **options)
    seen = slice(150, None) if padded else slice(None)
    torch.testing.assert_close(found[:, :, seen], wanted[:, :, seen])
    torch.testing.assert_close(found[1], wanted[1])


def test_chunks_behind_a_cache_begin_where_they_began():
    q, k, v = operands()
    options = STRUCTURES["chunks"]
    wanted = attention_reference(q[:, :, 300:], k, v, **options)[0]
    torch.testing.assert_close(attend(q[:, :, 300:], k, v, {}, **options), wanted)


def test_gradients_flow_through_bands():
    given = [x.requires_grad_() for x in operands()]
    options = STRUCTURES["first tokens"]
    weight = draw(2, 4, LENGTH, 6, seed=4)
    gradients = [
        torch.autograd.grad((call(*given) * weight).sum(), given)
        for call in (
            lambda *x: attention_reference(*x, **options)[0],
            lambda *x: attend(*x, {}, **options),
        )
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(wanted, ours)
