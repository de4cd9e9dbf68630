"""Attention on a grid, against masks made query by query and key by key."""

import itertools
import math

import pytest
import torch

from attnopt.neighborhoods import Axis, Neighborhood
from attnopt.ops import (
    attention_lse,
    attention_reference,
    neighborhood_attention,
    neighborhood_attention_lse,
    neighborhood_attention_reference,
    tile_tokens,
)
from attnopt.ops.boxes import attend_neighborhood
from attnopt.ops.tiles import tile_order
from attnopt.tilings import tiling
from attnopt.visits import search, simulate, tile_shapes
from tests.conformance import draw

WIDTH = 8


def sees(query, key, length, window, stride, dilation, causal, border):
    """Say by the definition whether a query of one axis sees a key of it."""
    if query % dilation != key % dilation:
        return False
    count = len([i for i in range(length) if i % dilation == query % dilation])
    query, key = query // dilation, key // dilation
    group = [i for i in range(count) if i // stride == query // stride]
    if causal:
        leader = min(group[0] + stride - 1, count - 1)
        return leader - window < key <= query
    leader = min(group[0] + stride // 2, count - 1)
    seen = [leader - window // 2 + n for n in range(window)]
    if border == "shift":
        while seen[0] < 0:
            seen = [i + 1 for i in seen]
        while seen[-1] > count - 1:
            seen = [i - 1 for i in seen]
    return key in seen


def mask_of(settings):
    """Return which tokens see which, pair by pair."""
    names = ("grid", "window", "stride", "dilation", "causal")
    axes = list(zip(*(settings[n] for n in names), strict=True))
    border, leading = settings.get("border", "shift"), settings.get("leading", 0)
    tables = [
        [[sees(i, j, *axis, border) for j in range(axis[0])] for i in range(axis[0])]
        for axis in axes
    ]
    cells = list(itertools.product(*map(range, settings["grid"])))
    mask = torch.ones(leading + len(cells), leading + len(cells), dtype=torch.bool)
    for a, query in enumerate(cells):
        for b, key in enumerate(cells):
            pairs = zip(tables, query, key, strict=True)
            mask[leading + a, leading + b] = all(t[i][j] for t, i, j in pairs)
    return mask


def settings(grid, window, stride=None, dilation=None, causal=None, **more):
    one = [1] * len(grid)
    return {
        "grid": list(grid),
        "window": list(window),
        "stride": list(stride or one),
        "dilation": list(dilation or one),
        "causal": list(causal or [False] * len(grid)),
        **more,
    }


CASES = [
    settings(grid, window, stride, dilation, causal, border=border, leading=leading)
    for grid, windows in (
        ((13,), [((5,), (1,)), ((4,), (3,)), ((6,), (6,)), ((1,), (1,))]),
        ((7, 5), [((3, 2), (1, 1)), ((3, 2), (3, 2)), ((6, 2), (2, 1))]),
        ((3, 5, 2), [((3, 2, 1), (1, 1, 1)), ((2, 2, 1), (2, 1, 1))]),
    )
    for window, stride in windows
    for dilation in ([1] * len(grid), [1] * (len(grid) - 1) + [2])
    for causal in ([False] * len(grid), [True] + [False] * (len(grid) - 1))
    for border in ("shift", "clamp")
    for leading in (0, 2)
]


def inputs(case, *, batch=2, heads=4, kv_heads=2, dtype=torch.float64):
    tokens = math.prod(case["grid"]) + case.get("leading", 0)
    counts = (heads, kv_heads, kv_heads)
    return tuple(draw(batch, n, tokens, WIDTH, seed=s).to(dtype) for s, n in enumerate(counts))


def named(case):
    return "-".join(f"{x}" for x in case.values()).replace(" ", "")


def by_tiles(monkeypatch):
    """Let small tiles be used at any size."""
    for name, x in {"_WORTH": 1e9, "_MOVED": 2, "_PER_TILE": 0, "_PER_BATCH": 0}.items():
        monkeypatch.setattr(f"attnopt.tilings.{name}", x)
    monkeypatch.setattr("attnopt.ops.boxes._tiling", tiling)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_query_sees_its_neighbourhood(case, monkeypatch):
    q, k, v = inputs(case)
    wanted, wanted_lse = attention_reference(q, k, v, mask=mask_of(case))
    found, lse = neighborhood_attention_reference(q, k, v, **case)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    torch.testing.assert_close(attend_neighborhood(q, k, v, **case), wanted)
    by_tiles(monkeypatch)
    memo = {}
    for _ in range(2):
        torch.testing.assert_close(attend_neighborhood(q, k, v, memo=memo, **case), wanted)


TILED = [
    settings((7, 5), (3, 3), leading=1, tile=[2, 2]),
    settings((8, 4), (4, 3), (2, 1), tile=[4, 2]),
    settings((3, 4, 5), (2, 3, 3), leading=2, tile=[2, 2, 2]),
    settings((13,), (5,), (2,), (2,), tile=[4]),
    settings((6, 4), (3, 3), causal=(True, False), tile=[2, 4], border="clamp"),
]


@pytest.mark.parametrize("case", TILED, ids=named)
def test_tokens_in_the_order_of_tiles_see_the_same(case, monkeypatch):
    by_tiles(monkeypatch)
    q, k, v = inputs(case)
    plain = {n: x for n, x in case.items() if n != "tile"}
    layout = (case["grid"], case["tile"], case.get("leading", 0))
    moved = [tile_tokens(x, 2, *layout) for x in (q, k, v)]
    wanted = neighborhood_attention(q, k, v, **plain)
    for op in (neighborhood_attention, attend_neighborhood):
        found = tile_tokens(op(*moved, **case), 2, *layout, inverse=True)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("grid", "tile"), [((6, 4), (3, 2)), ((7, 5), (2, 4)), ((5,), (2,))])
def test_the_order_of_tiles_is_tile_after_tile(grid, tile):
    cells = list(itertools.product(*map(range, grid)))
    home = [tuple(a // b for a, b in zip(cell, tile, strict=True)) for cell in cells]
    wanted = sorted(range(len(cells)), key=lambda i: (home[i], cells[i]))
    assert tile_order(grid, tile).tolist() == wanted
    x = draw(2, len(cells) + 1, 3)
    moved = tile_tokens(x, 1, grid, tile, 1)
    assert torch.equal(moved, x[:, [0, *(1 + i for i in wanted)]])
    assert torch.equal(tile_tokens(moved, 1, grid, tile, 1, inverse=True), x)


@pytest.mark.parametrize("leading", [0, 1, 3])
def test_a_window_of_the_whole_grid_is_dense_attention(leading):
    case = settings((5, 3), (5, 3), (2, 1), leading=leading)
    q, k, v = inputs(case)
    for op in (neighborhood_attention, attend_neighborhood):
        torch.testing.assert_close(op(q, k, v, **case), attention_reference(q, k, v)[0])


def test_the_log_sum_exp_merges_parts():
    case = settings((4, 4), (3, 3))
    q, k, v = inputs(case)
    found = neighborhood_attention_lse(q, k, v, **case)
    wanted = attention_lse(q, k, v, mask=mask_of(case))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


OPTIONS = {
    "bias": {"bias": draw(1, 4, 22, 22, seed=7)},
    "bias of a head": {"bias": draw(22, 22, seed=7)},
    "bias of keys": {"bias": draw(2, 1, 1, 22, seed=7)},
    "mask": {"mask": draw(2, 1, 22, 22, seed=8) > -1},
    "padding": {"padding": draw(2, 1, 1, 22, seed=9) > -1},
    "bias and padding": {
        "bias": draw(1, 4, 22, 22, seed=7),
        "padding": draw(2, 1, 1, 22, seed=9) > -1,
    },
    "mean of the blind": {"padding": draw(2, 1, 1, 22, seed=9) > 0.5, "mean_if_blind": True},
    "sinks": {"sinks": draw(4, seed=6)},
    "soft cap": {"softcap": 2.0, "scale": 0.7},
    "maps": {"k_map": [1, 0, 1, 0], "v_map": [0, 0, 1, 1]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_those_of_the_canonical_attention(name, monkeypatch):
    by_tiles(monkeypatch)
    case, options = settings((5, 4), (3, 2), leading=2), OPTIONS[name]
    q, k, v = inputs(case)
    seen = mask_of(case) & options.get("mask", torch.tensor(True))
    wanted = attention_reference(q, k, v, **{**options, "mask": seen})[0]
    for op in (neighborhood_attention, attend_neighborhood):
        torch.testing.assert_close(op(q, k, v, **case, **options), wanted)


def test_gradients_flow_through_tiles(monkeypatch):
    by_tiles(monkeypatch)
    case = settings((7, 5), (3, 3), leading=1)
    found = []
    for op in (neighborhood_attention, attend_neighborhood):
        leaves = [x.requires_grad_() for x in inputs(case)]
        op(*leaves, **case).square().sum().backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_agree_with_the_definition(dtype, monkeypatch):
    by_tiles(monkeypatch)
    case = settings((9, 7), (5, 3), (2, 1), leading=1)
    q, k, v = inputs(case, dtype=dtype)
    found = attend_neighborhood(q, k, v, **case)
    wanted = neighborhood_attention_reference(q.double(), k.double(), v.double(), **case)[0]
    assert found.dtype == dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    assert float((found.double() - wanted).abs().max() / v.double().abs().max()) < limit


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
COMPILED = ("test_aot_dispatch_dynamic",)


@pytest.mark.parametrize("tile", [[], [2, 2]])
@pytest.mark.parametrize("checks", [QUICK, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_the_ops_pass_the_checks_of_torch(tile, checks):
    case = settings((4, 3), (3, 2), leading=1, tile=tile)
    leaves = tuple(x.requires_grad_() for x in inputs(case, batch=1))
    torch.library.opcheck(neighborhood_attention, leaves, case, test_utils=checks)
    torch.library.opcheck(neighborhood_attention_lse, leaves, case, test_utils=checks)
    torch.library.opcheck(tile_tokens, (leaves[0], 2, [4, 3], [2, 2], 1), test_utils=checks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": [6, 3]}, "does not fit an axis of 5"),
        ({"window": [3, 2], "dilation": [2, 1]}, "2 apart"),
        ({"window": [3]}, "needs a value for each"),
        ({"stride": [4, 1]}, "larger than the window"),
        ({"stride": [0, 1]}, "must be positive"),
        ({"border": "wrap"}, "shift or clamp"),
        ({"leading": 1}, "no grid"),
        ({"leading": -1, "grid": [4, 4]}, "negative"),
        ({"grid": [5, 2]}, "no grid"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_reason(changes, said):
    case = {**settings((5, 3), (3, 2)), **changes}
    x = draw(1, 1, 15, 4)
    for op in (neighborhood_attention, attend_neighborhood):
        with pytest.raises(ValueError, match=said):
            op(x, x, x, **case)


def test_tiles_are_chosen_where_they_pay_and_the_reason_is_said():
    large = tiling(Neighborhood.of((64, 64), (8, 8), (1, 1), (1, 1), (False, False)))
    assert large.batches
    assert large.cost < 0.2
    assert "of a dense attention" in large.why
    small = tiling(Neighborhood.of((4, 4), (3, 3), (1, 1), (1, 1), (False, False)))
    assert not small.batches
    assert "of a dense attention" in small.why
    whole = tiling(Neighborhood.of((4, 4), (4, 4), (1, 1), (1, 1), (False, False)))
    assert whole.why == "every token sees every token"


def counted(case, tile):
    """Count visited and unmasked tiles pair by pair, in the order of residue classes."""
    seen = mask_of(case)
    grid = case["grid"]
    rows = list(zip(grid, tile, case["dilation"], strict=True))
    home = [
        tuple((i % d, i // d // t) for i, (_, t, d) in zip(cell, rows, strict=True))
        for cell in itertools.product(*map(range, grid))
    ]
    cells = {}
    for a, b in itertools.product(range(len(home)), repeat=2):
        cells.setdefault((home[a], home[b]), []).append(bool(seen[a, b]))
    tiles = len(set(home))
    visited = sum(any(c) for c in cells.values()) / tiles
    return tiles / visited, sum(all(c) for c in cells.values()) / tiles / visited


@pytest.mark.parametrize("border", ["shift", "clamp"])
@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation", "causal", "tile"),
    [
        ((12,), (5,), (1,), (1,), (False,), (4,)),
        ((13,), (4,), (3,), (1,), (False,), (4,)),
        ((13,), (4,), (2,), (2,), (False,), (2,)),
        ((13,), (5,), (2,), (1,), (True,), (4,)),
        ((6, 8), (3, 4), (1, 2), (1, 1), (False, False), (2, 4)),
        ((5, 6, 4), (3, 3, 4), (1, 3, 2), (1, 2, 1), (True, False, False), (2, 2, 2)),
    ],
)
def test_the_simulator_counts_what_brute_force_counts(
    grid, window, stride, dilation, causal, tile, border
):
    case = settings(grid, window, stride, dilation, causal, border=border)
    hood = Neighborhood.of(grid, window, stride, dilation, causal, border)
    visits = simulate(hood, tile, tile)
    bound, dense = counted(case, tile)
    assert visits.tile_bound == pytest.approx(bound)
    assert visits.dense == pytest.approx(dense)
    pairs = float(mask_of(case).sum()) / math.prod(grid) ** 2
    assert visits.flop_bound == pytest.approx(1 / pairs)
    assert hood.share == pytest.approx(pairs)


def test_the_share_counts_the_tokens_before_the_grid():
    case = settings((5, 4), (3, 3), leading=2)
    hood = Neighborhood.of((5, 4), (3, 3), (1, 1), (1, 1), (False, False), leading=2)
    assert hood.share == pytest.approx(float(mask_of(case).double().mean()))


def test_the_search_finds_tiles_without_masks():
    best = search((30, 48, 80), (18, 24, 24))[0]
    assert best.visits.dense == 1
    assert best.visits.tile_bound == pytest.approx(100 / 9)
    ranked = [f.visits.predicted for f in search((16, 16), (8, 8), area=16)]
    assert ranked == sorted(ranked, reverse=True)
    assert all(math.prod(t) == 16 for t in tile_shapes((16, 16), 16))


def test_an_axis_is_dense_where_every_query_sees_every_key():
    assert Axis(7, 7).is_dense
    assert not Axis(7, 7, causal=True).is_dense
    assert not Axis(7, 7, border="clamp").is_dense
    assert Axis(7, 14, border="clamp").is_dense
