"""Estimates of the attention on tiles, and the tiles that are selected by them."""

import math

import pytest
import torch
from conformance import draw

from attnopt.ops import attention_reference, block_attention, plan_blocks
from attnopt.ops.blocks import grid_of
from attnopt.ops.estimators import CAUSAL_ONLY, ESTIMATORS, Call, group_scores
from attnopt.ops.plan_blocks import ALIKE, plan_tiles
from attnopt.ops.selecting import RULES, select
from attnopt.ops.tiling import Tiling

TILE = 8
CPU = torch.device("cpu")
each = pytest.mark.parametrize("estimator", ESTIMATORS)
everywhere = pytest.mark.parametrize(
    ("estimator", "causal"),
    [(e, c) for e in ESTIMATORS for c in (True, False) if c or e not in CAUSAL_ONLY],
)


def drawn(queries=61, keys=61, heads=4, key_heads=2, seed=0):
    q, k = draw(2, heads, queries, 16, seed=seed), draw(2, key_heads, keys, 16, seed=seed + 1)
    return q.float(), k.float()


def call_of(q, k, *, causal=True, stride=4, padding=None, tile=TILE):
    tiling = Tiling(q.shape[2], k.shape[2], tile, tile, causal, True, CPU, padding)
    return Call(q, k, q.shape[-1] ** -0.5, tiling, stride, ALIKE)


def scores_of(estimator, call):
    found = ESTIMATORS[estimator](call)[0]
    return found.masked_fill(~call.tiling.allowed().unsqueeze(2), -torch.inf)


