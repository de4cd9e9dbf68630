"""Rewrite the attention of a checkpoint exactly, and measure that nothing changed.

    python examples/exact_parity.py examples/models/code-llama examples/models/vit-digits

The stock float32 model and the rewritten one are both compared with the same model in float64. A
rewrite passes where its RMS error is at most 1.25 times and its largest error at most twice the
stock model's own. A model whose scores are scaled by 1.1 goes through the same comparison, which
must reject it. Exit status 1 where anything is not as promised.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import attnopt

SEEDS, PROMPT, PADDING, STEPS = 8, 96, 13, 8
RMS_LIMIT, PEAK_LIMIT = 1.25, 2.0

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """An example call for the capture, and named outputs to compare at their valid positions."""

    example: dict[str, Tensor]
    outputs: Callable[[Callable[..., Any]], Outputs]


def main(folders: list[str]) -> int:
    """Check every checkpoint."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        return int(not all(check(Path(folder)) for folder in folders))


def check(folder: Path) -> bool:
    """Rewrite one checkpoint, print how far it moved, and say whether all is well."""
    config = transformers.AutoConfig.from_pretrained(folder)
    source = getattr(transformers, config.architectures[0])
    stock = source.from_pretrained(folder, dtype=torch.float32).eval()
    workload = text(folder) if stock.can_generate() else images(config)

    program = attnopt.capture(stock, (), workload.example)
    exact = attnopt.apply(program, "exact")
    found, refused = len(program.sites), len(exact.refused)
    print(f"{folder}: {found} attentions, {found - refused} rewritten, {refused} refused")
    print(f"  {'error, in errors of the stock model':<38}{'RMS':>11}{'largest':>11}")
    with Float64Everywhere():
        truth = workload.outputs(copy.deepcopy(stock).double())
    own = workload.outputs(stock)
    kept = compare(workload.outputs(exact), own, truth, label="")
    broken = attnopt.capture(with_wrong_scale(stock), (), workload.example)
    seen = compare(workload.outputs(broken), own, truth, label=", scale x 1.1")
    return found > 0 and not refused and all(kept) and not any(seen)


def with_wrong_scale(model: nn.Module) -> nn.Module:
    """Return a copy whose attention scores are scaled by 1.1."""
    wrong = copy.deepcopy(model)
    for module in wrong.modules():
        if hasattr(module, "scaling"):
            module.scaling *= 1.1
    return wrong


def text(folder: Path) -> Workload:
    """Return prompts of code, one of them padded on the left, and decoding steps after them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    code = tokenizer(Path(__file__).read_text(), return_tensors="pt").input_ids[0]
    length = PROMPT + STEPS
    starts = torch.linspace(0, len(code) - length, 2 * SEEDS).long()
    tokens = torch.stack([code[start : start + length] for start in starts])
    mask = torch.ones_like(tokens)
    mask[1::2, :PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def outputs(model: Callable[..., Any]) -> Outputs:
        """Feed the prompt at once and the rest one by one."""
        parts: list[Tensor] = []
        cache = None
        for start, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, length))]:
            result = model(
                input_ids=tokens[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = result.past_key_values
            parts.append(result.logits)
        prefill = parts[0][mask[:, :PROMPT].bool()]
        return {
            f"prefill of {PROMPT} tokens": prefill,
            f"{STEPS} decoding steps": torch.cat(parts[1:]),
        }

    return Workload({"input_ids": tokens[:2], "attention_mask": mask[:2]}, outputs)


def images(config: Any) -> Workload:
    """Return random images."""
    torch.manual_seed(0)
    pixels = torch.randn(SEEDS, config.num_channels, config.image_size, config.image_size)

    def outputs(model: Callable[..., Any]) -> Outputs:
        # A float64 model takes float64 images.
        dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else pixels.dtype
        return {f"{SEEDS} images": model(pixel_values=pixels.to(dtype)).logits}

    return Workload({"pixel_values": pixels[:2]}, outputs)


def compare(got: Outputs, own: Outputs, truth: Outputs, *, label: str) -> list[bool]:
    """Print the errors in units of the stock model's own, and say which are within the limits."""
    verdicts: list[bool] = []
    for name, want in truth.items():
        error, unit = got[name].double() - want, own[name].double() - want
        rms = float(error.square().mean().sqrt() / unit.square().mean().sqrt())
        peak = float(error.abs().max() / unit.abs().max())
        verdicts.append(rms <= RMS_LIMIT and peak <= PEAK_LIMIT)
        verdict = "exact" if verdicts[-1] else "rejected"
        print(f"  {name + label:<38}{rms:>11,.2f}{peak:>11,.2f}  {verdict}")
    return verdicts


class Float64Everywhere(TorchFunctionMode):
    """Make what a model computes in float32 on purpose, such as its norms, float64 too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with float64 where float32 was asked for."""
        func = Tensor.double if func is Tensor.float else func
        wide = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
