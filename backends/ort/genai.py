"""What ONNX Runtime GenAI wants beside an ONNX file: genai_config.json and the tokenizer.

Names and shapes are read from the file itself. GenAI gives each layer a cache of the static heads
and width of its input, so layers may differ in their heads; where those sizes were symbolic, it
would take one number for all. Where GroupQueryAttention alone reads the cache, GenAI keeps one
buffer of it for all steps; elsewhere the cache grows by concatenation.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.artifacts.saving import carry_over, source_folder
from attnopt.nouns import No
from attnopt.program import Program

CONFIG = "genai_config.json"
_PAST, _PRESENT = "past_key_values.%d.", "present.%d."
_TAKEN = ("input_ids", "attention_mask", "position_ids")
# Families that GenAI runs as any decoder, by its own names. Of phi3, which it also knows, it would
# compute the cache anew at 4,097 tokens; such families and unknown ones are "decoder".
_TYPES = {
    "ernie4_5": "ernie4_5",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt_oss": "gptoss",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "phi": "phi",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
# What configs call the number of tokens that a model was made for, and what stands for no limit.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_UNLIMITED = 2**15
_INTEGERS = (6, 7)  # int32 and int64 of ONNX
_SEARCH: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
}


@dataclass(frozen=True)
class Value:
    """An input or output of a file: its number type in ONNX, its sizes, names for what varies."""

    dtype: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """The inputs and outputs of a file by name, and which ops read its caches."""

    inputs: dict[str, Value]
    outputs: dict[str, Value]
    readers: frozenset[str] = frozenset()

    @classmethod
    def read(cls, file: Path) -> "Graph":
        """Read them from a file; its weights stay where they are."""
        import onnx

        graph = onnx.load(file, load_external_data=False).graph
        readers = (n for n in graph.node if any(x.startswith("past_") for x in n.input))
        names = frozenset(n.op_type for n in readers if not _reads_rows(n))
        return cls(_values(graph.input), _values(graph.output), names)

    @property
    def shares_buffers(self) -> bool:
        """Whether a cache may be longer than what was seen: then the mask tells what was."""
        return self.readers == {"GroupQueryAttention"} and "attention_mask" in self.inputs

    @property
    def layers(self) -> int:
        """The number of layers that keep a cache."""
        return sum(name.startswith("past_key_values.") for name in self.inputs) // 2


def _reads_rows(node: Any) -> bool:
    """Tell whether a node asks for the size of the first axis and nothing else."""
    axes = {a.name: a.i for a in node.attribute}
    return node.op_type == "Shape" and axes.get("start", 0) == 0 and axes.get("end") == 1


def write_genai(program: Program, file: Path) -> None:
    """Write genai_config.json beside a file, and copy the tokenizer of the source."""
    graph = Graph.read(file)
    refused = fits(program, graph)
    if isinstance(refused, No):
        raise NotImplementedError(f"ONNX Runtime GenAI cannot run {program.name}: {refused}")
    source = source_folder(program)
    if source is not None:
        carry_over(source, file.parent)
    text = json.dumps(content(program, graph, file.name), indent=2)
    (file.parent / CONFIG).write_text(text + "\n", encoding="utf-8")


def refuse_early(program: Program) -> None:
    """Raise NotImplementedError for what GenAI has no call for, before anything is exported."""
    why = None
    if program.parts:
        why = "it is no decoder alone: it was captured in parts"
    elif not program.states:
        why = "it keeps no cache; GenAI runs causal language models that take and give one"
    elif program.config is None:
        why = "it has no config, which says where texts end"
    elif not _ends(program.source.generation_config, program.config.get_text_config()):
        why = "no eos_token_id ends its texts, and GenAI would end them at token 0; set one"
    if why is not None:
        raise NotImplementedError(f"ONNX Runtime GenAI cannot run {program.name}: {why}")


def fits(program: Program, graph: Graph) -> bool | No:
    """Tell whether GenAI can call a file, or why not."""
    layers = [(f"{_PAST % n}key", f"{_PAST % n}value") for n in range(graph.layers)]
    expected = {name for pair in layers for name in pair}
    foreign = sorted(graph.inputs.keys() - expected - set(_TAKEN))
    if foreign or "input_ids" not in graph.inputs or not expected <= graph.inputs.keys():
        return No(f"inputs are {', '.join(_TAKEN)} and caches of layers 0, 1, ...", *foreign[:1])
    wanted = ["logits", *(n.replace("past_key_values", "present") for n in sorted(expected))]
    missing = [name for name in wanted if name not in graph.outputs]
    if missing:
        return No("outputs are logits and the caches of all layers", missing[0])
    for key, value in layers:
        refused = _cached_alike(key, graph.inputs[key].shape, graph.inputs[value].shape)
        if isinstance(refused, No):
            return refused
    tokens = [graph.inputs[name].dtype for name in _TAKEN if name in graph.inputs]
    if not set(tokens) <= set(_INTEGERS) or len(set(tokens[1:])) > 1:
        return No("tokens, mask and positions are integers, the last two of one type")
    if not isinstance(graph.outputs["logits"].shape[-1], int):
        return No("the size of the vocabulary is to be known", "logits")
    return True


def _cached_alike(name: str, key: tuple[int | str, ...], value: tuple[int | str, ...]) -> bool | No:
    """Tell whether keys and values of a layer have one shape, of known heads and width."""
    if len(key) != 4 or not all(isinstance(key[axis], int) for axis in (1, 3)):
        return No("a cache is (batch, heads, length, width) of known heads and width", name)
    if [key[1], key[3]] != [value[axis] for axis in (1, 3)]:
        return No(f"keys {key[1]} x {key[3]} and values {value[1]} x {value[3]} are unlike", name)
    return True


def content(program: Program, graph: Graph, filename: str) -> dict[str, Any]:
    """Return genai_config.json; GenAI refuses keys that it does not know, and nulls."""
    config = program.config.get_text_config()
    generation, length = program.source.generation_config, _length(config)
    return {
        "model": {
            "type": _TYPES.get(str(config.model_type), "decoder"),
            **_tokens(generation, config),
            "context_length": length,
            "vocab_size": graph.outputs["logits"].shape[-1],
            "decoder": _decoder(program, graph, filename),
        },
        "search": {
            **_search(generation),
            "min_length": 0,
            "max_length": length,
            "past_present_share_buffer": graph.shares_buffers,
        },
    }


def _decoder(program: Program, graph: Graph, filename: str) -> dict[str, Any]:
    keys = [graph.inputs[f"{_PAST % n}key"].shape for n in range(graph.layers)]
    config = program.config.get_text_config()
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": max(int(shape[3]) for shape in keys),
        "hidden_size": int(getattr(config, "hidden_size", 0)),
        "num_attention_heads": max(site.heads for site in program.sites),
        "num_key_value_heads": max(int(shape[1]) for shape in keys),
        "num_hidden_layers": graph.layers,
        "inputs": {
            **{name: name for name in _TAKEN if name in graph.inputs},
            "past_key_names": f"{_PAST}key",
            "past_value_names": f"{_PAST}value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{_PRESENT}key",
            "present_value_names": f"{_PRESENT}value",
        },
    }


def _tokens(generation: Any, config: Any) -> dict[str, Any]:
    """Return the tokens that begin, end and pad a text; a beginning may be missing."""
    ends = _ends(generation, config)
    begin = _ids(generation, config, "bos_token_id")
    pad = _ids(generation, config, "pad_token_id") or ends
    found = {"bos_token_id": begin[0]} if begin else {}
    return {**found, "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad[0]}


def _ends(generation: Any, config: Any) -> list[int]:
    return _ids(generation, config, "eos_token_id")


def _ids(generation: Any, config: Any, name: str) -> list[int]:
    """Return what the source gives for a token, one or several, or none."""
    given = _first(getattr(generation, name, None), getattr(config, name, None))
    listed = given if isinstance(given, list | tuple) else [given]
    return [int(t) for t in listed if t is not None and int(t) >= 0]


def _search(generation: Any) -> dict[str, Any]:
    """Return how the source generates where nothing else is asked for."""
    return {name: _first(getattr(generation, name, None), usual) for name, usual in _SEARCH.items()}


def _length(config: Any) -> int:
    found = (getattr(config, name, None) for name in _LENGTHS)
    return next((n for n in found if isinstance(n, int) and 0 < n < 2**31), _UNLIMITED)


def _first(*given: Any) -> Any:
    return next((x for x in given if x is not None), None)


def _values(values: Iterable[Any]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or int(d.dim_value) for d in tensor.shape.dim)
        found[value.name] = Value(int(tensor.elem_type), shape)
    return found
