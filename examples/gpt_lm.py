"""Halve the cache of a GPT-style language model, and read what it writes before and after.

python examples/gpt_lm.py examples/models/code-llama out/halved
"""

import argparse
import sys
from typing import Any

import torch
import transformers

import attnopt

PROMPT = "def read_config(path):\n"


def main(words: list[str]) -> int:
    """Fuse key and value heads, judge that, save it, and let both models go on from a prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--kv-cache", default="50%")
    parser.add_argument("--max-drop", default="15%")
    parser.add_argument("--data", default="stdlib:12x128")
    given = parser.parse_args(words)
    goal = {"kv_cache": given.kv_cache, "max_drop": given.max_drop}
    result = attnopt.optimize(given.model, goal, data=given.data, out=given.out, held_out=12)
    assert result.report is not None
    print(result.report.verdict)
    if not result.accepted:
        return 4
    print(f"the whole report: {given.out}/attnopt/report.html")
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    for folder in (given.model, given.out):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        print(f"--- {folder}\n{written(model, tokenizer)}")
    return 0


def written(model: Any, tokenizer: Any) -> str:
    """Go on from the prompt, always with the likeliest token."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(made[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
