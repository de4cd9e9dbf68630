"""The search: budgets are kept, rules obeyed, scores used again, and the same found every time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dha_models import captured, decoder, ids

import attnopt
from attnopt import debug
from attnopt.calibrating import Statistics
from attnopt.costs import Workload
from attnopt.nouns import Choice, Plan
from attnopt.passes import amp, dha, window
from attnopt.program import Program
from attnopt.search import Rule
from attnopt.search.candidates import Asked, Candidate, Step, following, steps_at
from attnopt.search.clock import Clock
from attnopt.search.scores import Scores
from attnopt.search.solving import Measured, Model, Scored, damages_of, solve
from attnopt.search.uniform import uniform_plans
from attnopt.search.weighing import cache_bytes, flops_of, weights_of

TOKENS = 24


@pytest.fixture(scope="module")
def known() -> tuple[Program, Statistics]:
    return captured(decoder("llama"), rows=16)


def planned(known: tuple[Program, Statistics], goal: Mapping[str, Any], **terms: Any) -> Plan:
    program, stats = known
    return attnopt.plan(program, goal, statistics=stats, **{"tier": 2, **terms})


def left(known: tuple[Program, Statistics], plan: Plan, name: str) -> float:
    workload = Workload(sequence=TOKENS)
    programs = (attnopt.apply(known[0], plan), known[0])
    after, before = (weights_of(p, workload)[name] for p in programs)
    return after / before


@pytest.mark.parametrize(
    ("goal", "passes"),
    [
        ({"kv_cache": 0.4}, ["dha"]),
        pytest.param({"kv_cache": 0.4}, ["dha", "window"], marks=pytest.mark.slow),
        pytest.param({"params": 0.8}, ["amp"], marks=pytest.mark.slow),
        pytest.param({"memory": 0.8}, ["amp"], marks=pytest.mark.slow),
        pytest.param({"params": 0.85, "kv_cache": 0.5}, ["amp"], marks=pytest.mark.slow),
    ],
)
def test_every_budget_is_kept(
    known: tuple[Program, Statistics], goal: dict[str, float], passes: list[str]
):
    plan = planned(known, goal, passes=passes)
    for name, share in goal.items():
        assert left(known, plan, name) <= share * (1 + 1e-9)
        assert plan.provenance["left"][name] == pytest.approx(left(known, plan, name), abs=1e-5)
    assert {c.rewrite for c in plan.choices} <= set(passes)


@pytest.mark.slow
def test_operations_and_time_are_budgets_in_any_tier(known: tuple[Program, Statistics]):
    plan = planned(known, {"flops": 0.8}, passes=["amp"], tier=0)
    assert plan.provenance["left"]["flops"] <= 0.8
    found = planned(known, {"latency": 0.97}, passes=["amp"], tier=1).search
    assert found.best.weights[0] <= 0.97 * found.weights["latency"]


def test_no_plan_is_worse_than_one_pass_everywhere(known: tuple[Program, Statistics]):
    found = planned(known, {"kv_cache": 0.5}, passes=["dha"]).search
    alike = [t for t in found.tried if t.name.endswith("everywhere")]
    assert {t.choices[0].rewrite for t in alike} == {"dha"}
    assert found.best.cost <= min(t.cost for t in alike)
    shares = [share for share, _ in found.front]
    costs = [cost for _, cost in found.front]
    assert shares == sorted(shares, reverse=True)
    assert costs == sorted(costs)
    (taken,) = [point for point in found.points if point.get("chosen")]
    assert taken["damage"] == found.best.cost
    assert taken["cost"] <= 0.5


def test_heads_that_are_fused_may_look_back_over_a_window(known: tuple[Program, Statistics]):
    program, stats = known
    assert following("dha", ("window", "amp")) == ["window"]
    site = program.sites[0]
    both = (
        Choice(site.name, "dha", {"kv_heads": 2}),
        Choice(site.name, "window", {"window": 8, "first": 2, "full": [1]}),
    )
    result = attnopt.apply(program, Plan(both, statistics=stats))
    workload = Workload(sequence=TOKENS)
    one = cache_bytes(program, workload) / (2 * site.kv_heads)
    # Of four heads two are fused away, and of the two that are left one keeps ten tokens.
    assert cache_bytes(result, workload) == pytest.approx(one * (4 + 1 + 10 / TOKENS))
    tokens = ids(2, 8)
    fused = attnopt.apply(program, Plan(both[:1], statistics=stats))
    wide = dict(both[1].config, window=TOKENS)
    whole = attnopt.apply(
        program, Plan((both[0], Choice(site.name, "window", wide)), statistics=stats)
    )
    error = (whole(input_ids=tokens).logits - fused(input_ids=tokens).logits).abs().max()
    assert float(error) < 1e-3 * float(fused(input_ids=tokens).logits.abs().max())


def test_what_cannot_follow_is_refused(known: tuple[Program, Statistics]):
    program, stats = known
    site = program.sites[0].name
    both = (Choice(site, "dha", {"kv_heads": 2}), Choice(site, "amp", {"groups": 1}))
    with pytest.raises(ValueError, match="pass 'amp' cannot follow 'dha' there"):
        attnopt.apply(program, Plan(both, statistics=stats))


def asked_of(known: tuple[Program, Statistics], **terms: Any) -> Asked:
    usual = {"goals": ("kv_cache",), "tier": 2, "tokens": TOKENS, "seen": TOKENS}
    return Asked(*known, **{**usual, **terms})


def test_rules_keep_sites_and_say_what_is_tried(known: tuple[Program, Statistics]):
    first, second = known[0].sites
    fixed = {"k_heads": 4}
    rules = (Rule(first.name, keep=True), Rule(layers=(1,), passes=("dha",), config=fixed))
    steps, refused = steps_at(first, asked_of(known), ("dha", "window"), rules)
    assert not steps
    assert "a rule says: keep model.layers.0.self_attn" in str(refused[0])
    steps, _ = steps_at(second, asked_of(known), ("dha", "window"), rules)
    assert {(s.rewrite, s.config.keys) for s in steps} == {("dha", 4)}
    with pytest.raises(ValueError, match="'keep nothing' decides about no site"):
        planned(known, {"kv_cache": 0.8}, rules=[Rule("nothing", keep=True)])
    kept = planned(known, {"kv_cache": 0.8}, passes=["dha"], tier=1, rules=rules[:1])
    assert {c.site for c in kept.choices} == {second.name}


def test_a_rule_about_nothing_is_told_before_anything_is_proved(
    known: tuple[Program, Statistics],
):
    heard: list[str] = []
    terms = {"rules": [Rule("nothing", keep=True)], "data": ids(16, TOKENS)}
    told = pytest.raises(ValueError, match="'keep nothing' decides about no site")
    with debug.hearing(lambda name, _: heard.append(name)), told:
        attnopt.optimize(known[0], {"kv_cache": 0.8}, **terms)
    assert heard == []


def test_heads_divide_among_devices(known: tuple[Program, Statistics]):
    plan = planned(known, {"kv_cache": 0.8}, passes=["amp"], tier=1, tensor_parallel=2)
    result = attnopt.apply(known[0], plan)
    assert all(s.heads % 2 == 0 and s.kv_heads % 2 == 0 for s in result.sites)
    assert any("do not divide among 2 devices" in str(no) for no in plan.search.refused)


def test_windows_are_not_judged_on_rows_shorter_than_the_text(known: tuple[Program, Statistics]):
    asked = asked_of(known, tokens=100)
    steps, refused = steps_at(known[0].sites[0], asked, ("dha", "window"))
    assert {s.rewrite for s in steps} == {"dha"}
    assert "rows of 24 tokens say nothing of a text of 100" in str(refused[0])


def test_a_tier_is_a_limit(known: tuple[Program, Statistics]):
    asked = asked_of(known, tier=1)
    steps, refused = steps_at(known[0].sites[0], asked, ("dha", "window"))
    assert [(s.config.keys, s.config.values) for s in steps] == [(2, 2), (1, 1)]
    assert any("its result needs tier 2, and 1 is asked for" in str(no) for no in refused)


class StoppedError(Exception):
    """An interruption."""


def test_a_search_goes_on_where_it_stopped(
    known: tuple[Program, Statistics], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program, data = known[0], ids(16, TOKENS)
    terms = {"passes": ["dha"], "tier": 1}
    whole = attnopt.plan(program, {"kv_cache": 0.5}, data, work=tmp_path / "whole", **terms)
    get, left_over = Scores.get, iter(range(2, 10**6, 4))
    limit = [0]

    def stopping(self: Scores, name: str, make: Any) -> Any:
        if name not in self and self.made >= limit[0]:
            raise StoppedError
        return get(self, name, make)

    monkeypatch.setattr(Scores, "get", stopping)
    stops, plan = 0, None
    while plan is None:
        limit[0] = next(left_over)
        try:
            plan = attnopt.plan(program, {"kv_cache": 0.5}, data, work=tmp_path / "cut", **terms)
        except StoppedError:
            stops += 1
            _tear(next((tmp_path / "cut").glob("*/scores-*.jsonl")))
    assert stops > 1
    assert plan == whole
    made = [attnopt.apply(program, p) for p in (plan, whole)]
    assert all(torch.equal(made[0].weights[n], made[1].weights[n]) for n in made[0].weights)


def _tear(file: Path) -> None:
    """Cut the last line of a file in two, as a crash may."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 7])


