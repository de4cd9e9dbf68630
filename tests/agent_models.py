"""A small block of a diffusion model, and what its rewrites by agents are asked for."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.nouns import Choice
from attnopt.passes import agent
from attnopt.program import Program

SAID = {"core": "plain", "exponent": 0.5, "shortcut": 0.1}
"""Settings that leave nothing to calibration data."""


class Block(nn.Module):
    """Attention over the patches of an image, told the time step, with sharp scores."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.time = nn.Linear(1, 16)
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return the patches after one attention."""
        step = self.time(timestep.float().reshape(-1, 1)).unsqueeze(1)
        tokens = self.patch(x).flatten(2).mT + step
        q, k, v = (
            y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(3 * tokens).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v)
        return tokens + self.o(seen.transpose(1, 2).flatten(2))


@cache
def block() -> Program:
    """Return the exact form of a block on images of 12 x 12, which has 6 x 6 patches."""
    torch.manual_seed(0)
    model = Block().eval()
    call = (torch.randn(2, 3, 12, 12), torch.tensor([3, 4]))
    return attnopt.apply(attnopt.capture(model, call), "exact")


def rewritten(program: Program, statistics: Any = None, **config: Any) -> Program:
    """Return a program with agents at every site that fits."""
    settings = agent.Config(**config)
    fitting = [s for s in program.sites if agent.fits(s, settings) is True]
    assert fitting
    choices = tuple(Choice(s.name, "agent", config) for s in fitting)
    return attnopt.apply(program, attnopt.Plan(choices, statistics=statistics))


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far apart two tensors are, as a share of the second."""
    return float((a - b).norm() / b.norm())
