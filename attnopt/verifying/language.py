"""Language models: the loss of both programs token by token, their distance, their first choices.

A causal model predicts each next token; an encoder-decoder the tokens of its decoder; a masked one,
which sees what follows, the 15 % of tokens that are masked for it by a seed. Padding, and labels of
-100, count for nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from attnopt import debug
from attnopt.program import Program
from attnopt.verifying.calling import Call, Run, in_float32, valid, without_labels
from attnopt.verifying.intervals import Paired, finite
from attnopt.verifying.report import Row

Objective = Literal["causal", "masked", "seq2seq"]
MASKED: Final = 0.15
_IGNORED: Final = -100
# Logits that are held at once, of each program.
_LOGITS: Final = 2**26


@dataclass(frozen=True)
class LanguageScores:
    """The losses of both programs row by row, in nats per token, and how far apart they predict.

    `counts` has the tokens of each row, `divergence` their summed KL(reference || program), and
    `agreeing` on how many of them both have the same first choice, where that was looked at.
    """

    reference_nll: Tensor
    nll: Tensor
    counts: Tensor
    divergence: Tensor | None = None
    agreeing: Tensor | None = None
    objective: Objective = "causal"
    seed: int = 0
    task: str = "lm"
    what: str = "loss"

    @property
    def tokens(self) -> int:
        """How many tokens were compared."""
        return int(self.counts.sum())

    @property
    def seen(self) -> str:
        """What was compared."""
        return f"{self.tokens:,} tokens in {len(self.counts)} rows"

    @property
    def base(self) -> float:
        """The mean loss of the reference."""
        return _mean(self.reference_nll, self.counts)

    @property
    def mean(self) -> float:
        """The mean loss of the program."""
        return _mean(self.nll, self.counts)

    @cached_property
    def delta_nll(self) -> Paired:
        """The change of the loss in nats per token."""
        change = (self.nll.double() - self.reference_nll.double()) * self.counts
        return Paired.of(change, self.counts, seed=self.seed)

    @property
    def drop(self) -> Paired:
        """The change of the loss relative to the reference's, both sums over the same rows."""
        return self._drop

    @cached_property
    def _drop(self) -> Paired:
        change = (self.nll.double() - self.reference_nll.double()) * self.counts
        return Paired.of(change, self.reference_nll.double() * self.counts, seed=self.seed)

    @cached_property
    def kl(self) -> Paired | None:
        """The mean of KL(reference || program), in nats per token."""
        return self._share(self.divergence)

    @cached_property
    def agreement(self) -> Paired | None:
        """The share of tokens of which both have the same first choice."""
        return self._share(self.agreeing)

    def _share(self, amounts: Tensor | None) -> Paired | None:
        return None if amounts is None else Paired.of(amounts, self.counts, seed=self.seed)

    def rows(self) -> list[Row]:
        """Return what a table shows."""
        loss = ("held-out loss, nats a token", f"{self.base:.4f}", f"{self.mean:.4f}")
        before, after = _perplexity(self.base), _perplexity(self.mean)
        found = [
            (*loss, f"{self.drop.mean:+.2%}"),
            ("perplexity", f"{before:,.3f}", f"{after:,.3f}", f"{after / before - 1:+.2%}"),
        ]
        if self.kl is not None:
            found.append(("KL from the reference, nats a token", "", f"{self.kl.mean:.4f}", ""))
        if self.agreement is not None:
            found.append(("same first choice", "", f"{self.agreement.mean:.2%}", ""))
        return found

    def content(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "objective": self.objective,
            "rows": len(self.counts),
            "tokens": self.tokens,
            "reference_nll": finite(self.base),
            "nll": finite(self.mean),
            "delta_nll": self.delta_nll.content(),
            "reference_perplexity": finite(_perplexity(self.base)),
            "perplexity": finite(_perplexity(self.mean)),
            "kl": None if self.kl is None else self.kl.content(),
            "agreement": None if self.agreement is None else self.agreement.content(),
        }


def score(
    program: Run,
    reference: Run,
    calls: Sequence[Call],
    *,
    objective: Objective,
    mask_token: int | None = None,
    start_token: int = 0,
    seed: int = 0,
) -> LanguageScores:
    """Run both on the same calls, and compare them token by token.

    Without a `mask_token`, what is masked becomes another token of the row.
    """
    random = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, ...]] = []
    for number, whole in enumerate(calls, 1):
        given, targets = _asked(whole, objective, mask_token, start_token, random)
        if targets.shape[1] < 1:
            raise ValueError("rows of one token predict nothing; give rows of at least two")
        for part, wanted in _pieces(given, targets, reference):
            found.append(_compared(program, reference, part, wanted, objective))
        debug.advance("verify", number, len(calls))
    before, after, divergence, agreeing, counts = (torch.cat(x) for x in zip(*found, strict=True))
    kept = counts > 0
    if not bool(kept.any()):
        raise ValueError("the held-out rows have no token to predict: all are padding, or ignored")
    return LanguageScores(
        (before / counts)[kept],
        (after / counts)[kept],
        counts[kept],
        divergence[kept],
        agreeing[kept],
        objective,
        seed,
    )


