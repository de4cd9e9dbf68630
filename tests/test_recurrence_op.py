"""The linear recurrence is a loop over tokens, as one op that graphs of any length hold."""

import pytest
import torch

from attnopt.ops import linear_recurrence


def drawn(length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    decay = torch.rand(2, length, 3, 4, dtype=torch.float64)
    return decay, torch.randn_like(decay), torch.randn(2, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 7])
def test_it_keeps_the_contract_of_an_op_with_gradients(length: int) -> None:
    inputs = tuple(t.requires_grad_() for t in drawn(length))
    torch.library.opcheck(linear_recurrence, inputs)
    assert torch.autograd.gradcheck(linear_recurrence, inputs)


def test_a_state_handed_on_continues_the_recurrence() -> None:
    decay, new, initial = drawn(7)
    whole = linear_recurrence(decay, new, initial)
    first = linear_recurrence(decay[:, :3], new[:, :3], initial)
    rest = linear_recurrence(decay[:, 3:], new[:, 3:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=0)


def test_without_decay_it_is_a_running_sum() -> None:
    _, new, _ = drawn(63)
    found = linear_recurrence(torch.ones_like(new), new, torch.zeros_like(new[:, 0]))
    torch.testing.assert_close(found, new.cumsum(1))
