"""The selective scan is its loop over tokens, chunk by chunk, in steps and with gradients."""

import pytest
import torch

from attnopt.ops import selective_scan, selective_scan_reference

B, C, N = 2, 3, 4


def drawn(tokens: int) -> tuple[torch.Tensor, ...]:
    chance = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=chance, dtype=torch.float64)

    steps, rates = normal(B, C, tokens).exp(), -normal(C, N).exp()
    return (
        normal(B, C, tokens),
        steps,
        rates,
        normal(B, tokens, N),
        normal(B, tokens, N),
        normal(B, C, N),
    )


def first(given: tuple[torch.Tensor, ...], cut: slice) -> list[torch.Tensor]:
    x, steps, rates, k, q, _ = given
    return [x[..., cut], steps[..., cut], rates, k[:, cut], q[:, cut]]


@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 150])
def test_it_is_its_loop_over_tokens(tokens: int) -> None:
    given = drawn(tokens)
    for found, want in zip(selective_scan(*given), selective_scan_reference(*given), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 5])
def test_it_keeps_the_contract_of_an_op_with_gradients(tokens: int) -> None:
    given = tuple(x.requires_grad_() for x in drawn(tokens))
    torch.library.opcheck(selective_scan, given)
    assert torch.autograd.gradcheck(selective_scan, given)


def test_a_state_handed_on_continues_the_scan() -> None:
    given = drawn(70)
    read, last = selective_scan(*given)
    before, state = selective_scan(*first(given, slice(41)), given[-1])
    after, state = selective_scan(*first(given, slice(41, None)), state)
    torch.testing.assert_close(torch.cat([before, after], 2), read)
    torch.testing.assert_close(state, last)


def test_a_step_of_zero_leaves_the_state_as_it_is() -> None:
    x, steps, rates, k, q, initial = drawn(9)
    read, last = selective_scan(x, torch.zeros_like(steps), rates, k, q, initial)
    torch.testing.assert_close(last, initial)
    torch.testing.assert_close(read, torch.einsum("bcn,btn->bct", initial, q))


def test_a_model_in_doubles_is_captured_as_it_computes() -> None:
    from attnopt.frontend.scans import _selective_scan

    x, steps, rates, k, q, _ = drawn(9)
    read, last = _selective_scan(
        x, steps, rates, k.mT, q.mT, delta_softplus=False, return_last_state=True
    )
    assert read.dtype is last.dtype is torch.float64
    initial = torch.zeros(B, C, N, dtype=torch.float64)
    rounded = (x.float().double(), steps, rates, k.float().double(), q, initial)
    for found, want in zip((read, last), selective_scan_reference(*rounded), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
