"""A graph compiler that rewrites attention in existing models."""

import importlib
from typing import TYPE_CHECKING, Any

from attnopt import hook as _hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from attnopt.artifacts import load as load
    from attnopt.artifacts import save as save
    from attnopt.backends.dynamo import compile_report as compile_report
    from attnopt.backends.ort import export_onnx as export_onnx
    from attnopt.calibrating import calibrate as calibrate
    from attnopt.frontend import capture as capture
    from attnopt.healing import heal as heal
    from attnopt.lowering import lower as lower
    from attnopt.nouns import Choice as Choice
    from attnopt.nouns import Mask as Mask
    from attnopt.nouns import No as No
    from attnopt.nouns import Plan as Plan
    from attnopt.nouns import Site as Site
    from attnopt.optimizing import optimize as optimize
    from attnopt.planning import plan as plan
    from attnopt.program import Program as Program
    from attnopt.rewriting import apply as apply
    from attnopt.verifying import Report as Report
    from attnopt.verifying import verify as verify

# Resolved on first use: `import attnopt` itself imports neither torch nor transformers.
_HOMES = {
    "apply": "attnopt.rewriting",
    "calibrate": "attnopt.calibrating",
    "capture": "attnopt.frontend",
    "compile_report": "attnopt.backends.dynamo",
    "export_onnx": "attnopt.backends.ort",
    "heal": "attnopt.healing",
    "load": "attnopt.artifacts",
    "lower": "attnopt.lowering",
    "optimize": "attnopt.optimizing",
    "plan": "attnopt.planning",
    "save": "attnopt.artifacts",
    "verify": "attnopt.verifying",
    "Choice": "attnopt.nouns",
    "Mask": "attnopt.nouns",
    "No": "attnopt.nouns",
    "Plan": "attnopt.nouns",
    "Program": "attnopt.program",
    "Report": "attnopt.verifying",
    "Site": "attnopt.nouns",
}

__all__ = [
    "Choice",
    "Mask",
    "No",
    "Plan",
    "Program",
    "Report",
    "Site",
    "apply",
    "calibrate",
    "capture",
    "compile_report",
    "export_onnx",
    "heal",
    "load",
    "lower",
    "optimize",
    "plan",
    "save",
    "verify",
]


_hook.install()


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
