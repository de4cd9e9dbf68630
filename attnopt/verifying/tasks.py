"""What a model is for, told from what it returns: logits of tokens or classes, or embeddings."""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from attnopt.verifying.calling import Call, Run, field, without_labels
from attnopt.verifying.embedding import POOLED
from attnopt.verifying.language import Objective

TASKS: Final = ("lm", "embedding", "classification")
_SHORT: Final = 32
_UNMOVED: Final = 1e-5


def checked_task(task: str | None) -> str | None:
    """Return a task, or None for one that is to be told; ValueError for an unknown one."""
    if task is not None and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there is {', '.join(TASKS)}")
    return task


def task_of(run: Run, call: Call) -> str:
    """Tell the task from the result of one row."""
    given = _first_row(without_labels(call))
    if _decodes(run) and "decoder_input_ids" not in given:
        return "lm"
    output = run(**given)
    plain = isinstance(output, Tensor)
    logits = output if plain else field(output, "logits")
    if logits is None:
        if field(output, "last_hidden_state", *POOLED) is not None:
            return "embedding"
        raise _untold(output)
    if logits.dim() == 3:
        return _of_tokens(run, call, logits, plain=plain)
    if logits.dim() == 2:
        return "embedding" if plain and "labels" not in call else "classification"
    raise _untold(output)


def _of_tokens(run: Run, call: Call, logits: Tensor, *, plain: bool) -> str:
    """Tell logits over the vocabulary from those of classes, and from states."""
    ids = call.get("decoder_input_ids", call.get("input_ids"))
    vocabulary = _vocabulary(run)
    if isinstance(ids, Tensor) and vocabulary is not None and logits.shape[-1] >= vocabulary:
        return "lm"
    if isinstance(ids, Tensor) and vocabulary is None and logits.shape[-1] > int(ids.max()):
        return "lm"
    return "embedding" if plain else "classification"


def _untold(output: Any) -> ValueError:
    names = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
    return ValueError(
        f"cannot tell the task from a result of {names}: name it (lm, embedding or classification)"
    )


def objective_of(run: Run, call: Call) -> Objective:
    """Tell how a language model predicts: by trying whether a token changes what is before it."""
    given = without_labels(call)
    if _decodes(run):
        return "seq2seq"
    if "input_ids" not in given:
        raise ValueError("a language model is judged on input_ids; the data has none")
    if getattr(run, "generation_config", None) is not None and _generates(run):
        return "causal"
    short = {n: v[:1, :_SHORT] if _is_rows(v) else v for n, v in given.items()}
    ids, mask = short["input_ids"], short.get("attention_mask")
    if ids.shape[1] < 2:
        return "causal"
    last = int(mask[0].nonzero().max()) if isinstance(mask, Tensor) and mask.any() else -1
    other = ids.clone()
    other[0, last] = ids[0, 0] if ids[0, last] != ids[0, 0] else (ids[0, 0] + 1) % _room(run, ids)
    a, b = (_logits(run(**{**short, "input_ids": x})) for x in (ids, other))
    before = slice(0, last if last >= 0 else ids.shape[1] - 1)
    moved = (a[:, before] - b[:, before]).abs().max()
    return "masked" if float(moved) > _UNMOVED * float(a.abs().max()) else "causal"


def special_tokens(config: Any) -> int:
    """Return the token that a decoder starts from."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return 0


def _generates(run: Run) -> bool:
    program = getattr(run, "program", None)
    return bool(getattr(program, "states", ()))


def _decodes(run: Run) -> bool:
    return bool(getattr(getattr(run, "config", None), "is_encoder_decoder", False))


def _first_row(call: Call) -> dict[str, Any]:
    return {n: v[:1] if isinstance(v, Tensor) and v.dim() else v for n, v in call.items()}


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found.float()


def _room(run: Run, ids: Tensor) -> int:
    return _vocabulary(run) or int(ids.max()) + 1


def _vocabulary(run: Run) -> int | None:
    config: Any = getattr(run, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) else None
