"""Tie the weights that a class of Transformers ties, but for those that differ.

A config may say that weights are tied of which a checkpoint holds two: T5 1.1, FLAN-T5 and mT5 have
a head of their own, and their configs know nothing of it. Transformers keeps such weights apart
when it loads them, and so does this.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def tie(model: Any, alike: Callable[[str, str], bool]) -> None:
    """Tie the weights of a model, in place; two names that are not `alike` get one each."""
    model.tie_weights()
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if not alike(target, source):
            _part(model, target)
            model.all_tied_weights_keys.pop(target, None)


def _part(model: nn.Module, name: str) -> None:
    """Give a name a parameter of its own, of which only the form is known."""
    path, _, last = name.rpartition(".")
    shared = model.get_parameter(name)
    own = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
    setattr(model.get_submodule(path), last, own)
