"""Train a small Llama on the Python standard library's own sources.

The bundled checkpoint ``examples/models/code-llama`` comes from this script. It needs the
``examples`` extra (``pip install attnopt[examples]``) and no download: the text is the standard
library of the interpreter that runs it.

    python examples/train_code_llama.py --out out/code-llama --minutes 60
    python examples/train_code_llama.py --out out/code-llama --from examples/models/code-llama
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

BOS, EOS = "<s>", "</s>"
VOCABULARY = 2048
MAX_CONTEXT = 1024
HISTORY = "training.json"
SAVE_EVERY = 600.0
WARMUP = 0.02
DECAY = 0.6


@dataclass
class Run:
    """Hold what the model card says of a training run."""

    command: str
    python: str
    train_files: int
    train_tokens: int
    held_files: int
    held_tokens: int
    minutes: float = 0.0
    steps: int = 0
    tokens: int = 0
    finished: bool = False
    earlier: list[dict[str, object]] = field(default_factory=list)

    def history(self) -> list[dict[str, object]]:
        """Return every run behind the weights, oldest first."""
        if not self.steps:
            return self.earlier
        this = {key: getattr(self, key) for key in ("command", "minutes", "steps", "tokens")}
        return [*self.earlier, this | {"minutes": round(self.minutes, 1)}]


def sources() -> tuple[list[str], list[str]]:
    """Return the training and the held-out texts of the running interpreter's library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith("lib2to3/tests/data"):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if not 200 <= len(text) <= 200_000:
            continue
        digest = int(hashlib.sha1(name.encode()).hexdigest(), 16)
        (held if digest % 20 == 0 else train).append(text)
    return train, held


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the given texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def new_model() -> LlamaForCausalLM:
    """Return the model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """Return one token tensor per text, each between the begin and end tokens."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([first, *row, last]) for row in rows]


