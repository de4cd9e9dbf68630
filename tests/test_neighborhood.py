"""Neighbourhoods in models of images: what they compute, and where they are refused."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import vision_models
from vision_models import noise, rewritten

import attnopt
from attnopt.costs import Workload, count_costs
from attnopt.graphs import copied_module
from attnopt.nouns import Choice, Grid, Mask, No
from attnopt.ops import attention, neighborhood_attention
from attnopt.passes import neighborhood
from attnopt.passes.neighborhood import Config
from attnopt.search.candidates import Asked, steps_at

DIGITS = Path(__file__).parents[1] / "examples" / "models" / "vit-digits"


@cache
def captured(name):
    return getattr(vision_models, name)()


@cache
def digits():
    return attnopt.apply(attnopt.capture(DIGITS), "exact")


def logits(program):
    return program(pixel_values=noise(3, 1, 32, 32, seed=1)).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_a_window_of_the_whole_grid_changes_no_bit(name):
    model = captured(name)
    result = rewritten(model.program)
    assert torch.equal(model.call(result), model.call(model.program))
    assert not result.main.graph.find_nodes(op="call_function", target=neighborhood_attention)
    assert result.tier == model.program.tier


def under_mask(program, window):
    """Return a program in which a mask, made pair by pair, shows the neighbours of a token."""
    grid = program.sites[0].grid
    sides, leading = (grid.height, grid.width), grid.leading

    def near(a, b, length):
        start = min(max(a - window // 2, 0), length - window)
        return start <= b < start + window

    cells = [(y, x) for y in range(sides[0]) for x in range(sides[1])]
    seen = torch.ones(leading + len(cells), leading + len(cells), dtype=torch.bool)
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            seen[leading + i, leading + j] = near(y, v, sides[0]) and near(x, u, sides[1])
    module = copied_module(program.graph_module)
    module.register_buffer("near", seen)
    for node in module.graph.find_nodes(op="call_function", target=attention):
        if node.args[1].meta["val"].shape[2] == len(seen):
            with module.graph.inserting_before(node):
                node.update_kwarg("mask", module.graph.get_attr("near"))
    module.recompile()
    return replace(program, graph_module=module)


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_tokens_see_their_neighbourhood_and_what_stands_before_the_image(name):
    model = captured(name)
    wanted = model.call(under_mask(model.program, 3))
    assert distance(model.call(rewritten(model.program, window=3)), wanted) < 1e-5
    assert distance(model.call(model.program), wanted) > 1e-3


def test_windows_that_are_there_already_are_refused_with_the_reason():
    model = captured("swin")
    assert len(model.program.sites) == 3
    for site in model.program.sites:
        refusal = neighborhood.fits(site, Config(3))
        assert isinstance(refusal, No)
        assert "windows of an image" in refusal.why


REFUSED = {
    "larger than the grid of 16 x 16": ({}, Config(17)),
    "see their neighbourhood already": ({"grid": None}, Config(3)),
    "its mask is causal": ({"mask": Mask("causal")}, Config(3)),
    "come from a cache": ({"cached": True}, Config(3)),
    "padding": ({"padded": True}, Config(3)),
    "other tokens": ({"kind": "cross"}, Config(3)),
    "3 keys, 8 apart": ({}, Config(3, dilation=8)),
    "stride 4": ({}, Config(3, stride=4)),
    "shift or clamp": ({}, Config(3, border="wrap")),
    "needs a value": ({}, Config([3])),
    "tiles of a dilated window": ({}, Config(3, dilation=2, tile=4)),
    "bias is in the order of rows": ({"bias": "table"}, Config(3, tile=4)),
    "positive side": ({}, Config(3, tile=[4])),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_neighbourhood_is_refused_with_the_reason(why):
    facts, config = REFUSED[why]
    site = replace(digits().sites[0], **facts)
    refusal = neighborhood.fits(site, config)
    assert isinstance(refusal, No)
    assert refusal.where == site.name
    assert re.search(why, refusal.why)


def test_a_plan_that_does_not_fit_is_an_error():
    choice = Choice(digits().sites[0].name, "neighborhood", {"window": 20})
    with pytest.raises(ValueError, match="larger than the grid"):
        attnopt.apply(digits(), attnopt.Plan((choice,)))


def test_the_candidates_fit_and_come_with_stride_and_tile():
    site = digits().sites[0]
    found = neighborhood.candidates(site)
    assert [c.window for c in found] == [(12, 12), (8, 8), (4, 4)]
    assert all(neighborhood.fits(site, c) is True for c in found)
    assert all(c.tile is not None for c in found)
    odd = replace(site, grid=Grid(14, 14, 1))
    assert all(neighborhood.fits(odd, c) is True for c in neighborhood.candidates(odd))
    assert neighborhood.candidates(replace(site, grid=None)) == (Config(),)


def test_the_cost_is_that_of_the_pairs_that_see_each_other():
    site = digits().sites[0]
    whole = neighborhood.cost(site, Config(), None)["flops"]
    assert whole == 2 * 4 * (16 + 16) * 257**2
    near = neighborhood.cost(site, Config(4), None)["flops"]
    assert near == pytest.approx(2 * 4 * 32 * (256 * 17 + 257))
    workload = Workload(1, 0)
    before = count_costs(digits(), workload).flops
    after = count_costs(rewritten(digits(), window=4), workload).flops
    assert before - after == pytest.approx(4 * (whole - near), abs=8)


def test_a_rewritten_site_is_found_again_with_its_grid():
    result = rewritten(digits(), window=5)
    assert [s.name for s in result.sites] == [s.name for s in digits().sites]
    site = result.sites[0]
    assert site.grid == Grid(16, 16, 1)
    assert site.mask.kind == "dense"
    assert "neighbourhood" in " ".join(site.notes)
    refusal = neighborhood.fits(site, Config(3))
    assert isinstance(refusal, No)


SETTINGS = {
    "window": {"window": 7},
    "tile": {"window": 7, "tile": 4},
    "cut tiles": {"window": [5, 3], "stride": [2, 1], "border": "clamp", "tile": [3, 5]},
    "dilation": {"window": [5, 3], "dilation": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_backends_agree_with_the_program(name):
    result = rewritten(digits(), **SETTINGS[name])
    with torch.no_grad():
        for backend in ("reference", "eager"):
            module = attnopt.lower(result, backend)
            found = module(pixel_values=noise(3, 1, 32, 32, seed=1)).logits
            assert distance(found, logits(result)) < 1e-5


@pytest.mark.parametrize("name", ["tile", "cut tiles"])
def test_saving_keeps_every_bit(name, tmp_path):
    result = rewritten(digits(), **SETTINGS[name])
    assert result.tier == 2
    attnopt.save(result, tmp_path / "out")
    again = attnopt.capture(tmp_path / "out")
    assert torch.equal(logits(again), logits(result))
    with torch.no_grad():
        loaded = attnopt.load(tmp_path / "out")(pixel_values=noise(3, 1, 32, 32, seed=1)).logits
        lowered = attnopt.lower(result, "eager")(pixel_values=noise(3, 1, 32, 32, seed=1)).logits
    assert torch.equal(loaded, lowered)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tile", "cut tiles"])
def test_an_export_agrees_with_the_program(name, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install attnopt[onnx]")
    result = rewritten(digits(), **SETTINGS[name])
    made = attnopt.export_onnx(result, tmp_path / "onnx")
    assert made.accepted
    assert made.operators == {"Attention": 4}
    assert max(case.max_delta_logit for case in made.parity.cases) <= 1e-4


@pytest.mark.slow
def test_inductor_agrees_with_the_program():
    result = rewritten(digits(), window=7, tile=4)
    with torch.no_grad():
        found = attnopt.lower(result, "inductor")(pixel_values=noise(3, 1, 32, 32, seed=1)).logits
    assert distance(found, logits(result)) < 1e-5


def test_windows_are_proposed_where_operations_are_to_be_saved():
    (site, *_) = digits().sites
    asked = Asked(digits(), None, ("latency",), 2, 0)
    steps, refused = steps_at(site, asked, ("neighborhood",))
    assert [s.config.window for s in steps] == [(12, 12), (8, 8), (4, 4)]
    assert not refused
    for goals in (("params",), ("memory",), ("kv_cache",)):
        assert steps_at(site, replace(asked, goals=goals), ("neighborhood",)) == ([], [])
