"""What a program weighs: everything that a budget can be set on, read off the program itself."""

import math
from collections.abc import Iterator
from typing import Any

from attnopt.costs import Workload, count_costs, parameters, uncounted
from attnopt.program import Program, State

_TOKENS = 2


def weights_of(program: Program, workload: Workload) -> dict[str, float]:
    """Return the weight of a program for every budget that its shapes tell."""
    held = parameters(program.main)
    cache = cache_bytes(program, workload)
    return {
        "kv_cache": cache,
        "params": float(sum(p.numel() for p in held)),
        "memory": cache + sum(p.numel() * p.element_size() for p in held),
    }


def flops_of(program: Program, workload: Workload) -> float | None:
    """Return the operations of a program; None where an op of it is not counted."""
    if next(uncounted(program), None) is not None:
        return None
    return float(count_costs(program, workload).flops)


def cache_bytes(program: Program, workload: Workload) -> float:
    """Return the bytes of all states after the tokens of a workload."""
    tokens = workload.sequence + workload.past
    return float(sum(_bytes(s, workload.batch, tokens) for s in program.states))


def _bytes(state: State, batch: int, tokens: int) -> int:
    sizes = {"batch": batch, "past": tokens, "source": tokens}
    shape = [sizes[n] if isinstance(n, str) else n for n in state.shape]
    if state.ring and len(shape) > _TOKENS:
        shape[_TOKENS] = min(shape[_TOKENS], tokens)
    return math.prod(shape) * state.dtype.itemsize


def heads_of(program: Program, module: str) -> Iterator[tuple[int, int]]:
    """Yield the query heads and the key heads of every attention op inside a module."""
    from attnopt.costs import module_path

    for node in program.main.graph.nodes:
        name = str(getattr(node.target, "name", lambda: "")()) if callable(node.target) else ""
        if not name.startswith("attnopt::") or module_path(node) != module:
            continue
        shapes: list[Any] = [
            getattr(a.meta.get("val"), "shape", ()) for a in node.all_input_nodes[:2]
        ]
        if all(len(s) == 4 and isinstance(s[1], int) for s in shapes):
            yield shapes[0][1], shapes[1][1]
