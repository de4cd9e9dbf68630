"""Positions of language models without a cache: an input, because `generate()` gives them.

Transformers numbers the tokens of a row that is padded on the left from its first real token on.
A graph that numbers from the left by itself would write another text for such a row.
"""

import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from attnopt.frontend.calls import Example, counted
from attnopt.frontend.skeletons import Slot, take_apart

NAME = "position_ids"


def with_positions(source: nn.Module, example: Example) -> Example:
    """Make the positions explicit where the source counts from 0 if they are omitted."""
    ids = example.tensors.get("input_ids")
    given = example.skeleton.get(NAME) is not None or NAME not in example.signature.parameters
    if given or ids is None or ids.dim() != 2 or not _numbers_plainly(source):
        return example
    made = replace(
        example,
        skeleton={**example.skeleton, NAME: Slot(NAME)},
        tensors={**example.tensors, NAME: counted(ids)},
    )
    return made if _agree(source, example, made) else example


def _numbers_plainly(source: nn.Module) -> bool:
    """Tell whether what numbers tokens reads neither the tokens nor the mask for it."""
    try:
        texts = [
            inspect.getsource(type(module).forward)
            for module in source.modules()
            if {NAME, "inputs_embeds"} <= set(inspect.signature(module.forward).parameters)
        ]
    except (OSError, TypeError, ValueError):  # a class without a file, or not of Python
        return False
    numbering = [text for text in texts if f"{NAME} is None" in text]
    plain = [t for t in numbering if f"self.{NAME}[" in t or f"{NAME} = torch.arange(" in t]
    return bool(plain) and len(plain) == len(numbering) and not any("cumsum" in t for t in texts)


@torch.no_grad()
def _agree(source: nn.Module, without: Example, explicit: Example) -> bool:
    """Run both calls where there are weights to run: they must be the same."""
    if any(p.is_meta for p in source.parameters()):
        return True
    results: list[list[Tensor]] = []
    for example in (without, explicit):
        found: dict[str, Tensor] = {}
        take_apart(example.call(source, example.tensors), found.setdefault)
        results.append(list(found.values()))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))
