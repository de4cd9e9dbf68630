"""Grids that are resized to the size that they have are copied."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.frontend.resizes import resize_what_changes

aten = torch.ops.aten

MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "nearest-exact"},
    *({"mode": m, "align_corners": c} for m in ("bilinear", "bicubic") for c in (False, True)),
    *({"mode": m, "antialias": True} for m in ("bilinear", "bicubic")),
]


def made(given: Tensor, **options: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Trace a resize; return its graph and the ops that are left."""
    found = make_fx(lambda x: F.interpolate(x, **options), pre_dispatch=True, tracing_mode="fake")(
        given
    )
    resize_what_changes(found)
    found.recompile()
    return found, [n.target for n in found.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_resize_to_the_same_size_is_a_copy(options: dict[str, Any]) -> None:
    x = torch.randn(1, 3, 7, 9)
    module, ops = made(x, size=(7, 9), **options)
    assert ops == [aten.clone.default]
    assert torch.equal(module(x), F.interpolate(x, size=(7, 9), **options))


@pytest.mark.parametrize("mode", ["nearest", "linear", "trilinear"])
def test_grids_of_other_axes_are_copied(mode: str) -> None:
    x = torch.randn(1, 3, 4, 5, 6) if mode == "trilinear" else torch.randn(1, 3, 7)
    module, ops = made(x, size=tuple(x.shape[2:]), mode=mode)
    assert ops == [aten.clone.default]
    assert torch.equal(module(x), F.interpolate(x, size=tuple(x.shape[2:]), mode=mode))


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_resize_to_another_size_stays(options: dict[str, Any]) -> None:
    x = torch.randn(1, 3, 7, 9)
    module, ops = made(x, size=(9, 7), **options)
    assert aten.clone.default not in ops
    assert torch.equal(module(x), F.interpolate(x, size=(9, 7), **options))


def test_a_factor_that_happens_to_keep_the_size_stays() -> None:
    """7 * 1.1 is 7 rows, read at other places than they are."""
    x = torch.randn(1, 3, 7, 9)
    module, ops = made(x, scale_factor=1.1, mode="bicubic")
    want = F.interpolate(x, scale_factor=1.1, mode="bicubic")
    assert want.shape == x.shape
    assert not torch.equal(want, x)
    assert aten.clone.default not in ops
    assert torch.equal(module(x), want)
