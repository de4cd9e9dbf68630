"""Find, explain and rewrite attention in a module that was written another way.

python examples/odd_module.py

Queries come from a 1x1 convolution, keys and values from one einsum, scores are capped by a tanh,
a learned table is added, and the softmax is written out: nothing is a call of a known function.
"""

import sys

import torch
from torch import Tensor, nn

import attnopt

WIDTH, HEADS, TOKENS = 48, 4, 24


class Odd(nn.Module):
    """One attention as nobody's library has it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Conv1d(WIDTH, WIDTH, 1)
        self.both = nn.Parameter(torch.randn(WIDTH, 2, HEADS, WIDTH // HEADS) * 0.1)
        self.near = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS) * 0.1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x.mT).unflatten(1, (HEADS, -1))
        k, v = torch.einsum("btc,cnhd->nbhtd", x, self.both)
        scores = torch.einsum("bhdt,bhsd->bhts", q, k) * (WIDTH // HEADS) ** -0.5
        scores = 5.0 * torch.tanh(scores / 5.0) + self.near
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        mixed = torch.einsum("bhts,bhsd->bthd", powers / powers.sum(-1, keepdim=True), v)
        return x + self.out(mixed.flatten(2))


def main(words: list[str]) -> int:
    """Capture it, say what was found, rewrite it exactly, and compare."""
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(3, TOKENS, WIDTH)
    program = attnopt.capture(model, (x,))
    for site in program.sites:
        print(f"found {site.name or 'the model'}: {site.heads} heads of {site.head_dim}, "
              f"soft cap {site.softcap}, bias {site.bias}, mask {site.mask}")  # fmt: skip
    for miss in program.near_misses:
        print(f"almost: {miss.module}: {miss.why}")
    exact = attnopt.apply(program, "exact")
    for no in exact.refused:
        print(f"refused: {no}")
    with torch.no_grad():
        apart = float((attnopt.lower(exact, "eager")(x) - model(x)).abs().max())
    print(f"rewritten exactly: {len(program.sites) - len(exact.refused)} of {len(program.sites)}, "
          f"largest difference {apart:.1e}")  # fmt: skip
    return int(not program.sites or bool(exact.refused) or apart > 1e-5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
