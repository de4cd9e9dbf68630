"""Graphs lose heads, channels and neurons: what is left computes as the masked source does."""

from functools import cache

import pytest
import torch
from narrowing import UNITS, Case, choices_of, distance, error_of, first
from torch import Tensor, nn

import attnopt
from attnopt.heads import Written, write_heads
from attnopt.nouns import Choice, No, Projection, Site
from attnopt.program import Program
from attnopt.rewriting import reweighted
from attnopt.surgery import GraphEdit, Kept, narrow

# By what is peculiar to each: grouped queries; fused qkv of a conv1d.
FAST = ("llama", "gpt2")
# Norms of q and k; fused qkv and gate-up; interleaved fused qkv; alibi with heads in the batch;
# no cache; tables by head; a window; sinks; partial interleaved rotation; soft caps; two parts;
# experts; one key head; learned queries; a complex rotation.
SLOW = (
    "qwen3 phi3 gpt_neox bloom bert vit modernbert swin mistral gpt_oss glm gemma2 cohere2 t5 bart "
    "whisper mixtral gpt_bigcode distilbert detr llama4_text"
).split()


@cache
def case(name: str) -> Case:
    return Case.of_zoo(name)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_what_is_left_computes_as_the_masked_source_does(name: str, unit: str) -> None:
    choices, refused = choices_of(case(name).program, unit)
    assert not refused
    if not choices:
        pytest.skip(f"{name} has no {unit} to spare")
    assert error_of(case(name), choices) < 1e-5


@pytest.mark.parametrize("name", FAST)
def test_nothing_removed_is_the_same_program(name: str) -> None:
    program = case(name).program
    things = (*program.mlps, *program.sites)
    plan = case(name).plan(tuple(Choice(t.name, "amp", {"groups": 0}) for t in things))
    result = attnopt.apply(program, plan)
    assert torch.equal(first(result(**case(name).call)), first(program(**case(name).call)))
    for binding in program.bindings.values():
        if binding.kind == "parameter":
            assert torch.equal(result.weights[binding.name], program.weights[binding.name])


