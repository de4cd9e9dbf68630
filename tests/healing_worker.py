"""One of the processes that heal together: torchrun healing_worker.py OUT."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnopt
from attnopt.healing import Healing, Recipe, healed
from attnopt.program import Program

WIDTH, HEADS, TOKENS = 16, 2, 5


class Layer(nn.Module):
    """A residual attention, without the bias of keys, which changes nothing but by rounding."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvo":
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            getattr(self, n)(x).view(*x.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)
            for n in "qkv"
        )
        mixed = scaled_dot_product_attention(q, k, v)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def pair() -> tuple[Program, Program]:
    """Return a damaged program and its source."""
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer()).requires_grad_(False).eval()
    teacher = attnopt.apply(attnopt.capture(model, (torch.rand(2, TOKENS, WIDTH),)), "exact")
    names = sorted(b.name for b in teacher.bindings.values() if b.kind == "parameter")
    damaged = {n: teacher.weights[n] + 0.1 * torch.randn(teacher.weights[n].shape) for n in names}
    return teacher.with_weights(damaged), teacher


def run(batch: int) -> Healing:
    """Heal it."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = pair()
    (name,) = (b.name for b in teacher.bindings.values() if b.kind == "input")
    rows = {name: torch.randn(40, TOKENS, WIDTH, generator=generator)}
    recipe = Recipe(8, site_steps=3, batch=batch, lr=3e-3, every=4, accumulate=2)
    return healed(student, teacher, rows, recipe)


def parameters(program: Program) -> dict[str, Tensor]:
    """Return the parameters by name."""
    names = {b.name for b in program.bindings.values() if b.kind == "parameter"}
    return {name: program.weights[name] for name in names}


if __name__ == "__main__":
    found = run(2)
    place = Path(sys.argv[1]) / ("first" if found.leads else "second")
    save_file(parameters(found.program), f"{place}.safetensors")
    place.with_suffix(".txt").write_text(f"{found.tokens} {found.looks[-1]['loss']}")
