"""Tokens are permuted where they come in and where they go out, and nothing else changes."""

from functools import cache
from pathlib import Path

import pytest
import torch
import vision_models
from torch import fx
from vision_models import noise, rewritten

import attnopt
from attnopt import hoisting
from attnopt.hoisting import hoist, lay_out, permutations
from attnopt.ops import attention, neighborhood_attention, tile_tokens
from tests.conformance import draw

DIGITS = Path(__file__).parents[1] / "examples" / "models" / "vit-digits"
GRID, TILE, LEADING = (4, 6), (2, 3), 1
TOKENS, WIDTH = 25, 8


@cache
def captured(name):
    return getattr(vision_models, name)()


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_the_bundled_vit_permutes_its_tokens_once(monkeypatch):
    program = attnopt.apply(attnopt.capture(DIGITS), "exact")
    picture = noise(3, 1, 32, 32, seed=1)
    hoisted = rewritten(program, window=7, tile=4)
    assert permutations(hoisted.graph) == 1
    monkeypatch.setattr("attnopt.surgery.edit.hoist", lambda graph: None)
    around = rewritten(program, window=7, tile=4)
    assert permutations(around.graph) == 4 * len(program.sites)
    by_rows = rewritten(program, window=7)
    found = [p(pixel_values=picture).logits for p in (hoisted, around, by_rows)]
    assert distance(found[0], found[1]) < 1e-5
    assert distance(found[0], found[2]) < 1e-5


# A class token is read without going back; a U-Net's convolutions read the grid in between.
EXPECTED = {"vit": 1, "deit": 2, "dit": 2, "unet": 8, "conditional_unet": 8}


@pytest.mark.parametrize("name", vision_models.NAMES)
def test_permutations_stand_where_the_grid_is_read(name):
    model = captured(name)
    result = rewritten(model.program, window=3, tile=[2, 4])
    assert permutations(result.graph) == EXPECTED[name]
    assert distance(model.call(result), model.call(rewritten(model.program, window=3))) < 1e-5


def test_tiles_that_are_cut_off_are_hoisted_too():
    model = captured("vit")
    result = rewritten(model.program, window=3, tile=[3, 5])
    assert permutations(result.graph) == 1
    assert distance(model.call(result), model.call(rewritten(model.program, window=3))) < 1e-5


def test_hoisting_again_changes_nothing():
    graph = rewritten(captured("vit").program, window=3, tile=4).graph
    before = [n.format_node() for n in graph.nodes if n.target is tile_tokens]
    hoist(graph)
    after = [n for n in graph.nodes if n.target is tile_tokens]
    assert len(after) == len(before) == 1
    graph.lint()


def test_sites_of_another_order_keep_their_own():
    program = captured("vit").program
    first, second = program.sites
    choices = tuple(
        attnopt.Choice(site.name, "neighborhood", {"window": 3, "tile": tile})
        for site, tile in ((first, [2, 2]), (second, [4, 4]))
    )
    result = attnopt.apply(program, attnopt.Plan(choices))
    wanted = captured("vit").call(rewritten(program, window=3))
    assert distance(captured("vit").call(result), wanted) < 1e-5
    assert permutations(result.graph) > 1


@pytest.mark.slow
def test_a_dense_layer_in_between_lets_the_order_pass():
    program = captured("dit").program
    choices = (attnopt.Choice(program.sites[0].name, "neighborhood", {"window": 3, "tile": 2}),)
    by_rows = (attnopt.Choice(program.sites[0].name, "neighborhood", {"window": 3}),)
    found = [attnopt.apply(program, attnopt.Plan(c)) for c in (choices, by_rows)]
    assert permutations(found[0].graph) == 2
    assert distance(*(captured("dit").call(p) for p in found)) < 1e-5


# ------------------------------------------------------------------------------------ node by node


