"""On `import attnopt`: let plain Transformers load what attnopt saved.

Nothing is imported for it: each extension happens when the part of Transformers that it concerns is
first imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

# Which function of attnopt extends which module of Transformers.
_EXTENSIONS = {
    "transformers.monkey_patching": ("attnopt.perlayer", "install"),
    "transformers.models.auto.configuration_auto": ("attnopt.auto_config", "register"),
    "transformers.models.auto.modeling_auto": ("attnopt.auto", "register_models"),
}


def install() -> None:
    """Extend what of Transformers is there already now, and the rest when it comes."""
    present = [sys.modules[name] for name in _EXTENSIONS if name in sys.modules]
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for module in present:
        _extend(module)


def _extend(module: ModuleType) -> None:
    home, name = _EXTENSIONS[module.__name__]
    getattr(importlib.import_module(home), name)(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules as everyone does, and is told when they were run."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _EXTENSIONS:
            return None
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
