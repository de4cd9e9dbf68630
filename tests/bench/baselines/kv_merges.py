"""Published ways to make one key and value head of several.

`mean` is what the GQA paper does (2305.13245); `mean_renorm` gives the mean the norm of its heads;
`first` keeps one head of each group. `procrustes` aligns the heads before it averages them
(2412.20677): values by rotations, keys by one phase per rotary plane, over the calibration data.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.calibrating import Statistics
from attnopt.compensating import refit as refit_outputs
from attnopt.layers import Layer
from attnopt.nouns import Choice, Plan
from attnopt.program import Program
from attnopt.rewriting import apply, reweighted

Groups = list[list[int]]


def merged(
    program: Program, stats: Statistics, merge: str, kv_heads: int, *, refit: bool = False
) -> Program:
    """Return a program in which every site has so many key and value heads.

    The graph is that of pass dha, whose weights have the same shapes. `refit` solves the output
    projections anew, as the pass does.
    """
    choices = tuple(
        Choice(s.name, "dha", {"kv_heads": kv_heads, "refit": False}) for s in program.sites
    )
    weights: dict[str, Tensor] = {}
    for site in program.sites:
        layer = Layer.read(site, stats)
        weights |= MERGES[merge](layer, _groups(layer, kv_heads)).write(site, stats.weights)
    result = reweighted(apply(program, Plan(choices, statistics=stats)), weights)
    if not refit:
        return result
    readers = [site.projections["o"] for site in program.sites]
    outputs = {reader.parameter: reader.axis for reader in readers}
    key = f"{merge}-{kv_heads}"
    return reweighted(result, refit_outputs(program.main, result.main, outputs, stats, key))


def _groups(layer: Layer, kv_heads: int) -> Groups:
    """Deal the key heads to groups of neighbours."""
    size = layer.k.count // kv_heads
    return [list(range(i, i + size)) for i in range(0, layer.k.count, size)]


def _mean(layer: Layer, groups: Groups) -> Layer:
    """Average the heads of a group."""
    k, v = (_averaged(x.maps, groups) for x in (layer.k, layer.v))
    return layer.replaced(k=k, v=v)


def _mean_renorm(layer: Layer, groups: Groups) -> Layer:
    """Average the heads of a group and give the mean their mean norm."""
    k, v = (_renormed(x.maps, groups) for x in (layer.k, layer.v))
    return layer.replaced(k=k, v=v)


def _first(layer: Layer, groups: Groups) -> Layer:
    """Keep the first head of a group."""
    first = [members[0] for members in groups]
    return layer.replaced(k=layer.k.maps[first], v=layer.v.maps[first])


def _procrustes(layer: Layer, groups: Groups) -> Layer:
    """Align the heads of a group, then average them."""
    return _mean(_aligned(layer, groups), groups)


def _procrustes_renorm(layer: Layer, groups: Groups) -> Layer:
    """Align the heads of a group, then average them and restore the norm."""
    return _mean_renorm(_aligned(layer, groups), groups)


def _averaged(maps: Tensor, groups: Groups) -> Tensor:
    return torch.stack([maps[members].mean(0) for members in groups])


def _renormed(maps: Tensor, groups: Groups) -> Tensor:
    rows: list[Tensor] = []
    for members in groups:
        mean = maps[members].mean(0)
        norm = torch.linalg.matrix_norm(maps[members]).mean()
        rows.append(mean * norm / torch.linalg.matrix_norm(mean).clamp_min(_TINY))
    return torch.stack(rows)


def _aligned(layer: Layer, groups: Groups) -> Layer:
    """Turn the heads of each group towards their mean; queries and outputs turn with them."""
    q, k, v, o = (x.maps.clone() for x in (layer.q, layer.k, layer.v, layer.o))
    root = _root(layer.gram_kv)
    for members in groups:
        phases = _align(layer.planes(k[members]) @ root.to(torch.complex128), _phase)
        turns = _align(v[members] @ root, _rotation)
        still = _align(layer.still(k[members]) @ root, _rotation)
        for i, m in enumerate(members):
            k[m] = _turned_key(layer, k[m], phases[i], still[i])
            v[m] = turns[i] @ v[m]
            for h in layer.queries_of(m):
                q[h] = _turned_key(layer, q[h], phases[i], still[i])
                o[h] = turns[i] @ o[h]
    return layer.replaced(q=q, k=k, v=v, o=o)


def _turned_key(layer: Layer, maps: Tensor, phases: Tensor, still: Tensor) -> Tensor:
    """Turn the planes of a key or query by phases, and its other channels by a rotation."""
    return layer.channels(
        phases.unsqueeze(-1) * layer.planes(maps),
        still @ layer.still(maps),
    )


def _align(
    heads: Tensor, fit: Callable[[Tensor, Tensor], Tensor], steps: int = 100, limit: float = 1e-5
) -> Tensor:
    """Generalised Procrustes: turn every head to the mean of the turned ones, until it rests."""
    turned, before = heads, torch.inf
    turns = torch.stack([fit(h, h) for h in heads])
    for _ in range(steps):
        mean = turned.mean(0)
        turns = torch.stack([fit(h, mean) for h in heads])
        turned = torch.stack([_turn(t, h) for t, h in zip(turns, heads, strict=True)])
        spread = float((turned - turned.mean(0)).abs().square().sum())
        if before - spread <= limit * spread:
            break
        before = spread
    return turns


def _turn(turn: Tensor, head: Tensor) -> Tensor:
    return turn.unsqueeze(-1) * head if turn.is_complex() else turn @ head


def _phase(head: Tensor, reference: Tensor) -> Tensor:
    """Return the unit number per plane that brings a head closest to a reference."""
    overlap = (reference * head.conj()).sum(-1)
    return overlap / overlap.abs().clamp_min(_TINY)


def _rotation(head: Tensor, reference: Tensor) -> Tensor:
    """Return the orthogonal matrix that brings a head closest to a reference."""
    u, _, vh = torch.linalg.svd(reference @ head.T)
    return u @ vh


def _root(gram: Tensor) -> Tensor:
    """Return R with R R^T = gram, so that norms of W R are norms over the data."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()


_TINY = 1e-30

MERGES: dict[str, Callable[[Layer, Groups], Layer]] = {
    "mean": _mean,
    "mean_renorm": _mean_renorm,
    "first": _first,
    "procrustes": _procrustes,
    "procrustes_renorm": _procrustes_renorm,
}
