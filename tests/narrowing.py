"""What a narrowed program must equal: the source, with nothing read of what is gone."""

from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor

import attnopt
from attnopt.calibrating import Statistics
from attnopt.nouns import Choice, Mlp, No, Projection, Site
from attnopt.passes import amp
from attnopt.program import Program
from attnopt.rewriting import reweighted, statistics_of

UNITS = ("groups", "queries", "neurons")


@dataclass(frozen=True)
class Case:
    """A program in its exact form, a call of it, and what calibration saw of that call."""

    program: Program
    call: dict[str, Any]
    stats: Statistics

    @classmethod
    def of(cls, model: torch.nn.Module, call: dict[str, Any]) -> "Case":
        program = attnopt.apply(attnopt.capture(model, (), call), "exact")
        return cls(program, call, attnopt.calibrate(program, [call]))

    @classmethod
    def of_zoo(cls, name: str) -> "Case":
        task = "lm" if name in zoo.LM else "base"
        model, call, _ = zoo.build(name, task=task, pad="left")
        return cls.of(model, call)

    def plan(self, choices: tuple[Choice, ...]) -> attnopt.Plan:
        return attnopt.Plan(choices, statistics=self.stats)


def strength(thing: Site | Mlp, unit: str) -> int:
    """Return about half of the units that something has."""
    if isinstance(thing, Mlp):
        return thing.neurons // 4 if unit == "neurons" else 0
    return {"groups": thing.kv_heads, "queries": thing.heads // thing.kv_heads}.get(unit, 0) // 2


def choices_of(
    program: Program, unit: str, **settings: object
) -> tuple[tuple[Choice, ...], tuple[No, ...]]:
    """Choose half of the units wherever they fit; return the refusals, too."""
    found: list[Choice] = []
    refused: list[No] = []
    for thing in (*program.main.mlps, *program.main.sites):
        count = strength(thing, unit)
        if not count:
            continue
        config = {unit: count, **settings}
        answer = amp.fits(thing, amp.Config(**config))
        if isinstance(answer, No):
            refused.append(answer)
        else:
            found.append(Choice(thing.name, "amp", config))
    return tuple(found), tuple(refused)


def padded(case: Case, plan: attnopt.Plan, narrowed: Program) -> Program:
    """Return the source with the columns of a narrowed program, and zeros for what is gone."""
    stats = statistics_of(plan, case.program.main)
    known = {t.name: t for t in (*case.program.main.mlps, *case.program.main.sites)}
    weights: dict[str, Tensor] = {}
    for choice in plan.choices:
        thing = known[choice.site]
        chosen = amp.choose(thing, stats, amp.Config(**choice.config))
        reader = thing.down if isinstance(thing, Mlp) else thing.projections["o"]
        new = narrowed.main.weights[reader.parameter]
        weights[reader.parameter] = spread(stats.weights[reader.parameter], new, reader, chosen)
    return reweighted(case.program, weights)


def spread(old: Tensor, new: Tensor, reader: Projection, chosen: Any) -> Tensor:
    """Put the columns that stayed where they were, and zeros between them."""
    rows = torch.tensor(reader.rows)
    kept = torch.ones(old.shape[reader.axis], dtype=torch.bool)
    kept[rows[~chosen.stays].flatten()] = False
    whole = torch.zeros_like(old).movedim(reader.axis, 0)
    whole[kept] = new.movedim(reader.axis, 0)
    return whole.movedim(0, reader.axis).contiguous()


def first(output: Any) -> Tensor:
    return zoo.first_tensor(output).double()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def stepped(program: Program, call: dict[str, Any], last: int) -> Tensor:
    """Return the results at the last tokens, which come one by one after the others."""
    name = "decoder_input_ids" if program.parts else "input_ids"
    tokens, mask = call[name], call.get("attention_mask")
    ends = range(tokens.shape[1] - last, tokens.shape[1])
    given = {**call, name: tokens[:, : ends[0]]}
    if mask is not None and not program.parts:
        given["attention_mask"] = mask[:, : ends[0]]
    output = program(**given)
    if program.parts:
        given["encoder_outputs"] = (output.encoder_last_hidden_state,)
        given = {n: x for n, x in given.items() if n not in ("input_ids", "input_features")}
    found: list[Tensor] = []
    for i in ends:
        given |= {name: tokens[:, i : i + 1], "past_key_values": output.past_key_values}
        if mask is not None and not program.parts:
            given["attention_mask"] = mask[:, : i + 1]
        output = program(**given)
        found.append(first(output))
    return torch.cat(found, 1)


def steps(program: Program) -> bool:
    """Tell whether a program takes tokens one by one."""
    return bool(program.states)


def error_of(case: Case, choices: tuple[Choice, ...]) -> float:
    """Return how far a narrowed program is from the padded source, with the cache and without."""
    plan = case.plan(choices)
    narrowed = attnopt.apply(case.program, plan)
    whole = padded(case, plan, narrowed)
    source, got, want = (first(p(**case.call)) for p in (case.program, narrowed, whole))
    assert distance(want, source) > 1e-6, "what went did nothing"
    errors = [distance(got, want)]
    if steps(narrowed):
        errors.append(distance(*(stepped(p, case.call, 3) for p in (narrowed, whole))))
    return max(errors)
