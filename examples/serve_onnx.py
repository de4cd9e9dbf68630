"""Serve a decoder with ONNX Runtime alone: export once, then a loop without torch.

python examples/serve_onnx.py examples/models/code-llama out/code-llama-onnx
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import attnopt

PROMPT = "def read_config(path):\n"


def main(words: list[str]) -> int:
    """Export, which compares the file with the program, and write a few tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args(words)
    made = attnopt.export_onnx(given.model, given.out)
    if not made.accepted:
        return 4
    tokenizer = Tokenizer.from_file(str(Path(given.model) / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    print(tokenizer.decode([*ids, *serve(f"{given.out}/model.onnx", ids, given.tokens)]))
    return 0


def serve(place: str, ids: list[int], count: int) -> list[int]:
    """Return the likeliest tokens after a prompt; the cache goes in as it came out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(place, providers=["CPUExecutionProvider"])
    wanted = {i.name: i for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    cache = {name: empty(told) for name, told in wanted.items() if name.startswith("past_key")}
    found: list[int] = []
    step, seen = ids, 0
    while len(found) < count:
        seen += len(step)
        given: dict[str, Any] = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - len(step), seen, dtype=np.int64)[None],
        }
        feed = {**{n: x for n, x in given.items() if n in wanted}, **cache}
        made = dict(zip(names, session.run(names, feed), strict=True))
        found.append(int(made["logits"][0, -1].argmax()))
        cache = {name: made[name.replace("past_key_values", "present")] for name in cache}
        step = found[-1:]
    return found


def empty(told: Any) -> Any:
    """Return a cache of nothing: one row, no token."""
    sizes = [
        size if isinstance(size, int) else 1 - place // 2 for place, size in enumerate(told.shape)
    ]
    return np.zeros(sizes, np.float32)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
