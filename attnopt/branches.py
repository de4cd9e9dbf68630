"""What the far keys of linear attention bring, and whether a text would miss them.

A hybrid that was healed may have learned to look at its window only: then its matrix is dead weight
and it is a window by another name. So the share of the far keys in the denominator and in the
output is read off the attention itself, layer by layer and by how far back the keys are, and the
loss is taken once more with the far keys left out, of each layer alone and of all together.
https://arxiv.org/abs/2510.05901
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.graphs import copied_module
from attnopt.ops import attention, linear_attention
from attnopt.ops.linear import Mixing, key_weights
from attnopt.program import Program
from attnopt.running import Run
from attnopt.verifying import losses
from attnopt.verifying.intervals import Paired

# Rows that tell; bins of distance are twice as wide each time.
_ROWS = 32
_KEPT = ("padding", "scale", "k_map", "v_map", "causal")


@dataclass(frozen=True)
class Branch:
    """One linear attention: which share of its result comes from far keys.

    `denominator` and `output` are means over the queries that have far keys; `by_distance` has the
    share of the denominator from keys that are so far back or farther, up to the next bin. `missed`
    is how much the loss grows without them.
    """

    name: str
    window: int
    denominator: float
    output: float
    by_distance: Mapping[int, float]
    missed: Paired

    @property
    def is_window(self) -> bool:
        """Whether the loss is not measurably better for the far keys."""
        return self.window > 0 and not self.missed.ci95[0] > 0


@dataclass(frozen=True)
class Branches:
    """All linear attentions of a program, and how much the loss grows without their far keys."""

    sites: tuple[Branch, ...]
    missed: Paired

    @property
    def told(self) -> tuple[str, ...]:
        """Say which layers are windows by another name."""
        found = [b for b in self.sites if b.is_window]
        return tuple(
            f"{b.name}: without its linear branch the loss is not measurably higher "
            f"({b.missed.mean:+.4f} nats in {b.missed.rows} rows; its share of the denominator is "
            f"{b.denominator:.1%}): as far as they tell it is a window of {b.window}"
            for b in found
        )

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "loss_without_far_keys": _told(self.missed),
            "sites": [
                {
                    "site": b.name,
                    "window": b.window,
                    "share_of_denominator": b.denominator,
                    "share_of_output": b.output,
                    "by_distance": {str(n): x for n, x in b.by_distance.items()},
                    "loss_without_far_keys": _told(b.missed),
                    "is_window": b.is_window,
                }
                for b in self.sites
            ],
        }


def _told(missed: Paired) -> dict[str, Any]:
    return {"mean": missed.mean, "ci95": list(missed.ci95)}


def has_branches(program: Program) -> bool:
    """Tell whether a program has linear attention."""
    return not program.parts and bool(_nodes(program.growing.graph))


def _nodes(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=linear_attention))


@torch.no_grad()
def branches(program: Program, rows: Tensor) -> Branches:
    """Measure what far keys bring to the causal linear attentions of a language model."""
    program = program.growing.cast(torch.float32)
    names = {s.name: s for s in program.sites}
    found = [n for n in _nodes(program.graph) if n.kwargs.get("causal")]
    rows = rows[:_ROWS]
    base = losses(program, rows, "linear")
    shares = _shares(program, rows, found)
    sites: list[Branch] = []
    for node, name in zip(found, _names(program, found, names), strict=True):
        lost = losses(without_far_keys(program, {node.name}), rows, "linear") - base
        window: Any = node.kwargs.get("window", 0)
        denominator, output, by_distance = shares[node.name]
        missed = Paired.of(lost)
        sites.append(Branch(name, int(window), denominator, output, by_distance, missed))
    every = losses(without_far_keys(program, {n.name for n in found}), rows, "linear") - base
    return Branches(tuple(sites), Paired.of(every))


def _names(program: Program, nodes: Collection[fx.Node], sites: Mapping[str, Any]) -> list[str]:
    """Return the names of the sites that nodes are."""
    from attnopt.finder import find_sites

    findings = find_sites(program)
    owners = {
        piece.anchor: site.name
        for site, pieces in zip(findings.sites, findings.groups, strict=True)
        for piece in pieces
    }
    return [owners.get(node, node.name) for node in nodes]


def without_far_keys(program: Program, names: Collection[str]) -> Program:
    """Return a program in which some linear attentions see their window only.

    One without a window sees its own key.
    """
    module = copied_module(program.graph_module)
    for node in _nodes(module.graph):
        if node.name in names:
            window: Any = node.kwargs.get("window", 0)
            kept = {n: x for n, x in node.kwargs.items() if n in _KEPT}
            node.target, node.args = attention, node.args[:3]
            node.kwargs = {**kept, "window": max(int(window), 1)}
    module.graph.lint()
    module.recompile()
    return program.with_graph(module, note="without far keys")


def _shares(program: Program, rows: Tensor, nodes: Collection[fx.Node]) -> dict[str, Any]:
    """Run a few rows, and return the shares of each node."""
    run = Run(program, {"input_ids": rows[:4]}, nodes)
    found: dict[str, Any] = {}
    for node in nodes:
        run.before(node)
        args, kwargs = run.map_nodes_to_values((node.args, dict(node.kwargs)), node)
        found[node.name] = _share(args, kwargs)
    return found


def _share(args: Any, kwargs: Mapping[str, Any]) -> tuple[float, float, dict[int, float]]:
    """Return the share of far keys in the denominator, in the output, and by distance."""
    q, k, v, *own = args
    settings = {n: x for n, x in kwargs.items() if n != "padding"}
    mixing = Mixing(*own, **settings)
    wide, keys, values = mixing.widened(q, k, v)
    column = torch.arange(k.shape[2], device=q.device)
    distance = column[k.shape[2] - q.shape[2] :].unsqueeze(1) - column
    weights = key_weights(wide, keys, mixing, distance, kwargs.get("padding"))[0]
    total = weights.sum(-1).clamp(min=mixing.least)
    far = weights.masked_fill(distance < mixing.window, 0.0)
    has = (distance >= max(mixing.window, 1)).any(-1)
    if not bool(has.any()):
        return 0.0, 0.0, {}
    share = (far.sum(-1) / total)[..., has]
    whole, own_part = (x @ values[..., :-1] for x in (weights, far))
    norms = [x[..., has, :].norm(dim=-1) for x in (own_part, whole)]
    output = norms[0] / (norms[0] + (whole - own_part)[..., has, :].norm(dim=-1)).clamp(min=1e-30)
    bins: dict[int, float] = {}
    start = max(mixing.window, 1)
    while start < k.shape[2]:
        inside = (distance >= start) & (distance < 2 * start)
        rows = inside.any(-1)
        bins[start] = float(((weights * inside).sum(-1) / total)[..., rows].mean())
        start *= 2
    return float(share.mean()), float(output.mean()), bins
