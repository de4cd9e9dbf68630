"""Branches on values: what is traced in their place computes what the stock model does."""

import pytest
import torch
from transformers import (
    BigBirdConfig,
    LongformerConfig,
    LongformerForQuestionAnswering,
    ReformerConfig,
)
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import attnopt
from attnopt.frontend.branches import BRANCHES, plans_blocks

# The stock models warn about their own configs.
pytestmark = pytest.mark.filterwarnings("ignore")


def hashed(buckets, hashes: int) -> LSHSelfAttention:
    return LSHSelfAttention(
        ReformerConfig(
            num_attention_heads=2,
            attention_head_size=8,
            hidden_size=16,
            num_buckets=buckets,
            num_hashes=hashes,
            hash_seed=3,
            lsh_attn_chunk_length=4,
        ),
        layer_idx=0,
    ).eval()


@pytest.mark.parametrize("buckets", [4, [2, 4]])
@pytest.mark.parametrize("padding", [None, 0, 3])
def test_tokens_are_hashed_into_the_buckets_of_the_stock_model(buckets, padding) -> None:
    stock = hashed(buckets, hashes=2)
    vectors = torch.randn(3, 2, 12, 8)
    mask = None if padding is None else (torch.arange(12) < 12 - padding).expand(3, 12).long()
    want = stock._hash_vectors(vectors, 2, mask)
    got = BRANCHES["LSHSelfAttention._hash_vectors"](stock, vectors, 2, mask)
    assert torch.equal(got, want)


def test_hashed_attention_is_one_graph_and_one_site() -> None:
    torch.manual_seed(0)
    stock = hashed(2, hashes=1)
    x, mask = torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.long)
    program = attnopt.capture(
        stock, (), {"hidden_states": x, "attention_mask": mask}, dynamic=False
    )
    (site,) = program.sites
    assert (site.heads, site.head_dim, site.padded) == (2, 8, True)
    assert site.projections["q"].parameter == site.projections["k"].parameter
    exact = attnopt.apply(program, "exact")
    for kept in (12, 9):
        mask = (torch.arange(12) < kept).long().expand(2, 12)
        want = stock(x, mask).hidden_states
        got = exact(hidden_states=x, attention_mask=mask).hidden_states
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_every_number_of_global_tokens_has_its_slots() -> None:
    stock = LongformerSelfAttention(
        LongformerConfig(
            hidden_size=16, num_attention_heads=2, attention_window=[4], num_hidden_layers=1
        ),
        layer_id=0,
    ).eval()
    flags = torch.zeros(2, 8, dtype=torch.bool)
    flags[0, 0] = flags[1, 2] = flags[1, 5] = True
    want = stock._get_global_attn_indices(flags)
    got = BRANCHES["LongformerSelfAttention._get_global_attn_indices"](flags)
    assert got[0] == int(want[0]) + 2
    assert all(torch.equal(a, b) for i in (1, 2) for a, b in zip(got[i], want[i], strict=True))
    free = set(zip(*(x.tolist() for x in got[3]), strict=True))
    assert free == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}


@pytest.mark.slow
def test_a_question_whose_tokens_see_all_is_found_without_asking_the_data() -> None:
    config = LongformerConfig(
        vocab_size=32, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        num_hidden_layers=1, attention_window=[4], sep_token_id=2, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongformerForQuestionAnswering(config).eval()

    def call(ends: list[int], length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 32, (len(ends), length))
        for row, end in zip(ids, ends, strict=True):
            row[[end, end + 1, -1]] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    program = attnopt.capture(model, (), call([4, 2], 12))
    assert program.history == ("capture: whole, dynamic",)
    assert len(program.sites) == 2
    for given in (call([3, 6], 12), call([1, 9, 5], 21)):
        want, got = model(**given), program(**given)
        torch.testing.assert_close(got.start_logits, want.start_logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.end_logits, want.end_logits, rtol=1e-5, atol=1e-6)


def test_a_plan_of_blocks_is_for_one_length() -> None:
    sparse = BigBirdConfig(attention_type="block_sparse", block_size=4, num_random_blocks=1)
    assert plans_blocks(sparse, 64)
    assert not plans_blocks(sparse, 28)
    assert not plans_blocks(BigBirdConfig(attention_type="original_full"), 4096)