def held_out_loss(model: LlamaForCausalLM, documents: list[torch.Tensor], context: int) -> float:
    """Return the mean loss in nats per token over consecutive windows of the held-out stream."""
    stream = torch.cat(documents)
    count = (len(stream) - 1) // context
    inputs = stream[: count * context].view(count, context)
    targets = stream[1 : count * context + 1].view(count, context)
    rows = 8192 // context
    total = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for i in range(0, count, rows):
            logits = model(input_ids=inputs[i : i + rows], use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            goal = targets[i : i + rows].flatten()
            total += functional.cross_entropy(flat, goal, reduction="sum").item()
    model.train()
    return total / (count * context)


class Batches:
    """Deal windows of a token stream whose documents are shuffled anew in each epoch."""

    def __init__(self, documents: list[torch.Tensor], seed: int) -> None:
        """Start the first epoch."""
        self.documents = documents
        self.generator = torch.Generator().manual_seed(seed)
        self.stream = torch.empty(0, dtype=torch.long)
        self.place = 0

    def next(self, rows: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs and targets of a batch whose rows lie far apart in the stream."""
        need = rows * context + 1
        if not len(self.stream):
            order = torch.randperm(len(self.documents), generator=self.generator).tolist()
            self.stream = torch.cat([self.documents[i] for i in order])
        stride = len(self.stream) // rows
        if need > len(self.stream):
            raise ValueError("a batch is larger than the training text")
        if self.place + context + 1 > stride:
            self.place, self.stream = 0, torch.empty(0, dtype=torch.long)
            return self.next(rows, context)
        starts = [row * stride + self.place for row in range(rows)]
        window = torch.stack([self.stream[s : s + context + 1] for s in starts])
        self.place += context
        return window[:, :-1], window[:, 1:]


def rate(part: float) -> float:
    """Return the learning-rate factor after the given part of the budget."""
    if part < WARMUP:
        return part / WARMUP
    return min(1.0, max(0.0, (1.0 - part) / DECAY))


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    layers = list(model.model.layers.parameters())
    matrices = [p for p in layers if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def write(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
    losses: dict[int, float],
) -> None:
    """Write the checkpoint and its card to a sibling folder, then put it in place of the old."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    saved = LlamaForCausalLM(model.config).to(torch.bfloat16)
    saved.load_state_dict(model.state_dict())
    saved.generation_config = model.generation_config
    saved.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    (fresh / HISTORY).write_text(json.dumps(run.history(), indent=2) + "\n", "utf-8")
    (fresh / "README.md").write_text(card(run, losses), "utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)
    if out.exists():
        os.rename(out, old)
    os.rename(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


def card(run: Run, losses: dict[int, float]) -> str:
    """Return the model card."""
    rows = "\n".join(f"| {context} | {loss:.4f} |" for context, loss in losses.items())
    table = f"| context | nats per token |\n| --- | --- |\n{rows}" if rows else "Not measured."
    runs = "\n".join(
        f"{i}. {r['minutes']:.0f} minutes, {r['steps']:,} steps, {r['tokens']:,} tokens: "
        f"`{r['command']}`"
        for i, r in enumerate(run.history(), 1)
    )
    state = (
        "" if run.finished or not run.steps else "\nTraining was cut short or is still under way.\n"
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, code, python]
---

# code-llama

A small Llama that continues Python source: 6 layers of width 256, multi-head attention with
8 heads of 32, rotary positions up to {MAX_CONTEXT}, tied embeddings, a byte-level BPE of
{VOCABULARY:,} tokens, 5.3 M parameters in bfloat16. It exists to measure rewrites of attention on
trained weights; it has the attention patterns of a trained model and little knowledge.

## Data

The standard library of CPython {run.python}, as installed: files under 200 or over 200,000
characters, `site-packages` and `lib2to3/tests/data` are left out. Each file is one document,
`<s> text </s>`; documents are shuffled and joined.

| part | rule | files | tokens |
| --- | --- | --- | --- |
| training | the rest | {run.train_files:,} | {run.train_tokens:,} |
| held out | SHA-1 of the relative path divisible by 20 | {run.held_files:,} | {run.held_tokens:,} |

The standard library is under the PSF License.

## Training

Hardware: 2 CPU cores; bfloat16 autocast. `train_code_llama.py` uses Muon on
the layers' matrices and AdamW on the rest; the first 40 % of the budget (`--short`) trains at half
the context. Each run continues from the one before:

{runs}
{state}
## Held-out loss

Consecutive windows of the joined held-out files:

{table}

## Limits

- Trained on a few million tokens of one library: it writes Python-looking text, not working code.
- The split is by file, so code that the library repeats occurs on both sides.
- Positions past {MAX_CONTEXT} were never trained.
"""


def evaluate(model: LlamaForCausalLM, documents: list[torch.Tensor]) -> dict[int, float]:
    """Return the held-out loss of the saved precision at contexts 512 and 1,024."""
    rounded = LlamaForCausalLM(model.config)
    state = {name: p.to(torch.bfloat16).float() for name, p in model.state_dict().items()}
    rounded.load_state_dict(state)
    losses = {context: held_out_loss(rounded, documents, context) for context in (512, 1024)}
    for context, loss in losses.items():
        print(f"held-out loss at context {context}: {loss:.4f}", flush=True)
    return losses


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[torch.Tensor],
    run: Run,
    options: argparse.Namespace,
) -> None:
    """Train until the budget ends or the user interrupts, saving now and then."""
    model.train()
    batches = Batches(documents, options.seed)
    steppers = optimizers(model, options.lr)
    budget = options.minutes * 60
    start = time.monotonic()
    saved = shown = start
    smooth = math.nan
    try:
        while (passed := time.monotonic() - start) < budget:
            context, rows = options.context, options.batch
            if passed < options.short * budget:
                context, rows = context // 2, rows * 2
            inputs, targets = batches.next(rows, context)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=inputs, use_cache=False).logits
            flat = logits.float().flatten(0, 1)
            loss = functional.cross_entropy(flat, targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = options.lr * rate(passed / budget)
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            value = loss.item()
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            run.steps += 1
            run.tokens += inputs.numel()
            now = time.monotonic()
            run.minutes = (now - start) / 60
            if now - shown > 30:
                shown = now
                speed = run.tokens / (now - start)
                print(
                    f"{run.minutes:6.1f} min  step {run.steps}  context {context}  "
                    f"loss {smooth:.4f}  {speed:.0f} tokens/s",
                    flush=True,
                )
            if now - saved > SAVE_EVERY:
                saved = now
                write(options.out, model, tokenizer, run, {})
        run.finished = True
    except KeyboardInterrupt:
        print("interrupted: saving", flush=True)


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--from", dest="origin", type=Path, help="checkpoint to continue from")
    parser.add_argument("--minutes", type=float, default=60, help="budget; 0 only evaluates")
    parser.add_argument("--context", type=int, default=MAX_CONTEXT, help="final context")
    parser.add_argument("--short", type=float, default=0.4, help="part at half the context")
    parser.add_argument("--batch", type=int, default=4, help="rows at the final context")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out = options.out.resolve()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    logging.disable_progress_bar()

    train_texts, held_texts = sources()
    if options.origin:
        tokenizer = AutoTokenizer.from_pretrained(options.origin)
        model = LlamaForCausalLM.from_pretrained(options.origin, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(train_texts)
        model = new_model()
    tokenizer.model_max_length = MAX_CONTEXT
    documents, held = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    run = Run(
        command=" ".join(["python", "examples/train_code_llama.py", *sys.argv[1:]]),
        python=".".join(map(str, sys.version_info[:3])),
        train_files=len(documents),
        train_tokens=sum(map(len, documents)),
        held_files=len(held),
        held_tokens=sum(map(len, held)),
    )
    if options.origin:
        history = options.origin / HISTORY
        run.earlier = json.loads(history.read_text("utf-8")) if history.exists() else []
    print(f"{run.train_tokens:,} training tokens, {run.held_tokens:,} held out", flush=True)
    train(model, tokenizer, documents, run, options)
    write(options.out, model, tokenizer, run, {})
    write(options.out, model, tokenizer, run, evaluate(model, held))


if __name__ == "__main__":
    main()