def attended(x):
    """Attend with what every operand is made of."""
    q = x.view(x.shape[0], TOKENS, 2, WIDTH // 2).transpose(1, 2)
    one = [1, 1]
    settings = {"grid": list(GRID), "window": [3, 3], "stride": one, "dilation": one}
    out = neighborhood_attention(q, q, q, **settings, causal=[False, False], leading=LEADING)
    return out.transpose(1, 2).reshape(x.shape[0], TOKENS, WIDTH)


def traced(function):
    """Return a function as a graph of ATen with example values, every attention laid out."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*INPUTS)


WAYS = {
    "elementwise": (lambda x, *_: attended(torch.tanh(x) * 2 + x), 2),
    "a constant of every token": (lambda x, every, *_: attended(x + every), 2),
    "a constant of all tokens": (lambda x, every, *_: attended(x * every[:, :1]), 2),
    "two layers": (lambda x, *_: attended(attended(x) + x), 2),
    "a norm over channels": (
        lambda x, *_: attended(torch.layer_norm(attended(x), [WIDTH])), 2,
    ),
    "a norm over tokens": (
        lambda x, *_: attended(torch.layer_norm(attended(x), [TOKENS, WIDTH])), 4,
    ),
    "channels first": (lambda x, *_: attended(attended(x).mT.relu().mT), 2),
    "a mean over tokens": (lambda x, *_: attended(x).mean(1), 1),
    "a mean over channels": (lambda x, *_: attended(x).mean(-1), 2),
    "the class token": (lambda x, *_: attended(x)[:, 0], 1),
    "the first of the image": (lambda x, *_: attended(x)[:, 1], 2),
    "all but the class token": (lambda x, *_: attended(attended(x)[:, 1:].sum(1, True) + x), 3),
    "tokens turned around": (lambda x, *_: attended(attended(x).flip(1)), 4),
    "halves of the channels": (
        lambda x, *_: attended(torch.cat([p.neg() for p in attended(x).chunk(2, -1)][::-1], -1)), 2,
    ),
    "neighbours are mixed": (
        lambda x, every, weight, mix: attended(
            torch.conv1d(attended(x).transpose(1, 2), weight, padding=1).transpose(1, 2)), 4,
    ),
    "a product over tokens": (lambda x, every, weight, mix: attended(mix @ attended(x)), 4),
    "dense attention": (
        lambda x, *_: attended(attention(*[attended(x).unsqueeze(1)] * 3).squeeze(1)), 2,
    ),
    "causal attention": (
        lambda x, *_: attended(
            attention(*[attended(x).unsqueeze(1)] * 3, causal=True).squeeze(1)), 4,
    ),
    "tokens in the batch": (
        lambda x, *_: attended(attended(x).reshape(-1, WIDTH).relu().reshape(-1, TOKENS, WIDTH)), 4,
    ),
}  # fmt: skip
INPUTS = (
    draw(2, TOKENS, WIDTH),
    draw(1, TOKENS, WIDTH, seed=1),
    draw(WIDTH, WIDTH, 3, seed=2),
    draw(TOKENS, TOKENS, seed=3),
)


@pytest.mark.parametrize("name", WAYS)
def test_what_treats_tokens_alike_is_passed_and_nothing_else(name):
    function, count = WAYS[name]
    module = traced(function)
    wanted = function(*INPUTS)
    for node in module.graph.find_nodes(op="call_function", target=neighborhood_attention):
        lay_out(node, TILE)
    module.recompile()
    torch.testing.assert_close(module(*INPUTS), wanted)
    hoist(module.graph)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*INPUTS), wanted)
    assert permutations(module.graph) == count


def test_an_order_is_read_off_an_attention_with_a_tile():
    graph = fx.Graph()
    x = graph.placeholder("x")
    settings = {"grid": [4, 6], "leading": 1}
    node = graph.call_function(neighborhood_attention, (x, x, x), settings)
    assert hoisting.Order.of(node) is None
    node.kwargs = {**settings, "tile": [2, 3]}
    assert hoisting.Order.of(node) == hoisting.Order((4, 6), (2, 3), 1)
