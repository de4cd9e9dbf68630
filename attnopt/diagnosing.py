"""What an estimated plan visits, what it misses, and what it costs, on queries, keys and values.

Sampled queries are attended densely and by the plan. The share of their attention that the plan
keeps is exp(LSE by the plan - LSE dense), exactly; their outputs say how far off a layer's will be.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attnopt.ops.attention import attention_reference
from attnopt.ops.blocks import TILE, grid_of, tiles_in
from attnopt.ops.plan_blocks import STRIDE, plan_tiles
from attnopt.ops.sdpa import attend
from attnopt.ops.structure import visible_keys
from attnopt.ops.tiling import Tiling
from attnopt.timing import compare

_LAST_QUERIES = 64


@dataclass(frozen=True)
class Diagnosis:
    """What a plan is worth.

    `density` is what it visits of the tiles that dense attention visits, `recall` the share of the
    attention of each head that it keeps (mean over rows and samples), `error` and `cosine` compare
    the outputs of the samples: L1 relative to dense, and the mean cosine. `estimator_flops` count
    one call, `flops_share` relates them to dense attention, and `time_share` is measured (None
    where it was not).
    """

    density: float
    recall: tuple[float, ...]
    error: float
    cosine: float
    estimator_flops: float
    flops_share: float
    time_share: float | None

    @property
    def mean_recall(self) -> float:
        """The recall of all heads."""
        return sum(self.recall) / len(self.recall)


@torch.no_grad()
def diagnose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    estimator: str,
    rule: str,
    amount: float,
    tile: int = TILE,
    stride: int = STRIDE,
    causal: bool = True,
    padding: Tensor | None = None,
    scale: float | None = None,
    samples: int = 64,
    seed: int = 0,
    timed: bool = False,
) -> Diagnosis:
    """Judge the plan that an estimator makes; `samples` queries are drawn from the seed."""
    planned: dict[str, Any] = {"estimator": estimator, "rule": rule, "amount": amount}
    planned |= {"tile": tile, "stride": stride, "causal": causal, "padding": padding}
    planned["scale"] = scale
    grid = _grid(plan_tiles(q, k, **planned), k.shape[2], tile)
    tiling = Tiling(q.shape[2], k.shape[2], tile, tile, causal, True, q.device, padding)
    allowed = tiling.allowed().expand_as(grid)
    rows = _rows(q.shape[2], samples, seed).to(q.device)
    dense, sparse = _both(q, k, v, grid, rows, tile, causal=causal, padding=padding, scale=scale)
    own = 2 * q.shape[0] * q.shape[1] * (q.shape[3] + v.shape[3]) * _pairs(q, k, causal=causal)
    count = q.shape[0] * estimator_flops(
        estimator, q.shape[1], q.shape[3], q.shape[2], k.shape[2], tile=tile, stride=stride
    )
    share = _time_share(q, k, v, planned) if timed else None
    return Diagnosis(
        density=float(grid.sum() / allowed.sum()),
        recall=_recall(dense[1], sparse[1]),
        error=float((sparse[0] - dense[0]).abs().sum() / dense[0].abs().sum()),
        cosine=float(cosine_similarity(sparse[0], dense[0], dim=-1)[dense[1] > -torch.inf].mean()),
        estimator_flops=count,
        flops_share=count / own,
        time_share=share,
    )


def estimator_flops(
    estimator: str,
    heads: int,
    width: int,
    queries: int,
    keys: int,
    *,
    tile: int,
    stride: int = STRIDE,
    q_tile: int | None = None,
) -> float:
    """Return the operations of the products that an estimate takes, hidden pairs included."""
    pooled = 2 * heads * width * (queries / (q_tile or tile)) * (keys / tile)
    match estimator:
        case "sub_block":
            return pooled * (tile / stride) ** 2
        case "antidiagonal":
            return 2 * heads * width * queries * keys / stride
        case "flex":
            return pooled + 2 * heads * width * tile * keys
        case "vertical_slash":
            return 2 * heads * width * _LAST_QUERIES * keys
        case _:
            return pooled


def _grid(plan: tuple[Tensor, Tensor, Tensor, Tensor], keys: int, tile: int) -> Tensor:
    columns = tiles_in(keys, tile)
    return grid_of(plan[0], plan[1], columns) | grid_of(plan[2], plan[3], columns)


def _rows(queries: int, samples: int, seed: int) -> Tensor:
    order = torch.randperm(queries, generator=torch.Generator().manual_seed(seed))
    return order[:samples].sort().values


def _both(
    q: Tensor, k: Tensor, v: Tensor, grid: Tensor, rows: Tensor, tile: int, *, causal: bool,
    padding: Tensor | None, scale: float | None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Return outputs and log-sum-exps of some queries, dense and by the plan."""
    heads, keys = q.shape[1], k.shape[2]
    within = visible_keys(q.shape[2], keys, causal=causal, device=q.device)
    whole = torch.ones(len(rows), keys, dtype=torch.bool, device=q.device)
    within = whole if within is None else within[rows]
    seen = grid.repeat_interleave(heads // grid.shape[1], dim=1)[:, :, rows // tile]
    seen = seen.repeat_interleave(tile, dim=-1)[..., :keys] & within
    operands = q[:, :, rows].float(), k.float(), v.float()
    options: dict[str, Any] = {"padding": padding, "scale": scale}
    dense = attention_reference(*operands, mask=within, **options)
    return dense, attention_reference(*operands, mask=seen, **options)


def _recall(dense: Tensor, sparse: Tensor) -> tuple[float, ...]:
    """Return what each head keeps; queries that see nothing anyway do not count."""
    sees = dense > -torch.inf
    kept = torch.where(sees, torch.exp(sparse - dense), 0.0).sum((0, 2)) / sees.sum((0, 2))
    return tuple(kept.tolist())


def _pairs(q: Tensor, k: Tensor, *, causal: bool) -> float:
    queries, keys = q.shape[2], k.shape[2]
    return queries * keys - (queries * (queries - 1) / 2 if causal else 0)


def _time_share(q: Tensor, k: Tensor, v: Tensor, planned: dict[str, Any]) -> float:
    """Measure the estimate beside dense attention."""
    options = {n: planned[n] for n in ("causal", "padding", "scale")}
    calls = {
        "estimate": lambda: plan_tiles(q, k, **planned),
        "dense": lambda: attend(q, k, v, memo={}, **options),
    }
    timing = compare(calls, base="dense", most=7)
    return 1 / timing.speedup("estimate", "dense").ratio
