"""Attention over a ring, against the same attention over all keys with a mask."""

import pytest
import torch

from attnopt.ops import attention_reference, window_attention, window_attention_reference
from attnopt.ops.window import attend_window, positions_of, ring_of
from tests.conformance import draw

IMPLEMENTATIONS = {
    "op": window_attention,
    "reference": window_attention_reference,
    "fast": attend_window,
    "fast with memo": lambda *args, **options: attend_window(*args, memo={}, **options),
}


def rolled(call, tensors, chunks, window, first, **options):
    """Attend chunk by chunk over a ring that starts empty; return all outputs and the last ring."""
    q, k, v = tensors
    sizes = (first + window, k.shape[3]), (first + window, v.shape[3])
    rings = [k.new_zeros(k.shape[0], k.shape[1], *size) for size in sizes]
    padding = options.pop("padding", None)
    found, seen = [], 0
    for chunk in chunks:
        part = slice(seen, seen + chunk)
        if padding is not None:
            options["padding"] = padding[..., : seen + chunk]
        out, *rings = call(
            q[:, :, part], k[:, :, part], v[:, :, part], *rings, seen, window=window, first=first,
            **options,
        )  # fmt: skip
        found.append(out)
        seen += chunk
    return torch.cat(found, dim=2), rings


CHUNKS = [(21,), (1,) * 21, (3, 1, 1, 5, 11), (7, 7, 7), (20, 1)]


@pytest.mark.parametrize("call", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize(("window", "first"), [(5, 0), (5, 2), (1, 0), (1, 3), (30, 4), (21, 0)])
def test_a_ring_gives_what_a_mask_gives(call, chunks, window, first):
    q, k, v = draw(2, 4, 21, 8, seed=1), draw(2, 2, 21, 8, seed=2), draw(2, 2, 21, 6, seed=3)
    wanted = attention_reference(q, k, v, causal=True, window=window, first=first)[0]
    found, rings = rolled(call, (q, k, v), chunks, window, first)
    torch.testing.assert_close(found, wanted)
    slots = first + window
    held = positions_of(slots, 21, first, torch.device("cpu"))
    for ring, whole in zip(rings, (k, v), strict=True):
        assert ring.shape[2] == slots
        for slot, position in enumerate(held.tolist()):
            if position >= 0:
                torch.testing.assert_close(ring[:, :, slot], whole[:, :, position])


@pytest.mark.parametrize("call", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_side_operands_have_a_place_for_every_token(call, chunks):
    q, k, v = draw(2, 4, 21, 8, seed=1), draw(2, 2, 21, 8, seed=2), draw(2, 2, 21, 6, seed=3)
    padding = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    padding[0, ..., :6] = False
    options = {"padding": padding, "scale": 0.4, "sinks": draw(4, seed=7)}
    wanted = attention_reference(q, k, v, causal=True, window=4, first=2, **options)[0]
    found, _ = rolled(call, (q, k, v), chunks, 4, 2, **options)
    torch.testing.assert_close(found, wanted)


def test_a_ring_is_made_of_a_cache():
    whole = draw(1, 2, 30, 4, seed=1)
    for first, window in ((0, 7), (3, 7), (4, 40)):
        held = positions_of(first + window, 30, first, whole.device)
        ring = ring_of(whole, 30, first + window, first)
        for slot, position in enumerate(held.tolist()):
            wanted = whole[:, :, position] if position >= 0 else torch.zeros(1, 2, 4).double()
            torch.testing.assert_close(ring[:, :, slot], wanted)


def test_gradients_flow_through_a_ring():
    q, k, v = (draw(1, 2, 9, 4, seed=s).requires_grad_() for s in (1, 2, 3))
    found, _ = rolled(attend_window, (q, k, v), (4, 1, 4), 3, 1)
    wanted = attention_reference(q, k, v, causal=True, window=3, first=1)[0]
    weight = draw(*found.shape, seed=4)
    for one, two in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("call", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", [*CHUNKS, (6, 4, 2, 9), (5, 1, 6, 1, 8)])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_ring_as_long_as_a_chunk_holds_what_a_chunk_sees(call, chunks, padded):
    q, k, v = draw(2, 4, 21, 8, seed=1), draw(2, 2, 21, 8, seed=2), draw(2, 2, 21, 6, seed=3)
    options = {}
    if padded:
        options = {"padding": torch.ones(2, 1, 1, 21, dtype=torch.bool), "sinks": draw(4, seed=7)}
        options["padding"][0, ..., :8] = False
    wanted = attention_reference(q, k, v, causal=True, chunk=6, **options)[0]
    found, rings = rolled(call, (q, k, v), chunks, 6, 0, chunked=True, **options)
    torch.testing.assert_close(found, wanted)
    assert all(ring.shape[2] == 6 for ring in rings)
