"""List the recipes that come with attnopt, show one, or check one's own.

attnopt recipes show half-cache > mine.yaml
attnopt recipes validate mine.yaml

Exit status: 0 listed, shown, or valid; 2 usage, or a recipe with a mistake.
"""

import argparse
from pathlib import Path
from typing import Any

from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output, say

_WHAT = ("list", "show", "validate", "schema")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare what to do, and with which recipe."""
    parser.add_argument(
        "what",
        nargs="?",
        choices=_WHAT,
        default="list",
        help="list (default), show a recipe, validate a file, or print the JSON Schema for editors",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name, or a file")


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Do what is asked."""
    if arguments.what in ("list", "schema") and arguments.name is not None:
        raise CommandError("AO111", f"`recipes {arguments.what}` takes no name")
    if arguments.what in ("show", "validate") and arguments.name is None:
        raise CommandError("AO111", f"`recipes {arguments.what}` needs a recipe's name, or a file")
    _DO[arguments.what](arguments.name, output)
    return Exit.ACCEPTED


def _list(name: None, output: Output) -> None:
    from attnopt.recipes import names, recipe_of

    found = {name: recipe_of(name) for name in names()}
    if output.json:
        listed = [{"name": n, **_content(r)} for n, r in found.items()]
        output.document("attnopt.recipes/1", {"recipes": listed})
        return
    rows = [(n, str(r.tier), r.description) for n, r in found.items()]
    output.table(("recipe", "tier", "what it is for"), rows, foldable={"what it is for"})
    output.note("attnopt optimize MODEL -o OUT --recipe NAME")


def _show(name: str, output: Output) -> None:
    from attnopt.recipes import builtin_text, names, recipe_text

    recipe = _read(name)
    text = builtin_text(name) if name in names() else recipe_text(recipe)
    if output.json:
        output.document("attnopt.recipe/1", {"name": name, **_content(recipe), "text": text})
        return
    output.line(text.rstrip())


def _validate(name: str, output: Output) -> None:
    recipe = _read(name)
    if output.json:
        output.document("attnopt.recipe/1", {"name": name, "valid": True, **_content(recipe)})
        return
    output.line(f"{name} is valid")


def _schema(name: None, output: Output) -> None:
    import json

    from attnopt.recipes.schema import recipe_schema

    say(json.dumps(recipe_schema(), indent=2))


_DO: dict[str, Any] = {"list": _list, "show": _show, "validate": _validate, "schema": _schema}


def _read(name: str) -> Any:
    from attnopt.recipes import names, recipe_of

    if name not in names() and not Path(name).is_file():
        hint = suggestion(name, names())
        raise CommandError(
            "AO102", f"no recipe and no file {name!r}{hint}; there is {', '.join(names())}"
        )
    try:
        return recipe_of(name)
    except ValueError as error:
        raise CommandError("AO112", " ".join(str(error).split())) from error


def _content(recipe: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(recipe), "goal": dict(recipe.goal)}
