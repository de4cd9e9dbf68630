"""Attention through agents by the kernels, against the definition."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import attnopt
from attnopt.backends.triton_gpu import attending
from attnopt.backends.triton_gpu.attending import attend_agents
from attnopt.ops import agent_attention_reference
from tests.agent_models import SAID, block, distance, rewritten
from tests.conformance import draw
from tests.triton_problems import DEVICE, check, tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BASE = {"grid": [5, 7], "agents": [2, 3], "leading": 2}


def biases():
    sizes = [(3, 3), (5, 1), (7, 7)]
    made = [draw(2, 6, *s, seed=i).float().to(DEVICE) for i, s in enumerate(sizes)]
    return {
        "collect": made[:2],
        "collect_first": draw(2, 6, 2, seed=7).float().to(DEVICE),
        "spread": made[2:],
        "filter": draw(2 * 16, 1, 3, 3, seed=8).float().to(DEVICE),
    }


CASES = {
    "plain": {"exponent": 0.4, "shortcut": [0.3, 0.1]},
    "no tokens before": {"grid": [37, 1], "agents": [5, 1], "leading": 0},
    "one agent": {"agents": [1, 1]},
    "every token": {"agents": [5, 7]},
    "biases": {},
    "steps": {"active": torch.tensor([True, False], device=DEVICE)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agents_by_the_kernels(name, dtype, monkeypatch):
    case = {**BASE, **CASES[name], **(biases() if name == "biases" else {})}
    called = []
    few = attending.attend_few
    monkeypatch.setattr(attending, "attend_few", lambda *a, **o: called.append(o) or few(*a, **o))
    q, k, v = tensors(2, 2, 2, 37, 37, dtype=dtype)
    found = attend_agents(q, k, v, **case)
    # What they spread to so few tokens is attended in the same way where it has a bias.
    assert len(called) == (2 if name == "biases" else 1)
    wide = {n: _wide(x) for n, x in case.items()}
    check(found, agent_attention_reference(q.double(), k.double(), v.double(), **wide), dtype)


def test_a_nystrom_core_between_the_kernels():
    case = {**BASE, "nystrom": True, "ridge": 1e-2}
    q, k, v = tensors(2, 2, 2, 37, 37)
    found = attend_agents(q, k, v, **case)
    check(found, agent_attention_reference(q.double(), k.double(), v.double(), **case))


def _wide(x):
    if isinstance(x, list) and isinstance(x[0], torch.Tensor):
        return [t.double() for t in x]
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def test_agents_that_learn_have_gradients():
    found = []
    for op, wide in ((attend_agents, False), (agent_attention_reference, True)):
        leaves = [x.double() if wide else x for x in tensors(2, 2, 2, 37, 37)]
        case = {n: _wide(x) if wide else x for n, x in biases().items()}
        every = [*leaves, *case["collect"], case["collect_first"], case["filter"]]
        for x in every:
            x.requires_grad_()
        op(*leaves, **BASE, **case).square().sum().backward()
        found.append([x.grad for x in every])
    for one, other in zip(*found, strict=True):
        check(one, other)


def test_a_lowered_program_runs_agents_by_the_kernels(monkeypatch):
    called = []
    few = attending.attend_few
    monkeypatch.setattr(attending, "attend_few", lambda *a, **o: called.append(a) or few(*a, **o))
    result = rewritten(block(), agents=[2, 3], **SAID, timesteps=[4, 9])
    module = attnopt.lower(result, "triton_gpu").to(DEVICE)
    x = torch.randn(2, 3, 12, 12)
    for steps, count in (([5, 6], 1), ([1, 2], 1)):
        with torch.no_grad():
            found = module(x.to(DEVICE), torch.tensor(steps, device=DEVICE))
        assert len(called) == count
        assert distance(found.cpu(), result(x, torch.tensor(steps))) < 1e-5
