"""Generate greedily with plain Transformers from checkpoint directories, and weigh their caches.

python examples/greedy.py examples/models/code-llama out/code-llama-half
"""

import sys

import torch
import transformers

PROMPT = "def read_config(path):\n"
TOKENS = 24


def main(folders: list[str]) -> int:
    """Continue a prompt with each checkpoint."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in folders:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        made = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
        )
        layers = made.past_key_values.layers
        held = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        each = held // layers[0].keys.shape[2]
        count = made.sequences.shape[1] - ids.shape[1]
        print(f"{folder}: {count} tokens generated, {each:,} bytes of float32 cache a token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
