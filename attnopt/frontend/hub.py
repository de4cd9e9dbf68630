"""Checkpoints of the Hugging Face hub: what is read of one, fetched into the hub's own cache.

A name is `owner/model`, or `owner/model@revision`. Pickles and code are not fetched.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attnopt import debug
from attnopt.untrusted import is_weight_file, read_json

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_CONFIG: Final = "config.json"
# What describes a model, and what goes with its weights into an artifact.
_BESIDE: Final = (
    *(_CONFIG, "generation_config.json", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt"),
)


def fetched(name: str, *, weights: bool = True) -> Path:
    """Return the directory in the hub's cache that holds all that is read of a model."""
    repository, _, revision = name.partition("@")
    debug.announce(f"asking the Hugging Face hub for {name}")
    try:
        folder = _folder(repository, _BESIDE, revision)
        named = _weight_files(folder) if weights else []
        missing = [n for n in named if not (folder / n).exists()]
        if missing:
            debug.announce(f"fetching {', '.join(missing[:2])}{' ...' if missing[2:] else ''}")
            _folder(repository, (_CONFIG, *named), revision)
    except OSError as error:
        raise ValueError(
            f"cannot find {name!r}: no such directory, and the Hugging Face hub did not give it "
            f"({str(error).splitlines()[0].rstrip('.')}){_hint(name)}"
        ) from error
    return folder


def _hint(name: str) -> str:
    here = [str(p) for p in Path().iterdir() if p.is_dir()]
    near = difflib.get_close_matches(name, here, n=1)
    if near:
        return f"; did you mean the directory {near[0]!r}?"
    return "; check the spelling, or download it and give the directory"


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files, which the index says where there is one."""
    index = folder / INDEX
    places = read_json(index).get("weight_map") if index.is_file() else None
    files = set(places.values()) if isinstance(places, dict) else {SINGLE}
    return sorted(n for n in files if isinstance(n, str) and is_weight_file(n))


def _folder(repository: str, names: Sequence[str], revision: str) -> Path:
    """Fetch those of the files that there are, and return where they lie."""
    from transformers.utils.hub import cached_files

    found = cached_files(
        repository,
        list(names),
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
    )
    config = next((Path(f) for f in found or () if Path(f).name == _CONFIG), None)
    if config is None:
        raise OSError(f"it could not be reached, or has no {_CONFIG}, and is not in the cache")
    return config.parent
