"""Let a language model write: a checkpoint or an artifact, rewritten exactly.

attnopt generate out/code-llama-half "import " --max-new-tokens 40

Exit status: 0 written, 2 usage, 3 the model does not generate, 5 refused for safety.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import _source
from attnopt.cli._errors import CommandError, Exit, suggestion
from attnopt.cli._output import Output, say

if TYPE_CHECKING:
    from attnopt.program import Program

_BACKENDS = ("eager", "inductor", "reference")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the prompts and how to go on from them."""
    _source.configure(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to go on from")
    parser.add_argument("--file", metavar="FILE", help="a file of prompts, one a line")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens at most (64)")
    parser.add_argument("--beams", type=int, default=1, help="beams to search (1: greedy)")
    parser.add_argument(
        "--sample", action="store_true", help="draw tokens instead of the likeliest"
    )
    parser.add_argument("--temperature", type=float, help="of the draw; needs --sample")
    parser.add_argument("--top-k", type=int, help="draw from so many; needs --sample")
    parser.add_argument("--top-p", type=float, help="draw from so much; needs --sample")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument(
        "--backend", default="eager", help=f"what runs it: {', '.join(_BACKENDS)} (eager)"
    )


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Generate for all prompts at once, padded on the left, and print each with what follows."""
    prompts = _prompts(arguments)
    settings = _settings(arguments)
    source = _source.resolve(arguments)
    with output.progress() as stages, stages.stage("load"):
        program = _source.capture(source)
        model, tokenizer = _model(program, arguments), _tokenizer(program)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    streamer = None
    if arguments.stream:
        streamer = _streamer(tokenizer)
    import torch

    torch.manual_seed(arguments.seed)
    with _source.quiet_libraries():
        rows: Any = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    # An encoder-decoder answers with a text of its own, after one token to start from.
    decodes = bool(getattr(program.config, "is_encoder_decoder", False))
    new = rows[:, 1 if decodes else encoded["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    if output.json:
        pairs = zip(prompts, texts, new, strict=True)
        written = [{"prompt": p, "text": t, "tokens": n} for p, t, n in pairs]
        output.document("attnopt.generate/1", {"model": arguments.model, "written": written})
    elif not arguments.stream:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if number:
                output.line()
            output.line(text if decodes else prompt + text)
    return Exit.ACCEPTED


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Prints as all else is printed: the model goes on where nobody reads any more."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Print what is sure not to change any more."""
            say(text, end="\n" if stream_end else "")

    return Streamer(tokenizer, skip_special_tokens=True)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompts)
    if arguments.file is not None:
        try:
            prompts += Path(arguments.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError("AO102", f"cannot read {arguments.file}: {error}") from error
    if not prompts and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().rstrip("\n")) else []
    if not prompts:
        raise CommandError(
            "AO111", "nothing to go on from: give a PROMPT, --file, or text on stdin"
        )
    if not all(prompts):
        raise CommandError("AO111", "a prompt is empty: every PROMPT needs at least one character")
    if arguments.stream and len(prompts) > 1:
        raise CommandError("AO111", "--stream prints one text as it grows: give one PROMPT")
    return prompts


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the settings of generation and return them by their names in Transformers."""
    if arguments.backend not in _BACKENDS:
        hint = suggestion(arguments.backend, _BACKENDS) or f"; there is {', '.join(_BACKENDS)}"
        raise CommandError("AO111", f"--backend {arguments.backend}{hint}")
    for name in ("max_new_tokens", "beams"):
        if getattr(arguments, name) < 1:
            raise CommandError("AO111", f"--{name.replace('_', '-')} must be at least 1")
    drawn = {n: getattr(arguments, n) for n in ("temperature", "top_k", "top_p")}
    drawn = {n: x for n, x in drawn.items() if x is not None}
    if drawn and not arguments.sample:
        name = next(iter(drawn)).replace("_", "-")
        raise CommandError("AO111", f"--{name} needs --sample")
    if any(x <= 0 for x in drawn.values()) or drawn.get("top_p", 1) > 1:
        raise CommandError("AO111", "--temperature and --top-k are above 0, --top-p is at most 1")
    if arguments.stream and arguments.beams > 1:
        raise CommandError("AO111", "--stream and --beams exclude each other")
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "num_beams": arguments.beams,
        "do_sample": arguments.sample,
        **drawn,
    }


def _model(program: "Program", arguments: argparse.Namespace) -> Any:
    import attnopt

    if program.source.generation_config is None or not program.states:
        raise CommandError(
            "AO204",
            f"{program.name} does not generate: it is no language model that does",
            Exit.NOTHING,
        )
    with _source.quiet_libraries():
        return attnopt.lower(attnopt.apply(program, "exact"), arguments.backend)


def _tokenizer(program: "Program") -> Any:
    from attnopt.optimizing import tokenizer_of

    try:
        tokenizer = tokenizer_of(program)
    except ValueError as error:
        raise CommandError("AO104", " ".join(str(error).split())) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer
