"""The whole pipeline, one line a stage: capture, exact, calibrate, plan, rewrite, verify, save."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt import debug
from attnopt.artifacts.saving import Result, needed_tier, refuse_foreign, save, stock_model
from attnopt.branches import branches, has_branches
from attnopt.data import Split, batches_of, presented, split_for
from attnopt.data.reading import tokenizer_of as tokenizer_of
from attnopt.estimating import Estimate, TooLargeError, estimate, refuse_too_large
from attnopt.frontend import capture
from attnopt.keeping import calibrated, folder_of, kept, moved, resumed
from attnopt.nouns import No, Plan
from attnopt.planning import NothingToDoError, NoUniformPlanError, checked_goal, foreseen
from attnopt.planning import plan as make_plan
from attnopt.program import Program, State
from attnopt.reporting import samples
from attnopt.rewriting import apply, settled
from attnopt.search.foreseeing import looks_of
from attnopt.search.preparing import Terms, check_rules
from attnopt.search.rules import Rule
from attnopt.verifying import in_float32, verify
from attnopt.weights import described

_SEARCHED = "every pass is measured at every site, for the best mixture"


def optimize(
    model: nn.Module | Program | str | os.PathLike[str],
    goal: Mapping[str, Any] | None = None,
    plan: Plan | str | None = None,
    data: Any = None,
    out: str | os.PathLike[str] | None = None,
    *,
    held_out: int = 96,
    tier: int | None = None,
    command: str = "",
    passes: Sequence[str] | None = None,
    rules: Sequence[Rule] = (),
    tensor_parallel: int = 1,
    tokens: int | None = None,
    work: str | os.PathLike[str] | None = None,
    recipe: str = "",
) -> Result:
    """Rewrite a model to meet a goal (or as a plan says), measure it, and save it to `out`.

    Without a `tier` all layers are treated alike (tier 0) where that meets the goal and stays
    within its `max_drop`; where it does not, every pass is measured at every site (tier 2).
    `passes` to `work`: see `plan`; `recipe` is kept in the artifact. `data` is a Source or its name
    ("stdlib:48x256"), a Split, rows, or an iterable of calls; its held-out part judges. A result
    that fails its gate is saved beside, as `out`.rejected, and says so.
    """
    wanted = checked_goal(goal or (plan.goal if isinstance(plan, Plan) else {}))
    data = presented(data, model)
    program = model if isinstance(model, Program) else capture(model)
    if plan is None:
        check_rules(program, rules)
    if out is not None:
        refuse_foreign(Path(out).absolute(), program)
    terms = Terms(tier or 0, tuple(passes or ()), tuple(rules), tensor_parallel, tokens)
    with debug.stage("prove"):
        exact = apply(program, "exact")
        # Where one pass alone can serve, what it will do is known before its data.
        found: Any = []
        if plan is None:
            terms, found = within(exact, wanted, tier, terms)
    split = split_for(program, data, held_out)
    place = None if work is None else folder_of(work, exact, split)
    run = _Run(exact, wanted, split, None if out is None else Path(out).absolute(), work, place)
    with kept(place, saved=out is not None):
        alike_first = plan is None and tier is None and not terms.tier
        result = (
            _alike_or_mixed(run, terms, found) if alike_first else run.result(plan, terms, found)
        )
        result = replace(result, command=command, recipe=recipe)
        if out is not None:
            with debug.stage("save"):
                where = save(result, target(out, result))
            if place is not None:
                moved_to = moved(result.plan, where / "attnopt" / "statistics.safetensors")
                result = replace(result, plan=moved_to)
    return result


def within(
    exact: Program, goal: Mapping[str, Any], tier: int | None, terms: Terms
) -> tuple[Terms, Any]:
    """Return the terms that can meet a goal, and what is foreseen: all layers alike, or mixtures.

    A tier that is asked for is kept.
    """
    asked = goal, terms.passes or None, tier or 0, terms.rules, terms.tensor_parallel
    try:
        return replace(terms, tier=tier or 0), foreseen(exact, *asked)
    except NoUniformPlanError as error:
        if tier is not None:
            raise
        debug.announce(f"{error}: {_SEARCHED}")
        return replace(terms, tier=2), None


def _alike_or_mixed(run: "_Run", terms: Terms, found: Sequence[Sequence[Any]] | None) -> Result:
    """Treat all layers alike; where that cannot be or loses too much, search for a mixture."""
    mixed = replace(terms, tier=2)
    try:
        alike = run.result(None, terms, found)
    except NothingToDoError as error:
        debug.announce(f"{error}: {_SEARCHED}")
        return run.result(None, mixed, None)
    if alike.accepted:
        return alike
    lost = "" if alike.report is None else f" (up to {alike.report.drop.ci95[1]:.2%})"
    debug.announce(f"all layers alike lose more than is allowed{lost}: {_SEARCHED}")
    try:
        return run.result(None, mixed, None)
    except (NothingToDoError, TooLargeError) as error:
        debug.announce(f"there is no mixture: {error}")
        return alike


@dataclass(frozen=True)
class _Run:
    """An exact program, what is wanted of it, and by which data it is judged."""

    exact: Program
    goal: Mapping[str, Any]
    split: Split
    out: Path | None
    work: str | os.PathLike[str] | None
    place: Path | None

    def result(
        self, plan: Plan | str | None, terms: Terms, found: Sequence[Sequence[Any]] | None
    ) -> Result:
        """Say what it takes, plan, rewrite and measure; `found` is what is foreseen of a search."""
        exact, split = self.exact, self.split
        with debug.stage("estimate"):
            if isinstance(plan, Plan):
                expected = estimate(exact, split, self.goal, plan)
            else:
                expected = foretold(exact, split, self.goal, found, terms, self.work)
        if isinstance(expected, Estimate):
            debug.announce(f"takes {expected}")
            refuse_too_large(expected, self.out)
        with debug.stage("plan"):
            made = self._searched(terms) if plan is None else self._given(plan)
        with debug.stage("rewrite"):
            made = resumed(made, self.place)
            rewritten = apply(exact, made)
        with debug.stage("verify"):
            report = verify(rewritten, exact, split, max_drop=self.goal.get("max_drop"))
        with debug.stage("measure"):
            sampled = self.out is not None
            rewritten, measured = _measured(rewritten, exact, split, sampled=sampled)
        if isinstance(expected, Estimate):
            measured["estimate"] = expected.content()
        return Result(rewritten, exact, made, report, measured)

    def _searched(self, terms: Terms) -> Plan:
        told = {"data": self.split.source, "data_sha256": self.split.digest}
        return make_plan(
            self.exact,
            self.goal,
            self.split,
            terms.passes or None,
            tier=terms.tier,
            provenance=told,
            rules=terms.rules,
            tensor_parallel=terms.tensor_parallel,
            tokens=terms.tokens,
            work=self.work,
        )

    def _given(self, plan: Plan | str) -> Plan:
        """Return a plan that needs no search, with the statistics that it needs."""
        if plan == "exact":
            return Plan((), dict(self.goal))
        if isinstance(plan, str):
            plan = Plan.load(plan)
        needs = any(c.rewrite != "exact" for c in plan.choices)
        if needs and plan.statistics is None and plan.source is None:
            statistics = calibrated(self.exact, self.split, self.place)
            return settled(self.exact, replace(plan, statistics=statistics))
        return plan


def foretold(
    exact: Program,
    split: Split,
    goal: Mapping[str, Any],
    found: Sequence[Sequence[Any]] | None,
    terms: Terms,
    work: str | os.PathLike[str] | None = None,
) -> Estimate | No:
    """Estimate what it takes to find a plan and to carry it out, as far as `foreseen` tells."""
    likely = Plan(tuple(o.choice for o in found[0])) if found and len(found) == 1 else None
    looks = looks_of(exact, goal, split, terms, work) if found is None else None
    return estimate(exact, split, goal, likely, searched=True, looks=looks)


def _measured(
    rewritten: Program, exact: Program, split: Split, *, sampled: bool
) -> tuple[Program, dict[str, Any]]:
    """Measure a result; its history says what linear branches do."""
    measured = measure(rewritten, exact, split.held_out)
    if sampled:
        measured["samples"] = samples(rewritten, exact, split.held_out)
    if isinstance(split.held_out, Tensor) and rewritten.states and has_branches(rewritten):
        linear = branches(rewritten, split.held_out)
        measured["linear"] = linear.content()
        rewritten = replace(rewritten, history=(*rewritten.history, *linear.told))
    return rewritten, measured


def target(out: str | os.PathLike[str], result: Result) -> Path:
    """Return where a result goes: what is rejected never takes the place of what was accepted."""
    place = Path(out).absolute()
    return place if result.accepted else place.with_name(f"{place.name}.rejected")


def measure(rewritten: Program, reference: Program, rows: Any) -> dict[str, Any]:
    """Measure what the running models keep per token, and whether the stock class agrees.

    That takes both whole models in memory, in float32. Where they are too large for it, the cache
    is read off the State table, and `stock` says that the stock class was not asked.
    """
    found: dict[str, Any] = {"tier": needed_tier(rewritten)}
    call = _few(next(batches_of(rewritten, rows)))
    size = sum(math.prod(described(rewritten.weights, n).shape) for n in rewritten.weights)
    fits = 4 * size <= _LARGEST
    if rewritten.states:
        both = (reference, rewritten)
        found["kv_bytes_per_token"] = [
            _cache_bytes(p, call["input_ids"]) if fits and not p.parts else _cache_told(p)
            for p in both
        ]
        rings = [_ring_bytes(p) for p in both]
        if any(rings):
            found["ring_bytes"] = rings
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
    with torch.no_grad():
        want, got = _result(in_float32(rewritten)(**call)), _result(stock(**call))
    scale = float(want.double().square().mean().sqrt())
    found["stock_error"] = float((got - want).abs().max()) / scale
    debug.advance("measure", 2, 2)
    if not found["stock_error"] <= _AGREES:
        raise RuntimeError(
            f"the stock class computes something else than the program: results differ by "
            f"{found['stock_error']:.2g} of their size"
        )
    return found


def _few(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a few rows of a call, and of rows of tokens the first ones."""
    return {
        name: (v[:4, :64] if v.dim() == 2 and not v.is_floating_point() else v[:4])
        for name, v in call.items()
    }


def _result(output: Any) -> Tensor:
    """Return the first tensor of a model's result."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
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
    return _bytes_told(s for s in program.states if s.grows is not None)


def _ring_bytes(program: Program) -> int:
    """Return what the windows of a program keep, in bytes per row, however long the text is."""
    return _bytes_told(s for s in program.states if s.ring)


def _bytes_told(states: Iterable[State]) -> int:
    sizes = ((s.dtype.itemsize, [n for n in s.shape if isinstance(n, int)]) for s in states)
    return sum(item * math.prod(shape) for item, shape in sizes)
