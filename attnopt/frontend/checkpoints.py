"""Transformers checkpoints: the architecture without its weights, and weights read on demand.

The model is built with allocated but untouched parameters, which take address space and no memory;
torch.export reads their shapes only. Buffers are real.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.frontend.hub import INDEX as _INDEX
from attnopt.frontend.hub import SINGLE as _SINGLE
from attnopt.frontend.hub import fetched
from attnopt.perlayer import TURN
from attnopt.tensorfiles import Described, TensorFile
from attnopt.tying import tie
from attnopt.untrusted import (
    check_file,
    check_files,
    code_of,
    is_weight_file,
    read_json,
    refuse_elsewhere,
)
from attnopt.weights import spread

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A model whose parameters are placeholders, and its weights by dotted name."""

    model: nn.Module
    weights: Mapping[str, Tensor]
    note: str
    directory: Path = Path()

    def loaded(self, why: object) -> nn.Module:
        """Return the model with its weights in memory, for a capture that has to run it."""
        if isinstance(self.weights, NoWeights):
            raise ValueError(
                f"{self.directory} has no weights, and to capture it it must run: {why}"
            )
        return _loaded(self.model, self.directory)


class LazyWeights(Mapping[str, Tensor]):
    """Weights by dotted name, read from safetensors files each time they are asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, str]], real: Mapping[str, Tensor]):
        self._places = dict(places)
        self._files = {path: TensorFile(path) for path, _ in self._places.values()}
        self._real = dict(real)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            return self._real[name]
        path, stored = self._places[name]
        return self._files[path][stored]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._real

    def describe(self, name: str) -> Described:
        """Return shape and type of a weight without reading it."""
        if name not in self._places:
            return Described.of(self._real[name])
        path, stored = self._places[name]
        return self._files[path].describe(stored)

    def sample(self, name: str, places: int, count: int) -> Tensor:
        """Read `count` elements at so many places of a weight."""
        if name not in self._places:
            flat = self._real[name].reshape(-1)
            parts = [flat[a : a + n] for a, n in spread(flat.numel(), places, count)]
        else:
            path, stored = self._places[name]
            size = math.prod(self.describe(name).shape)
            file = self._files[path]
            parts = [file.sample(stored, a, n) for a, n in spread(size, places, count)]
        return torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from (n for n in self._real if n not in self._places)

    def __len__(self) -> int:
        return len(set(self._places) | set(self._real))


class NoWeights(Mapping[str, Tensor]):
    """The weights of a directory that holds a configuration only: buffers, and nothing else."""

    def __init__(self, directory: Path, names: list[str], real: Mapping[str, Tensor]):
        self._directory = directory
        self._names = names
        self._real = dict(real)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._real:
            return self._real[name]
        if name not in self._names:
            raise KeyError(name)
        raise ValueError(
            f"{self._directory} has no weights (config.json only), so {name} cannot be read; "
            f"add {_SINGLE} to run the program"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._real or name in self._names

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._names, *self._real])

    def __len__(self) -> int:
        return len({*self._names, *self._real})


def open_checkpoint(
    place: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> Checkpoint:
    """Build the architecture of a checkpoint and find its weights; nothing is loaded yet."""
    directory = _directory(place)
    check_files(directory)
    described = read_json(directory / "config.json")
    _refuse_delta(directory, described)
    _refuse_quantized(directory, described)
    code = code_of(described)
    if code is not None and not trust_remote_code:
        raise ValueError(
            f"{directory} brings its own code ({code} in config.json); "
            "read it, then pass trust_remote_code=True"
        )
    refuse_elsewhere(described, directory / "config.json")
    stored = stored_tensors(directory)
    model = _hollow_model(directory, described, trust_remote_code)
    if stored is None:
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        weights: Mapping[str, Tensor] = NoWeights(directory, names, _buffers(model))
        return Checkpoint(model, weights, "config only: no weights", directory)
    match = _match_names(model, stored)
    if match.converted:
        loaded = _loaded(model, directory)
        return Checkpoint(
            loaded,
            _all_tensors(loaded),
            f"loaded: {match.converted} needs conversion",
            directory,
        )
    _refuse_mismatch(directory, match)
    return Checkpoint(
        model, LazyWeights(match.places, _buffers(model)), "read when needed", directory
    )


def class_of(place: str | os.PathLike[str]) -> tuple[Any, Any]:
    """Return the class and the config of a checkpoint; its weights are not looked at."""
    directory = _directory(place)
    described = read_json(directory / "config.json")
    if holds_program(directory) or code_of(described):
        raise ValueError(
            f"{directory} names no class of Transformers: it holds a program, or code of its own"
        )
    config = _config_of(directory, described, trust_remote_code=False)
    return _model_class(directory, config, described, trust_remote_code=False), config


def holds_program(place: str | os.PathLike[str]) -> bool:
    """Tell whether a directory is one of attnopt's that holds a program (tier 2)."""
    config = Path(place) / "config.json"
    return config.is_file() and read_json(config).get("model_type") == "attnopt"


