"""The model card of an artifact: what changed, what it costs, how to load it and make it."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnopt.artifacts.saving import Result


_LOADS = (
    "It is a plain Transformers checkpoint: attnopt is not needed to run it.",
    "`import attnopt` lets Transformers build layers that differ; without it, loading fails.",
    "It holds a program of attnopt's: `import attnopt` registers its model type with Transformers; "
    "without it, loading fails.",
)


def card(result: "Result", environment: Mapping[str, Any], tier: int = 0) -> str:
    """Return the text of README.md."""
    return "\n".join(_lines(result, environment, tier)) + "\n"


def _lines(result: "Result", environment: Mapping[str, Any], tier: int) -> Iterator[str]:
    base = environment["base"] or result.program.name
    yield from ("---", "library_name: transformers", f"base_model: {base}")
    yield from ("base_model_relation: quantized", "tags:", "- attnopt", "- attention", "---", "")
    verdict = "" if result.accepted else ", REJECTED by its quality gate"
    yield from (f"# {base}, attention rewritten by attnopt{verdict}", "")
    yield from _quality(result)
    yield from ("## What changed", "", "| attention | pass | settings |", "|---|---|---|")
    for choice in result.plan.choices:
        settings = ", ".join(f"{k}={v}" for k, v in choice.config.items())
        yield f"| {choice.site} | {choice.rewrite} | {settings} |"
    yield from ("", "## How to load it", "", "```python")
    if tier == 1:
        yield "import attnopt  # its layers differ in their heads"
    if tier == 2:
        yield from ("import attnopt", "", 'model = attnopt.load("path/of/this/directory")', "```")
    else:
        name = result.program.name
        yield from (f"from transformers import {name}", "")
        yield from (f'model = {name}.from_pretrained("path/of/this/directory")', "```")
    yield from ("", _LOADS[tier], "")
    yield from (
        "## How it was made",
        "",
        "```",
        environment["command"] or "attnopt.save",
        "```",
        "",
    )
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items())
    yield f"Python {environment['python']}, {packages}; {environment['platform']}."
    yield from ("", *_made_again(result))
    if result.report is not None:
        yield "`attnopt/report.html` shows what was found, changed and measured."
    yield "`attnopt/manifest.json` has the sha256 of every file."


def _made_again(result: "Result") -> Iterator[str]:
    """Say whether the weights follow from the plan, or were trained on after it."""
    healing = (result.measured or {}).get("healing")
    if healing is None:
        yield "`attnopt/plan.yaml` with the statistics beside it gives the same weights again; no"
        yield "further training healed them."
        return
    lost, left = (healing[when]["delta_nll"]["mean"] for when in ("before", "after"))
    yield "`attnopt/plan.yaml` gives the rewrite; the weights were then healed by distillation from"
    yield f"the source: {healing['steps']:,} steps on {healing['tokens']:,} tokens, which brought"
    yield f"the loss above the source's from {lost:+.4f} to {left:+.4f} nats a token."


def _quality(result: "Result") -> Iterator[str]:
    report = result.report
    if report is None:
        yield from ("The quality was not measured.", "")
        return
    scores, (low, high) = report.scores, report.drop.ci95
    yield from ("## Quality", "", "| | source | this | change |", "|---|---|---|---|")
    for row in scores.rows():
        yield f"| {' | '.join(row)} |"
    for task, found in report.benchmarks.items():
        for metric, (before, after) in found.items():
            yield f"| {task}, {metric} | {before:.4f} | {after:.4f} | {after - before:+.4f} |"
    measured = result.measured or {}
    if "kv_bytes_per_token" in measured:
        before, after = measured["kv_bytes_per_token"]
        change = f"{after / before - 1:+.1%}" if before else ""
        yield f"| cache, bytes a token | {before:,} | {after:,} | {change} |"
    if "ring_bytes" in measured:
        before, after = measured["ring_bytes"]
        yield f"| windows, bytes a row | {before:,} | {after:,} | |"
    limit = "none" if report.max_drop is None else f"at most {report.max_drop:.2%}"
    yield from ("", f"{scores.what}: {report.drop.mean:+.2%} (95 % {low:+.2%} to {high:+.2%}, "
                f"paired, {scores.seen}); gate: {limit}.", "")  # fmt: skip
    for note in report.notes:
        yield from (f"{note[:1].upper()}{note[1:]}.", "")
