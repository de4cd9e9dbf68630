"""The canonical op: its reference is its definition, so its identities are tested."""

import pytest
import torch

from attnopt.finder.structures import structure
from attnopt.nouns import Mask
from attnopt.ops import attention, attention_lse
from attnopt.ops.structure import mask_of, options_of

STRUCTURES = (
    Mask("none"),
    Mask("causal"),
    Mask("sliding", window=1),
    Mask("sliding", window=5),
    Mask("sliding", window=3, right=1),
    Mask("sliding", window=0, right=4),
    Mask("chunked", window=4),
    Mask("block", window=4),
    Mask("prefix", prefix=3),
    Mask("sliding", window=4, first=3),
)


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, dtype=torch.float64, generator=generator)


def plain(q, k, v, bias=None):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores if bias is None else scores + bias, dim=-1) @ v


@pytest.mark.parametrize("size", [1, 7, 63])
def test_it_is_softmax_attention(size):
    q, k, v = draw(2, 3, size, 5), draw(2, 3, size + 2, 5, seed=1), draw(2, 3, size + 2, 4, seed=2)
    torch.testing.assert_close(attention(q, k, v), plain(q, k, v))


def test_grouped_heads_read_the_head_of_their_group():
    q, k, v = draw(2, 6, 7, 4), draw(2, 2, 7, 4, seed=1), draw(2, 2, 7, 4, seed=2)
    repeated = plain(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(attention(q, k, v), repeated)


def test_maps_choose_the_heads_of_keys_and_values_apart():
    q, k, v = draw(1, 4, 7, 4), draw(1, 2, 7, 4, seed=1), draw(1, 3, 7, 4, seed=2)
    found = attention(q, k, v, k_map=[0, 1, 0, 1], v_map=[2, 2, 0, 1])
    torch.testing.assert_close(found, plain(q, k[:, [0, 1, 0, 1]], v[:, [2, 2, 0, 1]]))


def test_a_window_of_one_returns_the_values():
    q, k, v = (draw(2, 2, 7, 4, seed=s) for s in range(3))
    torch.testing.assert_close(attention(q, k, v, causal=True, window=1), v)


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_causal_queries_sit_at_the_end_of_the_keys(queries):
    q, k, v = draw(1, 2, 7, 4), draw(1, 2, 7, 4, seed=1), draw(1, 2, 7, 4, seed=2)
    whole = attention(q, k, v, causal=True)
    tail = attention(q[:, :, -queries:], k, v, causal=True)
    torch.testing.assert_close(tail, whole[:, :, -queries:])


@pytest.mark.parametrize("sizes", [(7, 7), (3, 13), (20, 20)])
@pytest.mark.parametrize("mask", STRUCTURES, ids=str)
def test_a_structure_is_the_mask_that_it_names(mask, sizes):
    queries, keys = sizes
    q, k, v = draw(2, 2, queries, 4), draw(2, 2, keys, 4, seed=1), draw(2, 2, keys, 4, seed=2)
    shown = torch.rand(2, 1, 1, keys, generator=torch.Generator().manual_seed(3)) < 0.7
    want = attention(q, k, v, mask=structure(mask, queries, keys) & shown)
    got = attention(q, k, v, padding=shown, **options_of(mask))
    torch.testing.assert_close(got, want)
    assert mask_of(options_of(mask)) == mask


def test_rows_that_see_nothing_are_zero_with_finite_gradients():
    q = draw(1, 1, 3, 4).requires_grad_()
    k, v = draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    out, lse = attention_lse(q, k, v, mask=mask)
    out.sum().backward()
    assert (out[0, 0, 1] == 0).all()
    assert lse[0, 0, 1] == -torch.inf
    assert q.grad.isfinite().all()


def test_sinks_scale_the_output_by_their_share():
    q, k, v = (draw(2, 3, 7, 4, seed=s) for s in range(3))
    sinks = draw(3, seed=4)
    out, lse = attention_lse(q, k, v)
    share = torch.sigmoid(lse - sinks.view(1, 3, 1)).unsqueeze(-1)
    torch.testing.assert_close(attention(q, k, v, sinks=sinks), out * share)


def test_parts_merge_by_their_log_sum_exp():
    q, k, v = draw(1, 2, 5, 4), draw(1, 2, 9, 4, seed=1), draw(1, 2, 9, 4, seed=2)
    parts = [attention_lse(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 4), slice(4, 9))]
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    merged = sum(out * torch.exp(lse - total).unsqueeze(-1) for out, lse in parts)
    torch.testing.assert_close(merged, attention(q, k, v))


def test_gradients_are_those_of_the_formula():
    inputs = [draw(1, 2, 3, 4, seed=s).requires_grad_() for s in range(3)]
    bias = draw(1, 2, 3, 3, seed=5).requires_grad_()
    sinks = draw(2, seed=6).requires_grad_()

    def op(q, k, v, b, z):
        return attention(q, k, v, bias=b, sinks=z, softcap=3.0, scale=0.4)

    assert torch.autograd.gradcheck(op, (*inputs, bias, sinks))


def test_opcheck_accepts_it():
    q, k, v = (draw(1, 2, 3, 4, seed=s).requires_grad_() for s in range(3))
    torch.library.opcheck(attention, (q, k, v), {"causal": True})
    shown = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    torch.library.opcheck(attention, (q, k, v), {"padding": shown, "window": 2, "right": 1})


def test_low_precision_accumulates_in_single():
    q, k, v = (draw(1, 2, 65, 8, seed=s) for s in range(3))
    exact = attention(*(t.bfloat16().double() for t in (q, k, v)))
    found = attention(*(t.bfloat16() for t in (q, k, v)))
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max()
