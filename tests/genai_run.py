"""Run a folder in ONNX Runtime GenAI; a script, so that it may run beside another onnxruntime."""

import json
import sys
from typing import Any

import numpy as np


def main(folder: str, wanted: str) -> None:
    """Print for each prompt (text, or token ids) its ids, the ids generated, and their text."""
    import onnxruntime_genai as genai  # type: ignore[import-not-found]

    asked = json.loads(wanted)
    config = genai.Config(folder)
    config.overlay(json.dumps(asked.get("overlay", {})))
    model = genai.Model(config)
    texts = any(isinstance(prompt, str) for prompt in asked["prompts"])
    tokenizer = genai.Tokenizer(model) if texts else None
    found = [_generated(genai, model, tokenizer, p, asked["steps"]) for p in asked["prompts"]]
    print(json.dumps({"version": genai.__version__, "runs": found}))


def _generated(genai: Any, model: Any, tokenizer: Any, prompt: Any, steps: int) -> dict[str, Any]:
    ids = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    rows = np.array(ids, np.int32)
    rows = rows if rows.ndim == 2 else rows[None]
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=rows.shape[1] + steps, batch_size=len(rows))
    generator = genai.Generator(model, options)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    made = [generator.get_sequence(row).tolist()[rows.shape[1] :] for row in range(len(rows))]
    text = None if tokenizer is None else tokenizer.decode(made[0])
    return {"ids": ids, "made": made, "text": text}


if __name__ == "__main__":
    main(*sys.argv[1:])
