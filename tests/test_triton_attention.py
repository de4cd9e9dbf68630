"""The kernels of attention by a plan, forward and backward, against the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from attnopt.backends.triton_gpu.attending import Windows, attend, attend_blocks, attend_by_plan
from attnopt.ops import attention_reference
from attnopt.ops.plans import BlockPlan, plan_of_structure, plan_of_windows
from tests.conformance import KINDS, draw
from tests.test_block_plans import windows
from tests.triton_problems import DEVICE, check, defined, tensors

TILES = {"q_tile": 32, "k_tile": 32, "device": DEVICE}
# Numbers that no key shows are subtracted from and divided by in lanes that are then hidden.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def random_plan(batch, heads, rows, columns, seed=0, tile=16):
    """Return a plan with partial, full and no tiles, some queries without any."""
    draws = torch.rand(batch, heads, rows, columns, generator=torch.Generator().manual_seed(seed))
    draws[:, 0, 0] = 1.0
    lists = []
    for grid in (draws < 0.4, (draws >= 0.4) & (draws < 0.7)):
        lists += [grid.sum(-1).int(), torch.argsort(~grid, dim=-1, stable=True).int()]
    return BlockPlan(*(x.to(DEVICE) for x in lists), tile, tile)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_mask(kind):
    q, k, v = tensors(1, 1, 1, 45, 63)
    plan = plan_of_structure(45, 63, **TILES, **kind.options)
    out, lse = attend_by_plan(q, k, v, plan, **kind.options)
    wanted, wanted_lse = defined(q, k, v, plan, **kind.options)
    check(out, wanted)
    check(lse, wanted_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (63, 63), (7, 63), (63, 7)])
def test_dtypes_and_odd_sizes(dtype, queries, keys):
    q, k, v = tensors(1, 2, 1, queries, keys, 12, v_width=20, dtype=dtype)
    plan = plan_of_structure(queries, keys, **TILES, causal=True)
    out, lse = attend_by_plan(q, k, v, plan, causal=True)
    wanted, wanted_lse = defined(q, k, v, plan, causal=True)
    assert out.dtype == dtype
    check(out, wanted)
    check(lse, wanted_lse)


@pytest.mark.parametrize("plan_heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_plan_of_any_heads(plan_heads, batch):
    q, k, v = tensors(2, 4, 2, 20, 26)
    plan = random_plan(batch, plan_heads, 2, 2)
    out, lse = attend_by_plan(q, k, v, plan, causal=True)
    wanted, wanted_lse = defined(q, k, v, plan, causal=True)
    check(out, wanted)
    check(lse, wanted_lse)
    assert not out[:, 0, :16].any()
    assert lse[:, 0, :16].isneginf().all()


def options_of(name):
    """Return options of one kind for two rows of two heads, 20 queries and 26 keys."""
    shown = torch.ones(2, 1, 1, 26, dtype=torch.bool)
    shown[0, ..., :11] = False
    shown[1, ..., 7:9] = False
    return {
        "padding": {"padding": shown.to(DEVICE)},
        "mask": {"mask": (draw(2, 1, 20, 26, seed=4) > 0).to(DEVICE)},
        "bias": {"bias": draw(1, 2, 20, 26, seed=5).float().to(DEVICE)},
        "softcap": {"softcap": 2.0, "scale": 0.7},
        "sinks": {"sinks": draw(2, seed=6).float().to(DEVICE)},
        "sinks and padding": {
            "sinks": draw(2, seed=6).float().to(DEVICE), "padding": shown.to(DEVICE)
        },
    }[name]  # fmt: skip


OPTIONS = ("padding", "mask", "bias", "softcap", "sinks", "sinks and padding")


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    q, k, v = tensors(2, 2, 1, 20, 26)
    plan, options = random_plan(1, 2, 2, 2), options_of(name)
    out, lse = attend_by_plan(q, k, v, plan, causal=True, **options)
    wanted, wanted_lse = defined(q, k, v, plan, causal=True, **options)
    check(out, wanted)
    check(lse, wanted_lse)


def test_tiles_that_no_plan_lists_are_not_read():
    q, k, v = tensors(1, 2, 1, 64, 64)
    plan = plan_of_structure(64, 64, 16, 16, window=16, device=DEVICE)
    wanted, _ = defined(q, k, v, plan, window=16)
    k[:, :, :32], v[:, :, :32] = torch.nan, torch.nan
    out, _ = attend_by_plan(q, k, v, plan, window=16)
    check(out[:, :, 48:], wanted[:, :, 48:])


@pytest.mark.parametrize("lengths", [(20,), (4, 5), (3, 3, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_windows_over_a_grid(lengths, causal):
    seen = Windows(*(x.to(DEVICE) for x in windows(lengths, 3)))
    queries, keys = len(seen.start), len(seen.place)
    q, k, v = tensors(1, 1, 1, queries, keys)
    plan = plan_of_windows(*seen, 16, 16, causal=causal)
    out, lse = attend_by_plan(q, k, v, plan, windows=seen, causal=causal)
    wanted, wanted_lse = attention_reference(
        q.double(), k.double(), v.double(), mask=seen.mask, causal=causal
    )
    check(out, wanted)
    check(lse, wanted_lse)


def gradients(call, q, k, v, sinks=None):
    """Return the gradients of a sum over output and log-sum-exp, of every input."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, sinks) if x is not None]
    options = {} if sinks is None else {"sinks": inputs[3]}
    out, lse = call(*inputs[:3], **options)
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    loss = (out * draw(*out.shape, seed=8).to(out)).sum() + (
        lse * draw(*lse.shape, seed=9).to(lse)
    ).sum()
    return torch.autograd.grad(loss, inputs)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mask", "bias", "padding", "sinks")]


