"""Remove a fifth of a vision transformer, judged by its answers on labelled pictures.

python examples/vit.py examples/models/vit-digits out/vit-pruned

It needs scikit-learn for its handwritten digits: pip install 'attnopt[examples]'.
"""

import argparse
import sys

import torch
import transformers
from train_vit_digits import digits

import attnopt


def main(words: list[str]) -> int:
    """Prune heads and neurons, compare the answers, and load the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--params", default="80%")
    parser.add_argument("--pictures", type=int, default=360)
    given = parser.parse_args(words)
    images, labels, held, answers = (t[: given.pictures] for t in digits())
    rows = {"pixel_values": torch.cat([images, held]), "labels": torch.cat([labels, answers])}
    goal = {"params": given.params, "max_drop": "10%"}
    result = attnopt.optimize(given.model, goal, data=rows, out=given.out, held_out=len(held))
    assert result.report is not None
    print(result.report.verdict)
    if not result.accepted:
        return 4
    model = transformers.AutoModelForImageClassification.from_pretrained(given.out)
    with torch.no_grad():
        right = (model(pixel_values=held).logits.argmax(-1) == answers).float().mean()
    print(f"{given.out}: {float(right):.1%} of {len(held)} held-out digits read right")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
