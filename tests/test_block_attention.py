"""The definition of attention by a plan of tiles, against masks made tile by tile."""

import pytest
import torch

from attnopt.ops import attention_reference, block_attention, block_attention_reference
from tests.conformance import draw


def plan(grid):
    """Return count and index of a grid (B, P, I, J) of visited tiles."""
    count = grid.sum(-1).to(torch.int32)
    index = torch.argsort(~grid, dim=-1, stable=True).to(torch.int32)
    return count, index


def tiles_of(seed, *sizes):
    return torch.rand(*sizes, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("plan_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (8, 21), (1, 7), (16, 16)])
def test_a_plan_sees_what_its_tiles_hold(plan_heads, queries, keys):
    q, k, v = (
        draw(2, 4, queries, 8, seed=1),
        draw(2, 2, keys, 8, seed=2),
        draw(2, 2, keys, 6, seed=3),
    )
    rows, columns = -(-queries // 4), -(-keys // 5)
    partial = tiles_of(4, 2, plan_heads, rows, columns)
    full = tiles_of(5, 2, plan_heads, rows, columns) & ~partial
    found, lse = block_attention_reference(
        q, k, v, *plan(partial), *plan(full), q_tile=4, k_tile=5, causal=True
    )
    mask = torch.zeros(2, 4, queries, keys, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            p = h * plan_heads // 4
            for t in range(queries):
                for s in range(keys):
                    past = s <= t + keys - queries
                    cell = (b, p, t // 4, s // 5)
                    mask[b, h, t, s] = (partial[cell] and past) or full[cell]
    wanted, wanted_lse = attention_reference(q, k, v, mask=mask)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_a_plan_of_all_tiles_is_plain_attention():
    q, k, v = draw(1, 4, 9, 8, seed=1), draw(1, 4, 9, 8, seed=2), draw(1, 4, 9, 8, seed=3)
    count, index = plan(torch.ones(1, 1, 3, 3, dtype=torch.bool))
    found = block_attention(q, k, v, count, index, q_tile=4, k_tile=4, causal=True)
    torch.testing.assert_close(found, attention_reference(q, k, v, causal=True)[0])


def test_what_is_listed_beyond_the_count_is_not_read():
    q = k = v = draw(1, 1, 8, 4, seed=1)
    count = torch.tensor([[[1, 0]]], dtype=torch.int32)
    index = torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    found = block_attention(q, k, v, count, index, q_tile=4, k_tile=4)
    wanted = attention_reference(q[:, :, :4], k[:, :, 4:], v[:, :, 4:])[0]
    torch.testing.assert_close(found[:, :, :4], wanted)
    assert not found[:, :, 4:].any()
