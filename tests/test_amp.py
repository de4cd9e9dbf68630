"""Removing heads and neurons: the least is lost, the rest makes up for it, in every basis."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import decoder, ids, turn_heads
from narrowing import distance
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import attnopt
from attnopt.calibrating import Statistics
from attnopt.heads import removable
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.passes import amp
from attnopt.program import Program
from attnopt.ridge import Dense, Few

Pair = tuple[Program, Statistics]


def calibrated(model: torch.nn.Module) -> Pair:
    program = attnopt.apply(attnopt.capture(model, (), {"input_ids": ids(2, 11)}), "exact")
    return program, attnopt.calibrate(program, ids(8, 24, seed=3))


@cache
def of(family: str) -> Pair:
    return calibrated(gpt2() if family == "gpt2" else decoder(family))


def gpt2() -> torch.nn.Module:
    """Return a model whose q, k and v are one parameter, with biases everywhere."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                        bos_token_id=0, eos_token_id=1)  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def pruned(pair: Pair, **config: Any) -> Program:
    program, stats = pair
    things = program.mlps if "neurons" in config else program.sites
    choices = tuple(Choice(t.name, "amp", config) for t in things)
    return attnopt.apply(program, attnopt.Plan(choices, statistics=stats))


def logits(program: Any) -> Tensor:
    return program(input_ids=ids(3, 17, seed=5)).logits.double()


def loss(thing: Site | Mlp, stats: Statistics, config: amp.Config) -> float:
    """Return the squared error of what a thing gives, when units go and the others are solved."""
    reader = thing.down if isinstance(thing, Mlp) else thing.projections["o"]
    chosen = amp._choose(thing, stats, config)
    error = stats.weights[reader.parameter].double().clone()
    kept = torch.tensor(reader.rows)[chosen.stays].flatten()
    error[:, kept] -= chosen.columns
    gram = stats.gram(reader.parameter)[:-1, :-1]
    return float(((error @ gram) * error).sum())


def test_the_growth_is_the_loss_after_compensation() -> None:
    program, stats = of("llama")
    site = program.sites[0]
    config = amp.Config(groups=1, ridge=1e-10)
    removal = amp._Removal(amp._Reader.of(site, stats), config)
    growth = removal._growth([(h,) for h in range(site.heads)])
    measured = loss(site, stats, config)
    assert float(growth.min()) == pytest.approx(measured, rel=1e-5)
    for score in ("amp", "flap", "l2", "random"):
        other = replace(config, score=score)
        gone = int((~amp._choose(site, stats, other).stays).nonzero())
        assert float(growth[gone]) == pytest.approx(loss(site, stats, other), rel=1e-5)


def test_the_growth_of_neurons_is_their_loss() -> None:
    program, stats = of("llama")
    mlp = program.mlps[0]
    config = amp.Config(neurons=1, ridge=1e-8)
    removal = amp._Removal(amp._Reader.of(mlp, stats), config)
    growth = removal._growth([(n,) for n in range(mlp.neurons)])
    assert float(growth.min()) == pytest.approx(loss(mlp, stats, config), rel=1e-4)


def test_compensation_loses_less_than_none() -> None:
    program, stats = of("llama")
    for thing, unit in ((program.sites[0], {"groups": 2}), (program.mlps[0], {"neurons": 10})):
        with_it, without = (loss(thing, stats, amp.Config(**unit, compensate=c)) for c in (1, 0))
        assert with_it < 0.95 * without


def test_a_twin_head_goes_without_loss() -> None:
    model = decoder("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[16:24] = projection.weight[:8]
    result = pruned(calibrated(model), groups=1, ridge=1e-10)
    assert [s.kv_heads for s in result.sites] == [3, 3]
    assert distance(logits(result), logits(model)) < 1e-4
    assert distance(logits(pruned(of("llama"), groups=1)), logits(decoder("llama"))) > 1e-2


def test_twin_neurons_go_without_loss() -> None:
    model = decoder("llama")
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[30:] = projection.weight[:10]
    result = pruned(calibrated(model), neurons=10, ridge=1e-10)
    assert [m.neurons for m in result.mlps] == [30, 30]
    assert distance(logits(result), logits(model)) < 1e-4


@pytest.mark.parametrize("score", ["obs", "amp"])
def test_the_basis_of_the_heads_does_not_matter(score: str) -> None:
    turned = decoder("llama")
    turn_heads(turned)
    results = [logits(pruned(p, groups=2, score=score)) for p in (of("llama"), calibrated(turned))]
    assert distance(results[1], results[0]) < 1e-4
    assert distance(results[0], logits(of("llama")[0])) > 1e-2


def test_the_order_of_the_heads_does_not_matter() -> None:
    model = decoder("llama")
    order = torch.tensor([2, 0, 3, 1])
    rows = (order.unsqueeze(1) * 8 + torch.arange(8)).flatten()
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows].clone())
    results = [logits(pruned(p, groups=2)) for p in (of("llama"), calibrated(model))]
    assert distance(results[1], results[0]) < 1e-5