def _asked(
    call: Call, objective: Objective, mask_token: int | None, start: int, random: torch.Generator
) -> tuple[dict[str, Any], Tensor]:
    """Return what the programs are given, and the token that each position of theirs predicts."""
    given, labels = without_labels(call), call.get("labels")
    if objective == "seq2seq":
        return _decoded(given, labels, start)
    if objective == "masked":
        return _masked(given, labels, mask_token, random)
    ids = given["input_ids"]
    targets = ids if labels is None else labels
    real = valid(given)
    if real is not None:
        targets = targets.masked_fill(~real, _IGNORED)
        # What follows padding is predicted from nothing.
        follows = functional.pad(real[:, :-1], (1, 0))
        targets = targets.masked_fill(~follows, _IGNORED)
    return given, targets[:, 1:]


def _decoded(
    given: dict[str, Any], labels: Tensor | None, start: int
) -> tuple[dict[str, Any], Tensor]:
    """Ask a decoder for its labels, for what it is given, or for the second half of each row."""
    if labels is not None and "decoder_input_ids" not in given:
        shifted = functional.pad(labels[:, :-1], (1, 0), value=start).clamp(min=0)
        return {**given, "decoder_input_ids": shifted}, labels
    if labels is not None:
        return given, labels
    if "decoder_input_ids" not in given:
        ids, half = given["input_ids"], given["input_ids"].shape[1] // 2
        first = {n: v[:, :half] for n, v in given.items()}
        continued = ids[:, half:]
        real = valid(given)
        if real is not None:
            continued = continued.masked_fill(~real[:, half:], _IGNORED)
        return _decoded(first, continued, start)
    targets = given["decoder_input_ids"]
    real = valid(given, "decoder_attention_mask")
    if real is not None:
        targets = targets.masked_fill(~real, _IGNORED)
    return given, targets[:, 1:]


def _masked(
    given: dict[str, Any], labels: Tensor | None, mask_token: int | None, random: torch.Generator
) -> tuple[dict[str, Any], Tensor]:
    """Hide some tokens of each row, at least one, never its first."""
    if labels is not None:
        return given, labels
    ids, real = given["input_ids"], valid(given)
    chance = torch.rand(ids.shape, generator=random)
    able = torch.ones_like(ids, dtype=torch.bool) if real is None else real.clone()
    able &= able.long().cumsum(1) > 1
    chance = chance.masked_fill(~able, 2.0)
    hidden = (chance < MASKED) | ((chance == chance.amin(1, keepdim=True)) & able)
    if mask_token is None:
        others = torch.randint(ids.shape[1], ids.shape, generator=random)
        shown = ids.gather(1, others)
    else:
        shown = torch.full_like(ids, mask_token)
    asked = {**given, "input_ids": torch.where(hidden, shown, ids)}
    return asked, ids.masked_fill(~hidden, _IGNORED)


def _pieces(given: Call, targets: Tensor, reference: Run) -> list[tuple[dict[str, Any], Tensor]]:
    """Cut a call into as many rows as their logits can be held."""
    config: Any = getattr(reference, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", None) or 2**15)
    size = max(_LOGITS // (vocabulary * targets.shape[1]), 1)
    count = len(targets)
    if size >= count or any(not isinstance(v, Tensor) or len(v) != count for v in given.values()):
        return [(dict(given), targets)]
    return [
        ({n: v[s : s + size] for n, v in given.items()}, targets[s : s + size])
        for s in range(0, count, size)
    ]


def _compared(
    program: Run, reference: Run, given: Call, targets: Tensor, objective: Objective
) -> tuple[Tensor, ...]:
    """Return, for each row: both summed losses, the summed divergence, agreements, and tokens."""
    before = _predicted(reference, given, targets, objective)
    after = _predicted(program, given, targets, objective)
    if before.shape != after.shape:
        raise ValueError(
            f"the program's logits have shape {list(after.shape)}, the reference's "
            f"{list(before.shape)}: they are no two spellings of one model"
        )
    counted = targets != _IGNORED
    losses = [_losses(x, targets) for x in (before, after)]
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    p = log_p.exp()
    divergence = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
    same = (before.argmax(-1) == after.argmax(-1)) & counted
    return (
        *(x.double().sum(1) for x in losses),
        divergence.double().masked_fill(~counted, 0.0).sum(1),
        same.double().sum(1),
        counted.double().sum(1),
    )


def _predicted(run: Run, given: Call, targets: Tensor, objective: Objective) -> Tensor:
    """Return the logits of the positions that predict the targets."""
    output = run(**given)
    logits: Tensor = (output if isinstance(output, Tensor) else output.logits).float()
    return logits[:, : targets.shape[1]] if logits.shape[1] > targets.shape[1] else logits


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", ignore_index=_IGNORED
    )


def losses(program: Any, rows: Tensor, stage: str, *, tokens: int = 4096) -> Tensor:
    """Return a causal model's mean loss of each row in nats per token."""
    run = in_float32(program) if isinstance(program, Program) else program
    parts = rows.split(max(tokens // rows.shape[1], 1))
    found: list[Tensor] = []
    with torch.no_grad():
        for number, part in enumerate(parts, 1):
            logits = run(input_ids=part).logits.float()
            found.append(_losses(logits[:, :-1], part[:, 1:]).double().mean(1))
            debug.advance(f"verify {stage}", number, len(parts))
    return torch.cat(found)


def _mean(losses: Tensor, counts: Tensor) -> float:
    return float((losses.double() * counts).sum() / counts.sum())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
