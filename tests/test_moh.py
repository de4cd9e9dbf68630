"""Pass moh on whole models: zero strength, decoding, saving, export, refusals, and healing."""

from dataclasses import replace

import pytest
import torch
from dha_models import captured, decoder
from dha_models import ids as words
from tiny_decoders import SHAPE, SIZES, gpt2, llama
from tiny_decoders import words as ids
from transformers import Qwen3Config, Qwen3ForCausalLM

import attnopt
from attnopt import spreading
from attnopt.contributing import fitted_router, norm_scales
from attnopt.costs import Workload, count_costs, uncounted
from attnopt.graphs import copied_module
from attnopt.healing import Recipe, healed
from attnopt.healing.functional import Functional, wide_weights
from attnopt.healing.pace import Pace
from attnopt.inlining import inline_attention
from attnopt.nouns import Choice, No, Plan
from attnopt.ops import fitted_gates, routed_attention
from attnopt.passes import moh
from attnopt.passes.moh import Config
from attnopt.rewriting import settled
from attnopt.search.candidates import Asked, steps_at

MODES = (
    {"mode": "dynamic"},
    {"mode": "dynamic", "heads": 3, "score": "scaled", "refit": False},
    {"mode": "group", "heads": 1},
    {"mode": "trained", "shared": 1},
)


@pytest.fixture(scope="module", params=[llama, gpt2], ids=lambda make: make.__name__)
def source(request):
    model = request.param()
    program = attnopt.apply(attnopt.capture(model, (ids()[:, :9],)), "exact")
    return model, program, attnopt.calibrate(program, ids())


only_llama = pytest.mark.parametrize("source", [llama], indirect=True, ids=["llama"])


def routed(program, statistics, **config):
    choices = tuple(Choice(s.name, "moh", config) for s in program.sites)
    return attnopt.apply(program, Plan(choices, statistics=statistics))


def stirred(program, seed=2):
    """Return a program whose routers are not zeros."""
    torch.manual_seed(seed)
    names = [n for n in program.weights if ".router." in n]
    return program.with_weights({n: torch.randn_like(program.weights[n]) for n in names})


@pytest.mark.parametrize("mode", ["dynamic", "group"])
def test_all_heads_are_the_source_bit_for_bit(source, mode):
    _, program, stats = source
    heads = getattr(program.sites[0], "kv_heads" if mode == "group" else "heads")
    same = routed(program, stats, mode=mode, heads=heads)
    assert torch.equal(same(ids()).logits, program(ids()).logits)


@pytest.mark.parametrize("shared", [0, 2])
def test_routers_of_zeros_and_all_heads_are_the_source(source, shared):
    model, program, stats = source
    heads = program.sites[0].heads
    same = routed(program, stats, mode="trained", heads=heads, shared=shared)
    with torch.no_grad():
        torch.testing.assert_close(same(ids()).logits, model(ids()).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", MODES, ids=str)
def test_steps_are_the_whole_text(source, config):
    _, program, stats = source
    rewritten = stirred(routed(program, stats, **config))
    model = attnopt.lower(rewritten, "eager")
    with torch.no_grad():
        whole = rewritten(ids()).logits
        assert not torch.allclose(whole, program(ids()).logits, atol=1e-3)
        cache, found, seen = None, [], 0
        for count in (5, 1, 1, 10, 1, 22):
            out = model(ids()[:, seen : seen + count], past_key_values=cache)
            cache, seen = out.past_key_values, seen + count
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=0, atol=2e-6)


# Exporting takes seconds.
EXPORTED = (MODES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in MODES[2:]))


@only_llama
@pytest.mark.parametrize("config", EXPORTED, ids=str)
def test_a_result_generates_and_is_saved_and_exported(source, config, tmp_path):
    _, program, stats = source
    rewritten = stirred(routed(program, stats, **config))
    model = attnopt.lower(rewritten, "eager")
    attnopt.save(rewritten, tmp_path / "kept")
    loaded = attnopt.load(tmp_path / "kept")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    given = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    texts = [m.generate(ids()[:, :12], attention_mask=mask, **given) for m in (model, loaded)]
    assert torch.equal(*texts)
    alone = model.generate(ids()[:1, 5:12], **given)
    assert torch.equal(alone[0, 7:], texts[0][0, 12:])
    export = attnopt.export_onnx(attnopt.capture(tmp_path / "kept"), tmp_path / "onnx")
    assert export.accepted
    assert export.operators == {"Attention": 2}


