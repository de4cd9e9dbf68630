"""On `import attnopt`: let plain `from_pretrained` build layers that differ in their heads.

Nothing is imported for it: it happens when Transformers' own `monkey_patching` is first imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_WATCHED = "transformers.monkey_patching"


def install() -> None:
    """Extend Transformers now where it is there already, else when it comes."""
    if _WATCHED in sys.modules:
        _extend(sys.modules[_WATCHED])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _extend(module: ModuleType) -> None:
    from attnopt import perlayer

    perlayer.install(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched module as everyone does, and is told when it was run."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, then extends it."""

    def __init__(self, own: importlib.abc.Loader) -> None:
        self.own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        _extend(module)
