"""Random spellings are found and rewritten right, and the fuzzer can tell when they are not."""

import os
import pickle
from dataclasses import replace
from random import Random

import fuzz
import pytest
import torch
from fuzz_grammar.cases import CAPTURED, Case, draw
from fuzz_grammar.lookalikes import LOOKALIKES
from fuzz_grammar.spec import Spec, repair, sample
from site_facts import ANY, COMPARED
from torch import fx

from attnopt.nouns import Mask, Site

CASES = int(os.environ.get("ATTNOPT_FUZZ_CASES", "24"))
SEED = int(os.environ.get("ATTNOPT_FUZZ_SEED", "0"))
SHARDS, FAST = 6, 1


@pytest.mark.parametrize(
    "shard", [*range(FAST), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FAST, SHARDS))]
)
def test_random_spellings_are_found_and_rewritten_right(shard):
    summary = fuzz.run(SEED, range(shard, CASES, SHARDS))
    problems = [line for r in summary.results if r.problems for line in fuzz.report(r)]
    assert summary.found_share >= 0.99, "\n".join(problems)
    assert not summary.count("wrong rewrite"), "\n".join(problems)
    assert not summary.count("wrong capture"), "\n".join(problems)
    assert not summary.count("false positive"), "\n".join(problems)


# The fuzzer itself, on stand-ins for a compiler that exports and claims what it is told to.


def exported(case: Case, edit=lambda graph: None) -> fx.GraphModule:
    inputs = case.inputs(CAPTURED, 0)
    shapes = {name: fuzz.dynamic(name, case, case.spec.static_length) for name in inputs}
    program = torch.export.export(case.module, (), inputs, dynamic_shapes=shapes, strict=False)
    module = program.module()
    edit(module.graph)
    module.recompile()
    return module


def claimed(expected) -> Site:
    facts = {name: getattr(expected, name) for name in COMPARED}
    facts = {name: None if value is ANY else value for name, value in facts.items()}
    rest = {"rope": None, "qk_norm": None, "grid": None, "projections": {}}
    return Site(name="claimed", module="", **facts, **rest)


def stand_in(edit=lambda graph: None, change=lambda sites: sites):
    def compiler(case: Case) -> fuzz.Compiled:
        sites = change(tuple(claimed(one) for one in case.expected))
        return fuzz.Compiled(
            sites=sites,
            near_misses=("module softmax: no values",),
            refused=(),
            rewritten=len(sites),
            captured=exported(case),
            exact=exported(case, edit),
        )

    return compiler


def scale_scores(graph: fx.Graph) -> None:
    """Multiply the input of every softmax by 1.1."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int):
        with graph.inserting_before(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], 1.1))
        node.update_arg(0, scaled)


PLAIN = Case(0, 0, spec=Spec())


def test_an_honest_compiler_passes():
    assert fuzz.check(PLAIN, stand_in()).problems == ()


def test_a_scale_that_is_off_by_a_tenth_is_a_wrong_rewrite():
    result = fuzz.check(PLAIN, stand_in(edit=scale_scores))
    assert result.categories == {"wrong rewrite"}
    assert result.failed


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_wrong_scale_shows_in_every_dtype(dtype):
    case = replace(PLAIN, spec=Spec(dtype=dtype))
    assert fuzz.check(case, stand_in(edit=scale_scores)).categories == {"wrong rewrite"}
    assert fuzz.check(case, stand_in()).problems == ()


def test_a_wrong_scale_shows_in_many_attentions_in_a_row():
    case = replace(PLAIN, spec=repair(Spec(stack="sequential", layers=3, twice=True)))
    assert len(case.expected) == 6
    assert fuzz.check(case, stand_in(edit=scale_scores)).categories == {"wrong rewrite"}
    assert fuzz.check(case, stand_in()).problems == ()


def test_a_site_that_is_not_reported_is_missed():
    result = fuzz.check(PLAIN, stand_in(change=lambda sites: ()))
    assert result.categories == {"missed"}


def test_a_site_too_many_is_a_false_positive():
    result = fuzz.check(PLAIN, stand_in(change=lambda sites: sites * 2))
    assert result.categories == {"false positive"}


@pytest.mark.parametrize(
    ("fact", "value"), [("heads", 3), ("scale", 0.4), ("mask", Mask("causal")), ("sinks", True)]
)
def test_a_wrong_fact_is_reported_by_name(fact, value):
    changed = stand_in(change=lambda sites: (replace(sites[0], **{fact: value}),))
    result = fuzz.check(PLAIN, changed)
    (problem,) = result.problems
    assert problem.category == "facts"
    assert result.failed
    assert f"{fact}: found {value}" in problem.text


def test_a_crash_counts_as_a_miss():
    def crash(case: Case) -> fuzz.Compiled:
        raise RuntimeError("no such axis")

    result = fuzz.check(PLAIN, crash)
    assert result.categories == {"crash"}
    assert (result.found, result.expected) == (0, 1)


def test_shrinking_keeps_only_what_the_failure_needs():
    def misses_causal(sites):
        return tuple(site for site in sites if site.mask.kind != "causal")

    spec = repair(Spec(mask="causal", softcap=5.0, scale=0.3, projection_bias=True))
    result = fuzz.shrunk(replace(PLAIN, spec=spec), stand_in(change=misses_causal))
    assert result.case.spec.described() == {"mask": "causal"}


def test_a_case_is_the_same_each_time_it_is_drawn():
    first, second = draw(3, 14), draw(3, 14)
    assert first == second
    assert first.described() == second.described()
    for mine, other in zip(
        first.module.state_dict().values(), second.module.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other)


def test_every_drawn_spec_obeys_the_rules():
    for number in range(2000):
        spec = sample(Random(number))
        assert repair(spec) == spec


@pytest.mark.parametrize("kind", sorted(LOOKALIKES))
def test_a_look_alike_runs_and_exports_with_dynamic_sizes(kind):
    case = draw(5, 0, only=kind)
    assert case.expected == ()
    assert fuzz.export_failure(case) is None


def test_drawn_modules_run_at_every_size_and_give_finite_numbers():
    for index in range(60):
        case = draw(11, index)
        for size in case.sizes:
            inputs = case.inputs(size, 0)
            with torch.no_grad():
                (first, *_) = fuzz.tensors_of(case.module(**inputs))
            assert torch.isfinite(first).all(), f"{size} {case.command()}"


def test_results_travel_between_processes_without_their_modules():
    index = next(i for i in range(50) if draw(0, i).lookalike == "ChannelGate")
    result = fuzz.one(0, index, None)
    assert pickle.loads(pickle.dumps(result)) == result
    assert "module" not in vars(result.case)