@only_llama
@pytest.mark.parametrize("config", [MODES[0], MODES[3]], ids=str)
def test_a_compiler_takes_the_whole_graph(source, config):
    _, program, stats = source
    rewritten = stirred(routed(program, stats, **config))
    module = copied_module(rewritten.graph_module)
    inline_attention(module, remember=False)
    compiled = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    values = rewritten.form.flatten((ids(),), {})
    given = [
        values[n.name] if n.name in values else rewritten.weights[rewritten.bindings[n.name].name]
        for n in rewritten.placeholders
    ]
    with torch.no_grad():
        found = rewritten.form.unflatten(tuple(compiled(*given)), values).logits
    torch.testing.assert_close(found, rewritten(ids()).logits, rtol=0, atol=2e-6)


@only_llama
def test_a_plan_is_carried_out_again_from_its_file(source, tmp_path):
    _, program, stats = source
    plan = Plan(tuple(Choice(s.name, "moh", {}) for s in program.sites), statistics=stats)
    first = attnopt.apply(program, plan)
    plan.save(tmp_path / "plan.yaml")
    again = attnopt.apply(program, Plan.load(tmp_path / "plan.yaml"))
    assert torch.equal(first(ids()).logits, again(ids()).logits)


@only_llama
def test_scales_follow_their_definition(source):
    model, program, stats = source
    found = []
    attention = model.model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    attention.q_proj.register_forward_hook(lambda m, x, y: found.append(y))
    with torch.no_grad():
        model(ids())
    attention.o_proj._forward_pre_hooks.clear()
    attention.q_proj._forward_hooks.clear()
    norms, outputs = (x[:, 1:].unflatten(-1, (8, -1)).double() for x in found)
    columns = attention.o_proj.weight.detach().double().unflatten(1, (8, -1))
    given = torch.einsum("bthd,ohd->btho", outputs, columns).norm(dim=-1)
    norms = norms.norm(dim=-1)
    wanted = (norms * given).mean((0, 1)) / norms.square().mean((0, 1))
    torch.testing.assert_close(
        norm_scales(program, stats, program.sites[0]), wanted, rtol=1e-5, atol=0
    )


@only_llama
def test_a_router_tells_best_what_heads_give(source):
    """Of all linear maps of what it reads; with what calibration keeps, so that it is replayed."""
    model, program, stats = source
    found = []
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda m, x: found.append(x[0]))
    attention.q_proj.register_forward_hook(lambda m, x, y: found.extend((y, x[0])))
    with torch.no_grad():
        model(ids())
    attention.o_proj._forward_pre_hooks.clear()
    attention.q_proj._forward_hooks.clear()
    norms, tokens, outputs = (x[:, 1:].double().flatten(0, 1) for x in found)
    columns = attention.o_proj.weight.detach().double().unflatten(1, (8, -1))
    given = torch.einsum("nhd,ohd->nho", outputs.unflatten(-1, (8, -1)), columns).norm(dim=-1)
    norms = norms.unflatten(-1, (8, -1)).norm(dim=-1)
    features = torch.cat([tokens, norms, torch.ones(len(norms), 1)], dim=1)
    router = fitted_router(program, stats, program.sites[1])
    left = (features @ router.T - given).norm()
    best = (features @ torch.linalg.lstsq(features, given, driver="gelsd").solution - given).norm()
    assert best <= left < 1.2 * best
    assert left < 0.8 * (norms * norm_scales(program, stats, program.sites[1]) - given).norm()


@only_llama
def test_heads_on_average_are_spread_by_what_attentions_lose(source, monkeypatch):
    _, program, stats = source
    first, second = (s.name for s in program.sites)
    monkeypatch.setattr(spreading, "_damages", lambda *_: {
        first: {n: 1.0 * (8 - n) for n in range(1, 9)},
        second: {n: 3.0 * (8 - n) for n in range(1, 9)},
    })  # fmt: skip
    choices = tuple(Choice(s.name, "moh", {"average": 5.0}) for s in program.sites)
    plan = settled(program, Plan(choices, statistics=stats))
    assert {c.site: c.config["heads"] for c in plan.choices} == {first: 2, second: 8}
    assert "on average" in plan.choices[0].why
    same = attnopt.apply(program, Plan(choices, statistics=stats))
    counts = [n.kwargs["count"] for n in same.graph.find_nodes(
        op="call_function", target=fitted_gates)]  # fmt: skip
    assert counts == [2]


@only_llama
def test_the_damage_of_numbers_of_heads_is_measured(source, monkeypatch):
    _, program, stats = source
    monkeypatch.setattr(spreading, "_STEPS", 2)
    ways = {s.name: moh._ways(s, Config(average=4.0)) for s in program.sites}
    found = spreading._damages(program, stats, ways)
    for damages in found.values():
        assert list(damages) == [1, 4, 8]
        assert damages[8] == 0.0 < damages[4] < damages[1]
    monkeypatch.setattr(spreading, "_damages", lambda *_: found)
    assert sum(spreading.spread(program, stats, ways, 4.0).values()) <= 8
    with pytest.raises(ValueError, match="at least"):
        spreading.spread(program, stats, ways, 0.5)


