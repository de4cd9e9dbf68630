"""Small random models of images, and what their rewrites are asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

import attnopt
from attnopt.nouns import Choice
from attnopt.passes import neighborhood
from attnopt.program import Program

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 4,
}

# Importing diffusers takes seconds.
_SLOW = ("dit", "unet", "conditional_unet")
NAMES = ("vit", "deit", *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW))


@dataclass(frozen=True)
class Captured:
    """The exact form of a model, and a call of other sizes than it was captured with."""

    program: Program
    call: Callable[[Any], torch.Tensor]


def rewritten(program: Program, **config: Any) -> Program:
    """Return a program with neighbourhoods at every site that has room for them."""
    settings = neighborhood.Config(**config)
    fitting = [s for s in program.sites if neighborhood.fits(s, settings) is True]
    assert fitting
    return attnopt.apply(
        program, attnopt.Plan(tuple(Choice(s.name, "neighborhood", config) for s in fitting))
    )


def noise(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Draw normal numbers."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def exact(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Program:
    """Capture a model and bring it to its exact form."""
    torch.manual_seed(0)
    return attnopt.apply(attnopt.capture(model.eval(), args, kwargs), "exact")


def vit() -> Captured:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    program = exact(model, pixel_values=noise(2, 3, 32, 32))
    return Captured(program, lambda run: run(pixel_values=noise(3, 3, 32, 32, seed=1)).logits)


def deit() -> Captured:
    torch.manual_seed(0)
    model = transformers.DeiTModel(transformers.DeiTConfig(**SMALL))
    program = exact(model, pixel_values=noise(2, 3, 32, 32))
    picture = noise(3, 3, 32, 32, seed=1)
    return Captured(program, lambda run: run(pixel_values=picture).last_hidden_state)


def swin() -> Captured:
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    program = exact(transformers.SwinModel(config), pixel_values=noise(2, 3, 32, 32))
    picture = noise(3, 3, 32, 32, seed=1)
    return Captured(program, lambda run: run(pixel_values=picture).last_hidden_state)


def dit() -> Captured:
    """Return a diffusion transformer; its zeros at the start are made numbers."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install attnopt[dev]")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        patch_size=1, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "linear" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, 0, 0.2)
    steps, labels = torch.tensor([3, 4]), torch.tensor([1, 2])
    program = exact(model, noise(2, 4, 8, 8), timestep=steps, class_labels=labels)
    call = {"timestep": torch.tensor([3, 4, 5]), "class_labels": torch.tensor([1, 2, 0])}
    return Captured(program, lambda run: run(noise(3, 4, 8, 8, seed=1), **call).sample)


_BLOCKS = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def unet() -> Captured:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install attnopt[dev]")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        **_BLOCKS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    program = exact(model, noise(2, 3, 16, 16), torch.tensor([3, 4]))
    picture, steps = noise(3, 3, 16, 16, seed=1), torch.tensor([3, 4, 5])
    return Captured(program, lambda run: run(picture, steps).sample)


def conditional_unet() -> Captured:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install attnopt[dev]")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        **_BLOCKS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
    )
    text = noise(2, 7, 24)
    program = exact(model, noise(2, 4, 16, 16), torch.tensor([3, 4]), text)
    picture, steps, words = noise(3, 4, 16, 16, seed=1), torch.tensor([3, 4, 5]), noise(3, 7, 24)
    return Captured(program, lambda run: run(picture, steps, words).sample)
