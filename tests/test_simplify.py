"""Masks become structure and padding where that is what they are, and stay operands otherwise."""

import pytest
import torch
from torch import nn

import attnopt
from attnopt.nouns import Mask
from attnopt.ops import attention
from attnopt.ops.structure import mask_of


class Masked(nn.Module):
    """Self-attention over 4 heads of 8 whose mask tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.distance = nn.Embedding(64, 4)

    def scores(self, scores, given):
        raise NotImplementedError

    def forward(self, x, attention_mask):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = self.scores(q @ k.transpose(-1, -2), attention_mask)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def positions(scores):
    place = torch.arange(scores.shape[-1])
    return place[:, None], place


class CausalPadded(Masked):
    def scores(self, scores, given):
        row, column = positions(scores)
        seen = (column <= row) & given.bool()[:, None, None, :]
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


class WindowInverted(Masked):
    """One in `given` hides a key."""

    def scores(self, scores, given):
        row, column = positions(scores)
        near = (row - column < 5) & (column <= row)
        return scores.masked_fill(~near | (given[:, None, None, :] == 1), -torch.inf)


class BiasPlusMask(Masked):
    """A learned bias and the mask are added up before they join the scores."""

    def scores(self, scores, given):
        row, column = positions(scores)
        bias = self.distance((row - column).clamp(0, 63)).permute(2, 0, 1)[None]
        seen = (column <= row) & given.bool()[:, None, None, :]
        least = torch.finfo(scores.dtype).min
        return scores + (bias + torch.zeros(seen.shape).masked_fill(~seen, least))


class TwoFills(Masked):
    """A blind query gives the mean of the keys before it: no structure says so."""

    def scores(self, scores, given):
        row, column = positions(scores)
        hidden = torch.zeros(scores.shape[-2:]).masked_fill(column > row, -torch.inf)
        padded = (1.0 - given[:, None, None, :].float()) * torch.finfo(scores.dtype).min
        return scores + (hidden + padded)


class Overwritten(Masked):
    """The padding is written over the causal mask: a blind query gives the mean of padded keys."""

    def scores(self, scores, given):
        row, column = positions(scores)
        scores = scores.masked_fill(column > row, -torch.inf)
        return scores.masked_fill(given[:, None, None, :] == 0, torch.finfo(scores.dtype).min)


class SmallFill(Masked):
    """A blind query sees its keys by their scores after all."""

    def scores(self, scores, given):
        row, column = positions(scores)
        seen = (column <= row) & given.bool()[:, None, None, :]
        return scores + torch.zeros(seen.shape).masked_fill(~seen, -1e4)


class MovedChunks(Masked):
    """Chunks counted from the first real token: padding moves the structure."""

    def scores(self, scores, given):
        row, column = positions(scores)
        place = given.cumsum(-1) - 1
        same = (place[:, :, None] // 4 == place[:, None, :] // 4)[:, None]
        seen = same & (column <= row) & given.bool()[:, None, None, :]
        return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


class ScaledAfterwards(Masked):
    """The number that hides is -1e4 as it is written, and a quarter of it in the softmax."""

    def scores(self, scores, given):
        row, column = positions(scores)
        kept = (column <= row).to(scores.dtype)
        return (scores * kept - 1e4 * (1 - kept)) * 0.25


class FarWindow(Masked):
    """No sample is long enough to tell this window from a causal mask."""

    def scores(self, scores, given):
        row, column = positions(scores)
        return scores.masked_fill((column > row) | (row - column >= 30000), -torch.inf)


def rewritten(module, ones=1):
    torch.manual_seed(0)
    given = torch.full((2, 11), ones)
    program = attnopt.capture(module.eval(), (torch.randn(2, 11, 32), given))
    return program, attnopt.apply(program, "exact")


def node_of(program):
    (node,) = [n for n in program.graph.nodes if n.target is attention]
    return node


def widest(program):
    """Return the most elements that a boolean tensor of the graph has, for one row of a batch."""
    sizes = [
        n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    return max((s[:1].numel() for s in sizes if s.dtype == torch.bool), default=0)


@pytest.mark.parametrize(
    ("cls", "ones", "mask"),
    [
        (CausalPadded, 1, Mask("causal")),
        (WindowInverted, 0, Mask("sliding", window=5)),
        (BiasPlusMask, 1, Mask("causal")),
    ],
)
def test_a_named_mask_becomes_structure_and_padding(cls, ones, mask):
    module = cls()
    program, exact = rewritten(module, ones)
    options = node_of(exact).kwargs
    assert mask_of(options) == mask
    assert "mask" not in options
    assert options["padding"].meta["val"].shape[1:3] == (1, 1)
    assert widest(exact) <= 13
    assert_equal_for_padded(module, exact, ones)
    assert exact.sites == program.sites


def assert_equal_for_padded(module, exact, ones=1):
    """Compare all queries for which the source gives numbers, those that see no key included."""
    x, given = torch.randn(3, 40, 32), torch.full((3, 40), ones)
    given[0, :7], given[1, 37:] = 1 - ones, 1 - ones
    want = module(x, given)
    for run in (exact, attnopt.lower(exact, backend="eager")):
        got = run(x, given)
        assert got.isfinite().all()
        seen = want.isfinite()
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "mean"), [(CausalPadded, True), (WindowInverted, False), (BiasPlusMask, True)]
)
def test_what_a_blind_query_gives_is_kept(cls, mean):
    exact = rewritten(cls(), 0 if cls is WindowInverted else 1)[1]
    assert node_of(exact).kwargs.get("mean_if_blind", False) is mean


def test_a_mask_that_is_scaled_afterwards_is_one():
    program, exact = rewritten(ScaledAfterwards())
    (site,) = program.sites
    assert (site.mask, site.bias) == (Mask("causal"), "none")
    assert not exact.refused


def test_what_is_added_beside_a_mask_stays_a_bias():
    options = node_of(rewritten(BiasPlusMask())[1]).kwargs
    assert options["bias"].meta["val"].shape[:2] == (1, 4)


@pytest.mark.parametrize("cls", [TwoFills, Overwritten, SmallFill])
def test_a_mask_of_which_blind_queries_tell_more_stays_a_bias(cls):
    module = cls()
    exact = rewritten(module)[1]
    assert not exact.refused
    assert mask_of(node_of(exact).kwargs) == Mask("none")
    assert_equal_for_padded(module, exact)


@pytest.mark.parametrize("cls", [MovedChunks, FarWindow])
def test_a_mask_that_the_name_does_not_cover_stays_an_operand(cls):
    options = node_of(rewritten(cls())[1]).kwargs
    assert "mask" in options
    assert mask_of(options) == Mask("none")


def test_a_wrong_name_is_caught_by_the_proof(monkeypatch):
    from attnopt.ops import structure

    monkeypatch.setattr(
        "attnopt.passes.exact.options_of",
        lambda mask: structure.options_of(Mask("sliding", window=6)),
    )
    module = CausalPadded()
    _, exact = rewritten(module)
    assert any("differs from the source by" in no.why for no in exact.refused)