@only_llama
def test_the_output_projection_is_solved_anew(source):
    """With it the rewritten layers are closer to the source's on what was calibrated."""
    _, program, stats = source
    gaps = []
    for refit in (False, True):
        rewritten = routed(program, stats, heads=4, refit=refit)
        gaps.append(float((rewritten(ids()).logits - program(ids()).logits).norm()))
    assert gaps[1] < 0.8 * gaps[0]


@only_llama
def test_the_order_of_heads_does_not_matter(source):
    """Key heads in another order, with their readers, are the same model in another spelling."""
    _, program, stats = source
    twin = llama()
    order = [2, 0, 3, 1]
    rows = torch.arange(32).view(4, 2, 4)[order].flatten()
    keys = torch.arange(16).view(4, 4)[order].flatten()
    with torch.no_grad():
        for layer in twin.model.layers:
            own = layer.self_attn
            own.q_proj.weight.copy_(own.q_proj.weight[rows])
            own.o_proj.weight.copy_(own.o_proj.weight[:, rows])
            for projection in (own.k_proj, own.v_proj):
                projection.weight.copy_(projection.weight[keys])
    other = attnopt.apply(attnopt.capture(twin, (ids()[:, :9],)), "exact")
    other_stats = attnopt.calibrate(other, ids())
    for config in MODES[:3]:
        one, two = routed(program, stats, **config), routed(other, other_stats, **config)
        torch.testing.assert_close(one(ids()).logits, two(ids()).logits, rtol=0, atol=2e-5)


@only_llama
def test_the_cost_falls_with_the_heads_that_are_on(source):
    _, program, stats = source
    site = program.sites[0]
    costs = {}
    for heads in (8, 4):
        rewritten = routed(program, stats, heads=heads, score="norm", refit=False)
        costs[heads] = count_costs(rewritten, Workload(sequence=64)).flops
    pairs = 2 * 2 * 64 * 64 * 8 * (site.head_dim + site.v_head_dim)
    assert costs[8] - costs[4] == pairs // 2
    told = [moh.cost(site, Config(heads=n), Workload(sequence=64))["flops"] for n in (8, 4)]
    assert told[1] == told[0] / 2
    assert moh.cost(site, Config("group", 1), None)["reads"] == 0.25


def test_what_cannot_choose_heads_is_refused(source):
    _, program, _ = source
    site = program.sites[0]
    for config, why in (
        (Config(heads=0), "each token uses 1 to"),
        (Config(heads=site.heads + 1), "each token uses 1 to"),
        (Config("group", site.kv_heads + 1), "key heads"),
        (Config("dynamc"), "did you mean 'dynamic'"),
        (Config(score="fited"), "did you mean 'fitted'"),
        (Config(heads=2, average=2), "either"),
        (Config(average=0.5), "average 0.5"),
        (Config(heads=3, shared=1), "in the mode 'trained' only"),
        (Config("trained", 3, 3), "always on"),
    ):
        answer = moh.fits(site, config)
        assert isinstance(answer, No)
        assert why in str(answer)
    assert isinstance(moh.fits(replace(site, kv_heads=1), Config("group")), No)
    assert moh.fits(site, Config("trained", site.heads, site.heads - 1)) is True


def test_norms_of_queries_that_are_normed_choose_nothing():
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    program = attnopt.apply(
        attnopt.capture(Qwen3ForCausalLM(config).eval(), (ids()[:, :9],)), "exact"
    )
    site = program.sites[0]
    for mode in ("dynamic", "group"):
        assert "choose the score 'fitted'" in str(moh.fits(site, Config(mode, 1, score="scaled")))
        assert moh.fits(site, Config(mode, 1)) is True
    rewritten = routed(program, attnopt.calibrate(program, ids()))
    assert rewritten.graph.find_nodes(op="call_function", target=routed_attention)


# ----------------------------------------------------------------------------------------- healing


@only_llama
def test_heads_are_annealed_in_steps_only(source):
    _, program, stats = source
    rewritten = routed(program, stats, heads=2, refit=False)
    pace, device = Pace(), torch.device("cpu")
    run = Functional.of(rewritten, device, pace)
    batch, weights = {"input_ids": ids()}, wide_weights(rewritten, device)
    wanted = {s: program(ids()).logits if s == 0 else rewritten(ids()).logits for s in (0.0, 1.0)}
    for share, logits in wanted.items():
        with pace.at(share):
            torch.testing.assert_close(run.logits(batch, weights), logits, rtol=0, atol=2e-6)
    torch.testing.assert_close(run.logits(batch, weights), wanted[1.0], rtol=0, atol=2e-6)
    assert float(pace.added()) == 0.0
    (node, *_) = rewritten.graph.find_nodes(op="call_function", target=fitted_gates)
    assert node.kwargs["count"] == 2


