"""Change the temperature of attention: one's own rewrite, in a file of its own.

python examples/own_pass.py examples/models/code-llama --temperature 1.1

The file is the pass: `attnopt.passes.extended` takes it along for as long as the block lasts. A
distribution would name it in its entry points instead, under the group `attnopt.passes`.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch

import attnopt
from attnopt import passes
from attnopt.heads import Written, read_heads, write_heads

exact = False
tier = 0


@dataclass(frozen=True)
class Config:
    """Scores are divided by the `temperature`; at 1 nothing changes."""

    temperature: float = 1.0


def fits(site: Any, config: Config) -> "Literal[True] | attnopt.No":
    """Say whether queries can be scaled by their projection."""
    if site.qk_norm is not None or "q" not in site.projections:
        return attnopt.No("its queries are normed, or no projection makes them", site.name)
    if config.temperature <= 0:
        return attnopt.No(f"temperature {config.temperature}: it must be above 0", site.name)
    return True


def convert(site: Any, stats: Any, config: Config) -> dict[str, torch.Tensor]:
    """Return the projection of the queries, divided by the temperature."""
    query = site.projections["q"]
    every = torch.ones(len(query.rows), len(query.rows[0]), dtype=torch.bool)
    maps = read_heads(stats.weights, query).maps / config.temperature
    return write_heads(stats.weights, [Written(query, every, maps)])


def emit(edit: Any, site: Any, config: Config) -> None:
    """Leave the graph as it is: only weights change."""


def cost(site: Any, config: Config, workload: Any) -> dict[str, float]:
    """Keep the cache as large as it was."""
    return {"kv_elements_per_token": site.kv_heads * (site.head_dim + site.v_head_dim)}


def main(words: list[str]) -> int:
    """Apply this very file to every attention, and say what it did to the loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--temperature", type=float, default=1.1)
    parser.add_argument("--data", default="stdlib:8x128")
    given = parser.parse_args(words)
    with passes.extended(temperature=sys.modules[__name__]):
        program = attnopt.capture(given.model)
        settings = {"temperature": given.temperature}
        plan = attnopt.Plan(
            tuple(attnopt.Choice(s.name, "temperature", settings) for s in program.sites)
        )
        result = attnopt.optimize(program, plan=plan, data=given.data, held_out=8)
    assert result.report is not None
    print(result.report.verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
