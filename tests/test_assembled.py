"""Attention that is read by structure: scores written together from pieces, weights in factors."""

import pytest
import torch
import zoo
from torch import nn

import attnopt
from attnopt.finder import explain
from attnopt.rewriting import rewrite_exactly


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


class Bent(Projected):
    """What is written together is bent before the softmax, which no attention is."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        half = x.shape[1] // 2
        scores = q.new_zeros((*q.shape[:3], x.shape[1]))
        scores[:, :, :half] = q[:, :, :half] @ k.transpose(-1, -2)
        scores[:, :, half:] = q[:, :, half:] @ k.transpose(-1, -2)
        return self.merged(torch.softmax(scores * scores.abs(), dim=-1) @ v)


class Padded(Projected):
    """Padded keys are hidden where scores are written together; padded queries give nothing."""

    def forward(self, x, mask):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        penalty = ((1 - mask) * torch.finfo(x.dtype).min)[:, None, None]
        scores = q.new_zeros((*q.shape[:3], x.shape[1]))
        hiding = q.new_zeros((len(x), 1, *scores.shape[2:]))
        for part in (slice(0, 5), slice(5, None)):
            scores[:, :, :, part] = q @ k[:, :, part].transpose(-1, -2)
            hiding[:, :, :, part] = penalty[..., part]
        weights = torch.softmax(scores + hiding, dim=-1)
        return self.merged(weights.masked_fill((mask == 0)[:, None, :, None], 0.0) @ v)


class Parted(Projected):
    """Scores are written together from two parts of the keys; the rest differs by case."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        scores = q.new_zeros((*q.shape[:3], x.shape[1]))
        scores[..., :5] = q @ k[:, :, :5].transpose(-1, -2)
        scores[..., 5:] = q @ k[:, :, 5:].transpose(-1, -2)
        return self.weighed(scores, v, x)


class Shuffled(Parted):
    """The weights of a key meet the values of the one before it."""

    def weighed(self, scores, v, x):
        return self.merged(torch.softmax(scores, dim=-1) @ v.roll(1, 2))


class Thinned(Parted):
    """Weights are taken away by key, and what is left does not add up to one."""

    def weighed(self, scores, v, x):
        weights = torch.softmax(scores, dim=-1)
        return self.merged(weights.masked_fill((x[..., 0] > 0)[:, None, None], 0.0) @ v)


class Shown(Parted):
    """The weights are a result, too."""

    def weighed(self, scores, v, x):
        weights = torch.softmax(scores, dim=-1)
        return self.merged(weights @ v), weights


class Tilted(Parted):
    """What the model computes is added to the scores."""

    def weighed(self, scores, v, x):
        return self.merged(torch.softmax(scores + x[:, None, :, :12], dim=-1) @ v)


class Halved(Projected):
    """Each half of the tokens sees itself, however many they are."""

    def forward(self, x):
        q, k, v = (self.heads(x, p) for p in (self.q, self.k, self.v))
        scores = torch.full_like(q @ k.transpose(-1, -2), -torch.inf)
        half = (x.shape[1] + 1) // 2
        scores[:, :, :half, :half] = q[:, :, :half] @ k[:, :, :half].transpose(-1, -2)
        scores[:, :, half:, half:] = q[:, :, half:] @ k[:, :, half:].transpose(-1, -2)
        return self.merged(torch.softmax(scores, dim=-1) @ v)


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


def ops_of(program):
    """Return the options of every canonical op, tensors by their names."""
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.attnopt.attention.default)
    return [dict(n.kwargs) for n in nodes]


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


def test_exact_rewrites_scores_written_into_slices():
    module = Written()
    exact = attnopt.apply(captured(module), "exact")
    assert not exact.refused
    assert ops_of(exact) == [{"scale": 0.3, "chunk": 6}]
    x = torch.randn(2, 12, 24)
    torch.testing.assert_close(exact(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exact_joins_scores_that_stand_side_by_side(dynamic):
    module = Beside().eval()
    program = attnopt.capture(module, (torch.randn(2, 12, 24),), dynamic=dynamic)
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    assert ops_of(exact) == [{"scale": 0.25}]
    x = torch.randn(2, 12, 24)
    torch.testing.assert_close(exact(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exact_hides_padded_keys_and_empties_padded_queries(dynamic):
    module = Padded().eval()
    program = attnopt.capture(module, (torch.randn(2, 12, 24), torch.ones(2, 12)), dynamic=dynamic)
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    assert set(ops_of(exact)[0]) == {"scale", "bias"}
    masks = torch.tensor([[1.0] * 12, [0.0] * 3 + [1.0] * 9, [1.0, 0.0] * 6, [0.0] * 12])
    x = torch.randn(2, 12, 24)
    for mask in (masks[:2], masks[2:]):
        torch.testing.assert_close(exact(x, mask), module(x, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [Bent, Shuffled, Thinned, Shown, Tilted])
def test_exact_refuses_with_the_reason_and_changes_nothing(case):
    module = case()
    program = captured(module)
    exact = attnopt.apply(program, "exact")
    assert "assembled from pieces" in exact.refused[0].why
    assert not ops_of(exact)
    x = torch.randn(2, 12, 24)
    torch.testing.assert_close(exact(x), module(x), rtol=1e-5, atol=1e-6)


def test_pieces_are_left_where_a_proof_would_take_too_long():
    changed, done = rewrite_exactly(captured(Written()), {}, largest_proof=100)
    assert not done
    assert not ops_of(changed)


def test_a_mask_whose_name_fits_one_size_alone_is_not_written_for_all():
    program = attnopt.capture(Halved().eval(), (torch.randn(2, 12, 24),))
    assert str(program.sites[0].mask).startswith("block")
    assert not ops_of(attnopt.apply(program, "exact"))
    assert ops_of(attnopt.apply(captured(Halved()), "exact")) == [{"scale": 1.0, "chunk": 6}]


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
    assert "attention(" in found.after
    assert any("assembled from pieces" in line for line in found.why)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["longformer", "led"])
def test_exact_rewrites_bands_of_the_zoo(name):
    model, kwargs = zoo.build(name)[:2]
    program = attnopt.capture(model.eval(), kwargs=kwargs)
    assert "assembled from pieces" in program.sites[0].notes[0]
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    parts = exact.parts.values() if exact.parts else (exact,)
    windows = [options for part in parts for options in ops_of(part) if "right" in options]
    assert [(o["window"], o["right"]) for o in windows] == [(4, 4), (4, 4)]
    torch.testing.assert_close(exact(**kwargs)[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("name", ["longformer", "led"])
def test_bands_of_the_zoo_are_rewritten_when_compiled(name):
    model, kwargs = zoo.build(name)[:2]
    torch._dynamo.reset()
    attnopt.compile_report(reset=True)
    options = {"inner": "eager", "on_miss": "error"}
    compiled = torch.compile(model.eval(), backend="attnopt", options=options, dynamic=False)
    kwargs["attention_mask"][1, -5:] = 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(**kwargs)[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)
    report = attnopt.compile_report()
    assert report.rewritten == report.found
    assert len(report.found) >= 2


@pytest.mark.slow
def test_exact_rewrites_every_block_of_queries_of_bigbird():
    model, kwargs = zoo.build("big_bird_sparse")[:2]
    program = attnopt.capture(model.eval(), kwargs=kwargs)
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    assert len(ops_of(exact)) == 5 * len(program.sites)
    kwargs["attention_mask"][1, -13:] = 0
    torch.testing.assert_close(exact(**kwargs)[0], model(**kwargs)[0], rtol=1e-4, atol=1e-5)
