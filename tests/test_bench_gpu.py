"""The GPU benchmark, as far as it goes without a GPU: its rows, and what its masks mean."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import gpu
import gpu_masks

from attnopt.ops.structure import visible_keys
from tests.test_block_plans import check


def test_a_dry_run_lists_the_rows(capsys):
    assert gpu.main(["--dry", "--groups", "grid", "densities"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 26
    assert "grid, plane, 65536 tokens, 24/24, stride 16 x 16" in rows


def test_without_a_gpu_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--groups", "grid"]) == 3
    assert "--dry" in capsys.readouterr().err


@pytest.mark.parametrize("name", gpu_masks.MASKS)
def test_a_mask_means_the_same_to_all_that_are_timed(name, monkeypatch):
    monkeypatch.setattr(gpu_masks, "DEVICE", "cpu")
    shown = gpu_masks.mask(name, 3000)
    told = torch.ones(3000, 3000, dtype=torch.bool)
    if shown.structure:
        told &= visible_keys(3000, 3000, **shown.structure)
    if shown.windows is not None:
        told &= shown.windows.mask
    assert torch.equal(shown.rows(0, 3000), told)
    check(shown.plan(), told)


def test_tokens_of_a_grid_lie_tile_after_tile(monkeypatch):
    monkeypatch.setattr(gpu_masks, "DEVICE", "cpu")
    shown, order = gpu_masks.neighborhood((12, 8), (5, 3), (1, 1), (4, 4))
    place = shown.windows.place
    assert torch.equal(order.sort().values, torch.arange(96))
    for tile in place.unflatten(0, (-1, 16)):
        assert (tile // 4 == tile[0] // 4).all()
    assert shown.windows.mask.sum(-1).eq(15).all()
