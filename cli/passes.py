"""List the passes: what can be done to an attention, and where the result loads.

A pass is one file in attnopt/passes, or an entry point of the group `attnopt.passes` in another
distribution.
"""

import argparse
from dataclasses import asdict

from attnopt import passes
from attnopt.cli._errors import Exit
from attnopt.cli._output import Output

SCHEMA = "attnopt.passes/1"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments of its own."""


def run(arguments: argparse.Namespace, output: Output) -> int:
    """List the passes."""
    found = [passes.describe(name) for name in passes.names()]
    if output.json:
        output.document(SCHEMA, {"passes": [asdict(item) for item in found]})
        return Exit.ACCEPTED
    rows = [[p.name, _result(p.exact), _tier(p.tier), p.summary, p.origin] for p in found]
    if rows:
        output.table(
            ["pass", "result", "tier", "what it does", "from"], rows, foldable={"what it does"}
        )
    output.note(f"{len(rows)} installed")
    return Exit.ACCEPTED if rows else Exit.NOTHING


def _result(exact: bool | None) -> str:
    return "?" if exact is None else "exact" if exact else "approximate"


def _tier(tier: int | None) -> str:
    return "?" if tier is None else str(tier)
