"""The kernel of routed attention, and steps that leave key heads unread, against the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from attnopt.backends.triton_gpu.attending import attend_few, attend_routed, kernel_of
from attnopt.backends.triton_gpu.routed import Packed
from attnopt.ops import attention_reference, routed_attention, routed_attention_reference
from tests.conformance import KINDS, draw
from tests.triton_problems import DEVICE, check, is_real, tensors

# Numbers that no key shows are subtracted from and divided by in lanes that are then hidden.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def gates_of(batch, heads, tokens, share=0.5):
    """Draw gates, with a head that nobody uses and one that everybody does."""
    on = torch.rand(batch, heads, tokens, generator=torch.Generator().manual_seed(3)) < share
    on[:, 0], on[:, -1] = False, True
    return (on * (1 + draw(batch, heads, tokens, seed=4).abs())).float().to(DEVICE)


def defined(q, k, v, gates, **options):
    wide = {n: x.double() if is_real(x) else x for n, x in options.items()}
    return routed_attention_reference(q.double(), k.double(), v.double(), gates.double(), **wide)


@torch.no_grad()
def attended(*tensors, **options):
    return attend_routed(*tensors, memo={}, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_mask(kind):
    q, k, v = tensors(1, 4, 2, 70, 90)
    gates = gates_of(1, 4, 70)
    check(attended(q, k, v, gates, **kind.options), defined(q, k, v, gates, **kind.options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (67, 131), (131, 67)])
def test_dtypes_and_odd_sizes(dtype, queries, keys):
    q, k, v = tensors(2, 2, 1, queries, keys, 12, v_width=20, dtype=dtype)
    gates = gates_of(2, 2, queries).to(dtype)
    out = attended(q, k, v, gates, causal=True)
    assert out.dtype == dtype
    check(out, defined(q, k, v, gates, causal=True))
    assert not out[:, 0].any()


@pytest.mark.parametrize("name", ["padding", "mean", "mask", "bias", "softcap", "sinks"])
@pytest.mark.parametrize("queries", [1, 70])
def test_options(name, queries):
    q, k, v = tensors(2, 4, 2, queries, 90)
    shown = torch.ones(2, 1, 1, 90, dtype=torch.bool)
    shown[0, ..., :60], shown[1] = False, False
    options = {
        "padding": {"padding": shown.to(DEVICE)},
        "mean": {"padding": shown.to(DEVICE), "mean_if_blind": True},
        "mask": {"mask": (draw(2, 4, queries, 90, seed=4) > 0).to(DEVICE)},
        "bias": {"bias": draw(1, 4, queries, 90, seed=5).float().to(DEVICE)},
        "softcap": {"softcap": 2.0, "scale": 0.7},
        "sinks": {"sinks": draw(4, seed=6).float().to(DEVICE)},
    }[name]
    gates = gates_of(2, 4, queries)
    found = attended(q, k, v, gates, causal=True, **options)
    check(found, defined(q, k, v, gates, causal=True, **options))


@pytest.mark.parametrize("queries", [1, 2, 70])
def test_keys_of_groups_that_are_off_are_not_read(queries):
    q, k, v = tensors(1, 4, 2, queries, 90)
    gates = gates_of(1, 4, queries)
    gates[:, :2] = 0
    wanted = defined(q, k, v, gates, causal=True)
    k[:, 0], v[:, 0] = torch.nan, torch.nan
    check(attended(q, k, v, gates, causal=True), wanted)


def test_dead_heads_of_few_queries_see_nothing():
    q, k, v = tensors(2, 4, 2, 1, 90)
    live = torch.tensor([[1, 0], [0, 1]], dtype=torch.uint8, device=DEVICE)
    out, lse = attend_few(q, k, v, live=live, splits=2, causal=True)
    wanted = attention_reference(q.double(), k.double(), v.double())[0]
    alive = live.bool().repeat_interleave(2, dim=1)
    check(out, torch.where(alive[..., None, None], wanted, 0.0))
    assert torch.equal(lse.isneginf().squeeze(-1), ~alive)


def test_rows_are_packed_in_the_order_of_tokens():
    gates = torch.tensor([[[0, 1, 1], [2, 0, 3], [0, 0, 0], [0, 0, 4]]]).float()
    packed = Packed.of(gates, 2)
    assert packed.count.tolist() == [[4, 1]]
    assert packed.order[0, 0, :4].tolist() == [1, 2, 4, 5]
    assert packed.order[0, 1, :1].tolist() == [5]


def test_what_is_learned_goes_another_way():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 1, 9, 9))
    gates = gates_of(1, 2, 9)
    found = attend_routed(q, k, v, gates, memo={}, causal=True)
    check(found.detach(), defined(q, k, v, gates, causal=True).detach())
    found.sum().backward()
    assert q.grad is not None


def test_the_backend_runs_the_op_by_the_kernel():
    graph = torch.fx.Graph()
    node = graph.call_function(routed_attention, tuple(graph.placeholder(n) for n in "qkvg"))
    assert kernel_of(node) is attend_routed
