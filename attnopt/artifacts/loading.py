"""Load an artifact after checking every file of it against its manifest."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attnopt.artifacts.manifest import IntegrityError, check_manifest, files_below, unchanged
from attnopt.artifacts.programs import UNDERSTANDS as PROGRAM
from attnopt.artifacts.programs import read_stored
from attnopt.artifacts.staging import recovered
from attnopt.frontend.checkpoints import stored_tensors
from attnopt.perlayer import TURN
from attnopt.perlayer import UNDERSTANDS as PER_LAYER
from attnopt.program import Program
from attnopt.untrusted import code_of, read_json, refuse_elsewhere, runs_code

READER = 1
DELTA = ("delta",)
DELTA_TYPE = "attnopt_delta"
_ADAPTER = "adapter_config.json"


def load(
    path: str | os.PathLike[str],
    strict: bool = True,
    base: str | os.PathLike[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Return the model of an artifact, or of a delta and its base, in eval mode.

    Strict: every file is listed and unchanged. Always: no pickle, no code, no link, no path that
    leaves the directory, no missing and no unexpected tensor. `options` go to `from_pretrained`; an
    artifact of tier 2 takes `dtype` and `backend`.
    """
    root = artifact_at(path)
    with unchanged(root):
        config = checked(root, strict=strict)
        if is_delta(config) or base is not None:
            return _of_delta(root, config, base, options)
        if is_stored(config):
            from attnopt.auto import made_of

            return made_of(read_stored(root), **options)
        return _stock(root, config, options)


def _stock(root: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint, all of whose files were checked, with the stock class that it names."""
    cls = _class(root, config)
    _check_weights(root)
    with TURN:
        model, seen = cls.from_pretrained(
            root,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if seen[kind]:
            name = sorted(map(str, seen[kind]))[0]
            raise IntegrityError(f"{root} has {kind.replace('_', ' ')}: {name}")
    loaded: nn.Module = model.eval()
    return loaded


def load_program(path: str | os.PathLike[str], *, strict: bool = True) -> Program:
    """Return the program of an artifact of tier 2."""
    root = artifact_at(path)
    with unchanged(root):
        if not is_stored(checked(root, strict=strict)):
            raise IntegrityError(f"{root} holds a checkpoint and no program; capture it")
        return read_stored(root)


def is_stored(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of an artifact of tier 2."""
    return config.get("model_type") == "attnopt"


def is_delta(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a delta, which is no model without its base."""
    return config.get("model_type") == DELTA_TYPE


def _of_delta(
    root: Path,
    config: Mapping[str, Any],
    base: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> nn.Module:
    if not is_delta(config):
        raise ValueError(f"{root} is whole: load it without a base")
    if base is None:
        raise ValueError(
            f"{root} is a delta, no model: load(path, base=...) needs {str(config.get('base'))!r}"
        )
    from attnopt.artifacts.restoring import restored

    with restored(root, base) as whole:
        model: Any = load(whole, strict=False, **options)
    if hasattr(model, "config"):
        model.config.name_or_path = str(root)
    return model  # type: ignore[no-any-return]


def artifact_at(path: str | os.PathLike[str]) -> Path:
    """Return the directory of an artifact, brought back where a process died replacing it."""
    root = Path(path).absolute()
    recovered(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no artifact at {root}")
    return root


def checked(root: Path, *, strict: bool) -> dict[str, Any]:
    """Return the config of an artifact, after every check."""
    refuse_code(root)
    if strict:
        check_manifest(root)
    return _config(root)


def refuse_code(root: Path) -> None:
    """Raise IntegrityError where a directory has a file that can run code."""
    for name in files_below(root):
        if runs_code(name):
            raise IntegrityError(f"refused: {root / name} can run code, which no artifact has")
        if name == _ADAPTER:
            raise IntegrityError(f"refused: {root / name} would change the model; merge it first")


def _config(root: Path) -> dict[str, Any]:
    place = root / "config.json"
    try:
        content = read_json(place)
        refuse_elsewhere(content, place)
        block = content["attnopt"]
        needed = int(block["min_reader"])
        unknown = sorted(set(block.get("must_understand", ())) - {*PER_LAYER, *PROGRAM, *DELTA})
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{place} is no config of an artifact of attnopt ({error})") from error
    if needed > READER:
        raise IntegrityError(
            f"{place} needs a newer attnopt (reader {needed}; this one is {READER})"
        )
    if unknown:
        raise IntegrityError(f"{place} needs an attnopt that understands {unknown[0]!r}")
    code = code_of(content)
    if code is not None:
        raise IntegrityError(f"refused: {place} names code ({code}), which no artifact has")
    return content


def _check_weights(root: Path) -> None:
    """Refuse weights out of the directory, damaged ones and none, before they are handed on."""
    try:
        stored = stored_tensors(root)
    except ValueError as error:
        raise IntegrityError(str(error)) from error
    if not stored:
        raise IntegrityError(f"{root} has no weights")


def _class(root: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or [""]
    cls = getattr(transformers, str(names[0]), None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise IntegrityError(f"{root / 'config.json'} names no class of Transformers: {names[0]!r}")
    return cls