@dataclass
class _Match:
    places: dict[str, tuple[Path, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    converted: str = ""


def _loaded(model: nn.Module, directory: Path) -> nn.Module:
    """Return a model of the same class with the weights of a directory that was checked."""
    cls: Any = type(model)
    loaded: nn.Module = cls.from_pretrained(
        directory, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return loaded.eval()


def _directory(place: str | os.PathLike[str]) -> Path:
    path = Path(place)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no Transformers checkpoint: it has no config.json")
        return path
    if path.exists() or path.is_absolute() or str(place).startswith((".", "~")):
        raise ValueError(
            f"{place} is no checkpoint directory; allowed are such a directory, a hub id, "
            "package.module:factory and a .pt2 file"
        )
    return fetched(str(place))


def _refuse_delta(directory: Path, described: Mapping[str, Any]) -> None:
    if described.get("model_type") == "attnopt_delta":
        raise ValueError(
            f"{directory} is a delta, no model; put it together with its base: "
            f"attnopt export {directory} --to full --base BASE -o OUT"
        )


def _refuse_quantized(directory: Path, described: Mapping[str, Any]) -> None:
    if described.get("quantization_config"):
        method = described["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{directory} is quantised ({method}); rewrite its unquantised source, quantise after"
        )


def stored_tensors(directory: Path) -> dict[str, Path] | None:
    """Return the file of each stored tensor; None where the directory has no weights at all."""
    if (directory / _SINGLE).is_file():
        path = _checked(directory, _SINGLE)
        return dict.fromkeys(_header(path), path)
    if (directory / _INDEX).is_file():
        return _indexed(directory, directory / _INDEX)
    pickles = [p.name for p in sorted(directory.iterdir()) if p.suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{directory} holds pickles only ({pickles[0]}), which can run code when read; convert "
            "them: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    return None


def _indexed(directory: Path, index: Path) -> dict[str, Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(
            f"{index} has no weight_map from tensor names to file names; "
            "save the checkpoint again with save_pretrained"
        )
    files = {n: _checked(directory, n) for n in sorted(set(names.values()))}
    headers = {n: set(_header(path)) for n, path in files.items()}
    for tensor, file in names.items():
        if tensor not in headers[file]:
            raise ValueError(f"{index} places {tensor} in {file}, which does not have it")
    return {tensor: files[file] for tensor, file in names.items()}


def _checked(directory: Path, name: str) -> Path:
    """Return the path of a weight file; refuse one that leaves the directory."""
    if not name.endswith(".safetensors"):
        raise ValueError(f"{directory / _INDEX} names {name[:120]!r}, which is no safetensors file")
    if not is_weight_file(name):
        raise ValueError(f"{directory / _INDEX} names {name[:120]!r}, which leaves the directory")
    path = directory / name
    if not path.exists() and not path.is_symlink():
        raise ValueError(f"{path} is missing; {directory / _INDEX} names it")
    check_file(path)
    return path


def _header(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut off ({error}); download or save it again"
        ) from error


def _hollow_model(
    directory: Path, described: Mapping[str, Any], trust_remote_code: bool
) -> nn.Module:
    from transformers import initialization

    config = _config_of(directory, described, trust_remote_code)
    cls = _model_class(directory, config, described, trust_remote_code)
    with TURN, initialization.no_init_weights():
        model: Any = cls._from_config(config)
    model.tie_weights()
    _read_generation(model, directory / "generation_config.json")
    assert isinstance(model, nn.Module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _config_of(directory: Path, described: Mapping[str, Any], trust_remote_code: bool) -> Any:
    import transformers
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{directory / 'config.json'} describes no model of transformers "
            f"{transformers.__version__} (model_type {described.get('model_type')!r})"
        ) from error


def _read_generation(model: Any, path: Path) -> None:
    """Generate as the checkpoint says: where texts end, how tokens are drawn."""
    if getattr(model, "generation_config", None) is None or not path.is_file():
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_dict(read_json(path))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no generation config: {error}") from error


def _model_class(
    directory: Path, config: Any, described: Mapping[str, Any], trust_remote_code: bool
) -> Any:
    import transformers

    names = described.get("architectures") or []
    if trust_remote_code and described.get("auto_map"):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = next(v for k, v in described["auto_map"].items() if k != "AutoConfig")
        return get_class_from_dynamic_module(reference, str(directory))
    if names and hasattr(transformers, str(names[0])):
        return getattr(transformers, str(names[0]))
    mapping: Any = transformers.AutoModel._model_mapping  # pyright: ignore[reportPrivateUsage]
    if names or type(config) not in mapping:
        raise ValueError(
            f"{directory / 'config.json'} names the architecture {names}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return mapping[type(config)]


def _match_names(model: nn.Module, stored: Mapping[str, Path]) -> _Match:
    """Map stored names to the model's, with the renamings that from_pretrained would apply."""
    wanted = model.state_dict(keep_vars=True)
    match = _Match()
    renamed = _renamed(model, list(stored), wanted)
    if isinstance(renamed, str):
        match.converted = renamed
        return match
    _keep_apart(model, {name: (stored[source], source) for source, name in renamed.items()})
    wanted = model.state_dict(keep_vars=True)
    for source, name in renamed.items():
        if name in wanted:
            match.places[name] = (stored[source], source)
        else:
            match.unexpected.append(source)
    _tie(model, wanted, match)
    match.missing = [n for n in wanted if n not in match.places and _needed(model, n)]
    ignored = _pattern(model, "_keys_to_ignore_on_load_unexpected", _OBSOLETE)
    match.unexpected = [n for n in match.unexpected if not re.search(ignored, n)]
    match.shapes = _wrong_shapes(wanted, match)
    return match


def _keep_apart(model: nn.Module, places: Mapping[str, tuple[Path, str]]) -> None:
    """Untie, in place, what the files hold twice with different values."""

    def alike(one: str, other: str) -> bool:
        if one not in places or other not in places:
            return True
        first, second = (TensorFile(path)[name] for path, name in (places[one], places[other]))
        return torch.equal(first, second)

    tie(model, alike)


# Buffers that older versions of Transformers stored.
_OBSOLETE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$")


def _renamed(model: Any, stored: list[str], wanted: Mapping[str, Tensor]) -> dict[str, str] | str:
    """Return the model's name of each stored tensor, or a stored name that needs more than that."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    names: dict[str, str] = {}
    for name in sorted(stored):
        new, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, dict(wanted)
        )
        if pattern is not None:
            return name
        names[name] = new
    return names


def _tie(model: Any, wanted: Mapping[str, Tensor], match: _Match) -> None:
    """Let tied parameters that are stored once be found by all their names."""
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name in match.places:
            first.setdefault(id(tensor), name)
    for name, tensor in wanted.items():
        if name not in match.places and id(tensor) in first:
            match.places[name] = match.places[first[id(tensor)]]


def _needed(model: nn.Module, name: str) -> bool:
    ignored = _pattern(model, "_keys_to_ignore_on_load_missing", ())
    return not re.search(ignored, name) and name in dict(
        model.named_parameters(remove_duplicate=False)
    )


def _pattern(model: Any, attribute: str, more: tuple[str, ...]) -> str:
    patterns = [*(getattr(model, attribute, None) or ()), *more]
    return "|".join(f"({p})" for p in patterns) or r"(?!)"


def _wrong_shapes(wanted: Mapping[str, Tensor], match: _Match) -> list[str]:
    from safetensors import safe_open

    found: list[str] = []
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (path, stored) in match.places.items():
        by_file.setdefault(path, []).append((name, stored))
    for path, pairs in by_file.items():
        with safe_open(str(path), framework="pt") as file:
            for name, stored in pairs:
                shape = list(file.get_slice(stored).get_shape())
                if shape != list(wanted[name].shape):
                    found.append(f"{name} is {shape}, not {list(wanted[name].shape)}")
    return found


def _refuse_mismatch(directory: Path, match: _Match) -> None:
    problems = [
        f"{label}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for label, names in (
            ("missing tensors", match.missing),
            ("unexpected tensors", match.unexpected),
            ("wrong shapes", match.shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{directory} does not fit its config.json; {'; '.join(problems)}; "
            "save it again with save_pretrained, or correct config.json"
        )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **_buffers(model)}
