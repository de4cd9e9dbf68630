"""Programs lowered to the kernels, and what they take."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

import attnopt
from attnopt.backends.triton_gpu import attending, routing
from attnopt.backends.triton_gpu.routing import available, favours, fits, fits_plan, splits_keys
from attnopt.ops.options import Options
from attnopt.ops.plans import plan_of_structure
from tests.conformance import padding
from tests.triton_problems import DEVICE, tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


class Windowed(nn.Module):
    """Two heads that see the last keys only."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.o = nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        place = torch.arange(x.shape[1], device=x.device)
        far = place[:, None] - place
        seen = (far >= 0) & (far < 6)
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~seen, -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_lowered_program_runs_the_kernels(monkeypatch):
    torch.manual_seed(0)
    model, x = Windowed().eval(), torch.randn(2, 20, 32)
    program = attnopt.apply(attnopt.capture(model, (x,)), "exact")
    called = []
    by_plan = attending.attend_by_plan
    monkeypatch.setattr(
        attending, "attend_by_plan", lambda *a, **o: called.append(o) or by_plan(*a, **o)
    )
    lowered = attnopt.lower(program, "triton_gpu").to(DEVICE)
    found = lowered(x.to(DEVICE))
    assert called[0]["window"] == 6
    torch.testing.assert_close(found.cpu(), model(x), atol=1e-5, rtol=1e-4)


def test_a_machine_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(routing, "interprets", lambda: False)
    assert "set TRITON_INTERPRET=1" in available().why
    program = attnopt.apply(attnopt.capture(Windowed(), (torch.randn(1, 8, 32),)), "exact")
    with pytest.raises(ValueError, match="lower to 'inductor' or 'eager'"):
        attnopt.lower(program, "triton_gpu")(torch.randn(1, 8, 32))


def test_what_the_kernels_cannot_run_is_refused_with_the_reason():
    q, k, v = tensors(1, 6, 2, 4, 9)
    assert fits(q, k, v, Options())
    assert "float64" in fits(q.double(), k.double(), v.double(), Options()).why
    assert "320 channels" in fits(*tensors(1, 1, 1, 4, 9, 320), Options()).why
    assert "evenly" in fits(q[:, :5], k, v, Options()).why
    assert "nothing" in fits(q[:, :, :0], k, v, Options()).why
    bias = Options(bias=torch.zeros(1, 1, 4, 9, requires_grad=True))
    assert "bias is trained" in fits(q, k, v, bias).why
    assert "tiles of 5 queries" in fits_plan(plan_of_structure(4, 9, 5, 16), 6).why
    assert fits_plan(plan_of_structure(4, 9), 6)


def test_what_others_do_better_is_left_to_them():
    q, k, _ = tensors(1, 2, 2, 9, 9)
    assert "vendor" in favours(q, k, Options()).why
    assert "vendor" in favours(q, k, Options.read({"causal": True})).why
    assert favours(q[:, :, 2:], k, Options.read({"causal": True}))
    assert favours(q, k, Options.read({"window": 3}))
    assert favours(q, k, Options(padding=padding(1, 9)))
    assert favours(q[:, :, :1], k, Options())


def test_few_queries_have_their_keys_split():
    q, k, v = tensors(1, 8, 2, 1, 9)
    assert splits_keys(q, k, v)
    assert "gradients" in splits_keys(q.requires_grad_(), k, v).why
    assert "share a key head" in splits_keys(*tensors(1, 8, 2, 17, 19)).why


def test_layers_share_a_plan():
    q, k, v = tensors(1, 1, 1, 20, 20)
    memo = {}
    attending.attend(q, k, v.requires_grad_(), memo, window=3)
    (made,) = memo.values()
    attending.attend(q, k, v, memo, window=3)
    assert list(memo.values()) == [made]
    attending.attend(q, k, v, memo, window=4)
    assert len(memo) == 2
