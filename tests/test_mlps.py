"""MLPs are found by meaning, and each neuron's rows are right: shown by running."""

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

import attnopt
from attnopt.nouns import Mlp
from attnopt.program import Program
from attnopt.rewriting import reweighted

F = nn.functional


class Block(nn.Module):
    """Two residual MLPs of one spelling, and a head that reads what they give."""

    def __init__(self, spelling: Callable[["Block", Tensor, int], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.up = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.gate = nn.ModuleList(nn.Linear(6, 10) for _ in range(2))
        self.both = nn.ModuleList(nn.Linear(6, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(10, 6) for _ in range(2))
        self.turned = nn.Parameter(torch.randn(6, 10))
        self.back = nn.Parameter(torch.randn(10, 6))
        self.head = nn.Linear(6, 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in range(2):
            x = x + self.spelling(self, x, layer)
        return self.head(x)


def plain(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.gelu(m.up[i](x)))


def gated(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.silu(m.gate[i](x)) * m.up[i](x))


def in_halves(m: Block, x: Tensor, i: int) -> Tensor:
    gate, up = m.both[i](x).chunk(2, dim=-1)
    return m.down[i](F.silu(gate) * up)


def interleaved(m: Block, x: Tensor, i: int) -> Tensor:
    both = m.both[i](x)
    return m.down[i]((both[..., 1::2] + 1) * torch.sigmoid(1.7 * both[..., ::2]))


def in_pairs(m: Block, x: Tensor, i: int) -> Tensor:
    gate, up = m.both[i](x).unflatten(-1, (10, 2)).unbind(-1)
    return m.down[i](F.relu(gate).square() * up)


def by_matmul(m: Block, x: Tensor, i: int) -> Tensor:
    return torch.tanh(x @ m.turned * (1 + i)) @ m.back if i else m.down[0](F.relu(m.up[0](x)))


def by_convolution(m: Block, x: Tensor, i: int) -> Tensor:
    up = F.conv1d(x.mT, m.up[i].weight.unsqueeze(-1), m.up[i].bias)
    return F.conv1d(F.gelu(up), m.down[i].weight.unsqueeze(-1)).mT


def through_a_view(m: Block, x: Tensor, i: int) -> Tensor:
    rows = m.up[i](x.flatten(0, 1))
    return m.down[i](F.gelu(rows.clamp(-3, 3))).view(x.shape)


def piecewise(m: Block, x: Tensor, i: int) -> Tensor:
    up = m.up[i](x)
    below = (torch.expm1(torch.min(up, torch.tensor(-1e-6))) - up) * 0.3
    return m.down[i](torch.where(up > 0, 0.8 * up * up, below) + 0.5 * up)


SPELLINGS = {f.__name__: f for f in (plain, gated, in_halves, interleaved, in_pairs, by_matmul,
                                     by_convolution, through_a_view, piecewise)}  # fmt: skip


def captured(spelling: Callable[[Block, Tensor, int], Tensor]) -> Program:
    return attnopt.capture(Block(spelling), (torch.randn(2, 5, 6),), dynamic=False)


def with_rows(
    program: Program,
    mlp: Mlp,
    change: Callable[[Tensor], Tensor],
    parts: tuple[str, ...] = ("inputs", "down"),
) -> Program:
    """Return a program in which the rows or columns of each neuron are what `change` makes."""
    places = [(p.parameter, p.axis, p.rows) for p in mlp.inputs if "inputs" in parts]
    places += [(p.bias, 0, p.rows) for p in mlp.inputs if "inputs" in parts and p.bias]
    if "down" in parts:
        places.append((mlp.down.parameter, mlp.down.axis, mlp.down.rows))
    found: dict[str, Tensor] = {}
    for name, axis, rows in places:
        new = found.get(name, program.weights[name]).clone().movedim(axis, 0)
        index = torch.tensor(rows)
        new[index] = change(new[index])
        found[name] = new.movedim(0, axis).contiguous()
    return reweighted(program, found)


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]


def check_rows(program: Program, call: dict[str, Tensor], args: tuple[Tensor, ...] = ()) -> None:
    """Shuffle the neurons of all MLPs: the model is the same; leave the biases: it is not."""
    want = zoo.first_tensor(program(*args, **call))
    mixed, unlike = program, program
    for mlp in program.mlps:
        mixed = with_rows(mixed, mlp, shuffled)
        unlike = with_rows(unlike, mlp, shuffled, ("down",))
    size = want.abs().max()
    torch.testing.assert_close(zoo.first_tensor(mixed(*args, **call)) / size, want / size,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert (zoo.first_tensor(unlike(*args, **call)) - want).abs().max() > 1e-3 * size


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found_with_its_rows(spelling: str) -> None:
    program = captured(SPELLINGS[spelling])
    assert [m.neurons for m in program.mlps] == [10, 10]
    expected = spelling in ("gated", "in_halves", "interleaved", "in_pairs")
    assert {m.gated for m in program.mlps} == {expected}
    check_rows(program, {}, (torch.randn(2, 5, 6),))


@pytest.mark.parametrize("spelling", ["plain", "gated", "in_pairs"])
def test_a_neuron_gone_from_its_inputs_is_a_neuron_gone_from_down(spelling: str) -> None:
    program = captured(SPELLINGS[spelling])
    x = torch.randn(2, 5, 6)

    def without(rows: Tensor) -> Tensor:
        return rows.index_fill(0, torch.tensor([4]), 0.0)

    by_column, by_rows = (
        with_rows(program, program.mlps[0], without, (part,))(x) for part in ("down", "inputs")
    )
    assert (by_column - program(x)).abs().max() > 1e-3
    torch.testing.assert_close(by_rows, by_column)


def linear_only(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](m.up[i](x) * 2)


def of_two_inputs(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.silu(m.gate[i](x.flip(1))) * m.up[i](x))


def over_neurons(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.softmax(m.up[i](x), -1))


def normed(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.layer_norm(F.gelu(m.up[i](x)), (10,)))


def image(x: Tensor) -> Tensor:
    return x.mT.unsqueeze(-1)


def over_neighbours(m: Block, x: Tensor, i: int) -> Tensor:
    up = F.conv2d(image(x), m.up[i].weight[..., None, None].expand(-1, -1, 3, 1), padding=(1, 0))
    return m.down[i](F.gelu(up).squeeze(-1).mT)


def by_depth(m: Block, x: Tensor, i: int) -> Tensor:
    deep = F.conv2d(image(m.up[i](x)), m.back[:, :1, None, None], groups=10)
    return m.down[i](F.gelu(deep).squeeze(-1).mT)


def routed(m: Block, x: Tensor, i: int) -> Tensor:
    """Two experts, of which each token has one."""
    first = m.head(x)[..., :2].argmax(-1, keepdim=True) == 0
    return torch.where(first, gated(m, x, 0), 0.0) + gated(m, x, 1) * ~first


def weighed(m: Block, x: Tensor, i: int) -> Tensor:
    """An expert that all tokens share, weighed by a gate of its own."""
    return gated(m, x, i) * torch.sigmoid(m.head(x)[..., :1])


def folded(m: Block, x: Tensor, i: int) -> Tensor:
    """The same row for two neurons, in another order: no neuron has a row of its own."""
    up = m.up[i](x)
    return m.down[i](F.silu(up) * up.flip(-1))


NO_MLP = (linear_only, of_two_inputs, over_neurons, normed, over_neighbours, by_depth, routed)


@pytest.mark.parametrize("other", NO_MLP)
def test_what_is_no_mlp_is_not_claimed(other: Callable[[Block, Tensor, int], Tensor]) -> None:
    assert captured(other).mlps == ()


def test_an_expert_that_all_tokens_share_is_an_mlp() -> None:
    assert [m.neurons for m in captured(weighed).mlps] == [10, 10]


def test_neurons_that_share_rows_are_not_claimed() -> None:
    program = captured(folded)
    for mlp in program.mlps:
        rows = [r for p in mlp.inputs for row in p.rows for r in row]
        assert len(rows) == len(set(rows))


PLAIN = (
    "gpt2 opt gpt_neox phi bert distilbert vit roberta gpt_bigcode starcoder2 gpt_neo electra deit"
).split()
GATED = (
    "llama mistral qwen2 qwen3 gemma gemma2 phi3 glm cohere2 olmo modernbert nomic_bert"
).split()
WIDER = {"bloom": 128, "mpt": 128}
FAST = ("gpt2", "phi3", "vit")


def _marked(names: list[str]) -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in FAST else slow) for n in names]


@pytest.mark.parametrize("name", _marked([*PLAIN, *GATED, *WIDER]))
def test_models_have_one_mlp_a_layer(name: str) -> None:
    model, call, _ = zoo.build(name)
    program = attnopt.capture(model, (), call)
    assert [m.neurons for m in program.mlps] == [WIDER.get(name, 64)] * 2
    assert {m.gated for m in program.mlps} == {name in GATED}
    check_rows(program, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    # One dense layer each beside the experts; an expert that all tokens share.
    [
        ("mixtral", []),
        ("gpt_oss", []),
        ("dbrx", []),
        ("switch_transformers", [64, 64]),
        ("qwen2_moe", [64, 64]),
    ],
)
def test_experts_are_not_taken_for_plain_mlps(name: str, found: list[int]) -> None:
    model, call, _ = zoo.build(name)
    assert [m.neurons for m in attnopt.capture(model, (), call).mlps] == found
