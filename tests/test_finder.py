"""The finder on small modules: what it finds, what it says, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnopt
from attnopt.finder import explain
from attnopt.passes import exact


class Attention(nn.Module):
    """A plain attention whose parts tests replace."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.q = nn.Linear(24, heads * width)
        self.kv = nn.Linear(24, 2 * kv_heads * width)
        self.o = nn.Linear(heads * width, 24, bias=False)

    def weights(self, scores):
        return torch.softmax(scores, dim=-1)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, self.width).permute(2, 0, 3, 1, 4)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = self.weights(q @ k.transpose(-1, -2) * 0.3) @ v
        return self.o(out.transpose(1, 2).reshape(b, t, -1))


class Returning(Attention):
    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
        w = torch.softmax(q @ q.transpose(-1, -2), dim=-1)
        return self.o((w @ q).transpose(1, 2).flatten(2)), w


class Negated(Attention):
    """Scores that no canonical form covers: an exponent that is not a softmax."""

    def weights(self, scores):
        return torch.sigmoid(scores)


class Hides(Attention):
    """Scores hidden by a large number, under log-sum-exp: blind queries cancel that number."""

    def forward(self, x, seen):
        q = self.q(x).view(*x.shape[:2], self.heads, 8).transpose(1, 2)
        scores = torch.where(seen[:, None], q @ q.transpose(-1, -2), -1e9)
        weights = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
        return self.o((weights @ q).transpose(1, 2).flatten(2))


class HidesTokensFirst(Hides):
    """The same with the tokens first and heads beside the batch: the scores are viewed for a mask.

    Where one head is left, its axis of size 1 is in the viewed scores alone.
    """

    def forward(self, x, seen):
        length, rows = x.shape[1], x.shape[0]
        q = self.q(x.transpose(0, 1)).view(length, -1, 8).transpose(0, 1)
        scores = torch.bmm(q, q.transpose(1, 2)).view(rows, -1, length, length)
        scores = torch.where(seen[:, None], scores, -1e9)
        weights = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))
        result = torch.bmm(weights.view(-1, length, length), q).transpose(0, 1)
        return self.o(result.reshape(length, rows, -1))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 3)
        self.experts = nn.Parameter(torch.randn(3, 24, 24))

    def forward(self, x):
        weights = torch.softmax(self.router(x), dim=-1)
        return torch.einsum("bte,btd,edf->btf", weights, x, self.experts)


def captured(module, size=(2, 11, 24)):
    torch.manual_seed(0)
    return attnopt.capture(module.eval(), (torch.randn(*size),))


def test_a_site_says_what_it_is():
    (site,) = captured(Attention()).sites
    assert (site.heads, site.kv_heads, site.head_dim, site.v_head_dim) == (4, 2, 8, 8)
    assert (site.kind, str(site.mask), site.bias, site.cached) == ("self", "none", "none", False)
    assert abs(site.scale - 0.3) < 1e-9


def test_projections_are_resolved_to_rows():
    (site,) = captured(Attention()).sites
    assert site.projections["q"].parameter == "q.weight"
    assert site.projections["q"].rows[1] == tuple(range(8, 16))
    assert site.projections["k"].rows[1] == tuple(range(8, 16))
    assert site.projections["v"].rows[0] == tuple(range(16, 24))
    assert (site.projections["o"].parameter, site.projections["o"].axis) == ("o.weight", 1)
    assert site.projections["q"].bias == "q.bias"
    assert site.projections["o"].bias is None


def test_the_exact_program_equals_the_source_at_other_sizes():
    module = Attention()
    program = attnopt.apply(captured(module), "exact")
    assert not program.refused
    for size in ((1, 1, 24), (3, 7, 24), (2, 63, 24)):
        x = torch.randn(*size)
        torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-6)


def test_repeated_heads_are_not_built():
    program = attnopt.apply(captured(Attention()), "exact")
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.attnopt.attention.default]
    assert [n.meta["val"].shape[1] for n in node.args] == [4, 2, 2]
    assert not any("repeat" in str(n.target) for n in program.graph.nodes)


def test_applying_leaves_the_program_as_it_was():
    program = captured(Attention())
    before = str(program.graph)
    attnopt.apply(program, "exact")
    assert str(program.graph) == before


def test_weights_that_are_returned_are_found_and_refused_with_the_reason():
    program = captured(Returning())
    exact = attnopt.apply(program, "exact")
    assert len(program.sites) == 1
    assert "read elsewhere" in exact.refused[0].why


def test_what_is_no_softmax_attention_is_a_near_miss():
    program = captured(Negated())
    assert not program.sites
    assert any("without a softmax" in miss.why for miss in program.near_misses)


def test_an_expert_gate_is_no_attention():
    assert not captured(Gate()).sites


def test_a_rewritten_program_shows_the_same_site():
    program = captured(Attention())
    again = attnopt.apply(program, "exact")
    assert again.sites == program.sites


def test_sites_of_a_shared_module_are_numbered():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            return self.inner(x + self.inner(x))

    assert [s.name for s in captured(Twice()).sites] == ["inner", "inner#2"]


def test_a_causal_sdpa_call_is_named():
    class Fused(Attention):
        def forward(self, x):
            q = self.q(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    (site,) = captured(Fused()).sites
    assert site.mask.kind == "causal"


def test_explain_shows_both_regions_and_reasons():
    program = captured(Attention())
    found = explain(program, program.sites[0].name)
    assert "softmax(" in found.before
    assert "attention(" in found.after
    assert any("4 heads of 8 over 2" in line for line in found.why)


def test_scores_scaled_by_a_wrong_factor_are_caught_by_the_proof(monkeypatch):
    right = exact.emit

    def wrong(writer, match):
        return right(writer, replace(match, scale=match.scale * 1.1))

    monkeypatch.setattr(exact, "emit", wrong)
    program = attnopt.apply(captured(Attention()), "exact")
    assert "differs from the source by" in program.refused[0].why


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-7])
@pytest.mark.parametrize("spelling", [Hides, HidesTokensFirst])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_proof_allows_for_what_blind_queries_round_and_for_nothing_else(
    monkeypatch, spelling, heads, factor
):
    right = exact.emit
    monkeypatch.setattr(
        exact, "emit", lambda writer, m: right(writer, replace(m, scale=m.scale * factor))
    )
    operands = (torch.randn(2, 11, 24), torch.rand(2, 11, 11) < 0.5)
    module = spelling(heads).eval()
    program = attnopt.apply(attnopt.capture(module, operands), "exact")
    assert len(program.sites) == 1
    assert len(program.refused) == (factor != 1.0)
