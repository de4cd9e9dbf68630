"""Gates: what is on, what equal heads do, and what routers of zeros let through."""

import pytest
import torch
from conformance import draw

from attnopt.ops import fitted_gates, norm_gates, router_gates
from attnopt.ops.gates import annealed, balance, norm_gates_reference, router_gates_reference


def test_the_longest_queries_are_on():
    q = draw(2, 6, 5, 4)
    scales = [1.0, 0.5, 2.0, 1.0, 3.0, 0.1]
    gates = norm_gates(q, count=2, scales=scales)
    sizes = q.norm(dim=-1) * torch.tensor(scales).double().view(1, -1, 1)
    assert gates.shape == (2, 6, 5)
    for row in range(2):
        for token in range(5):
            on = set(gates[row, :, token].nonzero().flatten().tolist())
            assert on == set(sizes[row, :, token].topk(2).indices.tolist())
    assert set(gates.unique().tolist()) == {0.0, 1.0}


def test_groups_go_together_by_the_root_of_their_squares():
    q = draw(1, 6, 9, 4)
    gates = norm_gates(q, count=1, group=3)
    sizes = q.square().sum(-1).unflatten(1, (2, 3)).sum(2)
    assert torch.equal(gates[:, ::3], gates[:, 2::3])
    assert torch.equal(gates[:, 0] > 0, sizes[:, 0] > sizes[:, 1])


@pytest.mark.parametrize("group", [1, 3])
def test_a_fitted_router_reads_tokens_and_norms(group):
    q, x, router = draw(2, 6, 5, 4), draw(2, 5, 7, seed=1), draw(6 // group, 14, seed=2)
    gates = fitted_gates(q, x, router, count=1, group=group)
    assert gates.shape == (2, 6, 5)
    for row in range(2):
        for token in range(5):
            told = torch.cat([x[row, token], q[row, :, token].norm(dim=-1), torch.ones(1)])
            best = int((router @ told).argmax())
            on = gates[row, :, token].nonzero().flatten().tolist()
            assert on == list(range(best * group, (best + 1) * group))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_of_equal_heads_the_first_ones_are_on(dtype):
    gates = norm_gates(torch.ones(1, 5, 3, 8, dtype=dtype), count=2)
    assert gates.dtype == dtype
    assert torch.equal(gates[0, :, 0].nonzero().flatten(), torch.tensor([0, 1]))
    zeros = torch.zeros(3, 8, dtype=dtype)
    gates = router_gates(draw(1, 4, 8).to(dtype), zeros, count=2, heads=[2, 0, 1])
    assert torch.equal(gates[0, :, 0].nonzero().flatten(), torch.tensor([0, 2]))


@pytest.mark.parametrize("shared", [0, 1, 3])
def test_routers_of_zeros_let_all_heads_through_as_they_are(shared):
    heads = [3, 1, 0, 2, 4]
    zeros = torch.zeros(5, 8)
    both = (zeros[:2], zeros[:shared]) if shared else (None, None)
    gates = router_gates(
        draw(2, 7, 8).float(), zeros[shared:], *both, count=5 - shared, heads=heads
    )
    torch.testing.assert_close(gates, torch.ones(2, 5, 7))


def test_a_single_shared_head_needs_no_router():
    x, routed, pair = draw(2, 7, 8), draw(3, 8, seed=1), draw(2, 8, seed=2)
    alone = router_gates(x, routed, pair, count=2, heads=[1, 0, 2, 3])
    beside = router_gates(x, routed, pair, draw(1, 8, seed=3), count=2, heads=[1, 0, 2, 3])
    torch.testing.assert_close(alone, beside)
    torch.testing.assert_close(alone[:, 1], 2 * torch.softmax(x @ pair.T, -1)[..., 0])


def test_learned_gates_are_those_of_the_formula():
    x, routed, pair, shared = (
        draw(1, 7, 8),
        draw(4, 8, seed=1),
        draw(2, 8, seed=2),
        draw(2, 8, seed=3),
    )
    found = router_gates(x, routed, pair, shared, count=2, heads=[4, 1, 0, 2, 3, 5])
    for token in range(7):
        row = x[0, token]
        first, second = (2 * torch.softmax(pair @ row, 0)).tolist()
        always = 2 * torch.softmax(shared @ row, 0)
        chances = torch.softmax(routed @ row, 0)
        best = chances.topk(2).indices
        wanted = torch.zeros(6, dtype=torch.float64)
        wanted[[4, 1]] = first * always
        for place in best.tolist():
            wanted[[0, 2, 3, 5][place]] = second * 2 * chances[place] / chances[best].sum()
        torch.testing.assert_close(found[0, :, token], wanted)


def test_an_even_load_costs_as_much_as_there_are_heads_on():
    x = torch.eye(6).double().repeat(4, 1).unsqueeze(0)
    turns = torch.stack([torch.roll(torch.eye(6), n, 0) for n in range(2)]).sum(0).double()
    assert float(balance(x, 3 * turns, 2)) == pytest.approx(2.0)
    same = torch.zeros(6, 6, dtype=torch.float64)
    same[0], same[1] = 4.0, 3.0
    assert float(balance(x, same, 2)) > 3.0


def test_annealing_goes_from_all_to_the_count():
    assert [annealed(8, 4, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [8, 7, 6, 5, 4]
    assert [annealed(8, 8, share) for share in (0.0, 1.0)] == [8, 8]


def test_routers_learn_by_the_gates_that_are_on():
    x = draw(1, 9, 8)
    routers = [draw(n, 8, seed=n).requires_grad_() for n in (4, 2, 1)]
    gates = router_gates(x, *routers, count=2, heads=[0, 1, 2, 3, 4])
    assert not gates.detach()[:, 1:].all()
    (gates * draw(1, 5, 9, seed=5)).sum().backward()
    assert all(bool(r.grad.any()) for r in routers[:2])


def test_the_ops_pass_the_checks_of_the_library():
    q = draw(1, 4, 5, 8).float().requires_grad_()
    torch.library.opcheck(norm_gates, (q,), {"count": 2, "scales": [1.0, 2.0, 3.0, 4.0]})
    x, routed = (draw(*s).float().requires_grad_() for s in ((1, 5, 8), (4, 8)))
    torch.library.opcheck(router_gates, (x, routed), {"count": 2, "heads": [0, 1, 2, 3]})


def test_the_ops_are_their_references():
    q, x = draw(1, 4, 5, 8), draw(1, 5, 8)
    options = {"count": 2, "scales": [1.0, 2.0, 3.0, 4.0], "group": 2}
    assert torch.equal(norm_gates(q, **options), norm_gates_reference(q, **options))
    options = {"count": 2, "heads": [1, 0, 2]}
    assert torch.equal(
        router_gates(x, x[0, :3], **options), router_gates_reference(x, x[0, :3], **options)
    )
