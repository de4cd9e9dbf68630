"""Gated linear attention is its loop over tokens, by chunks, in steps and with gradients."""

import pytest
import torch

from attnopt.ops import gated_linear_attention, gated_linear_attention_reference

B, G, H, N, M = 2, 2, 6, 4, 5


def drawn(tokens: int, *, channels: bool = False) -> tuple[torch.Tensor, ...]:
    chance = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=chance, dtype=torch.float64)

    q, k, v = normal(B, tokens, G, N), normal(B, tokens, G, N), normal(B, tokens, H, M)
    decay = -normal(B, tokens, H, N if channels else 1).abs()
    return q, k, v, decay, normal(B, H, N, M)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 150])
def test_it_is_its_loop_over_tokens(tokens: int, channels: bool) -> None:
    given = drawn(tokens, channels=channels)
    for found, want in zip(
        gated_linear_attention(*given), gated_linear_attention_reference(*given), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_keeps_the_contract_of_an_op_with_gradients(tokens: int, channels: bool) -> None:
    *given, initial = drawn(tokens, channels=channels)
    # States of Mamba 2 have the channels of values first.
    initial = initial.transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs = tuple(x.requires_grad_() for x in (*given, initial))
    torch.library.opcheck(gated_linear_attention, inputs)
    assert torch.autograd.gradcheck(gated_linear_attention, inputs)


def test_a_state_handed_on_continues_it() -> None:
    *given, initial = drawn(70)
    read, last = gated_linear_attention(*given, initial)
    first, state = gated_linear_attention(*(x[:, :41] for x in given), initial)
    rest, state = gated_linear_attention(*(x[:, 41:] for x in given), state)
    torch.testing.assert_close(torch.cat([first, rest], 1), read)
    torch.testing.assert_close(state, last)


def test_without_decay_it_is_causal_attention_without_a_softmax() -> None:
    q, k, v, decay, initial = drawn(9)
    read, _ = gated_linear_attention(q, k, v, torch.zeros_like(decay), torch.zeros_like(initial))
    scores = torch.einsum("btgn,bsgn->bgts", q, k).tril().repeat_interleave(H // G, dim=1)
    torch.testing.assert_close(read, torch.einsum("bhts,bshm->bthm", scores, v))


def test_strong_decays_over_many_chunks_stay_finite() -> None:
    q, k, v, decay, initial = (x.float() for x in drawn(200))
    given = (q, k, v, 40 * decay, initial)
    found, want = gated_linear_attention(*given)[0], gated_linear_attention_reference(*given)[0]
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