def seen_by(plan, keys, tile=TILE):
    count, index, full_count, full_index = plan
    columns = -(-keys // tile)
    masked, whole = grid_of(count, index, columns), grid_of(full_count, full_index, columns)
    assert not (masked & whole).any()
    return masked | whole


def planned(q, k, **options):
    given = {"estimator": "sub_block", "rule": "topk", "amount": 0.4, "tile": TILE, "stride": 4}
    return seen_by(plan_blocks(q, k, causal=True, **(given | options)), k.shape[2])


def padded(keys, first):
    shown = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    shown[0, ..., :first] = False
    return shown


def logits(q, k, *, causal):
    """Return the scores of every query head, (B, P, G, T, S), minus infinity where hidden."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bpgtd,bpsd->bpgts", grouped, k) * q.shape[-1] ** -0.5
    if not causal:
        return scores
    place = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    return scores.masked_fill(torch.arange(k.shape[2]) > place, -torch.inf)


def by_tiles(x, reduce):
    """Return what a reduction says of every tile of the last two axes."""
    rows = x.split(TILE, dim=-2)
    return torch.stack([torch.stack([reduce(t) for t in r.split(TILE, -1)], -1) for r in rows], -2)


# ------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(61, 61), (64, 64), (21, 61)])
def test_parts_of_one_token_give_the_exact_mass(causal, queries, keys):
    q, k = drawn(queries, keys)
    found = scores_of("sub_block", call_of(q, k, causal=causal, stride=1))
    mass = by_tiles(logits(q, k, causal=causal), lambda t: torch.logsumexp(t.flatten(-2), -1))
    torch.testing.assert_close(found, mass, rtol=1e-4, atol=1e-4)


def test_antidiagonals_are_summed_as_one_product():
    q, k = drawn(64, 64, 2, 2)
    stride = 4
    found = scores_of("antidiagonal", call_of(q, k, causal=False, stride=stride))
    scores = logits(q, k, causal=False)
    cells = torch.zeros(2, 2, 1, 16, 16)
    for i in range(16):
        for j in range(16):
            cell = scores[..., i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            cells[..., i, j] = sum(cell[..., stride - 1 - r, r] for r in range(stride)) / stride
    share = cells.softmax(-1).unflatten(-1, (8, 2)).sum(-1).unflatten(-2, (8, 2)).sum(-2)
    # A row of cells stands for `stride` queries.
    torch.testing.assert_close(found, (share * stride).log(), rtol=1e-4, atol=1e-4)


def test_pooled_scores_are_products_of_means():
    q, k = drawn(64, 64, 2, 2)
    found = scores_of("pooled", call_of(q, k, causal=False))
    means = [x.unflatten(2, (8, 8)).mean(3) for x in (q, k)]
    want = means[0] @ means[1].mT / 4 + math.log(TILE)
    torch.testing.assert_close(found.squeeze(2), want)


def test_last_queries_weigh_columns_and_diagonals():
    """An attention that is one column and one diagonal is read as these."""
    length, far = 64, 19
    q, k = torch.zeros(1, 1, length, 2 * length), torch.zeros(1, 1, length, 2 * length)
    for i in range(length):
        q[0, 0, i, max(i - far, 0)] = q[0, 0, i, length] = 200.0
        k[0, 0, i, i] = 1.0
    k[0, 0, 5, length] = 1.0
    found = scores_of("vertical_slash", call_of(q, k)).squeeze().exp()
    last = logits(q, k, causal=True).softmax(-1).squeeze()
    for i in range(4, 8):
        heavy = found[i].argsort(descending=True)[:3].sort().values.tolist()
        spread = by_tiles(last, lambda t: t.sum((-1, -2)))[i]
        assert set((spread > 0.01).nonzero().flatten().tolist()) == set(heavy)


def test_flex_follows_the_last_queries_where_pooling_misleads():
    q, k = drawn(64, 64, 2, 2)
    q[:, 0], k[:, 0] = 0.0, 0.0
    q[:, 1] *= 40
    found = scores_of("flex", call_of(q, k))
    pooled, slash = (scores_of(e, call_of(q, k)) for e in ("pooled", "vertical_slash"))
    torch.testing.assert_close(found[:, 0], pooled[:, 0])
    assert not torch.allclose(pooled[:, 1], found[:, 1])
    assert not torch.allclose(pooled[:, 0], slash[:, 0])


def test_tiles_of_unlike_tokens_are_always_visited():
    q, k = (draw(1, 1, 64, 16, seed=n).float().abs() for n in (0, 1))
    k[0, 0, 24:32] *= torch.tensor([1.0, -1.0]).repeat(4).unsqueeze(1)
    q[0, 0, 40:48] *= torch.tensor([1.0, -1.0]).repeat(4).unsqueeze(1)
    grid = planned(q, k, estimator="sparge", amount=0.1, alike=0.3)[0, 0]
    assert grid[3:, 3].all()
    assert grid[5, :6].all()
    assert grid[7].nonzero().flatten().tolist() == [0, 3, 7]
    never = planned(q, k, estimator="sparge", amount=0.1)
    assert torch.equal(never, planned(q, k, estimator="pooled", amount=0.1))


# -------------------------------------------------------------------------------------- selection


@everywhere
@pytest.mark.parametrize("rule", ["topk", "mass"])
def test_at_full_strength_every_allowed_tile_is_visited(estimator, causal, rule):
    q, k = drawn()
    v = draw(2, 2, 61, 8, seed=5).float()
    options = {"estimator": estimator, "rule": rule, "amount": 1.0, "tile": TILE, "stride": 4}
    plan = plan_blocks(q, k, causal=causal, **options)
    found = block_attention(q, k, v, *plan, q_tile=TILE, k_tile=TILE, causal=causal)
    want = attention_reference(q, k, v, causal=causal)[0]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


@everywhere
def test_rows_are_never_empty_and_stay_within_what_is_allowed(estimator, causal):
    q, k = drawn()
    shown = padded(61, 21)
    plan = plan_blocks(
        q, k, estimator=estimator, rule="topk", amount=0.2, tile=TILE, causal=causal,
        padding=shown, stride=4,
    )  # fmt: skip
    grid = seen_by(plan, 61)
    allowed = call_of(q, k, causal=causal, padding=shown).tiling.allowed()
    assert not (grid & ~allowed).any()
    assert grid.any(-1)[allowed.expand_as(grid).any(-1)].all()
    assert grid[1, ..., 0].all()
    assert not grid[0, ..., :2].any()
    own = torch.arange(8)
    assert grid[1][:, own, own].all()


@each
def test_padding_has_no_part_in_a_plan(estimator):
    """What stands where nothing is seen may be anything."""
    q, k = drawn()
    shown = padded(61, 21)
    hidden = ~shown.transpose(-1, -2)
    loud = q.masked_fill(hidden, 30.0), k.masked_fill(hidden, -30.0)
    quiet = q.masked_fill(hidden, 0.0), k.masked_fill(hidden, 0.0)
    rows = slice(24 // TILE, None)
    plans = [planned(*x, estimator=estimator, padding=shown)[:, :, rows] for x in (loud, quiet)]
    assert torch.equal(*plans)


def test_a_share_of_a_row_is_rounded_up():
    scores = draw(1, 1, 10, 10, seed=1).float()
    allowed = torch.ones(10, 10).tril().bool()[None, None]
    nothing = torch.zeros_like(allowed)
    for amount in (0.1, 0.3, 0.7, 1.0):
        grid = select(scores, allowed, nothing, "topk", amount)
        want = [math.ceil(round(amount * (i + 1), 9)) for i in range(10)]
        assert grid.sum(-1).flatten().tolist() == want
    grid = select(scores, allowed, nothing, "topk", 0.3, multiple=2)
    assert grid.sum(-1).flatten().tolist() == [1, 2, 2, 2, 2, 2, 4, 4, 4, 4]


def test_the_mass_is_held_by_the_fewest_tiles():
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().view(1, 1, 1, 4)
    allowed = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    nothing = torch.zeros_like(allowed)
    for amount, want in ((0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        grid = select(shares, allowed, nothing, "mass", amount)
        assert grid.flatten().nonzero().flatten().tolist() == want
    first = torch.tensor([True, False, False, False]).view(1, 1, 1, 4)
    grid = select(shares, allowed, first, "mass", 0.6)
    assert grid.flatten().nonzero().flatten().tolist() == [0, 1]
    grid = select(shares, allowed, nothing, "threshold", 0.2)
    assert grid.flatten().nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_tiles_the_first_come_first(rule):
    amount = {"topk": 0.5, "mass": 0.5, "count": 4.0, "threshold": 0.125}[rule]
    scores, allowed = torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8, dtype=torch.bool)
    grid = select(scores, allowed, torch.zeros_like(allowed), rule, amount)
    count = 8 if rule == "threshold" else 4
    assert grid.flatten().nonzero().flatten().tolist() == list(range(count))


def test_forced_tiles_are_part_of_the_budget():
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 1, 4)
    allowed = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    forced = torch.tensor([True, False, False, False]).view(1, 1, 1, 4)
    grid = select(scores, allowed, forced, "count", 2.0)
    assert grid.flatten().tolist() == [True, False, False, True]


def test_a_group_of_heads_selects_together():
    q, k = drawn(64, 64, heads=6, key_heads=2)
    grid = planned(q, k)
    assert grid.shape[1] == 2
    call = call_of(q, k)
    scores = scores_of("sub_block", call)
    allowed = call.tiling.allowed()
    together = group_scores(scores, allowed)
    shares = scores.softmax(-1).sum(2)
    torch.testing.assert_close(together.exp(), shares)
    apart = planned(q, k.repeat_interleave(3, 1))
    assert apart.shape[1] == 6
    assert not torch.equal(apart[:, ::3], grid)


def test_maps_of_heads_give_each_head_a_plan():
    q, k = drawn(64, 64, heads=4, key_heads=2)
    found = planned(q, k, k_map=[0, 1, 0, 1])
    assert torch.equal(found, planned(q, k[:, [0, 1, 0, 1]]))


@each
def test_scores_are_computed_in_float32(estimator):
    q, k = (x.to(torch.bfloat16) for x in drawn())
    for x in (q, k):
        x += 8
    assert torch.equal(
        planned(q, k, estimator=estimator), planned(q.float(), k.float(), estimator=estimator)
    )


def test_pieces_give_what_the_whole_gives(monkeypatch):
    from attnopt.ops import estimators

    q, k = drawn()
    whole = [planned(q, k, estimator=e) for e in ESTIMATORS]
    monkeypatch.setattr(estimators, "_CELLS", 1)
    for estimator, want in zip(ESTIMATORS, whole, strict=True):
        assert torch.equal(planned(q, k, estimator=estimator), want)


# ----------------------------------------------------------------------------------------- the op


def test_few_tokens_and_dense_plans_visit_everything():
    q, k = drawn()
    assert planned(q, k, least_tokens=62).all()
    assert planned(q[:, :, -7:], k, least_tokens=61).all()
    assert not planned(q, k, least_tokens=61).all()
    allowed = call_of(q, k).tiling.allowed()
    density = planned(q, k).sum() / allowed.expand(2, 2, -1, -1).sum()
    assert torch.equal(planned(q, k, dense_above=float(density) + 0.01), planned(q, k))
    assert torch.equal(
        planned(q, k, dense_above=float(density) - 0.01), allowed.expand(2, 2, -1, -1)
    )


def test_a_routed_query_has_tiles_of_its_own():
    q, k = drawn(32, 61, 2, 2)
    plan = plan_blocks(
        q, k, estimator="pooled", rule="count", amount=3.0, tile=TILE, q_tile=1, causal=True
    )
    grid = seen_by(plan, 61)
    place = torch.arange(32) + 29
    own = place // TILE
    assert (grid.sum(-1) == 3).all()
    for t in range(32):
        means = torch.stack([k[:, :, j * TILE : (j + 1) * TILE].mean(2) for j in range(8)], 2)
        scores = (q[:, :, t : t + 1] * means).sum(-1)
        scores[..., own[t]] = torch.inf
        scores[..., own[t] + 1 :] = -torch.inf
        chosen = scores.topk(3).indices
        assert grid[:, :, t].gather(-1, chosen).all()


def test_whole_tiles_are_told_from_those_that_positions_cut():
    q, k = drawn(64, 64)
    count, index, full_count, _ = plan_blocks(
        q, k, estimator="pooled", rule="topk", amount=1.0, tile=TILE, causal=True
    )
    assert (count == 1).all()
    assert (index[..., 0] == torch.arange(8)).all()
    assert (full_count == torch.arange(8)).all()


@each
def test_the_op_passes_the_checks_of_the_library(estimator):
    q, k = drawn(21, 21)
    options = {"estimator": estimator, "rule": "mass", "amount": 0.6, "tile": TILE, "causal": True}
    torch.library.opcheck(plan_blocks, (q, k), {**options, "stride": 4})


@pytest.mark.parametrize(
    "estimator",
    [e if e == "sub_block" else pytest.param(e, marks=pytest.mark.slow) for e in ESTIMATORS],
)
def test_a_graph_of_any_length_makes_the_same_plan(estimator):
    class Planner(torch.nn.Module):
        def forward(self, q, k):
            return plan_tiles(
                q, k, estimator=estimator, rule="topk", amount=0.4, tile=TILE, causal=True,
                stride=4, least_tokens=30,
            )  # fmt: skip

    free = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Planner(), drawn(), dynamic_shapes=({2: free}, {2: free}))
    for size in (64, 45, 29):
        q, k = drawn(size, size, seed=3)
        found = exported.module()(q, k)
        want = planned(q, k, estimator=estimator, least_tokens=30)
        allowed = call_of(q, k).tiling.allowed()
        assert torch.equal(seen_by(found, size), want & allowed)
