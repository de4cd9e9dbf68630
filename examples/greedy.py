"""Generate greedily with plain Transformers from checkpoint directories, and weigh their caches.

python examples/greedy.py examples/models/code-llama out/code-llama-half --compiled

With --compiled each model generates once more under torch.compile(backend="attnopt").
"""

import argparse
import sys
from typing import Any

import torch
import transformers

PROMPT = "def read_config(path):\n"
TOKENS = 24


def main(words: list[str]) -> int:
    """Continue a prompt with each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--compiled", action="store_true", help="generate compiled, too")
    given = parser.parse_args(words)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in given.folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        made = generated(model, ids)
        layers = made.past_key_values.layers
        held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        each = held // layers[0].keys.shape[2]
        count = made.sequences.shape[1] - ids.shape[1]
        print(f"{folder}: {count} tokens generated, {each:,} bytes of float32 cache a token")
        if given.compiled:
            model.forward = torch.compile(model.forward, backend="attnopt", dynamic=True)
            same = torch.equal(generated(model, ids).sequences, made.sequences)
            print(f"{folder}: compiled, {'the same tokens' if same else 'OTHER TOKENS'}")
            if not same:
                return 1
    return 0


def generated(model: Any, ids: torch.Tensor) -> Any:
    """Generate greedily; return the tokens and the cache."""
    return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
