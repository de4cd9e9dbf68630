"""The recipes that come with attnopt: one file each, named for it."""

from importlib.resources import files

_SUFFIX = ".yaml"


def names() -> tuple[str, ...]:
    """Return the names of the recipes."""
    listed = (item.name for item in files(__name__).iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in listed if n.endswith(_SUFFIX)))


def builtin_text(name: str) -> str:
    """Return the text of a recipe."""
    return files(__name__).joinpath(f"{name}{_SUFFIX}").read_text(encoding="utf-8")
