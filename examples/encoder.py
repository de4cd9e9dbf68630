"""Remove heads and neurons of an encoder, and compare the embeddings before and after.

python examples/encoder.py --params 80%

The encoder is a small BERT of random weights, so that nothing has to be downloaded; any checkpoint
directory takes its place with --model.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import attnopt


def main(words: list[str]) -> int:
    """Prune, judge by cosine, save, load, and embed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory")
    parser.add_argument("--params", default="80%")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or small_bert(Path(folder) / "bert")
        program = attnopt.capture(model)
        print(f"{program.name}: {len(program.sites)} attentions, {len(program.mlps)} MLPs")
        random = torch.Generator().manual_seed(0)
        rows = torch.randint(5, program.config.vocab_size, (48, 32), generator=random)
        out = Path(folder) / "pruned"
        result = attnopt.optimize(program, {"params": given.params}, data=rows, out=out)
        assert result.report is not None
        print(result.report.verdict)
        loaded = transformers.AutoModel.from_pretrained(result_place(out))
        with torch.no_grad():
            first = loaded(input_ids=rows[:4]).last_hidden_state.mean(1)
        print(f"loaded by plain Transformers: embeddings of shape {list(first.shape)}")
    return 0


def result_place(out: Path) -> Path:
    """Return where the result lies: beside, where its gate was not passed."""
    return out if out.exists() else out.with_name(f"{out.name}.rejected")


def small_bert(folder: Path) -> Path:
    """Write a BERT of two layers with random weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=200,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
