"""Which keys a query sees, made and applied in the ways that models do."""

import torch
from torch import Tensor, nn

from attnopt.nouns import Mask
from fuzz_grammar.spec import MAX_POSITIONS, Spec


def expected_mask(spec: Spec) -> Mask:
    size = spec.size
    return {
        "none": Mask("none"),
        "causal": Mask("causal"),
        "sliding": Mask("sliding", window=size),
        "two_sided": Mask("sliding", window=size, right=size),
        "chunked": Mask("chunked", window=size),
        "prefix": Mask("prefix", prefix=size),
        "block": Mask("block", window=size),
    }[spec.mask]


class Visible(nn.Module):
    """The boolean mask of a kind, [1, 1, queries, keys]."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.kind, self.made, self.size = spec.mask, spec.mask_made, spec.size
        if self.made == "buffer":
            table = self.compared(MAX_POSITIONS)
            self.register_buffer("table", table, persistent=False)

    def forward(self, length: int) -> Tensor:
        if self.made == "buffer":
            return self.table[:, :, :length, :length]
        if self.made == "tril" and self.kind in ("causal", "sliding", "two_sided"):
            return self.triangle(length)
        return self.compared(length)

    def compared(self, length: int) -> Tensor:
        q, k, size = torch.arange(length)[:, None], torch.arange(length)[None, :], self.size
        if self.kind == "causal":
            visible = k <= q
        elif self.kind == "sliding":
            visible = (k <= q) & (q - k < size)
        elif self.kind == "two_sided":
            visible = (q - k).abs() <= size
        elif self.kind == "chunked":
            visible = (k <= q) & (q // size == k // size)
        elif self.kind == "block":
            visible = q // size == k // size
        else:
            visible = (k <= q) | (k < size)
        return visible[None, None]

    def triangle(self, length: int) -> Tensor:
        ones = torch.ones(length, length, dtype=torch.bool)
        if self.kind == "causal":
            return ones.tril()[None, None]
        if self.kind == "sliding":
            return ones.tril().triu(1 - self.size)[None, None]
        return ones.triu(-self.size).tril(self.size)[None, None]


def hide(scores: Tensor, visible: Tensor, form: str) -> Tensor:
    """Hide the keys that are not visible."""
    least = torch.finfo(scores.dtype).min
    if form == "fill_min":
        return scores.masked_fill(~visible, least)
    if form == "fill_inf":
        return scores.masked_fill(~visible, float("-inf"))
    if form == "where":
        return torch.where(visible, scores, torch.full([], least, dtype=scores.dtype))
    if form == "multiply":
        kept = visible.to(scores.dtype)
        return scores * kept - 1e4 * (1 - kept)
    return scores + additive(visible, form, scores.dtype)


def additive(visible: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """Turn a boolean mask into one that is added to the scores."""
    zero = torch.zeros(visible.shape, dtype=dtype)
    if form in ("add_inf", "fill_inf", "triu_inf"):
        return zero.masked_fill(~visible, float("-inf"))
    if form == "add_1e4":
        return (1.0 - visible.to(dtype)) * -1e4
    return torch.where(visible, zero, torch.finfo(dtype).min)


def upper_triangle(length: int, dtype: torch.dtype) -> Tensor:
    """The additive causal mask of `nn.Transformer`."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def hide_padding(scores: Tensor, padding: Tensor, form: str) -> Tensor:
    """Hide padded keys, given 1 or True for each real one in scores' axes."""
    least = torch.finfo(scores.dtype).min
    if form == "additive":
        return scores + (1.0 - padding.to(scores.dtype)) * least
    if form == "where":
        return torch.where(padding.to(torch.bool), scores, least)
    return scores.masked_fill(padding == 0, least)