class Attention(nn.Module):
    """Attention whose heads are narrow and unrotated, so that channels can go."""

    def __init__(self, *, reads_twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads_twice = reads_twice
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        made = torch.softmax(q @ k.mT / 2, -1) @ v
        result = self.o(made.transpose(1, 2).flatten(2))
        return result + v.sum() if self.reads_twice else result


def exact(*, reads_twice: bool = False) -> tuple[Program, Tensor]:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    module = Attention(reads_twice=reads_twice)
    return attnopt.apply(attnopt.capture(module, (x,)), "exact"), x


def mask(site: Site, heads: tuple[int, ...], channels: tuple[int, ...]) -> Tensor:
    stays = torch.ones(site.heads, site.head_dim, dtype=torch.bool)
    stays[list(heads)] = False
    stays[:, list(channels)] = False
    return stays


def masked(program: Program, site: Site, kept: Kept) -> Program:
    """Return the source in which the rows of q, k and v that go are zero."""
    found: dict[str, Tensor] = {}
    for name, stays in (("q", kept.q), ("k", kept.k), ("v", kept.v)):
        projection = site.projections[name]
        rows = torch.tensor(projection.rows)[~stays]
        for parameter in (projection.parameter, projection.bias):
            found[str(parameter)] = program.weights[str(parameter)].index_fill(0, rows, 0.0)
    return reweighted(program, found)


def narrowed(program: Program, site: Site, kept: Kept) -> Program:
    edit = GraphEdit.of(program)
    assert narrow(edit, site, kept) is None
    written = [Written(site.projections[n], getattr(kept, n)) for n in ("q", "k", "v")]
    changed = write_heads(program.weights, [*written, Written(site.projections["o"], kept.v)])
    edit.reshape_weights(changed)
    return edit.finish(changed, note="narrowed")


def test_values_lose_channels() -> None:
    program, x = exact()
    (site,) = program.sites
    kept = Kept(mask(site, (), ()), mask(site, (), ()), mask(site, (), (1, 3)))
    result = narrowed(program, site, kept)
    assert (result.sites[0].head_dim, result.sites[0].v_head_dim) == (4, 2)
    assert distance(result(x), masked(program, site, kept)(x)) < 1e-6


def test_keys_lose_channels_and_the_scale_stays() -> None:
    program, x = exact()
    (site,) = program.sites
    kept = Kept(mask(site, (), (2,)), mask(site, (), (2,)), mask(site, (), ()))
    result = narrowed(program, site, kept)
    assert (result.sites[0].head_dim, result.sites[0].scale) == (3, 0.5)
    assert distance(result(x), masked(program, site, kept)(x)) < 1e-6


def test_heads_and_channels_go_together() -> None:
    program, x = exact()
    (site,) = program.sites
    kept = Kept(mask(site, (1,), (2,)), mask(site, (1,), (2,)), mask(site, (1,), (0, 1, 2)))
    result = narrowed(program, site, kept)
    assert (result.sites[0].heads, result.sites[0].kv_heads) == (2, 2)
    assert distance(result(x), masked(program, site, kept)(x)) < 1e-6


def test_heads_cannot_keep_unlike_channels() -> None:
    program, _ = exact()
    (site,) = program.sites
    unlike = mask(site, (), ())
    unlike[0, 1] = False
    answer = narrow(GraphEdit.of(program), site, Kept(unlike, unlike, mask(site, (), ())))
    assert isinstance(answer, No)
    assert "unlike channels" in str(answer)


def test_what_something_else_reads_is_not_narrowed() -> None:
    program, _ = exact(reads_twice=True)
    (site,) = program.sites
    edit = GraphEdit.of(program)
    before = str(edit.graph)
    kept = mask(site, (1,), ())
    answer = narrow(edit, site, Kept(kept, kept, kept))
    assert isinstance(answer, No)
    assert "reads what would change" in str(answer)
    assert str(edit.graph) == before


def test_rotated_channels_cannot_go_alone() -> None:
    program = case("llama").program
    site = program.sites[0]
    whole = Kept.of(site)
    fewer = torch.arange(site.head_dim) != 1
    answer = narrow(GraphEdit.of(program), site, Kept(whole.q & fewer, whole.k & fewer, whole.v))
    assert isinstance(answer, No)


def test_the_rows_of_a_fused_parameter_are_written_together() -> None:
    weight = torch.arange(12.0).view(6, 2)
    first_rows = Projection("w", 0, ((0, 2), (4, 5)), "linear", "b")
    others = Projection("w", 0, ((1,), (3,)), "linear", "b")
    stays = torch.tensor([[True, True], [False, False]])
    maps = torch.tensor([[[9.0, 9, 7]]])
    changed = write_heads(
        {"w": weight, "b": torch.arange(6.0)},
        [Written(first_rows, stays), Written(others, torch.tensor([[False], [True]]), maps)],
    )
    assert changed["w"].tolist() == [[0, 1], [4, 5], [9, 9]]
    assert changed["b"].tolist() == [0, 2, 7]


class Twice(nn.Module):
    """Two layers with the parameters of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.layer(x)
            x = x + self.down(torch.relu(self.up(x)))
        return x


def test_parameters_of_two_layers_are_refused() -> None:
    x = torch.randn(2, 5, 12)
    found = Case.of(Twice(), {"x": x})
    assert (len(found.program.sites), len(found.program.mlps)) == (2, 2)
    for thing, config in (
        (found.program.sites[0], {"groups": 1}),
        (found.program.mlps[0], {"neurons": 1}),
    ):
        with pytest.raises(ValueError, match="shared with something else"):
            attnopt.apply(found.program, found.plan((Choice(thing.name, "amp", config),)))


def test_one_site_has_one_choice() -> None:
    found = case("llama")
    choice = Choice(found.program.sites[0].name, "amp", {"groups": 1})
    with pytest.raises(ValueError, match="has 2 choices for site"):
        attnopt.apply(found.program, found.plan((choice, choice)))
