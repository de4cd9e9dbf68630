"""Write the checkpoint of a stock class without the model: tensor by tensor, out of any weights.

The class, built without memory, says which tensors its checkpoint has and what they are called;
`save_pretrained` would write the same files, byte by byte.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnopt.artifacts.stock import build
from attnopt.nouns import No
from attnopt.tensorfiles import Described, write_tensors


def write_checkpoint(model: Any, weights: Mapping[str, Tensor], root: Path, shard: int) -> None:
    """Write config and weight files of at most `shard` bytes; the model is one without memory.

    Where its class stores tensors in another form than it computes with, all are held at once.
    """
    sources = _sources(model, weights)
    if isinstance(sources, No):
        held: Any = build(type(model), model.config, weights)
        held.save_pretrained(root, max_shard_size=shard)
        return
    model.save_pretrained(root, state_dict={})
    shapes = {name: tensor for name, (tensor, _) in sources.items()}
    files = _split(shapes, shard)
    for file, names in files.filename_to_tensors.items():
        told = {name: Described.of(shapes[name]) for name in names}

        def read(name: str) -> Tensor:
            return weights[sources[name][1]].to(shapes[name].dtype)

        write_tensors(root / file, told, read, {"format": "pt"})
    if files.is_sharded:
        _write_index(root, model, files)


def _sources(model: Any, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, str]] | No:
    """Return, for each tensor of the checkpoint, its form and the name of the weight it is."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    whole = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        whole.pop(name, None)
    twins = _twins(model, weights)
    state = remove_tied_weights_from_state_dict(whole, model)
    names = {id(tensor): name for name, tensor in state.items()}
    stored: dict[str, Tensor] = revert_weight_conversion(model, state)
    missing = next((n for n in state if n not in twins), None)
    if missing is not None:
        return No("no weight of the program", missing)
    changed = next((n for n, t in stored.items() if id(t) not in names), None)
    if changed is not None or len(stored) != len(state):
        return No("stored in another form than it is computed with", changed or "")
    return {name: (tensor, twins[names[id(tensor)]]) for name, tensor in stored.items()}


def _twins(model: Any, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the weight that each tensor of a model is; tied ones are the last of theirs."""
    last: dict[int, str] = {}
    held = model.state_dict(keep_vars=True)
    for name, tensor in held.items():
        if name in weights:
            last[id(tensor)] = name
    return {name: last[id(tensor)] for name, tensor in held.items() if id(tensor) in last}


def _split(shapes: dict[str, Tensor], shard: int) -> Any:
    from huggingface_hub import split_torch_state_dict_into_shards

    return split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard
    )


def _write_index(root: Path, model: Any, files: Any) -> None:
    content = {
        "metadata": {"total_parameters": model.num_parameters(), **files.metadata},
        "weight_map": files.tensor_to_filename,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (root / "model.safetensors.index.json").write_text(text, encoding="utf-8")