@only_llama
def test_routers_are_kept_in_balance_in_steps_only(source):
    _, program, stats = source
    rewritten = routed(program, stats, mode="trained", heads=4)
    pace, device = Pace(), torch.device("cpu")
    run = Functional.of(rewritten, device, pace)
    batch, weights = {"input_ids": ids()}, wide_weights(rewritten, device)
    run.logits(batch, weights)
    assert float(pace.added()) == 0.0
    with pace.at(1.0):
        run.logits(batch, weights)
        # Routers of zeros give all heads the same chance, whoever is on.
        assert float(pace.added()) == pytest.approx(0.01 * 4)
    with pace.at(0.0):
        run.logits(batch, weights)
        assert float(pace.added()) == pytest.approx(0.01 * 8)


@only_llama
def test_strength_is_reached_before_the_end(source):
    assert [Recipe(10).strength(n) for n in (0, 1, 4, 5, 9)] == [0.0, 0.2, 0.8, 1.0, 1.0]
    assert Recipe(10, anneal=0).strength(0) == 1.0
    with pytest.raises(ValueError, match="a share of all steps"):
        Recipe(10, anneal=2.0)


@pytest.fixture(scope="module")
def teacher():
    """Return a decoder with large weights, what calibration saw, and text that it wrote."""
    model = decoder("llama_gqa")
    torch.manual_seed(4)
    model.lm_head.weight.data.normal_(0, 0.5)
    program, stats = captured(model)
    given = {"max_length": 12, "min_length": 12, "do_sample": True, "top_k": 0}
    return program, stats, model.generate(words(128, 1), **given)


def test_healing_brings_a_mixture_closer(teacher, tmp_path):
    program, stats, rows = teacher
    student = routed(program, stats)
    settings = {"lr": 1e-2, "site_lr": 1e-2, "train": "sites", "batch": 8, "every": 20}
    result = healed(student, program, rows, Recipe(60, anneal=0, **settings))
    assert 0 < result.left < 0.9
    attnopt.save(result.program, tmp_path / "healed")
    loaded = attnopt.load(tmp_path / "healed")
    with torch.no_grad():
        wanted = result.program(rows).logits
        torch.testing.assert_close(loaded(rows).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [1, 2])
def test_routers_learn(teacher, shared):
    program, stats, rows = teacher
    student = stirred(routed(program, stats, mode="trained", heads=4, shared=shared))
    settings = {"site_steps": 40, "site_lr": 1e-2, "anneal": 0, "every": 40}
    result = healed(student, program, rows, Recipe(40, **settings))
    moved = [n for n in student.weights if ".router." in n]
    assert len(moved) == 2 * (1 + shared)
    for name in moved:
        assert not torch.equal(result.program.weights[name], student.weights[name])
    found = result.losses["sites"]
    assert found[-1] < 0.9 * found[0]


@only_llama
def test_a_few_numbers_of_heads_are_proposed_where_operations_are_to_be_saved(source):
    _, program, stats = source
    site, asked = program.sites[0], Asked(program, stats, ("flops",), 2, 24, 24)
    found = [(s.config.mode, s.config.heads) for s in steps_at(site, asked, ("moh",))[0]]
    assert found == [*(("dynamic", n) for n in (6, 4, 2)), ("group", 3), ("group", 2)]
    assert steps_at(site, replace(asked, goals=("params",)), ("moh",)) == ([], [])
    steps, refused = steps_at(site, replace(asked, goals=("kv_cache",)), ("moh",))
    assert not steps
    assert {no.why for no in refused} == {"moh: it leaves the cache as it is"}


@only_llama
def test_gates_cost_what_they_read(source):
    _, program, stats = source
    few = routed(program, stats, heads=4, refit=False)
    whole, found = (count_costs(p, Workload(sequence=64)).flops for p in (program, few))
    # Half of eight heads of four channels; tokens of 32, eight norms and a one tell of eight heads.
    saved, gates = 2 * 64 * 64 * 4 * (4 + 4), 2 * 64 * (32 + 8 + 1) * 8
    assert whole - found == len(program.sites) * (saved - gates)
    assert not list(uncounted(few))


@only_llama
@pytest.mark.slow  # a search
def test_a_plan_of_heads_is_replayed_without_data(source, tmp_path):
    _, program, stats = source
    terms = {"passes": ["moh"], "tier": 2, "tokens": 200}
    plan = attnopt.plan(program, {"flops": 0.99}, statistics=stats, **terms)
    assert {c.rewrite for c in plan.choices} == {"moh"}
    plan.save(tmp_path / "plan.yaml")
    first, again = (attnopt.apply(program, p) for p in (plan, Plan.load(tmp_path / "plan.yaml")))
    assert all(torch.equal(first.weights[n], again.weights[n]) for n in first.weights)