def test_another_budget_measures_little(known: tuple[Program, Statistics], tmp_path: Path):
    program, data = known[0], ids(16, TOKENS)
    terms = {"passes": ["dha"], "tier": 1, "work": tmp_path}
    first = attnopt.plan(program, {"kv_cache": 0.5}, data, **terms)
    again = attnopt.plan(program, {"kv_cache": 0.3}, data, **terms)
    assert again.search.made < first.search.made / 4
    assert attnopt.plan(program, {"kv_cache": 0.5}, data, **terms).search.made == 0


def test_a_plan_is_replayed_bit_for_bit(known: tuple[Program, Statistics], tmp_path: Path):
    plan = planned(known, {"kv_cache": 0.4}, passes=["dha"])
    plan.save(tmp_path / "plan.yaml")
    result = attnopt.apply(known[0], plan)
    again = attnopt.apply(known[0], Plan.load(tmp_path / "plan.yaml"))
    for name in again.weights:
        assert torch.equal(result.weights[name], again.weights[name]), name
    assert Plan.load(tmp_path / "plan.yaml").choices == plan.choices


def test_ops_that_attention_becomes_are_timed_as_they_run(known: tuple[Program, Statistics]):
    program, stats = known
    held: dict[str, Any] = {}
    clock = Clock(Scores(held=held), {"input_ids": ids(1, TOKENS)})
    for settings in ({"heads": 1}, {"heads": 3}):
        given = {"refit": False, "score": "norm", **settings}
        choices = tuple(Choice(s.name, "moh", given) for s in program.sites)
        assert clock.seconds(attnopt.apply(program, Plan(choices, statistics=stats))) > 0
    times = [n for n in held if n.startswith("fast op attnopt.routed_attention")]
    # One for each share of the rows that is on, whatever the layer.
    assert [n.split()[-1] for n in times] == ["0.25", "0.75"]


