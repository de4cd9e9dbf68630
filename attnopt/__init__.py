"""A graph compiler that rewrites attention in existing models."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attnopt.frontend import capture as capture
    from attnopt.nouns import Choice as Choice
    from attnopt.nouns import Mask as Mask
    from attnopt.nouns import No as No
    from attnopt.nouns import Plan as Plan
    from attnopt.nouns import Site as Site
    from attnopt.program import Program as Program
    from attnopt.rewriting import apply as apply

# Resolved on first use: `import attnopt` itself imports neither torch nor transformers.
_HOMES = {
    "apply": "attnopt.rewriting",
    "capture": "attnopt.frontend",
    "Choice": "attnopt.nouns",
    "Mask": "attnopt.nouns",
    "No": "attnopt.nouns",
    "Plan": "attnopt.nouns",
    "Program": "attnopt.program",
    "Site": "attnopt.nouns",
}

__all__ = [
    "Choice",
    "Mask",
    "No",
    "Plan",
    "Program",
    "Site",
    "apply",
    "capture",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *_HOMES})
