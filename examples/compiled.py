"""Use attnopt as a backend of torch.compile: the same rewrite, where the model is called.

python examples/compiled.py examples/models/code-llama --inner eager
"""

import argparse
import sys

import torch
import transformers

import attnopt


def main(words: list[str]) -> int:
    """Compile a model, call it, and say which attentions were rewritten."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--inner", default="inductor", help="what runs the rewritten graph")
    given = parser.parse_args(words)
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    ids = torch.arange(2, 50).view(2, 24)
    options = {"inner": given.inner, "on_miss": "error"}
    compiled = torch.compile(model, backend="attnopt", options=options, dynamic=True)
    with torch.no_grad():
        want, got = (m(input_ids=ids, use_cache=False).logits for m in (model, compiled))
    told = attnopt.compile_report()
    apart = float((got - want).abs().max() / want.abs().max())
    counts = f"{len(told.found)} attentions found, {len(told.rewritten)} rewritten"
    print(f"{counts}, {len(told.refused)} refused; relative difference {apart:.1e}")
    return int(not told.rewritten or apart > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
