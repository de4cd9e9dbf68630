"""Pass blocks: dense at full strength and for few tokens, tiles chosen by estimates elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from dha_models import decoder, ids

import attnopt
from attnopt.costs import Workload, count_costs, uncounted
from attnopt.nouns import Choice, Mask, No
from attnopt.ops import attention, block_attention, plan_blocks
from attnopt.ops.estimators import ESTIMATORS
from attnopt.passes import blocks
from attnopt.search.candidates import Asked, steps_at

SMALL = {"tile": 4, "stride": 2, "least_tokens": 1}


@pytest.fixture(scope="module")
def program() -> attnopt.Program:
    return attnopt.apply(
        attnopt.capture(decoder("llama_gqa"), (), {"input_ids": ids(2, 11)}), "exact"
    )


def blocked(program: attnopt.Program, **config: object) -> attnopt.Program:
    choices = tuple(Choice(s.name, "blocks", {**SMALL, **config}) for s in program.sites)
    return attnopt.apply(program, attnopt.Plan(choices))


def logits(program: object, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return program(input_ids=ids(3, 33, seed=5), **more).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("config", [{"amount": 1.0}, {"rule": "mass", "amount": 1.0},
                                    {"amount": 0.1, "least_tokens": 34},
                                    {"amount": 0.1, "dense_above": 0.01}])  # fmt: skip
def test_what_visits_everything_is_the_source_bit_for_bit(program, config) -> None:
    result = blocked(program, **config)
    assert [n.target for n in result.graph.nodes].count(block_attention) == 2
    lowered, whole = (attnopt.lower(p, backend="eager") for p in (result, program))
    assert torch.equal(logits(lowered), logits(whole))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fewer_tiles_change_the_result_and_no_backend_does(program, estimator) -> None:
    result = blocked(program, amount=0.3, estimator=estimator)
    assert result.tier == 2
    assert distance(logits(result), logits(program)) > 1e-3
    for backend in ("reference", "eager"):
        assert distance(logits(attnopt.lower(result, backend=backend)), logits(result)) < 1e-5


def test_decoding_is_the_source_s_bit_for_bit(program) -> None:
    result = blocked(program, amount=0.1)
    lowered, whole = (attnopt.lower(p, backend="eager") for p in (result, program))
    start, tokens = ids(2, 13, seed=1), ids(2, 5, seed=2)
    with torch.no_grad():
        caches = [whole(input_ids=start).past_key_values for _ in range(2)]
        for t in range(5):
            found = [
                m(input_ids=tokens[:, t : t + 1], past_key_values=c)
                for m, c in zip((lowered, whole), caches, strict=True)
            ]
            assert torch.equal(found[0].logits, found[1].logits)


def test_generation_at_full_strength_is_the_source_s(program) -> None:
    lowered, whole = (
        attnopt.lower(p, backend="eager") for p in (blocked(program, amount=1.0), program)
    )
    prompt = ids(2, 19, seed=4)
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    made = [
        m.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        for m in (lowered, whole)
    ]
    assert torch.equal(*made)


def test_what_is_padded_at_the_left_does_not_matter(program) -> None:
    result = blocked(program, amount=0.3)
    mask = torch.ones(3, 33, dtype=torch.long)
    mask[0, :9] = 0
    tokens = ids(3, 33, seed=5)
    other = torch.where(mask.bool(), tokens, 7)
    with torch.no_grad():
        found = [result(input_ids=x, attention_mask=mask).logits[:, 9:] for x in (tokens, other)]
    torch.testing.assert_close(*found)
    (planned, *_) = [n for n in result.graph.nodes if n.target is plan_blocks]
    assert planned.kwargs["padding"] is not None


def test_routed_queries_choose_their_tiles_when_decoding_too(program) -> None:
    result = blocked(program, mode="routed", rule="count", amount=2)
    tokens = ids(3, 33, seed=5)
    whole = logits(result)
    assert distance(whole, logits(program)) > 1e-3
    state, steps = None, []
    for start, stop in ((0, 20), (20, 21), (21, 22), (22, 33)):
        outputs, state = result.step({"input_ids": tokens[:, start:stop]}, state)
        steps.append(outputs[0])
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    every = blocked(program, mode="routed", rule="count", amount=9)
    assert distance(logits(every), logits(program)) < 1e-6
    assert distance(logits(attnopt.lower(result, backend="eager")), whole) < 1e-5


def test_a_rewritten_program_is_saved_and_loaded(program, tmp_path: Path) -> None:
    result = blocked(program, amount=0.3, rule="mass", estimator="antidiagonal")
    attnopt.save(result, tmp_path / "out")
    loaded = attnopt.load(tmp_path / "out")
    assert distance(logits(loaded), logits(result)) < 1e-6


def test_the_sites_are_found_again(program) -> None:
    result = blocked(program, amount=0.3)
    assert [s.name for s in result.sites] == [s.name for s in program.sites]
    assert [s.mask for s in result.sites] == [s.mask for s in program.sites]
    with pytest.raises(ValueError, match="not in its exact form"):
        blocked(result, amount=0.2)


def test_bidirectional_sites_are_attended_by_tiles() -> None:
    model, call, _ = zoo.build("bert", pad="left")
    source = attnopt.apply(attnopt.capture(model, (), call), "exact")
    own = [s for s in source.sites if blocks.fits(s, blocks.Config()) is True]
    assert own

    def made(amount: float) -> torch.Tensor:
        choices = tuple(Choice(s.name, "blocks", {**SMALL, "amount": amount}) for s in own)
        return zoo.first_tensor(attnopt.apply(source, attnopt.Plan(choices))(**call))

    want = zoo.first_tensor(source(**call))
    valid = call["attention_mask"].bool()
    assert distance(made(1.0)[valid], want[valid]) < 1e-6
    assert distance(made(0.3)[valid], want[valid]) > 1e-5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"estimator": "sub_blok"}, "did you mean 'sub_block'"),
        ({"rule": "top"}, "there is|did you mean"),
        ({"mode": "rooted"}, "did you mean 'routed'"),
        ({"amount": 0.0}, "above 0"),
        ({"amount": 1.5}, "at most 1"),
        ({"rule": "count", "amount": 0.5}, "whole number of tiles"),
        ({"mode": "routed", "rule": "mass"}, "keys to come"),
        ({"tile": 24}, "divides it"),
        ({"tile": 0}, "whole number from 1"),
        ({"least_tokens": 0}, "from 1"),
        ({"dense_above": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(program, config: dict, words: str) -> None:
    answer = blocks.fits(program.sites[0], blocks.Config(**config))
    assert isinstance(answer, No)
    assert any(w in str(answer) for w in words.split("|"))


@pytest.mark.parametrize(
    ("facts", "config", "words"),
    [
        ({"mask": Mask("dense")}, {}, "tensor of all pairs"),
        ({"mask": Mask("sliding", window=7)}, {}, "sliding(window=7)"),
        ({"bias": "alibi"}, {}, "alibi bias"),
        ({"mask": Mask("none")}, {"estimator": "flex"}, "only if causal"),
        ({"mask": Mask("none")}, {"mode": "routed"}, "causal self-attention only"),
        ({"mask": Mask("none"), "kind": "cross"}, {"estimator": "sparge"}, "for self-attention"),
    ],
)
def test_sites_that_tiles_do_not_suit_are_refused(program, facts, config, words) -> None:
    answer = blocks.fits(replace(program.sites[0], **facts), blocks.Config(**config))
    assert isinstance(answer, No)
    assert words in str(answer)


def test_cross_attention_is_attended_without_a_diagonal(program) -> None:
    site = replace(program.sites[0], mask=Mask("none"), kind="cross")
    assert blocks.fits(site, blocks.Config()) is True
    options = blocks._plan(site, blocks.Config(), {})
    assert options["aligned"] is False


def test_the_cost_is_that_of_the_tiles_and_of_the_estimate(program) -> None:
    site = program.sites[0]
    long, short = Workload(sequence=16384), Workload(sequence=1024)
    full = blocks.cost(site, blocks.Config(amount=1.0), long)
    assert full["density"] == 1
    assert full["estimator_flops"] == 0
    third = blocks.cost(site, blocks.Config(amount=0.3), long)
    assert third["density"] == pytest.approx(0.3)
    assert third["flops"] == pytest.approx(0.3 * full["flops"] + third["estimator_flops"])
    assert third["estimator_flops"] / full["flops"] < 0.01
    assert third["break_even"] == pytest.approx(0.75, rel=0.01)
    assert blocks.cost(site, blocks.Config(amount=0.3), short)["density"] == 1
    assert blocks.cost(site, blocks.Config(amount=0.9), long)["density"] == 1
    assert blocks.cost(site, blocks.Config(amount=0.3), Workload(1, 1, 16384))["density"] == 1
    elements = site.kv_heads * (site.head_dim + site.v_head_dim)
    assert blocks.cost(site, blocks.Config(), None) == {"kv_elements_per_token": elements}


def test_candidates_grow_stronger_and_fit(program) -> None:
    site = program.sites[0]
    configs = blocks.candidates(site)
    assert [c.amount for c in configs] == sorted((c.amount for c in configs), reverse=True)
    assert all(blocks.fits(site, c) is True for c in configs)


def test_the_canonical_op_is_gone(program) -> None:
    assert attention not in [n.target for n in blocked(program, amount=0.3).graph.nodes]


@pytest.mark.slow
def test_a_compiled_graph_computes_the_same(program) -> None:
    """Compiling takes a while."""
    result = blocked(program, amount=0.3)
    assert distance(logits(attnopt.lower(result, backend="inductor")), logits(result)) < 1e-5


@pytest.mark.slow
def test_the_code_model_keeps_its_loss_nearly() -> None:
    """A trained model, on half of its context."""
    place = Path(__file__).parents[1] / "examples" / "models" / "code-llama"
    source = attnopt.apply(attnopt.capture(place), "exact")
    result = blocked(source, amount=0.5, tile=16, stride=4)
    text = (Path(torch.__file__).parent / "functional.py").read_text()[:4000]
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(place)(text, return_tensors="pt").input_ids
    tokens = tokens[:, :512]
    loss = [
        torch.nn.functional.cross_entropy(
            attnopt.lower(p, backend="eager")(input_ids=tokens).logits[0, :-1], tokens[0, 1:]
        )
        for p in (source, result)
    ]
    assert abs(float((loss[1] - loss[0]).detach())) < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_plan_is_made_in_onnxruntime_too(tmp_path: Path) -> None:
    """An export takes most of a minute."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    source = attnopt.apply(attnopt.capture(decoder("llama_gqa")), "exact")
    made = attnopt.export_onnx(blocked(source, amount=0.4), tmp_path / "out")
    assert made.accepted
    assert max(c.max_delta_logit for c in made.parity.cases) < 1e-5


