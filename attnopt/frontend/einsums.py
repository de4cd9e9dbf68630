"""Products of three or more tensors become products of two, as the finder reads them."""

from typing import Any

import torch
from torch import fx


def split_einsums(graph_module: fx.GraphModule) -> None:
    """Multiply the operands of every einsum from the left to the right, two at a time, in place."""
    for node in list(graph_module.graph.nodes):
        operands: Any = node.args[1] if node.target is torch.ops.aten.einsum.default else ()
        if len(operands) > 2:
            _split(node)


def _split(node: fx.Node) -> None:
    given: Any = node.args
    target: Any = node.target
    equation, operands = str(given[0]).replace(" ", ""), list(given[1])
    inputs, arrow, output = equation.partition("->")
    if not arrow or "." in equation:
        return
    terms = inputs.split(",")
    made: Any = operands[0]
    graph = node.graph
    for place in range(1, len(operands)):
        last = place == len(operands) - 1
        wanted = output if last else _kept(terms[0], terms[place], [*terms[place + 1 :], output])
        step = f"{terms[0]},{terms[place]}->{wanted}"
        with graph.inserting_before(node):
            pair = [made, operands[place]]
            made = graph.call_function(target, (step, pair))
        made.meta = dict(node.meta)
        made.meta["val"] = torch.einsum(step, [x.meta["val"] for x in pair])
        terms[0] = wanted
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _kept(left: str, right: str, later: list[str]) -> str:
    """Return the letters of two terms that something later reads."""
    return "".join(x for x in dict.fromkeys(left + right) if any(x in term for term in later))
