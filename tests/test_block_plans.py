"""Plans of tiles made from structures, windows and masks, against the masks themselves."""

import itertools

import pytest
import torch

from attnopt.ops.blocks import grid_of
from attnopt.ops.plans import plan_of_mask, plan_of_structure, plan_of_windows, transposed
from attnopt.ops.structure import visible_keys
from tests.conformance import KINDS

SIZES = ((1, 1), (7, 7), (63, 63), (13, 63), (63, 7), (200, 200), (1, 200))


def grids(plan, keys):
    """Return which tiles are partial, and which are full."""
    tiles = -(-keys // plan.k_tile)
    partial = grid_of(plan.count, plan.index, tiles)
    if plan.full_count is None:
        return partial, torch.zeros_like(partial)
    return partial, grid_of(plan.full_count, plan.full_index, tiles)


def per_tile(mask, q_tile, k_tile):
    """Return, tile by tile, whether a mask (T, S) shows something, and whether it shows all."""
    rows, columns = (mask.shape[0] + q_tile - 1) // q_tile, (mask.shape[1] + k_tile - 1) // k_tile
    some, every = (torch.zeros(rows, columns, dtype=torch.bool) for _ in range(2))
    for i, j in itertools.product(range(rows), range(columns)):
        tile = mask[i * q_tile : (i + 1) * q_tile, j * k_tile : (j + 1) * k_tile]
        some[i, j], every[i, j] = tile.any(), tile.all()
    return some, every


def check(plan, mask):
    """A plan leaves out no tile that shows something, and calls no tile full that hides some."""
    partial, full = (x[0, 0] for x in grids(plan, mask.shape[1]))
    some, every = per_tile(mask, plan.q_tile, plan.k_tile)
    assert not (partial & full).any()
    assert not (full & ~every).any()
    assert not (some & ~(partial | full)).any()
    return partial | full, full, some, every


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_plan_of_a_structure_visits_what_the_mask_shows(kind):
    for (queries, keys), (q_tile, k_tile) in itertools.product(SIZES, ((16, 16), (32, 16), (5, 8))):
        plan = plan_of_structure(queries, keys, q_tile, k_tile, **kind.options)
        mask = visible_keys(queries, keys, **kind.options)
        mask = torch.ones(queries, keys, dtype=torch.bool) if mask is None else mask
        visited, full, some, every = check(plan, mask)
        assert torch.equal(visited, some)
        if "prefix" not in kind.options and "first" not in kind.options:
            assert torch.equal(full, every & some)


def test_without_whole_tiles_all_are_visited_through_the_masks():
    plan = plan_of_structure(40, 40, 16, 16, whole=False, causal=True)
    assert not plan.full_count.any()
    assert plan.count.flatten().tolist() == [1, 2, 3]


def test_the_list_of_a_window_is_as_wide_as_the_window():
    plan = plan_of_structure(4096, 4096, 64, 64, causal=True, window=128, first=64)
    assert plan.index.shape[-1] <= 6
    assert plan.visited().item() == sum(min(i + 1, 4) for i in range(64))


def windows(lengths, size, seed=0):
    """Return shifted windows over a grid, its tokens in random order, behind two extra keys."""
    axes = [torch.arange(n) for n in lengths]
    place = torch.cartesian_prod(*axes).reshape(-1, len(lengths))
    place = place[torch.randperm(len(place), generator=torch.Generator().manual_seed(seed))]
    room = torch.tensor(lengths) - size
    start = (place - size // 2).clamp(min=0).minimum(room)
    extra = torch.full((2, len(lengths)), -1)
    found = start, start + size, torch.cat([extra, place])
    return tuple(x.int() for x in found)


@pytest.mark.parametrize("structure", [{}, {"causal": True}, {"window": 20, "first": 1}], ids=str)
@pytest.mark.parametrize("lengths", [(63,), (9, 11), (3, 5, 7)])
def test_a_plan_of_windows_visits_what_lies_in_them(lengths, structure):
    start, stop, place = windows(lengths, 3)
    near = (start[:, None] <= place) & (place < stop[:, None])
    mask = near.all(-1) | (place < 0).any(-1)
    if structure:
        mask &= visible_keys(len(start), len(place), **structure)
    check(plan_of_windows(start, stop, place, 8, 16, **structure), mask)


def test_a_plan_of_windows_over_ordered_tokens_leaves_tiles_out():
    place = torch.arange(256).unsqueeze(-1).int()
    start = (place - 8).clamp(0, 240)
    plan = plan_of_windows(start, start + 16, place, 16, 16)
    assert plan.visited().item() <= 3 * 16


@pytest.mark.parametrize("plan_heads", [1, 2])
def test_a_plan_of_a_mask_is_exact(plan_heads):
    mask = torch.rand(2, plan_heads, 21, 35, generator=torch.Generator().manual_seed(1)) < 0.02
    mask[0, 0, :8] = True
    partial, full = grids(plan_of_mask(mask, 8, 16), 35)
    for b, p in itertools.product(range(2), range(plan_heads)):
        some, every = per_tile(mask[b, p], 8, 16)
        assert torch.equal(full[b, p], every)
        assert torch.equal(partial[b, p], some & ~every)


def test_a_plan_read_by_the_other_axis_lists_the_same_tiles():
    plan = plan_of_structure(100, 100, 16, 32, causal=True, window=30)
    turned = transposed(plan, 100)
    assert (turned.q_tile, turned.k_tile) == (32, 16)
    for one, other in zip(grids(plan, 100), grids(turned, 100), strict=True):
        assert torch.equal(one.transpose(-1, -2), other)
