"""Agents in models of images: what they compute, how they are fitted, where they are refused."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import vision_models
from vision_models import noise

import attnopt
from attnopt.costs import Workload, count_costs
from attnopt.fitting import Trial, fit_agents
from attnopt.nouns import Choice, Grid, Mask, No
from attnopt.ops import agent_attention, attention
from attnopt.passes import agent
from attnopt.passes.agent import Config
from attnopt.rewriting import settled
from attnopt.search.candidates import Asked, steps_at
from tests.agent_models import SAID, block, distance, rewritten

DIGITS = Path(__file__).parents[1] / "examples" / "models" / "vit-digits"


@cache
def digits():
    return attnopt.apply(attnopt.capture(DIGITS), "exact")


@cache
def statistics():
    return attnopt.calibrate(digits(), {"pixel_values": noise(4, 1, 32, 32, seed=2)})


@cache
def captured(name):
    return getattr(vision_models, name)()


def logits(program, count=3):
    return program(pixel_values=noise(count, 1, 32, 32, seed=1)).logits


def plan_of(program, stats=None, **config):
    choices = tuple(Choice(s.name, "agent", config) for s in program.sites)
    return attnopt.Plan(choices, statistics=stats)


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_no_agents_change_no_bit(name):
    model = captured(name)
    result = rewritten(model.program)
    assert torch.equal(model.call(result), model.call(model.program))
    assert not result.main.graph.find_nodes(op="call_function", target=agent_attention)
    assert result.tier == model.program.tier


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_with_every_token_an_agent_the_nystrom_core_reproduces_the_source(name):
    model = captured(name)
    config = {"agents": 64, "core": "nystrom", "exponent": 1.0, "shortcut": 0.0, "ridge": 0.0}
    result = rewritten(model.program, **config, steps=40)
    assert result.main.graph.find_nodes(op="call_function", target=agent_attention)
    assert distance(model.call(result), model.call(model.program)) < 1e-3


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_tokens_meet_through_agents(name):
    model = captured(name)
    result = rewritten(model.program, agents=[2, 3], **SAID)
    nodes = result.main.graph.find_nodes(op="call_function", target=agent_attention)
    assert nodes
    assert {tuple(n.kwargs["agents"]) for n in nodes} == {(2, 3)}
    left = [s.name for s in model.program.sites if agent.fits(s, Config([2, 3]))]
    assert len(nodes) == len(left)
    assert distance(model.call(result), model.call(model.program)) > 1e-5


def test_no_tensor_of_all_pairs_is_left_in_the_graph():
    result = rewritten(digits(), agents=16, **SAID)
    assert not result.graph.find_nodes(op="call_function", target=attention)


REFUSED = {
    "causal or has a cache": ({"mask": Mask("causal")}, Config(16)),
    "no token from another|has a cache": ({"cached": True}, Config(16)),
    "hide none": ({"padded": True}, Config(16)),
    "its mask is sliding": ({"mask": Mask("sliding", window=3, right=3)}, Config(16)),
    "other tokens": ({"kind": "cross"}, Config(16)),
    "not those of an image": ({"grid": None}, Config(16)),
    "4 query heads share 2 key heads": ({"kv_heads": 2}, Config(16)),
    "its bias": ({"bias": "table"}, Config(16)),
    "its softcap": ({"softcap": 30.0}, Config(16)),
    "its sinks": ({"sinks": True}, Config(16)),
    "10 agents are no square; choose 9 or 16": ({}, Config(10)),
    "agents 17 x 17 of a grid of 16 x 16": ({}, Config(289)),
    "agents 0 x 0": ({}, Config(0)),
    "agents 4 of a grid": ({}, Config([4])),
    "it is free or trained": ({}, Config(16, mode="quick")),
    "it is plain or nystrom": ({}, Config(16, core="svd")),
    "no trained form": ({}, Config(16, mode="trained", core="nystrom")),
    "2 shortcuts": ({}, Config(16, shortcut=[0.1, 0.2])),
    "from 0 and from 1": ({}, Config(16, ridge=-1.0)),
    "the lowest, and the one after": ({}, Config(16, timesteps=[5, 5])),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_agents_is_refused_with_the_reason(why):
    facts, config = REFUSED[why]
    site = replace(digits().sites[0], **facts)
    refusal = agent.fits(site, config)
    assert isinstance(refusal, No)
    assert refusal.where == site.name
    assert re.search(why, refusal.why)


def test_a_plan_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="no square"):
        attnopt.apply(digits(), plan_of(digits(), agents=10))
    with pytest.raises(ValueError, match=r"no tensor 'timestep'.*pixel_values"):
        attnopt.apply(digits(), plan_of(digits(), agents=16, timesteps=[0, 9], **SAID))
    with pytest.raises(ValueError, match="no statistics"):
        attnopt.apply(digits(), plan_of(digits(), agents=16))


def test_the_candidates_fit():
    site = digits().sites[0]
    assert [c.agents for c in agent.candidates(site)] == [(8, 8), (4, 4), (2, 2)]
    assert all(agent.fits(site, c) is True for c in agent.candidates(site))
    odd = replace(site, grid=Grid(7, 3, 1))
    assert all(agent.fits(odd, c) is True for c in agent.candidates(odd))
    assert agent.candidates(replace(site, grid=None)) == (Config(),)


def test_the_cost_is_that_of_the_pairs_of_tokens_and_agents():
    site = digits().sites[0]
    pairs = (1 + 16) * 257 + 256 * 16
    assert agent.cost(site, Config(), None)["flops"] == 2 * 4 * 32 * 257**2
    through = agent.cost(site, Config(16), None)["flops"]
    assert through == 2 * 4 * 32 * pairs
    workload = Workload(1, 0)
    before = count_costs(digits(), workload).flops
    after = count_costs(rewritten(digits(), agents=16, **SAID), workload).flops
    dense = agent.cost(site, Config(), None)["flops"]
    assert before - after == pytest.approx(4 * (dense - through), abs=8)


def test_a_rewritten_site_is_found_again_with_its_grid():
    result = rewritten(digits(), agents=16, **SAID)
    assert [s.name for s in result.sites] == [s.name for s in digits().sites]
    site = result.sites[0]
    assert (site.grid, site.mask.kind) == (Grid(16, 16, 1), "dense")
    assert "agents" in " ".join(site.notes)
    assert isinstance(agent.fits(site, Config(16)), No)


# --------------------------------------------------------------------------------------- calibrated


def test_the_shortcut_is_the_least_squares_solution():
    program, site = digits(), digits().sites[1]
    options = {"grid": [16, 16], "agents": [2, 2], "leading": 1, "exponent": 0.5}
    fit = fit_agents(program, statistics(), {site.name: Trial([options])})[site.name]
    assert fit.options == options

    def error(shortcut):
        tried = Trial([{**options, "shortcut": shortcut}])
        return fit_agents(program, statistics(), {site.name: tried})[site.name].error

    best = error(list(fit.shortcut))
    assert best == pytest.approx(fit.error, rel=1e-4)
    for head in range(4):
        for step in (-0.05, 0.05):
            other = [c + step * (h == head) for h, c in enumerate(fit.shortcut)]
            assert error(other) > best


def test_what_is_left_open_is_fitted_and_said_in_the_plan():
    whole = settled(digits(), plan_of(digits(), statistics(), agents=16))
    configs = [c.config for c in whole.choices]
    assert all(c["core"] in ("plain", "nystrom") and len(c["shortcut"]) == 4 for c in configs)
    assert all("of the output is lost" in c.why for c in whole.choices)
    assert not any(agent.is_open(Config(**c)) for c in configs)
    by_hand = attnopt.apply(digits(), replace(whole, statistics=None))
    at_once = attnopt.apply(digits(), plan_of(digits(), statistics(), agents=16))
    assert torch.equal(logits(by_hand), logits(at_once))


def test_what_is_given_stays():
    given = {"agents": 16, "core": "plain", "shortcut": 0.25}
    whole = settled(digits(), plan_of(digits(), statistics(), **given))
    for choice in whole.choices:
        assert {name: choice.config[name] for name in given} == given
        assert choice.config["exponent"] is not None


def test_what_fits_best_is_chosen():
    free = settled(digits(), plan_of(digits(), statistics(), agents=16))
    trials = {"core": ("plain", "nystrom"), "exponent": (1.0, 0.3)}
    errors = [_error(choice) for choice in free.choices]
    for name, values in trials.items():
        for value in values:
            fixed = settled(digits(), plan_of(digits(), statistics(), agents=16, **{name: value}))
            for best, choice in zip(errors, fixed.choices, strict=True):
                assert _error(choice) >= best


def _error(choice):
    return float(re.search(r"([\d.]+)% of the output", choice.why).group(1))


def test_fitted_agents_are_nearer_than_plain_ones():
    fitted = attnopt.apply(digits(), plan_of(digits(), statistics(), agents=16))
    plain = rewritten(digits(), agents=16, core="plain", exponent=1.0, shortcut=0.0)
    assert distance(logits(fitted), logits(digits())) < distance(logits(plain), logits(digits()))


def test_statistics_without_rows_say_what_to_do(tmp_path):
    plan_of(digits(), statistics(), agents=16).save(tmp_path / "plan.yaml")
    stored = attnopt.Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(ValueError, match="give core, exponent and shortcut in the plan"):
        attnopt.apply(digits(), stored)


def test_a_fitted_plan_is_replayed_from_its_file(tmp_path):
    whole = settled(digits(), plan_of(digits(), statistics(), agents=16))
    replace(whole, statistics=None).save(tmp_path / "plan.yaml")
    stored = attnopt.Plan.load(tmp_path / "plan.yaml")
    once, again = (attnopt.apply(digits(), p) for p in (whole, stored))
    assert torch.equal(logits(once), logits(again))


def test_an_artifact_holds_the_plan_with_all_that_was_fitted(tmp_path):
    pictures = {"pixel_values": noise(24, 1, 32, 32, seed=3), "labels": torch.arange(24) % 10}
    plan = plan_of(digits(), agents=16, core="plain")
    made = attnopt.optimize(digits(), plan=plan, data=pictures, out=tmp_path / "out", held_out=16)
    assert made.accepted
    stored = attnopt.Plan.load(tmp_path / "out" / "attnopt" / "plan.yaml")
    assert not any(agent.is_open(Config(**c.config)) for c in stored.choices)
    report = json.loads((tmp_path / "out" / "attnopt" / "report.json").read_text())
    assert {c["pass"] for c in report["changed"]} == {"agent"}
    assert torch.equal(logits(attnopt.capture(tmp_path / "out")), logits(made.program))


# ------------------------------------------------------------------------------------- trained form


def test_the_trained_form_starts_as_the_shortcut():
    said = {"agents": 16, "exponent": 0.5, "shortcut": [0.1, 0.2, 0.3, 0.4]}
    free = rewritten(digits(), core="plain", **said)
    trained = rewritten(digits(), mode="trained", **said)
    assert distance(logits(trained), logits(free)) < 1e-6
    new = sorted(set(trained.weights) - set(digits().weights))
    assert len(new) == 8 * 4
    assert all(name in trained.weights for name in digits().weights)
    nonzero = [n for n in new if bool(trained.weights[n].any())]
    assert nonzero == [n for n in new if n.endswith("agent_filter")]


def test_what_is_trained_is_read():
    trained = rewritten(digits(), mode="trained", agents=16, exponent=1.0, shortcut=0.1)
    before = logits(trained)
    for name in sorted(set(trained.weights) - set(digits().weights))[:8]:
        other = trained.weights[name] + noise(*trained.weights[name].shape, seed=4)
        assert distance(logits(trained.with_weights({name: other})), before) > 1e-6, name


def test_the_trained_form_of_a_program_is_that_of_the_op():
    trained = rewritten(block(), mode="trained", agents=[2, 3], exponent=0.5, shortcut=0.1)
    (node,) = trained.graph.find_nodes(op="call_function", target=agent_attention)
    assert [n.meta["val"].shape[-2:] for n in node.kwargs["collect"]] == [(6, 6), (6, 1), (1, 6)]
    assert "collect_first" not in node.kwargs
    assert node.kwargs["filter"].meta["val"].shape == (16, 1, 3, 3)


@pytest.mark.slow
def test_the_trained_form_is_healed_site_by_site_and_stays_what_it_is(tmp_path):
    from attnopt.healing import Recipe, healed

    data = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
    images = torch.from_numpy(data.images[:160]).float().unsqueeze(1)
    images = (torch.nn.functional.interpolate(images, (32, 32), mode="bilinear") / 16 - 0.3) / 0.35
    student = rewritten(digits(), mode="trained", agents=16, exponent=1.0, shortcut=0.1)
    recipe = Recipe(24, site_steps=12, batch=8, every=6, lr=2e-4, site_lr=3e-4)
    result = healed(student, digits(), {"pixel_values": images}, recipe)
    assert not result.skipped
    assert result.losses["sites"][-1] < result.losses["sites"][0]
    assert min(look["loss"] for look in result.looks) < 0.7 * result.looks[0]["loss"]
    new = set(student.weights) - set(digits().weights)
    moved = {n for n in new if not torch.equal(result.program.weights[n], student.weights[n])}
    assert moved == new
    attnopt.save(result.program, tmp_path / "out")
    again = attnopt.capture(tmp_path / "out")
    assert torch.equal(logits(again), logits(result.program))


# -------------------------------------------------------------------------------------- time steps


def test_agents_are_used_at_their_time_steps_only():
    x = noise(3, 3, 12, 12, seed=1)
    steps = torch.tensor([1, 5, 9])
    always = rewritten(block(), agents=9, **SAID)
    some = rewritten(block(), agents=9, **SAID, timesteps=[4, 9])
    through, dense = always(x, steps), block()(x, steps)
    found = some(x, steps)
    assert torch.equal(found[1], through[1])
    assert torch.equal(found[[0, 2]], dense[[0, 2]])
    assert distance(through[1], dense[1]) > 1e-3
    for step in (3, 4, 8, 9):
        alike = torch.full((3,), step)
        wanted = always if 4 <= step < 9 else block()
        assert torch.equal(some(x, alike), wanted(x, alike))


def test_a_step_without_agents_never_makes_them(monkeypatch):
    from attnopt.ops import through_agents

    called = []
    by_agents = through_agents.by_agents
    monkeypatch.setattr(
        through_agents, "by_agents", lambda *a: called.append(len(a[0])) or by_agents(*a)
    )
    module = attnopt.lower(rewritten(block(), agents=9, **SAID, timesteps=[4, 9]), "eager")
    x = noise(3, 3, 12, 12, seed=1)
    with torch.no_grad():
        module(x, torch.tensor([1, 2, 3]))
        assert called == []
        module(x, torch.tensor([1, 5, 6]))
        assert called == [2]
        module(x, torch.tensor([4, 5, 6]))
        assert called == [2, 3]


def test_a_schedule_is_fitted_on_the_steps_that_it_is_for():
    calls = [
        {"x": noise(4, 3, 12, 12, seed=s), "timestep": torch.full((4,), t)}
        for s, t in enumerate((1, 40))
    ]
    stats = attnopt.calibrate(block(), calls)
    fitted = {
        steps: settled(block(), plan_of(block(), stats, agents=4, core="plain", timesteps=steps))
        for steps in ((0, 10), (30, 50))
    }
    early, late = (f.choices[0].config for f in fitted.values())
    assert early["shortcut"] != late["shortcut"]
    alone = attnopt.calibrate(block(), calls[:1])
    plan = plan_of(block(), alone, agents=4, core="plain", timesteps=[0, 10])
    assert settled(block(), plan).choices[0].config["shortcut"] == early["shortcut"]


def test_a_schedule_for_which_there_is_no_data_says_so():
    calls = [{"x": noise(2, 3, 12, 12), "timestep": torch.tensor([1, 2])}]
    plan = plan_of(block(), attnopt.calibrate(block(), calls), agents=4, timesteps=[30, 50])
    with pytest.raises(ValueError, match="'timestep' from 30 to below 50"):
        settled(block(), plan)


def test_layers_share_what_tells_the_step():
    result = rewritten(block(), agents=9, **SAID, timesteps=[4, 9])
    compared = result.graph.find_nodes(op="call_function", target=torch.ops.aten.ge.Scalar)
    assert len(compared) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "unet", "conditional_unet"])
def test_diffusion_models_use_agents_by_schedule(name):
    model = captured(name)
    sites = [s for s in model.program.sites if agent.fits(s, Config(16)) is True]
    assert len(sites) >= 2
    always = model.call(rewritten(model.program, agents=16, **SAID))
    dense = model.call(model.program)
    # Rows of the call are at the steps 3, 4 and 5.
    some = rewritten(model.program, agents=16, **SAID, timesteps=[4, 5])
    compared = some.graph.find_nodes(op="call_function", target=torch.ops.aten.ge.Scalar)
    assert len(compared) == 1
    with torch.no_grad():
        for found in (model.call(some), model.call(attnopt.lower(some, "eager"))):
            torch.testing.assert_close(found[1], always[1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[[0, 2]], dense[[0, 2]], atol=1e-5, rtol=1e-4)
    assert distance(always, dense) > 1e-3


# ---------------------------------------------------------------------------------------- backends


SETTINGS = {
    "plain": {**SAID, "agents": [4, 3]},
    "nystrom": {**SAID, "agents": 9, "core": "nystrom"},
    "trained": {"agents": 9, "mode": "trained", "exponent": 0.5, "shortcut": 0.1},
    "steps": {
        "agents": 9,
        "mode": "trained",
        "exponent": 0.5,
        "shortcut": 0.1,
        "timesteps": [4, 9],
    },
}
CALLS = tuple(torch.tensor(steps) for steps in ([1, 2, 3], [4, 5, 8], [1, 5, 9]))


def called(run, steps):
    with torch.no_grad():
        return run(noise(3, 3, 12, 12, seed=1), steps)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", SETTINGS)
def test_backends_agree_with_the_program(name, backend):
    result = rewritten(block(), **SETTINGS[name])
    module = attnopt.lower(result, backend)
    for steps in CALLS:
        assert distance(called(module, steps), called(result, steps)) < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_saving_keeps_every_bit(name, tmp_path):
    result = rewritten(block(), **SETTINGS[name])
    assert result.tier == 2
    attnopt.save(result, tmp_path / "out")
    again = attnopt.capture(tmp_path / "out")
    loaded = attnopt.load(tmp_path / "out")
    for steps in CALLS:
        assert torch.equal(called(again, steps), called(result, steps))
        assert distance(called(loaded, steps), called(result, steps)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_export_agrees_with_the_program(name, tmp_path):
    ort = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: attnopt[onnx]")
    onnx = pytest.importorskip("onnx")
    result = rewritten(block(), **SETTINGS[name])
    made = attnopt.export_onnx(result, tmp_path / "onnx")
    assert made.accepted
    session = ort.InferenceSession(str(made.path))
    names = [i.name for i in session.get_inputs()]
    for steps in CALLS:
        values = (noise(3, 3, 12, 12, seed=1).numpy(), steps.numpy())
        found = session.run(None, dict(zip(names, values, strict=True)))[0]
        assert distance(torch.from_numpy(found), called(result, steps)) < 1e-5
    branches = [n for n in onnx.load(str(made.path)).graph.node if n.op_type == "If"]
    assert len(branches) == (name == "steps")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_inductor_agrees_with_the_program(name):
    result = rewritten(block(), **SETTINGS[name])
    module = attnopt.lower(result, "inductor")
    for steps in CALLS:
        assert distance(called(module, steps), called(result, steps)) < 1e-5


def test_agents_are_proposed_with_what_was_fitted():
    (site, *_) = digits().sites
    asked = Asked(digits(), None, ("flops",), 2, 0)
    assert [c.agents for c in agent.proposals(site, asked)] == [(8, 8), (4, 4), (2, 2)]
    steps, refused = steps_at(site, replace(asked, statistics=statistics()), ("agent",))
    assert not refused
    assert not any(agent.is_open(s.config) for s in steps)
    whole = settled(digits(), plan_of(digits(), statistics(), agents=[8, 8])).choices[0].config
    assert steps[0].settings == whole
    assert steps_at(site, replace(asked, goals=("memory",)), ("agent",)) == ([], [])


@pytest.mark.slow  # a search
def test_a_plan_of_agents_is_replayed_without_data(tmp_path):
    terms = {"passes": ["agent", "neighborhood"], "tier": 2}
    plan = attnopt.plan(digits(), {"flops": 0.9}, statistics=statistics(), **terms)
    assert {c.rewrite for c in plan.choices} <= {"agent", "neighborhood"}
    plan.save(tmp_path / "plan.yaml")
    first, again = (
        attnopt.apply(digits(), p) for p in (plan, attnopt.Plan.load(tmp_path / "plan.yaml"))
    )
    assert torch.equal(logits(first), logits(again))
