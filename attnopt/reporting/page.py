"""report.html: for a person who was not there, in one file that asks nobody for anything.

It is made of report.json and env.json alone. It has no script, and a policy that allows none.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

from attnopt.reporting.markup import Markup, joined, tag
from attnopt.reporting.sections import SECTIONS

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the page of a report."""
    title = _title(report, environment)
    style = files("attnopt.reporting").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    sections = [_section(name, made(report)) for name, made in SECTIONS]
    body = tag("body", tag("h1", title), *_opening(report), *sections, _made(environment))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _title(report: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    base = environment.get("base") or report["model"]
    return f"{base}, attention rewritten by attnopt"


def _opening(report: Mapping[str, Any]) -> list[Markup]:
    """Say in a few lines what came out."""
    shown = report.get("shown")
    lines = [] if shown is None else str(shown["verdict"]).splitlines()
    kind = "verdict" if report["accepted"] else "verdict rejected"
    state = "Accepted" if report["accepted"] else "Rejected by its quality gate"
    told = [tag("p", line) for line in lines]
    goal = ", ".join(f"{name} {_share(value)}" for name, value in report["goal"].items())
    asked = [tag("p", f"Asked for: {goal}", class_="faint")] if goal else []
    return [tag("div", tag("p", tag("b", state)), *told, class_=kind), *asked]


def _share(value: Any) -> str:
    return f"{100 * value:.4g} %" if isinstance(value, int | float) else str(value)


def _section(name: str, content: list[Markup]) -> Markup:
    return tag("section", tag("h2", name), *content) if content else Markup()


def _made(environment: Mapping[str, Any]) -> Markup:
    """Tell the exact command, and the versions of everything."""
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items())
    command = environment["command"] or "attnopt.save (called from Python)"
    return tag(
        "section",
        tag("h2", "How it was made"),
        tag("pre", command),
        tag("p", f"Python {environment['python']}, {packages}; {environment['platform']}."),
        tag(
            "p",
            joined(
                [
                    "The same numbers are in ",
                    tag("code", "report.json"),
                    " beside this page, the choices in ",
                    tag("code", "plan.yaml"),
                    ".",
                ]
            ),
            class_="faint",
        ),
    )
