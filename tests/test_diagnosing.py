"""What is said of an estimated plan is what a dense map of the attention says."""

import pytest
import torch
from conformance import draw, padding

from attnopt.diagnosing import diagnose
from attnopt.ops import attention_reference, block_attention, plan_blocks
from attnopt.ops.estimators import ESTIMATORS

PLAN = {"rule": "topk", "amount": 0.4, "tile": 8, "stride": 4}


def drawn(queries=61):
    return draw(2, 4, queries, 16, seed=1), draw(2, 2, 61, 16, seed=2), draw(2, 2, 61, 8, seed=3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_recall_and_error_are_those_of_the_whole_map(estimator):
    q, k, v = drawn()
    found = diagnose(q, k, v, estimator=estimator, samples=61, **PLAN)
    plan = plan_blocks(q, k, estimator=estimator, causal=True, **PLAN)
    sparse = block_attention(q, k, v, *plan, q_tile=8, k_tile=8, causal=True)
    dense, lse = attention_reference(q, k, v, causal=True)
    assert found.error == pytest.approx(
        float((sparse - dense).abs().sum() / dense.abs().sum()), rel=1e-4
    )
    each = torch.eye(61).double().expand(2, 2, 61, 61)
    visits = block_attention(q, k, each, *plan, q_tile=8, k_tile=8, causal=True) > 0
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    kept = (torch.exp(scores - lse.unsqueeze(-1)) * visits).sum(-1).mean((0, 2))
    torch.testing.assert_close(torch.tensor(found.recall).double(), kept, rtol=1e-4, atol=1e-5)
    assert found.time_share is None


def test_a_plan_of_everything_misses_nothing():
    q, k, v = drawn()
    found = diagnose(q, k, v, estimator="pooled", **{**PLAN, "amount": 1.0}, padding=padding(2, 61))
    assert found.density == 1
    assert found.recall == pytest.approx([1.0] * 4)
    assert found.error < 1e-6
    assert found.cosine == pytest.approx(1.0)


def test_more_tiles_keep_more():
    q, k, v = drawn()
    found = [
        diagnose(q * 3, k, v, estimator="sub_block", **{**PLAN, "amount": a}, samples=61)
        for a in (0.2, 0.5, 0.8)
    ]
    assert found[0].mean_recall < found[1].mean_recall < found[2].mean_recall
    assert found[0].error > found[1].error > found[2].error
    assert found[0].density < found[1].density < found[2].density


def test_an_estimate_is_a_small_share_of_dense_attention():
    q, k, v = (torch.randn(1, 2, 512, 32) for _ in range(3))
    found = diagnose(
        q, k, v, estimator="sub_block", rule="topk", amount=0.3, tile=64, timed=True, samples=8
    )
    assert found.flops_share == pytest.approx(found.estimator_flops / (4 * 2 * 32 * 512 * 513 / 2))
    assert found.flops_share < 0.01
    assert found.time_share > 0
