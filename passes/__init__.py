"""What can be done to an attention: one file per rewrite, named for it.

The folder is the registry: a new file is a new pass. Other distributions add theirs through the
entry-point group `attnopt.passes`, whose entries name modules with the same attributes; a script
takes a module of its own along for a while with `extended`.
"""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

if TYPE_CHECKING:
    from attnopt.nouns import No, Site

GROUP = "attnopt.passes"


class Pass(Protocol):
    """The attributes of a module that is a pass.

    `tier` is where a result can be stored: 0 a stock checkpoint, 1 a checkpoint with per-layer
    shapes, 2 a saved program.
    """

    @property
    def exact(self) -> bool:
        """Whether the result must equal the original within tolerance."""
        ...

    @property
    def tier(self) -> int:
        """The lowest artifact tier that can hold the result."""
        ...

    @property
    def Config(self) -> type[Any]:  # noqa: N802
        """The knobs: a frozen dataclass with working defaults."""
        ...

    @property
    def fits(self) -> "Callable[[Any, Any], Literal[True] | No]":
        """Whether the pass applies at a site, or why it does not."""
        ...

    @property
    def convert(self) -> Callable[..., Any]:
        """New parameters from the old ones and the calibration statistics."""
        ...

    @property
    def emit(self) -> Callable[..., Any]:
        """Put the op in the graph."""
        ...

    @property
    def cost(self) -> Callable[..., Any]:
        """FLOPs and bytes of the rewritten site."""
        ...


ATTRIBUTES = ("Config", "fits", "convert", "emit", "cost", "exact", "tier")


@dataclass(frozen=True)
class Description:
    """What a pass says about itself, read without importing it."""

    name: str
    summary: str
    exact: bool | None
    tier: int | None
    origin: str


_own: ContextVar[Mapping[str, Any]] = ContextVar("own", default=MappingProxyType({}))


@contextmanager
def extended(**modules: Any) -> Generator[None]:
    """Know further passes by name inside the block, such as a script's own module.

    No file that names such a pass can bring it along: the code is that of the caller.
    """
    for name, module in modules.items():
        if name in (*_files(), *_foreign()):
            raise ValueError(f"there is a pass {name!r} already; give yours another name")
        _check(name, module)
    token = _own.set({**_own.get(), **modules})
    try:
        yield
    finally:
        _own.reset(token)


def names() -> tuple[str, ...]:
    """Return the names of all passes, the files of this folder first."""
    return (*_files(), *sorted({*_foreign(), *_own.get()}))


def load(name: str) -> Pass:
    """Import a pass by name; an unknown name is a ValueError that suggests the nearest one."""
    own = _own.get().get(name)
    return _check(name, importlib.import_module(_module_name(name)) if own is None else own)


def _check(name: str, module: Any) -> Pass:
    missing = [attribute for attribute in ATTRIBUTES if not hasattr(module, attribute)]
    if missing:
        raise ValueError(f"pass {name!r} ({module.__name__}) lacks {', '.join(missing)}")
    return cast(Pass, module)


def answer(rewrite: Any, site: "Site") -> "Literal[True] | No":
    """Say whether a pass has anything to do at a site, with the strongest setting it would try."""
    if not hasattr(rewrite, "candidates"):
        return rewrite.fits(site, rewrite.Config())  # type: ignore[no-any-return]
    configs = rewrite.candidates(site)
    if not configs:
        from attnopt.nouns import No

        return No("nothing to save here: no cache of several heads", site.name)
    return rewrite.fits(site, configs[-1])  # type: ignore[no-any-return]


def tier_of(rewrite: Any, site: Any, config: Any) -> int:
    """Return the lowest tier that holds a result: the pass's own, or what it says of a setting."""
    return int(rewrite.tier_of(site, config) if hasattr(rewrite, "tier_of") else rewrite.tier)


def describe(name: str) -> Description:
    """Read a pass's one-line summary and its constants from its source."""
    own = _own.get().get(name)
    if own is not None:
        summary = (own.__doc__ or "").split("\n", 1)[0]
        return Description(name, summary, own.exact, own.tier, own.__name__)
    spec = importlib.util.find_spec(_module_name(name))
    if spec is None or spec.origin is None:
        raise ValueError(f"pass {name!r} has no source file")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    constants = _constants(tree)
    summary = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    origin = _foreign()[name].value if name in _foreign() else "attnopt"
    return Description(name, summary, constants.get("exact"), constants.get("tier"), origin)


def _files() -> tuple[str, ...]:
    """List the modules of this folder; a leading underscore hides a file."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


@cache
def _foreign() -> dict[str, EntryPoint]:
    """Return the passes of other distributions; this folder's names cannot be taken."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _files()}


def _module_name(name: str) -> str:
    if name in _files():
        return f"{__name__}.{name}"
    if name in _foreign():
        return _foreign()[name].module
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown pass {name!r}{hint} (attnopt passes lists all)")


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Collect the module-level assignments of literals."""
    found: dict[str, Any] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                found[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value)):
                found[name] = value
            case _:
                pass
    return found
