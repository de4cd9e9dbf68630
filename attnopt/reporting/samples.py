"""How a causal language model goes on before and after, from the same words, always the likeliest.

The words are the beginnings of held-out rows. Both models compute in float32, in memory: one that
is too large for that gives no samples.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from attnopt import debug
from attnopt.data.reading import folder_of, tokenizer_of
from attnopt.program import Program
from attnopt.verifying.calling import in_float32
from attnopt.weights import described

ROWS: Final = 2
PROMPT: Final = 32
NEW: Final = 24
_LARGEST: Final = 4 * 2**30


def samples(program: Program, reference: Program, rows: Any) -> list[dict[str, str]]:
    """Return prompts, and what the reference and the program say after them; none for others."""
    ids = rows.get("input_ids") if isinstance(rows, Mapping) else rows
    causal = program.generates and not program.parts and program.states
    if not (causal and isinstance(ids, Tensor) and ids.dim() == 2) or _is_large(program):
        return []
    prompts = ids[:ROWS, : max(min(PROMPT, ids.shape[1] // 2), 1)]
    said: list[list[Tensor]] = []
    for number, one in enumerate((reference, program), 1):
        said.append(_continued(one, prompts))
        debug.advance("samples", number, 2)
    names = ("prompt", "before", "after")
    told = [_words(reference, tokens) for tokens in (list(prompts), *said)]
    return [dict(zip(names, row, strict=True)) for row in zip(*told, strict=True)]


def _is_large(program: Program) -> bool:
    size = sum(math.prod(described(program.weights, n).shape) for n in program.weights)
    return 4 * size > _LARGEST


def _continued(program: Program, prompts: Tensor) -> list[Tensor]:
    """Return the tokens that follow each prompt, up to the end of the text."""
    from transformers import GenerationConfig

    limit = getattr(program.config, "max_position_embeddings", None)
    room = limit - prompts.shape[1] if isinstance(limit, int) else NEW
    config = GenerationConfig(
        max_new_tokens=max(min(NEW, room), 1), do_sample=False, num_beams=1, pad_token_id=0
    )
    with torch.no_grad():
        found: Tensor = in_float32(program).generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
    return [_ended(row, program) for row in found[:, prompts.shape[1] :]]


def _ended(row: Tensor, program: Program) -> Tensor:
    """Cut a row after the token that ends a text."""
    given = program.source.generation_config.eos_token_id
    ends = {given} if isinstance(given, int) else set(given or ())
    place = next((i for i, token in enumerate(row.tolist(), 1) if token in ends), len(row))
    return row[:place]


def _words(program: Program, rows: list[Tensor]) -> list[str]:
    """Return rows of tokens as text, or as their numbers where no tokenizer can be had."""
    try:
        tokenizer = None if folder_of(program) is None else tokenizer_of(program)
    except ValueError:
        tokenizer = None
    if tokenizer is None:
        return [" ".join(str(int(token)) for token in row) for row in rows]
    return [str(tokenizer.decode(row.tolist())) for row in rows]
