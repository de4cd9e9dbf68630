"""Time a rewritten model beside another: prompt, further tokens, cache and memory.

attnopt bench examples/models/code-llama
attnopt bench out/code-llama-half examples/models/code-llama --tokens 1024

Without a second model, the first is compared with its own stock class and `sdpa`. Rounds are
interleaved; gains are medians within rounds with 95 % intervals.

Exit status: 0 measured, 2 usage, 3 nothing to compare with, 5 refused for safety, 6 a missing
package.
"""

import argparse
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output

if TYPE_CHECKING:
    from attnopt.benching import Bench, Row
    from attnopt.program import Program

_BACKENDS = ("eager", "inductor", "ort", "reference")
_TOKENS = 512


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the two models and what they run."""
    _source.configure(parser)
    parser.add_argument("other", metavar="OTHER", nargs="?", help="what to compare it with")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch (1)")
    parser.add_argument("--tokens", type=int, help="tokens of the prompt (512, or what fits)")
    parser.add_argument("--new", type=int, default=32, help="tokens after it (32)")
    parser.add_argument("--rounds", type=int, default=40, help="rounds at most (40)")
    parser.add_argument(
        "--backend", default="eager", help=f"what runs them: {', '.join(_BACKENDS)} (eager)"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Measure both, and print the table."""
    _check(arguments)
    source = _source.resolve(arguments)
    other = None
    if arguments.other is not None:
        other = _source.resolve(argparse.Namespace(**{**vars(arguments), "model": arguments.other}))
    with output.progress() as stages, stages.stage("bench"):
        found, tokens = _measured(arguments, source, other)
    names = {"a": arguments.model, "b": arguments.other or f"{arguments.model}, stock sdpa"}
    if output.json:
        load = {n: getattr(arguments, n) for n in ("rows", "new", "backend")} | {"tokens": tokens}
        content = {**names, "load": load, "threads": _threads(), **found.content()}
        output.document("attnopt.bench/1", content)
    else:
        _print(output, names, found)
    return Exit.ACCEPTED


def _check(arguments: argparse.Namespace) -> None:
    for name in ("rows", "tokens", "new", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise CommandError("AO111", f"--{name} must be at least 1")
    if arguments.rounds < 7:
        raise CommandError("AO111", "--rounds must be at least 7 for an interval")
    if arguments.backend not in _BACKENDS:
        hint = suggestion(arguments.backend, _BACKENDS) or f"; there is {', '.join(_BACKENDS)}"
        raise CommandError("AO111", f"--backend {arguments.backend}{hint}")


def _measured(
    arguments: argparse.Namespace, source: _source.Source, other: "_source.Source | None"
) -> "tuple[Bench, int | None]":
    """Run both; return what was measured, and the tokens of the prompt where there is one."""
    import attnopt
    from attnopt.benching import Load, bench, stock
    from attnopt.frontend.inputs import example_inputs

    if arguments.backend == "ort":
        _check_onnx()
    program = _source.capture(source)
    load = load_for(arguments, program, Load) if _is_language(program) else None
    with _source.quiet_libraries():
        try:
            a = attnopt.lower(attnopt.apply(program, "exact"), arguments.backend)
            b: Any = None
            if other is not None:
                second = _source.capture(other)
                b = attnopt.lower(attnopt.apply(second, "exact"), arguments.backend)
            else:
                b = stock(program)
        except ValueError as error:
            raise CommandError("AO203", str(error), Exit.NOTHING) from error
        given = example_inputs(b) if load is None else load
        try:
            measured = bench(a, b, given, rounds=arguments.rounds)
        except NotImplementedError as error:  # a graph that ONNX has no form of
            raise CommandError("AO203", str(error), Exit.NOTHING) from error
    return measured, None if load is None else load.tokens


def _check_onnx() -> None:
    from attnopt.backends.ort import check_installed

    try:
        check_installed()
    except ModuleNotFoundError as error:
        raise CommandError("AO603", str(error), Exit.RESOURCES) from error


def load_for(arguments: argparse.Namespace, program: "Program", load: Any) -> Any:
    """Return the load of a language model; its prompt fits the positions that the model has."""
    room = getattr(program.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = arguments.tokens
    if tokens is None:
        tokens = _TOKENS if room is None else max(min(_TOKENS, room - arguments.new), 1)
    if room and tokens + arguments.new > room:
        raise CommandError(
            "AO111",
            f"--tokens {tokens} and --new {arguments.new} are more than the {room} positions of "
            f"{program.name}",
        )
    return load(arguments.rows, tokens, arguments.new)


def _is_language(program: "Program") -> bool:
    return bool(program.states) and not program.parts


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _print(output: Output, names: dict[str, str], found: "Bench") -> None:
    output.line(f"A: {names['a']}")
    output.line(f"B: {names['b']}")
    apart = f"{found.difference:.1e}"
    output.line(f"results differ by {apart} of their size; {found.rounds} rounds")
    output.line()
    rows = [(f"{r.name}, {r.unit}", _said(r.a), _said(r.b), _gain(r)) for r in found.rows]
    output.table(("", "A", "B", "A is better by (95 %)"), rows, foldable={""})


def _said(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _gain(row: "Row") -> str:
    if row.gain is not None:
        return f"{row.gain.ratio:.2f}x [{row.gain.low:.2f}, {row.gain.high:.2f}]"
    if row.a and row.b:
        return f"{row.b / row.a:.2f}x"
    return "-"