def test_as_many_query_heads_go_from_every_group() -> None:
    pair = of("llama_gqa")
    for thing in pair[0].sites:
        stays = amp._choose(thing, pair[1], amp.Config(queries=1)).stays
        assert stays.view(thing.kv_heads, -1).sum(1).tolist() == [1] * thing.kv_heads
    result = pruned(pair, queries=1)
    assert [(s.heads, s.kv_heads) for s in result.sites] == [(4, 4), (4, 4)]
    both = pruned(pair, groups=1, queries=1)
    assert [(s.heads, s.kv_heads) for s in both.sites] == [(3, 3), (3, 3)]
    assert torch.isfinite(logits(both)).all()


def test_what_a_token_leaves_in_the_cache_is_what_was_said() -> None:
    pair = of("llama_gqa")
    result = pruned(pair, groups=3)
    said = amp.cost(pair[0].sites[0], amp.Config(groups=3), None)["kv_elements_per_token"]
    _, state = result.step({"input_ids": ids(2, 9)})
    assert sum(t.numel() for t in state.tensors.values()) == 2 * 9 * 2 * said


@pytest.mark.parametrize(
    ("family", "config"),
    [(f, {"neurons": 7}) for f in ("llama", "glm", "gpt2")]
    + [(f, {"groups": 1}) for f in ("llama_gqa", "qwen2", "gpt2")],
)
def test_as_many_parameters_go_as_were_counted(family: str, config: dict[str, int]) -> None:
    pair = of(family)
    things = pair[0].mlps if "neurons" in config else pair[0].sites
    result = pruned(pair, **config)
    gone = sum(w.numel() - result.weights[n].numel() for n, w in pair[0].weights.items())
    (count,) = config.values()
    assert gone == sum(count * removable(thing, pair[0].weights)[0] for thing in things) > 0


@pytest.mark.parametrize("rows", [5, 40])
def test_few_rows_solve_as_their_second_moment_does(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 12, dtype=torch.float64)
    few, dense = Few(x, 1e-3), Dense(x.T @ x / rows, 1e-3)
    stay, gone = torch.arange(0, 8), torch.arange(8, 12)
    places = torch.arange(12).view(4, 3)
    torch.testing.assert_close(few.energy(), dense.energy())
    torch.testing.assert_close(few.solve(stay, gone), dense.solve(stay, gone))
    torch.testing.assert_close(few.blocks(places), dense.blocks(places))
    for out in (torch.tensor([9, 10, 11]), torch.tensor([3, 4, 5])):
        torch.testing.assert_close(few.eliminate(out), dense.eliminate(out))
        left = torch.tensor([[0, 1, 2], [6, 7, 8]])
        torch.testing.assert_close(few.blocks(left), dense.blocks(left))


def test_eliminating_one_by_one_ends_where_the_solve_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12, dtype=torch.float64)
    weight = torch.randn(6, 12, dtype=torch.float64)
    step_by_step, ridge = weight.clone(), Dense(x.T @ x / 40, 1e-3)
    for out in (torch.tensor([9, 10, 11]), torch.tensor([8])):
        step_by_step += step_by_step[:, out] @ ridge.eliminate(out)
    stay, gone = torch.arange(0, 8), torch.arange(8, 12)
    at_once = weight[:, stay] + weight[:, gone] @ ridge.solve(stay, gone)
    torch.testing.assert_close(step_by_step[:, stay], at_once)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        ({"qk_norm": "full"}, {"groups": 1}, "norm over all heads"),
        ({"projections": {}}, {"groups": 1}, "q projection"),
        ({"kind": "cross", "cached": True}, {"groups": 1}, "made by another part"),
        ({}, {"groups": 4}, "0 to 3 can go"),
        ({}, {"groups": -1}, "0 to 3 can go"),
        ({}, {"queries": 2}, "0 to 1 can go"),
        ({}, {"neurons": 1}, "no neurons"),
    ],
)
def test_what_cannot_go_is_refused(change: dict, config: dict, words: str) -> None:
    site = of("llama_gqa")[0].sites[0]
    answer = amp.fits(replace(site, **change), amp.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)


@pytest.mark.parametrize(
    ("config", "words"), [({"groups": 1}, "no heads"), ({"neurons": 40}, "0 to 39 can go")]
)
def test_what_an_mlp_has_not_is_refused(config: dict, words: str) -> None:
    answer = amp.fits(of("llama")[0].mlps[0], amp.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)


def test_weights_with_axes_for_heads_are_refused() -> None:
    site = of("llama")[0].sites[0]
    einsum = {n: replace(p, layout="einsum") for n, p in site.projections.items()}
    assert not amp.fits(replace(site, projections=einsum), amp.Config(groups=1))


def reloaded(result: Program, folder: Path) -> Any:
    """Save and load; what is loaded has the same weights, and computes the same."""
    loaded: Any = attnopt.load(attnopt.save(result, folder))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, result.weights[name]), name
    with torch.no_grad():
        assert distance(logits(loaded), logits(result)) < 1e-6
    return loaded


def test_a_saved_result_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    result = pruned(of("llama_gqa"), groups=2)
    assert sum(p.numel() for p in reloaded(result, tmp_path / "out").parameters()) > 0


def test_fewer_heads_than_the_stock_class_allows_are_kept_as_a_program(tmp_path: Path) -> None:
    result = pruned(of("gpt2"), groups=1)
    loaded = reloaded(result, tmp_path / "out")
    assert "attnopt" in (tmp_path / "out" / "config.json").read_text()
    tokens = loaded.generate(ids(2, 9), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 14)
    want = result(input_ids=tokens[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(tokens[:, -1], want)
