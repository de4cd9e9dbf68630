"""Tier 1: layers of a stock model that differ in heads or neurons, by `per_layer_config`.

Transformers 5 writes and reads per-layer settings, but its model classes build all layers alike.
While it builds a model, here its classes of layers have stand-ins, which build the stock class
itself from the settings of its layer. A config without our mark gets what it gets without us.
"""

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

from torch import nn

MARK = "attnopt"
UNDERSTANDS = ("per_layer_heads",)

# Who builds a model changes classes and defaults of the whole process: threads take turns.
TURN = threading.RLock()


def is_marked(config: Any) -> bool:
    """Tell whether attnopt wrote a config whose layers differ."""
    block = vars(config).get(MARK)
    return (
        isinstance(block, dict)
        and block.get("tier") == 1
        and bool(getattr(config, "is_heterogeneous", False))
    )


def install(patching: ModuleType) -> None:
    """Extend what Transformers does with registered patches while it builds a model.

    They are not registered themselves: with any registered class Transformers lists all names that
    it has at every load, which takes longer than to load a small model.
    """
    applied = _with_stand_ins(patching.apply_patches)
    # Who imported the function before reads it under its own name.
    for home in (patching, sys.modules.get("transformers.modeling_utils")):
        if home is not None and hasattr(home, "apply_patches"):
            vars(home)["apply_patches"] = applied


def _with_stand_ins(apply_patches: Callable[[], Any]) -> Callable[[], Any]:
    @contextlib.contextmanager
    def applied() -> Generator[None]:
        with TURN, apply_patches():
            places = list(_places())
            try:
                for module, name, stock in places:
                    setattr(module, name, stand_in(stock))
                yield
            finally:
                for module, name, stock in places:
                    setattr(module, name, stock)

    return applied


_LAYERED = ("Attention", "Layer", "Block")


def _places() -> Iterator[tuple[ModuleType, str, type[nn.Module]]]:
    """Yield the classes of layers of all models that were imported, with where they are read."""
    for home, module in list(sys.modules.items()):
        if home.startswith("transformers.models.") and ".modeling_" in home:
            for name, held in list(vars(module).items()):
                if name.endswith(_LAYERED) and isinstance(held, type) and _is_layered(held):
                    yield module, name, held


def _is_layered(cls: type) -> bool:
    """Tell whether a class is built for one layer of a config."""
    if not issubclass(cls, nn.Module) or isinstance(cls, _StandIn):
        return False
    return list(inspect.signature(cls).parameters)[:2] == ["config", "layer_idx"]


class _StandIn(type):
    """The type of a class whose instances are those of a stock class."""

    stock: type[nn.Module]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.stock)


def stand_in(stock: type[nn.Module]) -> type:
    """Return a class that builds a stock class from the settings of its layer."""

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        layer = kwargs.get("layer_idx", args[0] if args else None)
        if layer is None or not is_marked(config):
            return stock(config, *args, **kwargs)
        own = config.per_layer_config[layer]
        module: nn.Module = stock(own, *args, **kwargs)
        # What is set on the model later, such as its attention function, holds for every layer.
        for part in module.modules():
            if getattr(part, "config", None) is own:
                part.config = config
        return module

    named = {"__new__": build, "__module__": stock.__module__, "stock": stock}
    return _StandIn(stock.__name__, (), named)
