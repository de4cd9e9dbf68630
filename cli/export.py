"""Write a model for another runtime, and prove there that it computes the same.

attnopt export examples/models/code-llama --to onnx -o onnx
attnopt export examples/models/code-llama --to ort-genai -o genai
attnopt export out --to stock -o plain
attnopt export out --to delta -o small --base examples/models/code-llama
attnopt export small --to full -o out-again --base examples/models/code-llama

Exit status: 0 accepted, 2 usage or nothing stock, 3 cannot be exported yet, 4 the runtime computes
something else (kept as OUT.rejected/model.onnx.rejected), 5 refused for safety, 6 resources or a
missing package.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.cli import _delta, _source
from attnopt.cli._errors import CommandError, Exit, told
from attnopt.cli._output import Output, shown

if TYPE_CHECKING:
    from attnopt.backends.ort import Export

_TARGETS = ("onnx", "ort-genai", "stock", "delta", "full")
_OF_A_DELTA = {"delta": _delta.write, "full": _delta.join}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the target, the place and how much is compared."""
    _source.configure(parser)
    parser.add_argument(
        "--to",
        metavar="TARGET",
        required=True,
        help="onnx; ort-genai: the same for ONNX Runtime GenAI; stock: what anything loads; "
        "delta: an artifact without what its base has; full: a delta and its base as an artifact",
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="where the files go")
    parser.add_argument(
        "--ep",
        default="cpu",
        help="provider of ONNX Runtime that the file is for, and is compared on where it runs: "
        "cpu or cuda (default cpu)",
    )
    parser.add_argument("--opset", type=int, default=23, help="opset of ONNX (default 23)")
    parser.add_argument(
        "--steps", type=int, default=64, help="tokens to decode and compare (default 64)"
    )
    parser.add_argument("--base", metavar="DIR", help="the checkpoint that a delta starts from")
    parser.add_argument(
        "--statistics", action="store_true", help="keep in a delta what replays its plan"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Export, compare, and say with the status whether the two agree."""
    if arguments.to not in _TARGETS:
        raise CommandError(
            "AO110", f"--to {arguments.to} is not served yet; there is {', '.join(_TARGETS)}"
        )
    if arguments.steps < 1:
        raise CommandError("AO111", "--steps needs at least 1 token to compare")
    if arguments.to not in _OF_A_DELTA and (arguments.base or arguments.statistics):
        raise CommandError(
            "AO111", f"--base and --statistics belong to a delta, not {arguments.to}"
        )
    source = _source.resolve(arguments)
    if arguments.to in _OF_A_DELTA:
        return _OF_A_DELTA[arguments.to](arguments, output)
    if arguments.to == "stock":
        return _stock(arguments, source, output)
    with output.progress() as stages, stages.stage("export"):
        made = _export(arguments, source)
    if output.json:
        output.document("attnopt.export/1", {**made.content(), "out": str(made.path.parent)})
    else:
        _summary(output, made)
        if made.accepted and arguments.to == "ort-genai":
            _for_genai(output, made.path.parent)
    return Exit.ACCEPTED if made.accepted else Exit.GATE


def _export(arguments: argparse.Namespace, source: _source.Source) -> "Export":
    from attnopt.artifacts.saving import refuse_foreign
    from attnopt.backends.ort import check_installed, export_onnx

    try:
        check_installed()
    except ModuleNotFoundError as error:
        raise CommandError("AO603", str(error), Exit.RESOURCES) from error
    with told(arguments.out, "AO114"):
        refuse_foreign(Path(arguments.out).absolute())
        program = _source.capture(source)
        with _source.quiet_libraries():
            return export_onnx(
                program,
                arguments.out,
                ep=arguments.ep,
                opset=arguments.opset,
                steps=arguments.steps,
                genai=arguments.to == "ort-genai",
            )


def _stock(arguments: argparse.Namespace, source: _source.Source, output: Output) -> int:
    from attnopt.artifacts.widening import export_stock

    with output.progress() as stages, stages.stage("export"), told(arguments.out, "AO114"):
        program = _source.capture(source)
        with _source.quiet_libraries():
            made = export_stock(program, arguments.out)
    before, after = made.kv_elements
    if output.json:
        content = {"out": str(made.path), "kv_heads": made.heads, "difference": made.difference}
        output.document(
            "attnopt.export/1", {**content, "kv_elements_per_token": list(made.kv_elements)}
        )
        return Exit.ACCEPTED
    output.line(f"{program.name}: {made.heads} key and value heads in every layer")
    output.line(f"cache, numbers a token: {before:,} -> {after:,}")
    output.line(f"results differ by {made.difference:.1e} of their size")
    output.line(f"saved as {shown(made.path)}: plain Transformers loads it, without attnopt")
    return Exit.ACCEPTED


def _summary(output: Output, made: "Export") -> None:
    dtype = made.content()["source_dtype"]
    cast = "" if dtype == "float32" else f", cast from {dtype}"
    used = ", ".join(f"{count} {name}" for name, count in made.operators.items())
    output.line(
        f"{made.name}: {made.attentions} attentions ({used or 'none'}), opset {made.opset}, "
        f"weights in float32{cast}"
    )
    for why in made.content()["not_fused"]:
        output.line(f"no operator fits: {why}")
    output.line()
    rows = [
        (
            c.case,
            f"{c.equal}/{c.tokens}" if c.tokens else "-",
            f"{c.largest_logit:.3g}",
            f"{c.max_delta_logit:.1e}",
        )
        for c in made.parity.cases
    ]
    if rows:
        headings = ("against the program", "tokens equal", "largest logit", "max |delta logit|")
        output.table(headings, rows, foldable={"against the program"})
        output.line()
    for case in made.parity.left_out:
        output.line(f"not compared: {case}")
    for line in _verdict(made):
        output.line(line)


def _for_genai(output: Output, folder: Path) -> None:
    from attnopt.backends.ort.genai import CONFIG

    model = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
    tokenizer = sorted(p.name for p in folder.glob("*token*"))
    with_it = ", ".join(tokenizer) or "no tokenizer (MODEL has none): it takes token ids only"
    output.line(
        f"{CONFIG}: a {model['type']!r} of up to {model['context_length']:,} tokens; {with_it}"
    )


def _verdict(made: "Export") -> list[str]:
    if made.accepted:
        return [f"saved as {shown(made.path)}: ONNX Runtime computes the same"]
    why = made.parity.failure or "ONNX Runtime computes something else"
    return [f"REJECTED: {why}", f"kept as {shown(made.path)}"]
