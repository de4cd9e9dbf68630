"""Pass window on whole models: zero strength, rings, mixed layers, saving, export, generation."""

import pytest
import torch
from tiny_decoders import SHAPE, SIZES, gpt2, llama
from tiny_decoders import words as ids
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

import attnopt
from attnopt.nouns import Choice, No, Plan
from attnopt.passes import window
from attnopt.passes.window import Config
from attnopt.refusals import NothingToDoError
from attnopt.streaming import streaming

STEPS = (5, 1, 1, 1, 10, 1, 1, 20)


@pytest.fixture(scope="module", params=[llama, gpt2], ids=lambda make: make.__name__)
def source(request):
    model = request.param()
    program = attnopt.apply(attnopt.capture(model, (ids()[:, :9],)), "exact")
    return model, program, attnopt.calibrate(program, ids())


def plan(program, statistics, **config):
    choices = tuple(Choice(s.name, "window", config) for s in program.sites)
    return Plan(choices, statistics=statistics)


def stepped(model):
    """Return the logits of a text that comes in pieces, and the last cache."""
    cache, found, seen = None, [], 0
    for count in STEPS:
        out = model(ids()[:, seen : seen + count], past_key_values=cache)
        cache, seen = out.past_key_values, seen + count
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("config", [{"full": [0, 1, 2, 3]}, {"window": 200, "full": [1, 3]}])
def test_zero_strength_is_the_source(source, config):
    model, program, stats = source
    rewritten = attnopt.apply(program, plan(program, stats, **{"window": 8, **config}))
    with torch.no_grad():
        torch.testing.assert_close(rewritten(ids()).logits, model(ids()).logits, rtol=0, atol=2e-6)


def test_a_window_on_all_heads_is_a_mask(source):
    """The source itself, its mask replaced by one with a window, gives the same."""
    model, program, stats = source
    rewritten = attnopt.apply(program, plan(program, stats, window=6, first=2))
    i, j = torch.arange(40).unsqueeze(1), torch.arange(40)
    seen = (j <= i) & ((i - j < 6) | (j < 2))
    mask = torch.zeros(40, 40).masked_fill(~seen, -torch.inf).expand(2, 1, 40, 40)
    with torch.no_grad():
        wanted = model(ids(), attention_mask=mask).logits
        torch.testing.assert_close(rewritten(ids()).logits, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("full", [[], [2]])
def test_a_ring_goes_on_as_the_whole_text_does(source, full):
    _, program, stats = source
    rewritten = attnopt.apply(program, plan(program, stats, window=6, first=2, full=full))
    model = attnopt.lower(rewritten, "eager")
    with torch.no_grad():
        found, _ = stepped(model)
        torch.testing.assert_close(found, rewritten(ids()).logits, rtol=0, atol=2e-6)
    rings = [s for s in rewritten.states if s.ring]
    assert {s.shape[1:3] for s in rings} == {(4 - len(full), 8)}
    growing = [s for s in rewritten.states if s.grows is not None]
    assert {s.shape[1] for s in growing} == ({1} if full else set())
    assert len(growing) == (4 if full else 0)


def test_generation_pads_and_beams(source):
    _, program, stats = source
    rewritten = attnopt.apply(program, plan(program, stats, window=6, first=2, full=[1]))
    model = attnopt.lower(rewritten, "eager")
    grown = attnopt.lower(rewritten.growing, "eager")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    for more in ({}, {"num_beams": 3}):
        given = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **more}
        found = model.generate(ids()[:, :12], attention_mask=mask, **given)
        wanted = grown.generate(ids()[:, :12], attention_mask=mask, **given)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("source", [llama], indirect=True, ids=["llama"])
def test_a_result_is_saved_and_exported(source, tmp_path):
    _, program, stats = source
    rewritten = attnopt.apply(program, plan(program, stats, window=6, first=2, full=[1]))
    attnopt.save(rewritten, tmp_path / "kept")
    loaded = attnopt.load(tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, attnopt.lower(rewritten, "eager")(ids()).logits)
    export = attnopt.export_onnx(rewritten, tmp_path / "onnx")
    assert export.parity is not None
    assert all(c.tokens == c.equal for c in export.parity.cases)


def test_the_heads_that_lose_most_stay_whole(source):
    _, program, stats = source
    made = attnopt.plan(program, {"kv_cache": 0.5}, ids(), ["window"], statistics=stats)
    measured = streaming(program, stats, 16, 4)
    kept = {(c.site, h) for c in made.choices for h in c.config["full"]}
    damage = {(n, h): float(x) for n, m in measured.items() for h, x in enumerate(m.damage)}
    assert 0 < len(kept) < len(damage)
    assert min(damage[k] for k in kept) >= max(x for k, x in damage.items() if k not in kept)
    again = attnopt.apply(program, made)
    held = sum(len(c.config["full"]) for c in made.choices)
    width = program.sites[0].head_dim * 2
    elements = held * width + (8 - held) * width * 20 / 256
    assert elements <= 0.5 * 8 * width
    assert again.tier == 2


def test_a_budget_leaves_alone_what_it_cannot_split():
    """Heads with biases of their own keep their order, so that none can be chosen to stay."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)).eval()
    program = attnopt.capture(model, (ids()[:, :9],))
    with pytest.raises(NothingToDoError, match="biases or sinks of their own"):
        attnopt.plan(program, {"kv_cache": 0.5}, ids(), ["window"])


def test_damage_and_mass_follow_their_definitions(source):
    _, program, stats = source
    for found in streaming(program, stats, 500, 0).values():
        assert float(found.damage.abs().max()) < 1e-9
        assert float(found.mass.abs().max()) < 1e-5
    for found in streaming(program, stats, 4, 1).values():
        assert bool((found.damage > 0).all())
        assert bool(((found.mass > 0) & (found.mass < 1)).all())


def test_what_cannot_have_a_window_is_refused(source):
    _, program, _ = source
    site = program.sites[0]
    for config in (Config(0), Config(4, -1), Config(4, 2, (9,)), Config(4, 2, (1, 1))):
        assert isinstance(window.fits(site, config), No)
    assert window.fits(site, Config(4, 2, (0,))) is True


def test_sources_with_windows_keep_no_more_than_those():
    torch.manual_seed(0)
    config = MistralConfig(
        **SHAPE, **SIZES, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7,
    )  # fmt: skip
    source = MistralForCausalLM(config).eval()
    program = attnopt.apply(attnopt.capture(source, (ids()[:, :9],)), "exact")
    assert all(s.ring and s.shape[2] == 7 for s in program.states)
    model = attnopt.lower(program, "eager")
    with torch.no_grad():
        wanted = source(ids()).logits
        found, cache = stepped(model)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        kept = {x.shape[2] for layer in cache.layers for x in layer.tensors.values()}
        assert kept == {7}
        # What the source itself kept of a text goes on, too.
        past = source(ids()[:, :30], use_cache=True).past_key_values
        rest = model(ids()[:, 30:], past_key_values=past).logits
        torch.testing.assert_close(rest, wanted[:, 30:], rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="cannot forget tokens"):
        cache.crop(-1)