@pytest.mark.parametrize("name", ["causal", "softcap", "sinks and padding", *SLOW])
def test_gradients(name):
    q, k, v = tensors(2, 2, 1, 20, 26, v_width=12)
    options = {} if name == "causal" else options_of(name)
    sinks = options.pop("sinks", None)
    # Each query sees a key: where there is none, the definition's log-sum-exp has no gradient.
    structure = {"window": 26, "right": 3} if "padding" in name else {"causal": True}
    if name == "mask":
        options["mask"][..., 0] = True
    plan = plan_of_structure(20, 26, 16, 16, whole=name != "mask", device=DEVICE, **structure)
    options |= structure
    found = gradients(lambda *a, **o: attend_by_plan(*a, plan, **options, **o), q, k, v, sinks)
    wide = {n: x.double() if n == "bias" else x for n, x in options.items()}
    exact = [x if x is None else x.double() for x in (q, k, v, sinks)]
    wanted = gradients(lambda *a, **o: defined(*a, plan, **wide, **o), *exact)
    for one, other in zip(found, wanted, strict=True):
        check(one, other)


@pytest.mark.parametrize("plan_heads", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_gradients_go_by_the_plan(plan_heads):
    q, k, v = tensors(1, 4, 2, 20, 26)
    plan = random_plan(1, plan_heads, 2, 2)
    found = gradients(lambda *a: attend_by_plan(*a, plan), q, k, v)
    wanted = gradients(lambda *a: finite(*a, plan), *(x.double() for x in (q, k, v)))
    for one, other in zip(found, wanted, strict=True):
        check(one, other)


def finite(q, k, v, plan):
    """Return the definition with a log-sum-exp that has a gradient where nothing is seen, too."""
    out, lse = defined(q, k, v, plan)
    return out, torch.where(lse.isneginf(), 0.0, lse)


def test_gradients_through_windows_over_a_grid():
    seen = Windows(*(x.to(DEVICE) for x in windows((4, 5), 3)))
    q, k, v = tensors(1, 2, 1, 20, 22)
    plan = plan_of_windows(*seen, 16, 16)
    found = gradients(lambda *a: attend_by_plan(*a, plan, windows=seen), q, k, v)
    wanted = gradients(
        lambda *a: attention_reference(*a, mask=seen.mask), *(x.double() for x in (q, k, v))
    )
    for one, other in zip(found, wanted, strict=True):
        check(one, other)


@pytest.mark.parametrize("name", ["k_map", "v heads", "mean"])
def test_the_copy_of_the_op_takes_what_the_op_takes(name):
    q, k, v = tensors(2, 2, 2, 20, 26)
    options = {"softcap": 3.0, "causal": True}
    if name == "k_map":
        options |= {"k_map": [1, 0], "v_map": [0, 0]}
    if name == "v heads":
        v = draw(2, 1, 26, 8, seed=7).float().to(DEVICE)
    if name == "mean":
        options |= {"mean_if_blind": True, "padding": options_of("padding")["padding"]}
        options["window"] = 5
    wanted, _ = attention_reference(q.double(), k.double(), v.double(), **options)
    check(attend(q, k, v, {}, **options), wanted)


def test_the_copy_of_block_attention_is_the_kernel_where_tiles_fit():
    q, k, v = tensors(1, 2, 2, 20, 26)
    plan = random_plan(1, 1, 2, 2)
    found = attend_blocks(q, k, v, *plan.tensors, q_tile=16, k_tile=16, window=9)
    check(found, defined(q, k, v, plan, window=9)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [40, 64, 128, 256])
def test_larger_sizes_and_widths(dtype, width):
    q, k, v = tensors(1, 2, 1, 203, 211, width, dtype=dtype)
    options = {"window": 70, "first": 3}
    plan = plan_of_structure(203, 211, device=DEVICE, **options)
    out, lse = attend_by_plan(q, k, v, plan, **options)
    wanted, wanted_lse = defined(q, k, v, plan, **options)
    check(out, wanted)
    check(lse, wanted_lse)
    found = gradients(lambda *a: attend_by_plan(*a, plan, **options), q, k, v)
    exact = gradients(lambda *a: defined(*a, plan, **options), *(x.double() for x in (q, k, v)))
    for one, other in zip(found, exact, strict=True):
        check(one, other)