# ---------------------------------------------------------------------------------------- pieces


def test_scores_survive_what_a_crash_leaves(tmp_path: Path):
    file = tmp_path / "scores.jsonl"
    scores = Scores(file)
    assert scores.get("a", lambda: [0.1, None]) == [0.1, None]
    with file.open("ab") as cut:
        cut.write(b'["b", [0.')
    again = Scores(file)
    assert "b" not in again
    assert again.get("b", lambda: {"x": 1 / 3}) == {"x": 1 / 3}
    third = Scores(file)
    assert third.get("a", _never) == [0.1, None]
    assert third.get("b", _never) == {"x": 1 / 3}


def _never() -> Any:
    raise AssertionError("it is known")


def scored(site: str, label: str, weight: float, damage: float) -> Scored:
    steps = tuple(Step(n, dha.Config(1)) for n in label.split("+")) if label else ()
    return Scored(Candidate(site, steps), (weight,), damage)


def test_factors_are_learnt_from_whole_plans():
    plans = [
        Measured({"dha": 0.1, "window": 0.1}, 0.1 * 0.5 + 0.1 * 2.0),
        Measured({"dha": 0.2}, 0.2 * 0.5),
        Measured({"window": 0.3}, 0.3 * 2.0),
    ]
    model = Model.fitted(plans)
    assert model.factor("dha") == pytest.approx(0.5, rel=0.1)
    assert model.factor("window") == pytest.approx(2.0, rel=0.1)
    assert model.factor("dha+window") == pytest.approx(1.25, rel=0.1)
    assert model.factor("amp") == pytest.approx(1.25, rel=0.1)
    assert Model.fitted([]).factor("dha") == 1.0
    rows = [[scored("a", "dha", 1, 0.3), scored("a", "window", 1, 0.1)]]
    chosen = solve(rows, [1.0], model)
    assert chosen is not None
    assert [s.candidate.label for s in chosen] == ["dha"]
    assert damages_of(chosen) == {"dha": 0.3}


