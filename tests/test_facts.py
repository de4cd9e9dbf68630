"""Facts that a spelling hides: each case was once read wrongly."""

import pytest
import torch
from fuzz_grammar.cases import CAPTURED, Case
from fuzz_grammar.spec import Spec, repair
from site_facts import all_mismatches
from torch import nn

import attnopt
from attnopt.nouns import Mask

SPELLINGS = {
    "a scale of queries that are rotated together with the same keys": Spec(
        projection="none", rotary="joint", rotary_place="bhtd", scale_place="q_div"
    ),
    "a mask of scores whose queries and heads share an axis": Spec(
        kv_heads=1, groups=2, layout="mqa_folded", gqa="broadcast", mask="chunked"
    ),
    "no mask where queries and heads share an axis of windows": Spec(
        kv_heads=1, groups=3, layout="mqa_folded", gqa="broadcast", bias="alibi", partition="rows"
    ),
    "keys of another stream after an attention spelled as a sum": Spec(
        source="cross", contraction="sum", twice=True
    ),
    "heads of learned queries in the weight of an einsum": Spec(
        source="pool", projection="einsum"
    ),
    "a scale of queries that are rotated as complex numbers": Spec(
        rotary="complex", scale_place="q"
    ),
    "heads of queries whose channels lie apart, rotated as complex numbers": Spec(
        projection="conv1x1", layout="seq_first", rotary="complex"
    ),
    "heads of a raw input beside its queries, which keys of one head are summed with": Spec(
        kv_heads=1, groups=2, source="raw", contraction="sum", gqa="broadcast", output="none"
    ),
    "heads of a raw input that share an axis with its queries": Spec(
        kv_heads=1, groups=2, source="raw", layout="mqa_folded", gqa="broadcast", output="none"
    ),
    "slopes that are rounded to half precision": Spec(
        kv_heads=1, groups=3, bias="alibi_abs", dtype="bfloat16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPELLINGS)
def test_a_fact_is_read_from(what: str) -> None:
    spec = SPELLINGS[what]
    assert repair(spec) == spec
    case = Case(0, 0, spec=spec)
    program = attnopt.capture(case.module, (), case.inputs(CAPTURED, 0))
    assert all_mismatches(program.sites, case.expected) == ()


def attention(q, k, v, bias=0.0):
    return torch.softmax(q @ k.transpose(-1, -2) * 0.3 + bias, dim=-1) @ v


class LengthFirst(nn.Module):
    def forward(self, q, k, v):
        out = attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
        return out.permute(2, 0, 1, 3).flatten(2)


def test_heads_are_told_from_a_batch_that_comes_second():
    q, k, v = (torch.randn(12, 2, 3, 4) for _ in range(3))
    (site,) = attnopt.capture(LengthFirst(), (q, k, v)).sites
    assert (site.heads, site.kv_heads, site.head_dim) == (3, 3, 4)


class Projected(nn.Module):
    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.gate = nn.Linear(16, self.heads)
        self.o = nn.Linear(16, 16)

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class MaskedByValues(Projected):
    """A bias that data decide, with a causal and a padding mask written over it."""

    def forward(self, x, attention_mask):
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (
            attention_mask[:, None, None, :] == 0
        )
        bias = self.gate(x).exp().transpose(1, 2)[:, :, None, :].expand(-1, -1, length, -1)
        bias = bias.masked_fill(hidden, torch.finfo(x.dtype).min)
        out = attention(*self.split(x), bias=bias)
        return self.o(out.transpose(1, 2).flatten(2))


def test_a_mask_over_a_bias_from_data_is_named_and_the_bias_kept():
    module = MaskedByValues().eval()
    x, attention_mask = torch.randn(2, 11, 16), torch.ones(2, 11, dtype=torch.long)
    program = attnopt.capture(module, (x, attention_mask))
    (site,) = program.sites
    assert (site.mask, site.padded, site.bias) == (Mask("causal"), True, "dense")
    exact = attnopt.apply(program, "exact")
    assert not exact.refused
    attention_mask[1, -3:] = 0
    torch.testing.assert_close(exact(x, attention_mask), module(x, attention_mask))


class Differential(Projected):
    """The second half of the heads is subtracted from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(8, 16)

    def forward(self, x):
        first, second = attention(*self.split(x)).chunk(2, dim=1)
        return self.o((first - 0.5 * second).transpose(1, 2).flatten(2))


def test_heads_that_are_subtracted_share_columns_of_the_output_projection():
    (site,) = attnopt.capture(Differential().eval(), (torch.randn(2, 11, 16),)).sites
    rows = site.projections["o"].rows
    assert site.projections["o"].parameter == "o.weight"
    assert rows == (tuple(range(4)), tuple(range(4, 8))) * 2
