"""Writes into parts of a tensor that a graph made: taken out, or the graph is left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_dynamo import compiled, qkv
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt


class WritesBlocks(nn.Module):
    """Attention whose queries are changed block by block, under the name of another shape."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Any:
        queries = q * 2.0
        queries[:, :, :2] = k[:, :, :2]
        last = queries[:, :, -1]
        last.add_(1.0)
        last.mul_(2.0)
        queries.transpose(1, 2)[:, 3:5] -= 0.5
        blocks = queries.view(*q.shape[:3], 2, 4)
        blocks[:, :, 1].scatter_(2, index, v[:, :, 0, :4].unflatten(-1, (1, 4)))
        blocks[:, :, 2:-2, 1] += 1.0
        return F.scaled_dot_product_attention(queries, k, v), blocks


class WritesUnderneath(nn.Module):
    """Attention whose queries change in part beneath another name from before, read after."""

    def __init__(self, name: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        queries = q * 2.0
        before = self.name(queries)
        queries[:, :, 2:5] += 1.0
        return F.scaled_dot_product_attention(queries, k, v), before * 2.0


def test_writes_into_a_tensor_by_the_name_of_another_shape_are_taken_out() -> None:
    q, k, v = qkv()
    operands = (q, k, v, torch.zeros(*q.shape[:2], 1, 4, dtype=torch.long))
    attnopt.compile_report(reset=True)
    got = compiled(WritesBlocks())(*operands)
    for found, want in zip(got, WritesBlocks()(*operands), strict=True):
        torch.testing.assert_close(found, want)
    assert len(attnopt.compile_report().rewritten) == 1


@pytest.mark.parametrize(
    "name",
    [
        lambda x: x[:, :, 1:],
        lambda x: x[:, :, 1:][:, 1:],
        lambda x: x[:, :, 1:].mul_(3.0),
    ],
)
def test_a_graph_is_left_alone_where_a_view_from_before_a_write_shows_it(
    name: Callable[[Tensor], Tensor],
) -> None:
    operands = qkv()
    with pytest.warns(UserWarning, match="that other tensors share"):
        got = compiled(WritesUnderneath(name))(*operands)
    for found, want in zip(got, WritesUnderneath(name)(*operands), strict=True):
        torch.testing.assert_close(found, want)