def test_uniform_plans_are_those_that_all_sites_can_have():
    config = {"a": dha.Config(2), "b": dha.Config(2), "c": dha.Config(4)}
    rows = {
        site: [
            scored(site, "", 4, 0.0),
            Scored(Candidate(site, (Step("dha", config[site]),)), (2.0,), 0.1),
            Scored(Candidate(site, (Step("window", window.Config(8, 2, (1,))),)), (1.0,), 0.2),
        ]
        for site in config
    }
    plans = uniform_plans(rows, dict.fromkeys(rows, "attention"))
    assert [len(found) for found in plans.values()] == [0, 1]
    (windows,) = plans["window", "attention"]
    assert windows.weights == (3.0,)


class Foreign:
    """A pass that attnopt has never heard of."""

    exact = False
    tier = 2
    Config = dha.Config
    follows = ("dha",)

    @staticmethod
    def candidates(site: Any) -> Iterator[Any]:
        return iter((dha.Config(2), dha.Config(1)))

    fits = staticmethod(dha.fits)
    cost = staticmethod(dha.cost)


def test_any_pass_is_asked_the_same_way(
    known: tuple[Program, Statistics], monkeypatch: pytest.MonkeyPatch
):
    from attnopt import passes as registry

    program, stats = known
    load = registry.load
    monkeypatch.setattr(registry, "load", lambda n: Foreign if n == "foreign" else load(n))
    asked = Asked(program, stats, ("kv_cache",), 2, TOKENS, TOKENS)
    steps, refused = steps_at(program.sites[0], asked, ("foreign",))
    assert [s.config.kv_heads for s in steps] == [2, 1]
    assert not refused
    assert steps_at(program.mlps[0], asked, ("foreign",)) == ([], [])
    assert following("dha", ("foreign", "window")) == ["foreign", "window"]


def test_proposals_fit_what_is_asked(known: tuple[Program, Statistics]):
    program, stats = known
    site, mlp = program.sites[0], program.mlps[0]
    low, high = (Asked(program, stats, ("params",), t, TOKENS, TOKENS) for t in (0, 2))
    assert [(c.keys, c.values) for c in dha.proposals(site, low)] == [(2, 2), (1, 1)]
    assert len(dha.proposals(site, high)) == 8
    assert dha.proposals(mlp, high) == ()
    assert {c.neurons > 0 for c in amp.proposals(mlp, high)} == {True}
    assert [c.groups for c in amp.proposals(site, high)] == [1, 2, 3]
    found = window.proposals(site, high)
    assert {len(c.full) for c in found} == {0, 1, 2, 3}
    json.dumps([Step("window", c).settings for c in found])


def test_what_only_moves_tokens_is_no_operation():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, intermediate_size=48, image_size=32, patch_size=4)
    model = transformers.ViTForImageClassification(config).eval()
    program = attnopt.capture(model, (), {"pixel_values": torch.randn(2, 3, 32, 32)})
    (site,) = program.sites
    whole = flops_of(program, Workload(sequence=0))
    for settings in ({"window": 4, "tile": [2, 2]}, {"window": 4}):
        plan = Plan((Choice(site.name, "neighborhood", settings),))
        flops = flops_of(attnopt.apply(program, plan), Workload(sequence=0))
        assert flops is not None
        assert whole is not None
        assert flops < whole
