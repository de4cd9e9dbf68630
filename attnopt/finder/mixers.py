"""Recognise token mixers without softmax, so that no look-alike of attention goes unsaid."""

from collections.abc import Iterator

from torch import Tensor, fx

from attnopt.finder.contraction import read_contraction
from attnopt.finder.ops import CONTRACTIONS, kind, module_path
from attnopt.finder.provenance import View
from attnopt.nouns import NearMiss

_WHY = "mixes tokens without a softmax (linear attention, a state space or a recurrence)"
_RUNNING = (
    "cumsum",
    "linear_recurrence",
    "selective_scan",
    "gated_linear_attention",
    "gated_delta_rule",
)
_FOURIER = "mixes tokens by a Fourier transform"


def find_mixers(view: View, owned: set[str]) -> list[NearMiss]:
    """List the modules that multiply data with data, or transform it, outside the `owned` ones."""
    found: dict[str, NearMiss] = {}
    for node, why in _mixing(view):
        module = module_path(node)
        if module not in owned and module not in found:
            found[module] = NearMiss(module, node.name, why)
    return list(found.values())


def _mixing(view: View) -> Iterator[tuple[fx.Node, str]]:
    for node in view.program.graph.nodes:
        name = kind(node)
        if name.startswith("fft"):
            yield node, _FOURIER
        elif name in _RUNNING and view.origins.is_data(node) and not _counts(node):
            yield node, _WHY
        elif name in CONTRACTIONS and name not in ("conv1d", "conv2d", "conv3d", "convolution"):
            contraction = read_contraction(node)
            if contraction and all(
                view.origins.is_data(x) for x in (contraction.lhs, contraction.rhs)
            ):
                yield node, _WHY


def _counts(node: fx.Node) -> bool:
    """Tell a running count, as of the tokens of experts, from a running sum."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()
