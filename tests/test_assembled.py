"""Attention that is read by structure: scores written together from pieces, weights in factors."""

import torch
from torch import nn

import attnopt
from attnopt.finder import explain


class Projected(nn.Module):
    """Queries, keys and values of 3 heads of 8, and what reads their results."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.o = nn.Linear(24, 24, bias=False)

    def heads(self, x, projection):
        return projection(x).view(*x.shape[:2], 3, 8).transpose(1, 2)

    def merged(self, x):
        return self.o(x.transpose(1, 2).flatten(2))


class Written(Projected):
    """Each half of the queries sees its own half of the keys: products are written into slices."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        half = x.shape[1] // 2
        scores = q.new_full((*q.shape[:3], half), -torch.inf)
        scores[:, :, :half] = q[:, :, :half] @ k[:, :, :half].transpose(-1, -2) * 0.3
        scores[:, :, half:] = q[:, :, half:] @ k[:, :, half:].transpose(-1, -2) * 0.3
        weights = torch.softmax(scores, dim=-1)
        return self.merged(
            torch.cat(
                [weights[:, :, :half] @ v[:, :, :half], weights[:, :, half:] @ v[:, :, half:]], 2
            )
        )


class Beside(Projected):
    """Scores of the first keys stand beside those of all keys."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        first = q @ k[:, :, :2].transpose(-1, -2)
        weights = torch.softmax(torch.cat([first, q @ k.transpose(-1, -2)], -1) / 4, dim=-1)
        return self.merged(weights[..., :2] @ v[:, :, :2] + weights[..., 2:] @ v)


class Factors(Projected):
    """The weights are a product of three softmaxes over landmarks."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        marks = [t.reshape(-1, 3, 2, x.shape[1] // 2, 8).mean(-2) for t in (q, k)]
        first = torch.softmax(q @ marks[1].transpose(-1, -2), -1)
        middle = torch.softmax(marks[0] @ marks[1].transpose(-1, -2), -1)
        last = torch.softmax(marks[0] @ k.transpose(-1, -2), -1)
        return self.merged((first @ (middle @ (2 - middle))) @ (last @ v))


class Gram(Projected):
    """Channels, not tokens, meet in products that are written together."""

    def forward(self, x):
        q, k, v = (p(x) for p in (self.q, self.k, self.v))
        scores = q.new_zeros(x.shape[0], 24, 24)
        scores[:, :12] = q[..., :12].transpose(1, 2) @ k
        scores[:, 12:] = q[..., 12:].transpose(1, 2) @ k
        return v @ torch.softmax(scores, dim=-1)


class Twice(nn.Module):
    """The second attention reads the result of the first without a projection in between."""

    def forward(self, x):
        for _ in range(2):
            x = torch.softmax(x @ x.transpose(-1, -2), dim=-1) @ x
        return x


def captured(module, tokens=12):
    torch.manual_seed(0)
    return attnopt.capture(module.eval(), (torch.randn(2, tokens, 24),), dynamic=False)


def test_scores_written_into_slices_are_one_site():
    (site,) = captured(Written()).sites
    assert (site.heads, site.kv_heads, site.head_dim, site.v_head_dim) == (3, 3, 8, 8)
    assert (site.kind, str(site.mask), site.scale) == ("self", "block(window=6)", 0.3)
    assert site.projections["q"].rows[1] == tuple(range(8, 16))
    assert {p.parameter for p in site.projections.values()} >= {"q.weight", "k.weight", "v.weight"}


def test_scores_that_stand_beside_others_are_one_site():
    (site,) = captured(Beside()).sites
    assert (site.heads, str(site.mask), site.scale) == (3, "none", 0.25)
    assert site.projections["o"].parameter == "o.weight"


def test_scores_too_many_to_number_leave_the_mask_unnamed(monkeypatch):
    monkeypatch.setattr("attnopt.finder.assembled._LARGEST", 100)
    (site,) = captured(Written()).sites
    assert (site.heads, site.scale, str(site.mask)) == (3, 0.3, "dense")


def test_exact_refuses_with_the_reason_and_changes_nothing():
    module = Written()
    program = captured(module)
    exact = attnopt.apply(program, "exact")
    assert "assembled from pieces" in exact.refused[0].why
    x = torch.randn(2, 12, 24)
    torch.testing.assert_close(exact(x), module(x), rtol=1e-5, atol=1e-6)


def test_softmaxes_whose_weights_are_multiplied_are_one_site():
    program = captured(Factors())
    (site,) = program.sites
    assert (site.heads, site.kv_heads, site.head_dim, site.v_head_dim) == (3, 3, 8, 8)
    assert site.notes[-1] == "3 softmaxes over parts of one attention"
    refused = attnopt.apply(program, "exact").refused
    assert len(refused) == 3
    assert site.notes[0] in {no.why for no in refused}
    assert not program.near_misses


def test_one_attention_after_another_is_two_sites():
    assert len(captured(Twice()).sites) == 2


def test_gram_matrices_that_are_written_together_are_no_attention():
    program = captured(Gram())
    assert not program.sites
    assert any("sums over tokens" in miss.why for miss in program.near_misses)


def test_explain_shows_a_site_that_is_read_by_structure():
    program = captured(Beside())
    found = explain(program, program.sites[0].name)
    assert "softmax(" in found.before
    assert found.after == ""
    assert any("assembled from pieces" in line for line in found.why)
