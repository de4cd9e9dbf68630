"""Show one attention before and after the exact rewrite, and why it is one.

SITE is a name that `attnopt inspect MODEL` lists, or the end of one where that is unambiguous. It
may also name a near miss; then the reason why it is not attention is shown.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output

if TYPE_CHECKING:
    from attnopt.nouns import NearMiss
    from attnopt.program import Program

SCHEMA = "attnopt.explain/1"

_SHOWN = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    _source.configure(parser)
    parser.add_argument("site", metavar="SITE", nargs="?", help="a site, or the end of its name")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Explain one site."""
    source = _source.resolve(arguments)
    with output.progress() as stages:
        with stages.stage("capture"):
            program = _source.capture(source)
        with stages.stage("find"), _source.quiet_libraries():
            names = [site.name for site in program.sites]
    miss = _near_miss(program, arguments.site)
    if miss is not None:
        return _explain_miss(miss, output)
    return _explain(program, choose(arguments.site, names, arguments.model), output)


def choose(given: str | None, names: Sequence[str], model: str) -> str:
    """Return the one site that a name or the end of a name means."""
    if not names:
        raise CommandError("AO201", f"{model} has no attention to explain", Exit.NOTHING)
    if given is None:
        if len(names) == 1:
            return names[0]
        raise CommandError("AO105", f"which site? {_some(names)} (attnopt inspect {model})")
    if given in names:
        return given
    fitting = [name for name in names if name.endswith(f".{given}")]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CommandError("AO105", f"{given!r} could be any of {_some(fitting)}")
    hint = suggestion(given, names) or f"; there is {_some(names)}"
    raise CommandError("AO105", f"no site {given!r}{hint} (attnopt inspect {model} lists all)")


def _explain(program: "Program", site: str, output: Output) -> int:
    from attnopt.finder import explain

    found = explain(program, site)
    if output.json:
        output.document(
            SCHEMA,
            {"site": site, "before": found.before, "after": found.after, "why": list(found.why)},
        )
        return Exit.ACCEPTED
    output.line(f"{site}\n\nbefore:")
    _code(found.before, output)
    output.line("\nafter the exact rewrite:")
    _code(found.after or "# there is none: see the end of why", output)
    output.line("\nwhy:")
    for reason in found.why:
        output.line(f"  - {reason}")
    return Exit.ACCEPTED


def _code(text: str, output: Output) -> None:
    """Print Python, highlighted on a terminal."""
    if not output.console.is_terminal:
        output.line(text.rstrip())
        return
    from rich.syntax import Syntax

    output.rendered(Syntax(text.rstrip(), "python", word_wrap=True, background_color="default"))


def _near_miss(program: "Program", given: str | None) -> "NearMiss | None":
    """Return the near miss of that module, if there is one and no site has the name."""
    if given is None or any(s.name.endswith(given) for s in program.sites):
        return None
    fitting = [m for m in program.near_misses if given in {m.module, m.node}]
    return fitting[0] if fitting else None


def _explain_miss(miss: "NearMiss", output: Output) -> int:
    if output.json:
        output.document(SCHEMA, {"site": None, "near_miss": miss.module, "why": [miss.why]})
    else:
        output.line(f"{miss.module} is not attention: {miss.why} (at {miss.node})")
    return Exit.NOTHING


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
