"""Attention by bands, with more blocks than are attended to at once, and by what masks show."""

import pytest
import torch

from attnopt.ops import attention_reference
from attnopt.ops.bands import bands
from attnopt.ops.extents import extents
from attnopt.ops.hidden import Hidden, Structure
from attnopt.ops.sdpa import attend
from tests.conformance import draw

LENGTH = 800
STRUCTURES = {
    "window": {"causal": True, "window": 40},
    "window of two sides": {"window": 30, "right": 17},
    "chunks": {"causal": True, "chunk": 96},
    "first tokens": {"causal": True, "window": 33, "first": 5},
    "prefix": {"causal": True, "prefix": 210},
    "blocks": {"chunk": 150},
}
SCORES = {
    "plain": {},
    "sinks": {"sinks": draw(4, seed=9)},
    "soft cap": {"softcap": 2.0},
    "both": {"sinks": draw(4, seed=9), "softcap": 2.0, "scale": 0.7},
}


def named(given):
    return {"sinks": given[3]} if len(given) > 3 else {}


def operands() -> tuple[torch.Tensor, ...]:
    return (
        draw(2, 4, LENGTH, 8, seed=1),
        draw(2, 2, LENGTH, 8, seed=2),
        draw(2, 2, LENGTH, 6, seed=3),
    )


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_bands_give_what_a_mask_gives(structure, scores, padded):
    q, k, v = operands()
    options = {**structure, **scores}
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


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_gradients_flow_through_bands(scores):
    given = [x.requires_grad_() for x in operands()]
    options = {**STRUCTURES["first tokens"], **scores}
    if "sinks" in options:
        given.append(options.pop("sinks").clone().requires_grad_())
    weight = draw(2, 4, LENGTH, 6, seed=4)
    gradients = [
        torch.autograd.grad((call(*given) * weight).sum(), given)
        for call in (
            lambda *x: attention_reference(*x[:3], **options, **named(x))[0],
            lambda *x: attend(*x[:3], {}, **options, **named(x)),
        )
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(wanted, ours)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_a_block_reads_no_more_than_its_queries_see(structure):
    cut = bands(LENGTH, LENGTH, Hidden(Structure(**structure), None, None, None))
    assert cut is not None
    seen = Structure(**structure).mask(LENGTH, LENGTH, torch.device("cpu"))
    for block in cut.ends:
        part = seen[block.queries].any(0)
        part[: block.keys.first] = False
        shown = part.nonzero().flatten()
        assert int(shown[0]) >= block.keys.start
        assert int(shown[-1]) < block.keys.stop
        if structure.keys() != {"window", "right"}:
            assert int(shown[-1]) == block.keys.stop - 1


def documents(*lengths):
    """Return which tokens see each other where texts lie one after the other, causally."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number.unsqueeze(1) == number) & torch.ones(len(number), len(number)).tril().bool()


def pages():
    """Return masks of two rows: texts of unlike lengths, the first of the second one hidden."""
    masks = torch.stack([documents(300, 100, 250, 150), documents(5, 395, 300, 100)]).unsqueeze(1)
    masks[1, :, :, :5] = False
    return masks


MASKS = {
    "texts of each row": pages(),
    "texts of all rows": documents(100, 333, 67, 300),
    "both ways": documents(200, 200, 400) | documents(200, 200, 400).T,
    "whole": draw(1, 1, LENGTH, LENGTH, seed=5) < 3,
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_a_mask_shows_is_all_that_is_read(mask, scores):
    q, k, v = operands()
    for options in ({}, {"causal": True, "window": 350}, {"mean_if_blind": True}):
        options = {**options, **scores, "mask": mask}
        wanted = attention_reference(q, k, v, **options)[0]
        memo = {}
        for _ in range(2):
            torch.testing.assert_close(attend(q, k, v, memo, **options), wanted)


def test_masks_that_are_added_hide_as_well():
    q, k, v = operands()
    least = torch.finfo(torch.float64).min
    bias = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64)
    bias = (bias + draw(1, 1, LENGTH, LENGTH, seed=6)).masked_fill(~MASKS["both ways"], least)
    wanted = attention_reference(q, k, v, bias=bias)[0]
    torch.testing.assert_close(attend(q, k, v, {}, bias=bias), wanted)
    # A query that sees no key weighs all of them alike.
    bias[..., 7, :] = least
    wanted = attention_reference(q, k, v, bias=bias)[0]
    torch.testing.assert_close(attend(q, k, v, {}, bias=bias), wanted)


def test_gradients_flow_through_what_a_mask_shows():
    given = [x.requires_grad_() for x in operands()]
    options = {"mask": pages()}
    weight = draw(2, 4, LENGTH, 6, seed=4)
    wanted = torch.autograd.grad((attention_reference(*given, **options)[0] * weight).sum(), given)
    found = torch.autograd.grad((attend(*given, {}, **options) * weight).sum(), given)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_extents_are_where_blocks_see_keys():
    mask = torch.zeros(2, 1, 10, 9, dtype=torch.bool)
    mask[0, 0, 2, 3] = mask[1, 0, 1, 6] = mask[0, 0, 9, 8] = True
    assert extents(mask, 4) == [(3, 7), (0, 1), (8, 9)]
    assert extents(mask[0, 0], 4) == [(3, 4), (0, 1), (8, 9)]
