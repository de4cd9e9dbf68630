"""Time exactly rewritten models, run eagerly, against the stock `sdpa` and `eager` attention.

    python tests/bench/exact.py
    python tests/bench/exact.py --shapes llama vit --lengths 128 --most 15

Weights are random. Exit status 1 where the results differ, or where the interval of the speedup
over `sdpa` ends below 0.98. Models that have no `sdpa` are compared with `eager` alone.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from harness import Interval, as_row, compare, machine, write
from torch import Tensor, nn

import attnopt

LEAST: Final = 0.98
TOLERANCE: Final = 1e-3
LENGTHS: Final = (128, 1024, 2048)
PATCHES: Final = {128: 11, 1024: 32, 2048: 45}
"""The side of a square of about so many patches."""
VOCABULARY: Final = 1000

Call = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A kind of model: how to make it with an attention, and a call of a length."""

    name: str
    make: Callable[[str, int], nn.Module]
    call: Callable[[int], Call]
    fixed: bool = False


def llama(attention: str, length: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    return built(transformers.LlamaForCausalLM, config, attention)


def gpt2(attention: str, length: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=384, n_layer=6, n_head=6, n_positions=2048, vocab_size=VOCABULARY
    )
    return built(transformers.GPT2LMHeadModel, config, attention)


def bert(attention: str, length: int) -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=2048, vocab_size=VOCABULARY,
    )  # fmt: skip
    return built(transformers.BertModel, config, attention)


def vit(attention: str, length: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6,
        image_size=8 * PATCHES[length], patch_size=8,
    )  # fmt: skip
    return built(transformers.ViTModel, config, attention)


def t5(attention: str, length: int) -> nn.Module:
    config = transformers.T5Config(
        d_model=384, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )  # fmt: skip
    return built(transformers.T5ForConditionalGeneration, config, attention)


def built(cls: Any, config: Any, attention: str) -> nn.Module:
    torch.manual_seed(0)
    return cls._from_config(config, attn_implementation=attention).eval()


def text(length: int) -> Call:
    return {"input_ids": torch.randint(2, VOCABULARY, (1, length))}


def padded_text(length: int) -> Call:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 5] = 0
    return {"input_ids": torch.randint(2, VOCABULARY, (2, length)), "attention_mask": mask}


def image(length: int) -> Call:
    side = 8 * PATCHES[length]
    return {"pixel_values": torch.randn(1, 3, side, side)}


def both(length: int) -> Call:
    ids = torch.randint(2, VOCABULARY, (1, length))
    return {"input_ids": ids, "decoder_input_ids": ids.clone()}


SHAPES: Final = (
    Shape("llama", llama, text),
    Shape("llama padded", llama, padded_text),
    Shape("gpt2", gpt2, text),
    Shape("bert", bert, text),
    Shape("bert padded", bert, padded_text),
    Shape("vit", vit, image, fixed=True),
    Shape("t5", t5, both),
)


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES])
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    given = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    print("\n".join(f"{k}: {v}" for k, v in machine().items()))
    print(f"{'model':<14}{'tokens':>7}{'ms':>9}{'speedup over sdpa':>28}{'over eager':>28}")
    rows = [
        row
        for shape in SHAPES
        if given.shapes is None or shape.name in given.shapes
        for row in measure(shape, given.lengths, given.most)
    ]
    write("exact", rows)
    return int(not all(row["passed"] for row in rows))


def measure(shape: Shape, lengths: list[int], most: int) -> list[dict[str, Any]]:
    """Compare one kind of model at several lengths."""
    rows: list[dict[str, Any]] = []
    made: nn.Module | None = None
    for length in lengths:
        stock = stock_models(shape, length)
        if made is None or shape.fixed:
            made = lowered(stock["eager"], shape.call(length))
        models = {**stock, "exact": made}
        rows.append(measure_one(shape, length, models, most))
    return rows


def stock_models(shape: Shape, length: int) -> dict[str, nn.Module]:
    models = {"eager": shape.make("eager", length)}
    if models["eager"]._supports_sdpa:
        models["sdpa"] = shape.make("sdpa", length)
    return models


def lowered(model: nn.Module, example: Call) -> nn.Module:
    short = {name: x[..., :16] if x.dim() == 2 else x for name, x in example.items()}
    program = attnopt.apply(attnopt.capture(model, (), short), "exact")
    assert not program.refused, program.refused
    return attnopt.lower(program, "eager")


@torch.no_grad()
def measure_one(
    shape: Shape, length: int, models: Mapping[str, nn.Module], most: int
) -> dict[str, Any]:
    call = shape.call(length)
    wrong = difference(models, call)
    calls = {name: lambda m=model: m(**call) for name, model in models.items()}
    base = "sdpa" if "sdpa" in models else "eager"
    timing = compare(calls, base="exact", most=most)
    gains = {over: timing.speedup("exact", over) for over in models if over != "exact"}
    passed = wrong <= TOLERANCE and gains[base].high >= LEAST
    print(line(shape.name, length, timing.median("exact"), gains, passed, wrong), flush=True)
    return {
        "model": shape.name,
        "tokens": length,
        "rounds": len(timing.seconds["exact"]),
        "milliseconds": {name: round(1e3 * timing.median(name), 4) for name in models},
        "speedup": {over: as_row(interval) for over, interval in gains.items()},
        "difference": wrong,
        "passed": passed,
    }


def difference(models: Mapping[str, nn.Module], call: Call) -> float:
    """Return how far the exact model is from `eager`, as a share of the largest value."""
    want, got = (models[name](**call)[0] for name in ("eager", "exact"))
    mask = call.get("attention_mask")
    if mask is not None:
        want, got = want[mask.bool()], got[mask.bool()]
    return float((want - got).abs().max() / want.abs().max())


def line(
    name: str,
    length: int,
    seconds: float,
    gains: Mapping[str, Interval],
    passed: bool,
    wrong: float,
) -> str:
    shown = [str(gains.get(over, "")) for over in ("sdpa", "eager")]
    verdict = "" if passed else "  FAILED" if wrong <= TOLERANCE else f"  WRONG {wrong:.1e}"
    return f"{name:<14}{length:>7}{1e3 * seconds:>9.2f}{shown[0]:>28}{shown[1]:>28}{verdict}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
