"""JSON Schema of recipes and plans, so that editors complete and check them while typing.

    python -m attnopt.recipes.schema

writes both files beside this one; a test says when they are out of step with what is read.
"""

import json
from pathlib import Path
from typing import Any

from attnopt import plans
from attnopt.recipes import recipe

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
FOLDER = Path(__file__).parent


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe."""
    return {"$schema": _DRAFT, "title": "attnopt recipe", **recipe.SHAPE.schema()}


def plan_schema() -> dict[str, Any]:
    """Return the schema of a plan."""
    return {"$schema": _DRAFT, "title": "attnopt plan", **plans.SHAPE.schema()}


def texts() -> dict[str, str]:
    """Return the schema files by name."""
    made = {"recipe": recipe_schema(), "plan": plan_schema()}
    return {f"{n}.schema.json": json.dumps(s, indent=2) + "\n" for n, s in made.items()}


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
