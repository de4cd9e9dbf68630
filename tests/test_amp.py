"""Removing heads and neurons: the least is lost, the rest makes up for it, in every basis."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import captured, decoder, distance, ids, known, logits, turn_heads

import attnopt
from attnopt.calibrating import Statistics
from attnopt.heads import removable
from attnopt.nouns import Choice, Mlp, No, Site
from attnopt.passes import amp
from attnopt.program import Program
from attnopt.ridge import Dense, Few

Pair = tuple[Program, Statistics]


def pruned(pair: Pair, **config: Any) -> Program:
    program, stats = pair
    things = program.mlps if "neurons" in config else program.sites
    choices = tuple(Choice(t.name, "amp", config) for t in things)
    return attnopt.apply(program, attnopt.Plan(choices, statistics=stats))


def loss(thing: Site | Mlp, stats: Statistics, config: amp.Config) -> float:
    """Return the squared error of what a thing gives, when units go and the others are solved."""
    reader = thing.down if isinstance(thing, Mlp) else thing.projections["o"]
    chosen = amp.choose(thing, stats, config)
    error = stats.weights[reader.parameter].double().clone()
    kept = torch.tensor(reader.rows)[chosen.stays].flatten()
    error[:, kept] -= chosen.columns
    gram = stats.gram(reader.parameter)[:-1, :-1]
    return float(((error @ gram) * error).sum())


def losses_of_one_more(thing: Site | Mlp, stats: Statistics, gone: list[int]) -> dict[int, float]:
    """Return what is lost, with the others solved anew, when each unit goes beside some."""
    reader = thing.down if isinstance(thing, Mlp) else thing.projections["o"]
    weight, gram = stats.weights[reader.parameter].double(), stats.gram(reader.parameter)[:-1, :-1]
    found: dict[int, float] = {}
    for unit in set(range(len(reader.rows))) - set(gone):
        out = torch.tensor([reader.rows[u] for u in (*gone, unit)]).flatten()
        stay = torch.tensor([c for c in range(len(gram)) if c not in out])
        told = gram[out][:, stay] @ torch.linalg.solve(gram[stay][:, stay], gram[stay][:, out])
        error = weight[:, out] @ (gram[out][:, out] - told)
        found[unit] = float((error * weight[:, out]).sum())
    return found


@pytest.mark.parametrize(("kind", "count"), [("sites", 3), ("mlps", 4)])
def test_what_goes_first_is_what_costs_least_once_the_others_are_solved(
    kind: str, count: int
) -> None:
    program, stats = known("llama")
    (thing, *_) = getattr(program, kind)
    gone: list[int] = []
    for number in range(1, count + 1):
        found = losses_of_one_more(thing, stats, gone)
        gone.append(min(found, key=lambda unit: found[unit]))
        config = amp.Config(**{"groups" if kind == "sites" else "neurons": number}, ridge=1e-10)
        chosen = amp.choose(thing, stats, config)
        assert set((~chosen.stays).nonzero().flatten().tolist()) == set(gone)
        assert loss(thing, stats, config) == pytest.approx(min(found.values()), rel=1e-4)


@pytest.mark.parametrize("score", ["amp", "flap", "l2", "random"])
def test_whatever_goes_the_others_make_up_for_it(score: str) -> None:
    program, stats = known("llama")
    (site, *_) = program.sites
    config = amp.Config(groups=1, ridge=1e-10, score=score)
    gone = int((~amp.choose(site, stats, config).stays).nonzero())
    expected = losses_of_one_more(site, stats, [])[gone]
    assert loss(site, stats, config) == pytest.approx(expected, rel=1e-5)


def test_compensation_loses_less_than_none() -> None:
    program, stats = known("llama")
    for thing, unit in ((program.sites[0], {"groups": 2}), (program.mlps[0], {"neurons": 10})):
        with_it, without = (loss(thing, stats, amp.Config(**unit, compensate=c)) for c in (1, 0))
        assert with_it < 0.95 * without


def test_a_twin_head_goes_without_loss() -> None:
    model = decoder("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[16:24] = projection.weight[:8]
    result = pruned(captured(model), groups=1, ridge=1e-10)
    assert [s.kv_heads for s in result.sites] == [3, 3]
    assert distance(logits(result), logits(model)) < 1e-4
    assert distance(logits(pruned(known("llama"), groups=1)), logits(decoder("llama"))) > 1e-2


def test_twin_neurons_go_without_loss() -> None:
    model = decoder("llama")
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[30:] = projection.weight[:10]
    result = pruned(captured(model), neurons=10, ridge=1e-10)
    assert [m.neurons for m in result.mlps] == [30, 30]
    assert distance(logits(result), logits(model)) < 1e-4


@pytest.mark.parametrize("score", ["obs", "amp"])
def test_the_basis_of_the_heads_does_not_matter(score: str) -> None:
    turned = decoder("llama")
    turn_heads(turned)
    results = [logits(pruned(p, groups=2, score=score)) for p in (known("llama"), captured(turned))]
    assert distance(results[1], results[0]) < 1e-4
    assert distance(results[0], logits(known("llama")[0])) > 1e-2


def test_the_order_of_the_heads_does_not_matter() -> None:
    model = decoder("llama")
    order = torch.tensor([2, 0, 3, 1])
    rows = (order.unsqueeze(1) * 8 + torch.arange(8)).flatten()
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.copy_(projection.weight[rows].clone())
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows].clone())
    results = [logits(pruned(p, groups=2)) for p in (known("llama"), captured(model))]
    assert distance(results[1], results[0]) < 1e-5


def test_as_many_query_heads_go_from_every_group() -> None:
    pair = known("llama_gqa")
    for thing in pair[0].sites:
        stays = amp.choose(thing, pair[1], amp.Config(queries=1)).stays
        assert stays.view(thing.kv_heads, -1).sum(1).tolist() == [1] * thing.kv_heads
    result = pruned(pair, queries=1)
    assert [(s.heads, s.kv_heads) for s in result.sites] == [(4, 4), (4, 4)]
    both = pruned(pair, groups=1, queries=1)
    assert [(s.heads, s.kv_heads) for s in both.sites] == [(3, 3), (3, 3)]
    assert torch.isfinite(logits(both)).all()


def test_what_a_token_leaves_in_the_cache_is_what_was_said() -> None:
    pair = known("llama_gqa")
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
    pair = known(family)
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
    site = known("llama_gqa")[0].sites[0]
    answer = amp.fits(replace(site, **change), amp.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)


@pytest.mark.parametrize(
    ("config", "words"), [({"groups": 1}, "no heads"), ({"neurons": 40}, "0 to 39 can go")]
)
def test_what_an_mlp_has_not_is_refused(config: dict, words: str) -> None:
    answer = amp.fits(known("llama")[0].mlps[0], amp.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)


def test_weights_with_axes_for_heads_are_refused() -> None:
    site = known("llama")[0].sites[0]
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
    result = pruned(known("llama_gqa"), groups=2)
    assert sum(p.numel() for p in reloaded(result, tmp_path / "out").parameters()) > 0


def test_fewer_heads_than_the_stock_class_allows_are_kept_as_a_program(tmp_path: Path) -> None:
    result = pruned(known("gpt2"), groups=1)
    loaded = reloaded(result, tmp_path / "out")
    assert "attnopt" in (tmp_path / "out" / "config.json").read_text()
    tokens = loaded.generate(ids(2, 9), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert tokens.shape == (2, 14)
    want = result(input_ids=tokens[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(tokens[:, -1], want)
