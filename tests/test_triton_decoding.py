"""The kernel that splits the keys of few queries, against the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from attnopt.backends.triton_gpu.attending import attend_few
from attnopt.backends.triton_gpu.decoding import Stretch
from attnopt.backends.triton_gpu.masking import Rules
from attnopt.ops import attention_reference
from attnopt.ops.structure import visible_keys
from tests.conformance import KINDS, draw
from tests.triton_problems import DEVICE, check, is_real, tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def reference(q, k, v, **options):
    wide = {n: x.double() if is_real(x) else x for n, x in options.items()}
    return attention_reference(q.double(), k.double(), v.double(), **wide)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_last_queries_of_a_prefill(kind):
    q, k, v = tensors(1, 4, 2, 200, 200)
    wanted, wanted_lse = reference(q, k, v, **kind.options)
    out, lse = attend_few(q[:, :, -2:], k, v, splits=3, **kind.options)
    check(out, wanted[:, :, -2:])
    check(lse, wanted_lse[:, :, -2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 7, 63, 200])
def test_dtypes_and_odd_sizes(dtype, keys):
    q, k, v = tensors(2, 3, 1, 1, keys, 12, v_width=20, dtype=dtype)
    out, lse = attend_few(q, k, v, splits=2, causal=True)
    wanted, wanted_lse = reference(q, k, v)
    check(out, wanted, dtype)
    check(lse, wanted_lse)


@pytest.mark.parametrize("name", ["padding", "all padded", "mask", "bias", "softcap", "sinks"])
def test_options(name):
    q, k, v = tensors(2, 4, 2, 2, 90)
    shown = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    shown[0, ..., : 90 if name == "all padded" else 60] = False
    sinks = {"sinks": draw(4, seed=6).float().to(DEVICE)}
    options = {
        "padding": {"padding": shown.to(DEVICE)},
        "all padded": {"padding": shown.to(DEVICE), **sinks},
        "mask": {"mask": (draw(2, 4, 2, 90, seed=4) > 0).to(DEVICE)},
        "bias": {"bias": draw(1, 4, 2, 90, seed=5).float().to(DEVICE)},
        "softcap": {"softcap": 2.0, "scale": 0.7},
        "sinks": sinks,
    }[name]
    out, lse = attend_few(q, k, v, splits=2, causal=True, **options)
    wanted, wanted_lse = reference(q, k, v, causal=True, **options)
    check(out, wanted)
    check(lse, wanted_lse)


def test_heads_that_share_keys_but_not_values():
    q, k, v = tensors(1, 6, 3, 1, 40)
    v = draw(1, 2, 40, 8, seed=7).float().to(DEVICE)
    check(attend_few(q, k, v)[0], reference(q, k, v)[0])


def test_of_a_window_with_first_keys_only_those_are_read():
    q, k, v = tensors(1, 2, 1, 1, 400)
    wanted, _ = reference(q, k, v, window=30, first=3)
    k[:, :, 64:370], v[:, :, 64:370] = torch.nan, torch.nan
    out, _ = attend_few(q, k, v, splits=2, window=30, first=3)
    check(out, wanted)
    assert Stretch.of(Rules.of(window=30, first=3), 399, 1, 400, 64) == (1, 370, 2)


def test_a_cache_with_room_is_read_as_far_as_it_is_filled():
    q, k, v = tensors(1, 2, 1, 2, 200)
    wanted, _ = reference(q, k[:, :, :100], v[:, :, :100], causal=True)
    k[:, :, 150:], v[:, :, 150:] = torch.nan, torch.nan
    k[:, :, 100:150], v[:, :, 100:150] = 3.0, 5.0
    check(attend_few(q, k, v, causal=True, place=98)[0], wanted)


@pytest.mark.parametrize("length", [1, 3, 10, 13, 14, 40])
def test_a_ring_is_the_mask(length):
    window, first = 10, 3
    q, k, v = tensors(1, 4, 2, 1, length)
    wanted, wanted_lse = reference(q, k, v, window=window, first=first)
    ring_k, ring_v = (torch.full((1, 2, first + window, 16), torch.nan) for _ in range(2))
    ring_k, ring_v = ring_k.to(DEVICE), ring_v.to(DEVICE)
    positions = torch.full((first + window,), -1, dtype=torch.int32, device=DEVICE)
    for n in range(length):
        slot = n if n < first else first + (n - first) % window
        ring_k[:, :, slot], ring_v[:, :, slot], positions[slot] = k[:, :, n], v[:, :, n], n
    out, lse = attend_few(
        q, ring_k, ring_v, positions=positions, place=length - 1, window=window, first=first
    )
    check(out, wanted)
    check(lse, wanted_lse)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_read_holds_what_is_seen(kind):
    for queries, keys in ((1, 1), (1, 200), (3, 77), (2, 500)):
        rules = Rules.of(**kind.options)
        heads, tail, count = Stretch.of(rules, keys - queries, queries, keys, 16)
        read = torch.zeros(keys + 16, dtype=torch.bool)
        for step in range(count):
            start = step * 16 if step < heads else tail + (step - heads) * 16
            assert not read[start]
            read[start : start + 16] = True
        seen = visible_keys(queries, keys, **kind.options)
        seen = torch.ones(queries, keys, dtype=torch.bool) if seen is None else seen
        assert not (seen.any(0) & ~read[:keys]).any()
