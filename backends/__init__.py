"""Where a program runs: one file or folder per backend, named for it.

The folder is the registry: a file with a function `prepare`, which runs a graph, or `ready`, which
runs a whole program, is a backend of `attnopt.lower`.
"""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from torch import fx


class Backend(Protocol):
    """The attributes of a module that is a backend and runs graphs.

    One that runs whole programs has `ready(program, module, dtype, device)` instead, which returns
    something that is called as the source is, and by `flat(values)` gives the flat outputs.
    One with `grows = True` is given the form of a program whose states grow.
    """

    @property
    def prepare(self) -> "Callable[[fx.GraphModule], Callable[..., Any]]":
        """Return what runs a graph: same inputs in the same order, padding masks may be None.

        The graph may be changed in place.
        """
        ...


@cache
def names() -> tuple[str, ...]:
    """Return the names of all backends."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return tuple(name for name in found if _prepares(name))


def load(name: str) -> Backend:
    """Import a backend by name; an unknown name is a ValueError that suggests the nearest one."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}{hint} (there are {', '.join(names())})")
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def _prepares(name: str) -> bool:
    """Tell from a module's source whether it has a function `prepare` or `ready`."""
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    functions = {s.name for s in tree.body if isinstance(s, ast.FunctionDef)}
    return bool(functions & {"prepare", "ready"})
