"""MLPs are found by meaning, and each neuron's rows are right: shown by running."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor, nn

import attnopt
from attnopt.nouns import Mlp
from attnopt.program import Program

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


def through_a_view(m: Block, x: Tensor, i: int) -> Tensor:
    rows = m.up[i](x.flatten(0, 1))
    return m.down[i](F.gelu(rows.clamp(-3, 3))).view(x.shape)


SPELLINGS = {f.__name__: f for f in (plain, gated, in_halves, interleaved, in_pairs, by_matmul,
                                     through_a_view)}  # fmt: skip


def captured(spelling: Callable[[Block, Tensor, int], Tensor]) -> Program:
    return attnopt.capture(Block(spelling), (torch.randn(2, 5, 6),), dynamic=False)


def with_rows(program: Program, mlp: Mlp, change: Callable[[Tensor], Tensor]) -> Program:
    """Return a program in which the rows of each neuron are what `change` makes of them."""
    found: dict[str, Tensor] = {}
    for projection in (*mlp.inputs, mlp.down):
        rows = torch.tensor(projection.rows)
        names = {projection.parameter: projection.axis}
        if projection is not mlp.down and projection.bias is not None:
            names[projection.bias] = 0
        for name, axis in names.items():
            new = found.get(name, program.weights[name]).clone().movedim(axis, 0)
            new[rows] = change(new[rows])
            found[name] = new.movedim(0, axis).contiguous()
    from attnopt.rewriting import reweighted

    return reweighted(program, found)


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]


def check_rows(program: Program, call: dict[str, Tensor], args: tuple[Tensor, ...] = ()) -> None:
    """Shuffle the neurons of all MLPs: the model is the same; leave the biases: it is not."""
    want = zoo.first_tensor(program(*args, **call))
    mixed, unlike = program, program
    for mlp in program.mlps:
        mixed = with_rows(mixed, mlp, shuffled)
        unlike = with_rows(unlike, replace(mlp, down=mlp.down, inputs=()), shuffled)
    size = want.abs().max()
    torch.testing.assert_close(zoo.first_tensor(mixed(*args, **call)) / size, want / size,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert (zoo.first_tensor(unlike(*args, **call)) - want).abs().max() > 1e-3 * size


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found_with_its_rows(spelling: str) -> None:
    program = captured(SPELLINGS[spelling])
    assert [m.neurons for m in program.mlps] == [10, 10]
    expected = spelling not in ("plain", "by_matmul", "through_a_view")
    assert {m.gated for m in program.mlps} == {expected}
    check_rows(program, {}, (torch.randn(2, 5, 6),))


@pytest.mark.parametrize("spelling", ["plain", "gated", "interleaved"])
def test_a_neuron_gone_from_its_inputs_is_a_neuron_gone_from_down(spelling: str) -> None:
    program = captured(SPELLINGS[spelling])
    x = torch.randn(2, 5, 6)

    def without(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[4] = 0
        return rows

    mlp = program.mlps[0]
    by_column = with_rows(program, replace(mlp, inputs=()), without)(x)
    assert (by_column - program(x)).abs().max() > 1e-3
    if spelling == "interleaved":  # the gate is 1 more than its row
        return
    by_rows = with_rows(program, replace(mlp, down=replace(mlp.down, rows=mlp.down.rows)), without)
    torch.testing.assert_close(by_rows(x), by_column)


def linear_only(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](m.up[i](x) * 2)


def of_two_inputs(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.silu(m.gate[i](x.flip(1))) * m.up[i](x))


def over_neurons(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.softmax(m.up[i](x), -1))


def normed(m: Block, x: Tensor, i: int) -> Tensor:
    return m.down[i](F.layer_norm(F.gelu(m.up[i](x)), (10,)))


def folded(m: Block, x: Tensor, i: int) -> Tensor:
    """The same row for two neurons, in another order: no neuron has a row of its own."""
    up = m.up[i](x)
    return m.down[i](F.silu(up) * up.flip(-1))


@pytest.mark.parametrize("other", [linear_only, of_two_inputs, over_neurons, normed])
def test_what_is_no_mlp_is_not_claimed(other: Callable[[Block, Tensor, int], Tensor]) -> None:
    assert captured(other).mlps == ()


def test_neurons_that_share_rows_are_not_claimed() -> None:
    program = captured(folded)
    for mlp in program.mlps:
        rows = [r for p in mlp.inputs for row in p.rows for r in row]
        assert len(rows) == len(set(rows))


LAYERS = 2
PLAIN = {
    "gpt2": 128, "opt": 64, "bloom": 128, "gpt_neox": 64, "phi": 64, "falcon_mq": 128, "bert": 64,
    "distilbert": 64, "vit": 64, "roberta": 64, "mpt": 128, "gpt_bigcode": 64, "starcoder2": 64,
    "gpt_neo": 64, "electra": 64, "deit": 64,
}  # fmt: skip
GATED = {
    "llama": 64, "mistral": 64, "qwen2": 64, "qwen3": 64, "gemma": 64, "gemma2": 64, "phi3": 64,
    "glm": 64, "cohere2": 64, "olmo": 64, "modernbert": 64, "nomic_bert": 64,
}  # fmt: skip
FAST = ("gpt2", "phi3", "vit")


def _marked(names: dict[str, int]) -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in FAST else slow) for n in names]


@pytest.mark.parametrize("name", _marked(PLAIN | GATED))
def test_models_have_one_mlp_a_layer(name: str) -> None:
    model, call, _ = zoo.build(name)
    program = attnopt.capture(model, (), call)
    assert [m.neurons for m in program.mlps] == [(PLAIN | GATED)[name]] * LAYERS
    assert {m.gated for m in program.mlps} == {name in GATED}
    check_rows(program, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"), [("mixtral", []), ("gpt_oss", []), ("dbrx", []), ("fnet", [64, 64])]
)
def test_experts_are_not_taken_for_plain_mlps(name: str, found: list[int]) -> None:
    model, call, _ = zoo.build(name)
    assert [m.neurons for m in attnopt.capture(model, (), call).mlps] == found
