"""What healing minimises and what it is watched by, always one number a row.

The mean over rows is then the same however the rows are dealt to batches and processes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.calibrating import kept_tokens


def distance(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], inputs: Mapping[str, Tensor]
) -> Tensor:
    """Return the mean over regions of the squared error of the output, relative to its energy."""
    kept = kept_tokens(inputs)
    return torch.stack([relative(a, b, kept) for a, b in zip(ours, theirs, strict=True)]).mean()


def relative(ours: Tensor, theirs: Tensor, kept: Tensor | None) -> Tensor:
    """Return the mean over rows of the squared error over the energy, of the tokens kept."""
    ours, theirs = ours.float(), theirs.float()
    if kept is not None and ours.shape[:2] == kept.shape:
        where = kept.unsqueeze(-1)
        ours, theirs = ours * where, theirs * where
    error = (ours - theirs).flatten(1).square().sum(1)
    energy = theirs.flatten(1).square().sum(1)
    return (error / energy.clamp_min(_TINY)).mean()


def divergence(
    ours: Tensor,
    theirs: Tensor,
    inputs: Mapping[str, Tensor],
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the Kullback-Leibler divergence from the teacher's distribution, nats a token, by row.

    With `top_k` both distributions are those over the teacher's likeliest tokens. The temperature
    divides the logits; its square multiplies the result, so that gradients keep their size.
    """
    ours, theirs = ours.float(), theirs.float()
    if top_k is not None and top_k < theirs.shape[-1]:
        theirs, index = theirs.topk(top_k, dim=-1)
        ours = ours.gather(-1, index)
    log_p = functional.log_softmax(theirs / temperature, dim=-1)
    log_q = functional.log_softmax(ours / temperature, dim=-1)
    lost = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    return _by_row(lost, inputs.get("attention_mask"))


def surprise(logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of the next token, nats a token, by row."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    lost = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return _by_row(lost, None if mask is None else mask[:, 1:])


def continues_text(logits: Tensor, inputs: Mapping[str, Tensor]) -> bool:
    """Tell whether there is a next token for every position of the logits."""
    ids = inputs.get("input_ids")
    return ids is not None and logits.dim() == 3 and logits.shape[:2] == ids.shape


def _by_row(lost: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of each row over the positions that count."""
    if lost.dim() == 1:
        return lost
    if mask is not None and mask.shape == lost.shape:
        return (lost * mask).sum(1) / mask.sum(1).clamp_min(1)
    return lost.flatten(1).mean(1)


_TINY = 1e-30