def test_densities_are_proposed_for_long_texts_only(program) -> None:
    site = program.sites[0]
    short, long = (Asked(program, None, ("flops",), 2, n, n) for n in (1024, 8192))
    assert steps_at(site, short, ("blocks",)) == ([], [])
    steps, refused = steps_at(site, long, ("blocks",))
    assert [s.config.amount for s in steps] == [0.5, 0.3, 0.1]
    assert not refused
    steps, refused = steps_at(site, replace(long, seen=1024), ("blocks",))
    assert not steps
    assert "rows of 1024 tokens say nothing of a text of 8192" in str(refused[0])


def test_the_tiles_that_are_visited_are_counted(program) -> None:
    workload = Workload(sequence=40)
    base, whole, few = (
        count_costs(p, workload).flops
        for p in (program, blocked(program, amount=1.0), blocked(program, rule="count", amount=3))
    )
    site = program.sites[0]
    assert whole - base == 2 * 2 * site.heads * site.head_dim * (40 / 2) ** 2
    # Ten rows of tiles, of which the first two have fewer than three to visit.
    pairs = (1 + 2 + 8 * 3) * 4 * 4
    wide = 2 * 2 * site.heads * 2 * site.head_dim
    assert whole - few == wide * (40 * 40 - pairs)
    assert not list(uncounted(blocked(program)))
