"""The gated delta rule is its loop over tokens, by chunks, in steps and with gradients."""

import pytest
import torch

from attnopt.ops import gated_delta_rule, gated_delta_rule_reference

B, H, N, M = 2, 3, 4, 5


def drawn(tokens: int, *, channels: bool = False) -> tuple[torch.Tensor, ...]:
    chance = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=chance, dtype=torch.float64)

    q, k = normal(B, tokens, H, N), torch.nn.functional.normalize(normal(B, tokens, H, N), dim=-1)
    decay = -normal(B, tokens, H, N if channels else 1).abs()
    return q, k, normal(B, tokens, H, M), decay, normal(B, tokens, H).sigmoid(), normal(B, H, N, M)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 150])
def test_it_is_its_loop_over_tokens(tokens: int, channels: bool) -> None:
    given = drawn(tokens, channels=channels)
    for found, want in zip(
        gated_delta_rule(*given), gated_delta_rule_reference(*given), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_it_keeps_the_contract_of_an_op_with_gradients(tokens: int, channels: bool) -> None:
    given = tuple(x.requires_grad_() for x in drawn(tokens, channels=channels))
    torch.library.opcheck(gated_delta_rule, given)
    assert torch.autograd.gradcheck(gated_delta_rule, given)


def test_a_state_handed_on_continues_the_rule() -> None:
    *given, initial = drawn(70)
    read, last = gated_delta_rule(*given, initial)
    first, state = gated_delta_rule(*(x[:, :41] for x in given), initial)
    rest, state = gated_delta_rule(*(x[:, 41:] for x in given), state)
    torch.testing.assert_close(torch.cat([first, rest], 1), read)
    torch.testing.assert_close(state, last)


def test_with_full_rate_and_no_decay_a_key_reads_what_was_written_last() -> None:
    _, k, v, decay, beta, initial = drawn(9)
    read, _ = gated_delta_rule(k, k, v, torch.zeros_like(decay), torch.ones_like(beta), initial)
    torch.testing.assert_close(read, v)


def test_strong_decays_over_many_chunks_stay_finite() -> None:
    q, k, v, decay, beta, initial = (x.float() for x in drawn(200))
    given = (q, k, v, 40 * decay, beta, initial)
    found, want = gated_delta_rule(*given)[0], gated_delta_rule_reference(*given)[0]
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
