"""Budgets: met exactly, the same in every layer or by measured damage; the solver is right."""

import itertools
from collections.abc import Callable
from typing import Any

import dha_models
import pytest
import torch
from dha_models import captured, decoder, exactly, ids, known, repeat_heads
from transformers import Qwen3Config, Qwen3ForCausalLM

import attnopt
from attnopt import optimizing
from attnopt.heads import removable
from attnopt.knapsack import Item, choose
from attnopt.nouns import Plan
from attnopt.passes import dha, latent
from attnopt.planning import NothingToDoError
from attnopt.program import Program


def size(program: Program) -> int:
    bound = [b.name for b in program.bindings.values() if b.kind == "parameter"]
    return sum(program.weights[n].numel() for n in bound)


def test_the_knapsack_is_solved_to_the_optimum() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = [
            [
                Item(i, float(w), float(d))
                for i, (w, d) in enumerate(torch.rand(4, 2, generator=draw))
            ]
            for _ in range(4)
        ]
        budget = 1.6
        fitting = [c for c in itertools.product(*rows) if sum(i.weight for i in c) <= budget]
        chosen = choose(rows, budget)
        if not fitting:
            assert chosen is None
            continue
        assert chosen is not None
        best = min(sum(i.damage for i in c) for c in fitting)
        assert sum(i.damage for i in chosen) == pytest.approx(best)
        assert sum(i.weight for i in chosen) <= budget * (1 + 1e-6)


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "qwen2"])
def test_a_budget_of_parameters_is_met_to_half_a_neuron_a_layer(family: str) -> None:
    program, stats = known(family)
    plan = attnopt.plan(program, {"params": 0.75}, statistics=stats)
    result = attnopt.apply(program, plan)
    unit, _ = removable(program.mlps[0], program.weights)
    assert abs(size(result) - 0.75 * size(program)) <= len(program.mlps) * unit / 2 + 1
    assert len({s.kv_heads for s in result.sites}) == 1
    assert len({m.neurons for m in result.mlps}) == 1


def test_what_cannot_be_removed_is_told() -> None:
    program, _ = known("llama")
    with pytest.raises(NothingToDoError, match="the least is 0"):
        attnopt.plan(program, {"params": 0.01}, ids(4, 24))
    with pytest.raises(ValueError, match="one budget"):
        attnopt.plan(program, {"params": 0.8, "kv_cache": 0.5}, ids(4, 24))


@pytest.mark.parametrize("tier", [1, 2])
def test_layers_and_kinds_have_budgets_of_their_own(tier: int) -> None:
    program, stats = captured(decoder("llama"), rows=16)
    plan = attnopt.plan(program, {"kv_cache": 0.5}, passes=["dha"], statistics=stats, tier=tier)
    result = attnopt.apply(program, plan)
    _, state = result.step({"input_ids": ids(1, 6)})
    kept = sum(t.numel() for t in state.tensors.values())
    _, state = program.step({"input_ids": ids(1, 6)})
    assert kept <= 0.5 * sum(t.numel() for t in state.tensors.values())
    alike = attnopt.apply(
        program, attnopt.plan(program, {"kv_cache": 0.5}, statistics=stats, tier=0)
    )
    tokens = ids(16, 24, seed=3)
    want = program(input_ids=tokens).logits
    errors = [float((p(input_ids=tokens).logits - want).norm()) for p in (result, alike)]
    assert errors[0] < 1.5 * errors[1]


def test_measured_damages_serve_another_budget() -> None:
    program, stats = captured(decoder("llama"))
    terms = {"statistics": stats, "tier": 1, "passes": ["dha"]}
    assert attnopt.plan(program, {"kv_cache": 0.5}, **terms).search.made > 0
    again = attnopt.plan(program, {"kv_cache": 0.25}, **terms)
    # One whole plan at most: that every head shares is known already.
    assert again.search.made <= 1
    other = program.with_weights({n: 2 * w for n, w in program.weights.items() if "v_proj" in n})
    assert attnopt.plan(other, {"kv_cache": 0.25}, **terms).search.made > 2 * len(program.sites)


def of_low_rank(model: torch.nn.Module) -> torch.nn.Module:
    """Leave half of the channels of every value head without what the others do not say."""
    for layer in model.model.layers:
        weight = layer.self_attn.v_proj.weight.view(2, 2, 8, -1)
        weight[:, 1] = weight[:, 0] * 0.5
    return model


def with_equal_heads(model: torch.nn.Module) -> torch.nn.Module:
    repeat_heads(model, 2)
    return model


