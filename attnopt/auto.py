"""Tier 2 in Transformers: a model type of attnopt's own, which the Auto classes know.

`from_pretrained` reads the stored program and its weights; `save_pretrained` writes them again.
"""

import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from attnopt import backends
from attnopt.auto_config import MODEL_TYPE, AttnoptConfig
from attnopt.generating import LoweredLanguageModel, LoweredTransformer
from attnopt.lowering import lowered_class
from attnopt.program import Program
from attnopt.seq2seq import LoweredSeq2Seq

# What would change how a stock model runs or where it lies: never passed over in silence.
_NOT_SERVED = (
    "attn_implementation",
    "device_map",
    "quantization_config",
    "load_in_8bit",
    "load_in_4bit",
)


class _Stored:
    """Loading and saving of models whose directory holds a program."""

    config_class: Any = AttnoptConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        strict: bool = True,
        **options: Any,
    ) -> Any:
        """Load a directory that attnopt saved, after every check of `attnopt.load`."""
        from attnopt.artifacts.loading import load_program

        place = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(place):
            raise ValueError(
                f"{place!r} is no directory; download the whole repository first "
                "(huggingface_hub.snapshot_download) and give its path"
            )
        asked = [name for name in _NOT_SERVED if options.get(name) not in (None, False)]
        if asked:
            raise ValueError(
                f"{asked[0]}: a stored program takes dtype and backend; move it with .to() after"
            )
        known = {k: v for k, v in options.items() if k in ("dtype", "torch_dtype", "backend")}
        model = made_of(load_program(place, strict=strict), **known)
        if options.get("output_loading_info"):
            return model, {k: [] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        max_shard_size: int | str = 5 * 10**9,
        **options: Any,
    ) -> None:
        """Write the program with the weights that the model has now."""
        from attnopt.artifacts.saving import save

        assert isinstance(self, LoweredTransformer)
        save(self.current_program(), save_directory, tier=2, max_shard_size=_bytes(max_shard_size))


class AttnoptModel(_Stored, LoweredTransformer):  # type: ignore[misc]  # loads its own way
    """A stored program as a model of Transformers."""


class AttnoptForCausalLM(_Stored, LoweredLanguageModel):  # type: ignore[misc]  # as above
    """A stored program as a language model that generates."""


class AttnoptForSeq2SeqLM(_Stored, LoweredSeq2Seq):  # type: ignore[misc]  # as above
    """A stored program as an encoder-decoder that generates."""


_CLASSES: dict[type, Any] = {
    LoweredTransformer: AttnoptModel,
    LoweredLanguageModel: AttnoptForCausalLM,
    LoweredSeq2Seq: AttnoptForSeq2SeqLM,
}


def made_of(
    program: Program,
    *,
    backend: str = "eager",
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Return a program read from a directory as a model, in eval mode."""
    cls = _CLASSES.get(lowered_class(program), lowered_class(program))
    model: nn.Module = cls(program, backends.load(backend)).train(False)
    wanted = _dtype(torch_dtype if dtype is None else dtype)
    return model if wanted is None else model.to(wanted)


def register_models(module: ModuleType) -> None:
    """Make the model classes known to every Auto class of models."""
    generating = {
        "MODEL_FOR_CAUSAL_LM_MAPPING": AttnoptForCausalLM,
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING": AttnoptForSeq2SeqLM,
    }
    for name, mapping in vars(module).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING"):
            mapping.register(AttnoptConfig, generating.get(name, AttnoptModel), exist_ok=True)
    for name, cls in generating.items():
        vars(module)[f"{name}_NAMES"][MODEL_TYPE] = cls.__name__


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if given is None or given == "auto" or isinstance(given, torch.dtype):
        return given if isinstance(given, torch.dtype) else None
    found = getattr(torch, given.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {given!r} is not known to torch")
    return found


def _bytes(size: int | str) -> int:
    """Read 5000000 or "5GB"."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).upper().strip()
    unit = next((u for u in sorted(units, key=len, reverse=True) if text.endswith(u)), "")
    number = text.removesuffix(unit).strip()
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f"max_shard_size {size!r}: write a number of bytes, or such as '5GB'")
    return int(number) * units.get(unit, 1)
