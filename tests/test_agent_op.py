"""Attention through agents, against the definition cell by cell and row by row."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from attnopt.ops import agent_attention, agent_attention_reference, attention_reference
from attnopt.ops.through_agents import attend_agents
from tests.conformance import TOLERANCE, draw

WIDTH = 8
IMPLEMENTATIONS = [agent_attention_reference, attend_agents]


def inputs(case, *, batch=2, heads=3, v_width=WIDTH, dtype=torch.float64):
    tokens = math.prod(case["grid"]) + case.get("leading", 0)
    widths = (WIDTH, WIDTH, v_width)
    return tuple(draw(batch, heads, tokens, w, seed=s).to(dtype) for s, w in enumerate(widths))


def cells(length, count):
    """List the places of every cell of an axis."""
    return [range(i * length // count, math.ceil((i + 1) * length / count)) for i in range(count)]


def linear(length, size):
    """Return how so many numbers are drawn out to a length, half a step in at the ends."""
    made = torch.zeros(size, length, dtype=torch.float64)
    for at in range(size):
        place = min(max((at + 0.5) * length / size - 0.5, 0.0), length - 1.0)
        low = min(int(place), max(length - 2, 0))
        made[at, low] += 1 - (place - low)
        if place > low:
            made[at, low + 1] += place - low
    return made


def table_of(tables, grid):
    """Return tables (H, A, r, c) drawn out to a grid and summed, (H, A, N)."""
    drawn = [linear(t.shape[2], grid[0]) @ t @ linear(t.shape[3], grid[1]).T for t in tables]
    return sum(drawn).flatten(2)


def defined(q, k, v, case):
    """Return the output by definition, in float64: queries of agents cell by cell."""
    q, k, v = (x.double() for x in (q, k, v))
    (height, width), leading = case["grid"], case.get("leading", 0)
    scale = case.get("scale") or WIDTH**-0.5
    sharp = scale * math.sqrt(WIDTH) ** (1 - case.get("exponent", 1.0))
    rows, columns = cells(height, case["agents"][0]), cells(width, case["agents"][1])
    places = [[leading + y * width + x for y in ys for x in xs] for ys in rows for xs in columns]
    agents = torch.stack([q[:, :, p].mean(2) for p in places], dim=2)
    to_agents = scale * agents @ k.mT
    of_agents = sharp * q[:, :, leading:] @ agents.mT
    if case.get("collect"):
        to_agents[..., leading:] += table_of(case["collect"], case["grid"])
    if case.get("collect_first") is not None:
        to_agents[..., :leading] += case["collect_first"]
    if case.get("spread"):
        of_agents += table_of(case["spread"], case["grid"]).mT
    collected = to_agents.softmax(-1) @ v
    if case.get("nystrom"):
        core = (sharp * agents @ agents.mT).softmax(-1)
        size = core.shape[-1]
        ridge = case.get("ridge", 0.0) * core.square().sum((-1, -2), keepdim=True) / size
        collected = torch.linalg.solve(
            core.mT @ core + ridge * torch.eye(size), core.mT @ collected
        )
    found = of_agents.softmax(-1) @ collected
    image = v[:, :, leading:]
    factors = case.get("shortcut") or [0.0]
    found += torch.tensor(factors, dtype=torch.float64).view(-1, 1, 1) * image
    if case.get("filter") is not None:
        found += filtered(image, case["filter"], height, width)
    first = (scale * q[:, :, :leading] @ k.mT).softmax(-1) @ v
    return torch.cat([first, found], dim=2)


def filtered(image, weights, height, width):
    """Return the depth-wise convolution of values, tap by tap."""
    heads, channels = image.shape[1::2]
    grid = image.unflatten(2, (height, width))
    padded = torch.nn.functional.pad(grid, (0, 0, 1, 1, 1, 1))
    taps = weights.view(heads, channels, 3, 3)
    found = torch.zeros_like(grid)
    for y in range(3):
        for x in range(3):
            part = padded[:, :, y : y + height, x : x + width]
            found += part * taps[:, :, y, x].view(1, heads, 1, 1, channels)
    return found.flatten(2, 3)


def tables(*sizes, heads=3, agents=6):
    return [draw(heads, agents, *size, seed=i + 5) for i, size in enumerate(sizes)]


BASE = {"grid": [5, 7], "agents": [2, 3], "leading": 2}
CASES = {
    "plain": {},
    "one agent": {"agents": [1, 1]},
    "one token": {"grid": [1, 1], "agents": [1, 1], "leading": 0},
    "every token": {"agents": [5, 7]},
    "no tokens before": {"leading": 0},
    "odd cells": {"grid": [7, 9], "agents": [4, 5], "leading": 1},
    "sharpened": {"exponent": 0.3, "scale": 0.7},
    "shortcut": {"shortcut": [0.2]},
    "shortcut of each head": {"shortcut": [0.2, -0.1, 0.0]},
    "nystrom": {"nystrom": True, "ridge": 1e-2, "steps": 30, "exponent": 0.5},
    "biases": {
        "collect": tables((3, 3), (5, 1), (1, 7)),
        "collect_first": draw(3, 6, 2, seed=1),
        "spread": tables((7, 7), (1, 1)),
    },
    "filter": {"filter": draw(3 * WIDTH, 1, 3, 3, seed=2)},
}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_definition_says(name, op):
    case = {**BASE, **CASES[name]}
    q, k, v = inputs(case)
    torch.testing.assert_close(op(q, k, v, **case), defined(q, k, v, case), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "biases", "filter", "shortcut of each head"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_lower_precisions_agree_with_the_definition(op, name, dtype):
    case = {**BASE, **CASES[name]}
    q, k, v = inputs(case, dtype=dtype)
    found = op(q, k, v, **{n: _cast(x, dtype) for n, x in case.items()})
    wanted = defined(q, k, v, case)
    assert found.dtype == dtype
    assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2 * TOLERANCE[dtype]


def _cast(x, dtype):
    if isinstance(x, list) and isinstance(x[0], torch.Tensor):
        return [t.to(dtype) for t in x]
    return x.to(dtype) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_values_may_have_another_width(op):
    case = {**BASE, "shortcut": [0.5]}
    q, k, v = inputs(case, v_width=5)
    torch.testing.assert_close(op(q, k, v, **case), defined(q, k, v, case), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_with_every_token_an_agent_the_nystrom_core_is_dense_attention(op):
    case = {**BASE, "agents": [5, 7], "nystrom": True, "steps": 60}
    q, k, v = inputs(case)
    torch.testing.assert_close(op(q, k, v, **case), attention_reference(q, k, v)[0])
    plain = op(q, k, v, **{**case, "nystrom": False})
    assert float((plain - attention_reference(q, k, v)[0]).abs().max()) > 0.1


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_a_core_in_which_all_agents_are_alike_is_undone_without_numbers_that_explode(op):
    case = {**BASE, "nystrom": True, "ridge": 1e-4}
    q, k, v = inputs(case, dtype=torch.float32)
    q = q[:, :, :1].expand_as(q) + 1e-4 * q
    found = op(q, k, v, **case)
    dense = attention_reference(q, k, v)[0]
    assert float((found - dense).abs().max()) < 0.05


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_tokens_before_the_grid_see_all_keys_and_are_in_no_agent(op):
    q, k, v = inputs(BASE)
    found = op(q, k, v, **BASE)
    torch.testing.assert_close(found[:, :, :2], attention_reference(q, k, v)[0][:, :, :2])
    other = q.clone()
    other[:, :, :2] += 3.0
    torch.testing.assert_close(op(other, k, v, **BASE)[:, :, 2:], found[:, :, 2:])


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["plain", "nystrom", "biases", "filter"])
def test_no_token_meets_another(op, name):
    more = {} if name == "biases" else CASES[name]
    case = {"grid": [15, 15], "agents": [2, 3], "leading": 1, **more, "steps": 2}
    if name == "biases":
        case |= {"collect": tables((3, 3)), "spread": tables((3, 3))}
    q, k, v = inputs(case, batch=1)
    traced = make_fx(lambda *x: op(*x, **case))(q, k, v)
    made = [x for n in traced.graph.nodes for x in tree_leaves(n.meta.get("val"))]
    sizes = [x.numel() for x in made if isinstance(x, torch.Tensor)]
    assert len(sizes) > 10
    assert max(sizes) < 226**2


@pytest.mark.parametrize("op", [agent_attention, *IMPLEMENTATIONS])
@pytest.mark.parametrize("rows", [[True, False, True], [True] * 3, [False] * 3, True, False])
def test_rows_that_are_not_active_are_dense(op, rows):
    case = {**BASE, "shortcut": [0.1]}
    q, k, v = inputs(case, batch=3)
    active = torch.tensor(rows)
    through, dense = defined(q, k, v, case), attention_reference(q, k, v)[0]
    wanted = torch.where(active.reshape(-1, 1, 1, 1), through, dense)
    torch.testing.assert_close(op(q, k, v, active=active, **case), wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["plain", "nystrom", "biases", "filter", "shortcut"])
def test_gradients_agree(name):
    case = {**BASE, **CASES[name]}
    found = []
    for op in IMPLEMENTATIONS:
        leaves = [x.requires_grad_() for x in inputs(case)]
        own = {n: _leaf(x) for n, x in case.items()}
        more = [t for x in own.values() for t in (x if isinstance(x, list) else [x])]
        leaves += [t for t in more if isinstance(t, torch.Tensor)]
        (op(*leaves[:3], **own) ** 2).sum().backward()
        found.append([x.grad for x in leaves])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def _leaf(x):
    if isinstance(x, list) and isinstance(x[0], torch.Tensor):
        return [t.clone().requires_grad_() for t in x]
    return x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
COMPILED = ("test_aot_dispatch_dynamic",)


@pytest.mark.parametrize("name", ["nystrom", "biases", "filter"])
@pytest.mark.parametrize("checks", [QUICK, pytest.param(COMPILED, marks=pytest.mark.slow)])
def test_the_ops_pass_the_checks_of_torch(name, checks):
    case = {**BASE, **CASES[name], "steps": 2}
    leaves = tuple(x.requires_grad_() for x in inputs(case, batch=1))
    torch.library.opcheck(agent_attention, leaves, case, test_utils=checks)
    active = torch.tensor([True])
    torch.library.opcheck(agent_attention, leaves, {**case, "active": active}, test_utils=checks)


def test_the_op_that_compilers_do_not_look_into_passes_the_checks_of_torch():
    case = {**BASE, **CASES["biases"], "filter": CASES["filter"]["filter"]}
    given = [case.pop(n) for n in ("collect", "collect_first", "spread", "filter")]
    op = torch.ops.attnopt.scheduled_agents.default
    checks = ("test_schema", "test_faketensor")
    tensors = (*inputs(case), torch.tensor([True, False]), *given)
    torch.library.opcheck(op, tensors, case, test_utils=checks)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": [5, 6]}, "no grid"),
        ({"leading": 1}, "no grid"),
        ({"grid": [37], "leading": 0}, "height and width"),
        ({"agents": [6, 3]}, "from 1 to all"),
        ({"agents": [0, 3]}, "from 1 to all"),
        ({"agents": [4]}, "from 1 to all"),
        ({"shortcut": [0.1, 0.2]}, "one for each"),
        ({"nystrom": True, "spread": tables((3, 3))}, "no biases"),
    ],
)
@pytest.mark.parametrize("op", [agent_attention, attend_agents])
def test_what_cannot_be_is_refused_with_the_reason(op, changes, said):
    with pytest.raises(ValueError, match=said):
        op(*inputs(BASE), **{**BASE, **changes})


@pytest.mark.parametrize("op", [agent_attention, attend_agents])
def test_heads_that_share_keys_have_no_agents(op):
    q, k, v = inputs(BASE)
    with pytest.raises(ValueError, match="agents do not"):
        op(q, k[:, :1], v[:, :1], **BASE)
