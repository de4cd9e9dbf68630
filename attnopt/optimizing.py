"""The whole pipeline, one line a stage: capture, exact, calibrate, plan, rewrite, verify, save."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt import debug
from attnopt.artifacts.saving import Result, refuse_foreign, save, source_folder, stock_model
from attnopt.artifacts.stock import tier_of
from attnopt.calibrating import calibrate
from attnopt.data import Source, Split, split_of
from attnopt.frontend import capture
from attnopt.nouns import No, Plan
from attnopt.planning import checked_goal, search
from attnopt.planning import plan as make_plan
from attnopt.program import Program
from attnopt.rewriting import apply
from attnopt.untrusted import check_tokenizer
from attnopt.verifying import in_float32, verify
from attnopt.weights import described


def optimize(
    model: nn.Module | Program | str | os.PathLike[str],
    goal: Mapping[str, Any] | None = None,
    plan: Plan | str | None = None,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    held_out: int = 96,
    command: str = "",
) -> Result:
    """Rewrite a model to meet a goal (or as a plan says), measure it, and save it to `out`.

    `data` is a Source or its name ("stdlib:48x256"), or a Split. A result that fails its gate is
    saved beside, as `out`.rejected, and says so.
    """
    wanted = checked_goal(goal or (plan.goal if isinstance(plan, Plan) else {}))
    program = model if isinstance(model, Program) else capture(model)
    if out is not None:
        refuse_foreign(Path(out).absolute(), program)
    exact = apply(program, "exact")
    if plan is None:
        search(exact, wanted)
    split = _split(program, data, held_out)
    made = _plan(exact, wanted, plan, split)
    rewritten = apply(exact, made)
    report = verify(rewritten, exact, split, max_drop=wanted.get("max_drop"))
    measured = measure(rewritten, exact, split.held_out)
    result = Result(rewritten, exact, made, report, measured, command)
    if out is not None:
        save(result, target(out, result))
    return result


def target(out: str | os.PathLike[str], result: Result) -> Path:
    """Return where a result goes: what is rejected never takes the place of what was accepted."""
    place = Path(out).absolute()
    return place if result.accepted else place.with_name(f"{place.name}.rejected")


def _split(program: Program, data: Any, held_out: int) -> Split:
    """Return the rows to calibrate with and to judge by."""
    if isinstance(data, Split):
        return data
    if isinstance(data, Tensor):
        held = max(len(data) // 4, 1)
        return Split(data[:-held], data[-held:], "tensor", "")
    source = data if isinstance(data, Source) else Source.parse(data or str(Source()))
    tokenizer = tokenizer_of(program) if source.is_text else None
    return split_of(source, tokenizer, held_out=held_out)


def tokenizer_of(program: Program) -> Any:
    """Return the tokenizer that lies beside a program's checkpoint."""
    from transformers import AutoTokenizer

    folder = source_folder(program)
    if folder is None:
        raise ValueError(
            f"{program.name} was not captured from a directory, so it has no tokenizer; give token "
            "ids as data: a tensor (rows, tokens) or a .safetensors file with input_ids"
        )
    try:
        check_tokenizer(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{folder} has no usable tokenizer ({error}); give token ids as data: a .safetensors "
            "file with input_ids"
        ) from error


def _plan(exact: Program, goal: Mapping[str, Any], plan: Plan | str | None, split: Split) -> Plan:
    if plan == "exact":
        return Plan((), dict(goal))
    if isinstance(plan, str):
        plan = Plan.load(plan)
    if plan is None:
        told = {"data": split.source, "data_sha256": split.digest}
        return make_plan(exact, goal, split, provenance=told)
    needs = any(c.rewrite != "exact" for c in plan.choices)
    if needs and plan.statistics is None and plan.source is None:
        return replace(plan, statistics=calibrate(exact, split))
    return plan


def measure(rewritten: Program, reference: Program, rows: Tensor) -> dict[str, Any]:
    """Measure what the running models keep per token, and whether the stock class agrees.

    That takes both whole models in memory, in float32. Where they are too large for it, the cache
    is read off the State table, and `stock` says that the stock class was not asked.
    """
    found: dict[str, Any] = {}
    ids = rows[:4, :64]
    size = sum(math.prod(described(rewritten.weights, n).shape) for n in rewritten.weights)
    fits = 4 * size <= _LARGEST
    if rewritten.states:
        both = (reference, rewritten)
        found["kv_bytes_per_token"] = [
            _cache_bytes(p, ids) if fits else _cache_told(p) for p in both
        ]
    debug.advance("measure", 1, 2)
    if not fits:
        found["stock"] = (
            f"not compared with its stock class, which takes {4 * size / 2**30:.1f} GiB in float32 "
            f"(compared up to {_LARGEST / 2**30:.0f} GiB)"
        )
        return found
    stock = stock_model(rewritten.cast(torch.float32))
    if isinstance(stock, No):
        found["stock"] = str(stock)
        return found
    found["tier"] = tier_of(stock.config)
    with torch.no_grad():
        want = in_float32(rewritten)(input_ids=ids).logits
        got = stock(input_ids=ids).logits
    scale = float(want.double().square().mean().sqrt())
    found["stock_error"] = float((got - want).abs().max()) / scale
    debug.advance("measure", 2, 2)
    if not found["stock_error"] <= _AGREES:
        raise RuntimeError(
            f"the stock class computes something else than the program: logits differ by "
            f"{found['stock_error']:.2g} of their size"
        )
    return found


_AGREES = 1e-3
_LARGEST = 4 * 2**30


def _cache_bytes(program: Program, ids: Tensor) -> int:
    """Run a program and weigh the cache that it returns, per row and token."""
    _, carry = program.step({"input_ids": ids})
    growing = {s.name for s in program.states if s.grows is not None}
    total = sum(t.numel() * t.element_size() for n, t in carry.tensors.items() if n in growing)
    return total // ids.numel()


def _cache_told(program: Program) -> int:
    """Return what the State table says of the cache, in bytes per row and token."""
    growing = (s for s in program.states if s.grows is not None)
    sizes = ((s.dtype.itemsize, [n for n in s.shape if isinstance(n, int)]) for s in growing)
    return sum(item * math.prod(shape) for item, shape in sizes)