@pytest.mark.parametrize(
    ("change", "expected"), [(of_low_rank, {"latent"}), (with_equal_heads, {"dha"})]
)
def test_of_two_passes_the_one_that_damages_less_is_chosen(
    change: Callable[[torch.nn.Module], torch.nn.Module],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = exactly(change(decoder("llama_wide")))
    stats = attnopt.calibrate(program, ids(8, 24, seed=3))
    goal = {"kv_cache": 0.75}
    # What needs no higher tier comes first, and what was asked for alone.
    assert rewrites(attnopt.plan(program, goal, statistics=stats)) == {"dha"}
    only = attnopt.plan(program, goal, passes=["latent"], statistics=stats, tier=2)
    assert rewrites(only) == {"latent"}
    monkeypatch.setattr(latent, "tier", 0)
    assert rewrites(attnopt.plan(program, goal, statistics=stats)) == expected
    for module in (dha, latent):
        monkeypatch.setattr(module, "damage", lambda *_: 0.25)
    assert rewrites(attnopt.plan(program, goal, statistics=stats)) == {"dha"}


def rewrites(plan: attnopt.Plan) -> set[str]:
    return {choice.rewrite for choice in plan.choices}


@pytest.mark.parametrize("found", [True, False])
def test_a_mixture_is_searched_for_where_all_layers_alike_lose_too_much(
    found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a search would find is given; without one, what was rejected is handed back."""
    program = exactly(decoder("llama"))
    asked: list[int] = []
    own = optimizing.make_plan

    def planned(*args: Any, tier: int, **kwargs: Any) -> Plan:
        asked.append(tier)
        if tier == 0:
            return own(*args, tier=tier, **kwargs)
        if not found:
            raise NothingToDoError("nothing of that kind")
        return Plan((), {"kv_cache": 0.5})

    monkeypatch.setattr(optimizing, "make_plan", planned)
    goal = {"kv_cache": 0.5, "max_drop": 1e-9}
    rows = ids(24, 24)
    result = attnopt.optimize(program, goal, data=rows)
    assert asked == [0, 2]
    assert result.accepted is found
    assert {c.rewrite for c in result.plan.choices} == (set() if found else {"dha"})
    asked.clear()
    # A tier that is asked for is kept, and a goal without a limit is met as it is.
    assert not attnopt.optimize(program, goal, data=rows, tier=0).accepted
    assert attnopt.optimize(program, {"kv_cache": 0.5}, data=rows).accepted
    assert asked == [0, 0]


def test_a_mixture_is_searched_for_where_no_uniform_plan_meets_the_goal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys that pass a norm are not fused: of Qwen3's cache three quarters are left."""
    config = Qwen3Config(**dha_models.SIZES)
    program = exactly(Qwen3ForCausalLM(config).eval().requires_grad_(False))
    asked: list[int] = []

    def planned(*args: Any, tier: int, **kwargs: Any) -> Plan:
        asked.append(tier)
        return Plan((), {"kv_cache": 0.5})

    monkeypatch.setattr(optimizing, "make_plan", planned)
    rows = ids(8, 24)
    with pytest.raises(NothingToDoError, match=r"no uniform plan leaves 0\.5"):
        attnopt.optimize(program, {"kv_cache": 0.5}, data=rows, tier=0)
    assert attnopt.optimize(program, {"kv_cache": 0.5}, data=rows).accepted
    assert asked == [2]


def test_a_mixture_is_searched_for_where_a_search_of_uniform_plans_finds_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Operations are searched for in tier 0, too; what it cannot do the next one is asked for."""
    program = exactly(decoder("llama"))
    asked: list[int] = []

    def planned(*args: Any, tier: int, **kwargs: Any) -> Plan:
        asked.append(tier)
        if tier == 0:
            raise NothingToDoError("no pass that treats all layers alike keeps the budget")
        return Plan((), {"flops": 0.9})

    monkeypatch.setattr(optimizing, "make_plan", planned)
    rows = ids(8, 24)
    assert attnopt.optimize(program, {"flops": 0.9}, data=rows).accepted
    assert asked == [0, 2]
    with pytest.raises(NothingToDoError, match="alike"):
        attnopt.optimize(program, {"flops": 0.9}, data=rows, tier=0)


@pytest.mark.slow
def test_a_search_that_follows_finds_what_loses_less() -> None:
    program = exactly(decoder("llama"))
    rows = ids(40, 24)
    alike = attnopt.optimize(program, {"kv_cache": 0.5}, data=rows, tier=0).report.drop.ci95[1]
    goal = {"kv_cache": 0.5, "max_drop": 0.8 * alike}
    result = attnopt.optimize(program, goal, data=rows, passes=["dha", "window"])
    assert result.accepted
    assert result.plan.search is not None
    assert result.measured["tier"] == 2
