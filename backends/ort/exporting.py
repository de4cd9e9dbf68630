"""Export a program as an ONNX file, and have ONNX Runtime prove it."""

import importlib.util
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import attnopt
from attnopt import debug
from attnopt.artifacts.manifest import FOLDER, write_manifest
from attnopt.artifacts.saving import refuse_foreign
from attnopt.artifacts.staging import staged
from attnopt.backends.ort.files import save_together
from attnopt.backends.ort.genai import refuse_early, write_genai
from attnopt.backends.ort.norms import fuse_norms
from attnopt.backends.ort.operators import Choice, Provider, Target
from attnopt.backends.ort.packing import pack_products
from attnopt.backends.ort.parity import CASES, LONG, RIGHT_PADDED, Parity, compare, room
from attnopt.backends.ort.parts import attend_in_parts
from attnopt.backends.ort.rotary import give_every_row_its_table
from attnopt.backends.ort.rows import attend_in_rows
from attnopt.backends.ort.shortening import shorten
from attnopt.backends.ort.signature import (
    PlainSignature,
    Signature,
    StepSignature,
    signature_of,
)
from attnopt.backends.ort.standalone import standalone
from attnopt.backends.ort.translations import table
from attnopt.frontend import capture
from attnopt.nouns import No
from attnopt.ops import attention
from attnopt.program import Program
from attnopt.rewriting import apply
from attnopt.verifying import in_float32

FILE = "model.onnx"
DATA = "model.onnx.data"
STEPS = 64
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    """What was written where, from what, and how it compares with the program."""

    paths: tuple[Path, ...]
    name: str
    target: Target
    choices: tuple[Choice, ...]
    dtype: torch.dtype
    parity: Parity

    @property
    def path(self) -> Path:
        """The file that goes on from states, or the only one."""
        return self.paths[-1]

    @property
    def opset(self) -> int:
        """The opset of ONNX."""
        return self.target.opset

    @property
    def attentions(self) -> int:
        """How many attentions the files compute."""
        return len(self.choices)

    @property
    def operators(self) -> dict[str, int]:
        """How many attentions each operator serves."""
        return dict(Counter(c.operator for c in self.choices))

    @property
    def accepted(self) -> bool:
        """Whether ONNX Runtime computes what the program does."""
        return self.parity.accepted

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "accepted": self.accepted,
            "files": [path.name for path in self.paths],
            "model": self.name,
            "ep": self.target.ep,
            "opset": self.opset,
            "attentions": self.attentions,
            "operators": self.operators,
            "not_fused": sorted({c.why for c in self.choices if c.why}),
            "source_dtype": str(self.dtype).removeprefix("torch."),
            "dtype": "float32",
            "parity": self.parity.content(),
        }


def export_onnx(
    program: Program | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ep: Provider = "cpu",
    opset: int = Target.opset,
    steps: int = STEPS,
    genai: bool = False,
) -> Export:
    """Write `out`/model.onnx with its weights beside it, in float32, and compare it when it runs.

    That of a causal language model takes and gives the cache: `past_key_values.N.key` in,
    `present.N.key` out; with `genai`, what ONNX Runtime GenAI generates with lies beside it. An
    encoder-decoder becomes encode.onnx, which also runs the first decoder tokens, and decode.onnx,
    on the same weights. What computes something else is kept in `out`.rejected, each model as
    NAME.onnx.rejected.
    """
    check_installed()
    target = Target(ep, opset, genai=genai)
    folder = Path(out).absolute()
    refuse_foreign(folder)
    program = program if isinstance(program, Program) else capture(program)
    refuse_foreign(folder, program)
    if not _is_rewritten(program):
        program = apply(program, "exact")
    program = program.growing  # what serves ONNX files grows their caches
    with staged(folder) as staging:
        made = _written(program, staging, target, steps)
        if made.accepted:
            return _placed(made, folder)
        aside = folder.with_name(f"{folder.name}.rejected")
        refuse_foreign(aside)
        with staged(aside) as kept:
            kept.rmdir()
            staging.rename(kept)
        return _placed(made, aside)


def _is_rewritten(program: Program) -> bool:
    graphs = [part.graph for part in (program, *program.parts.values())]
    return any(g.find_nodes(op="call_function", target=attention) for g in graphs)


def _placed(made: Export, folder: Path) -> Export:
    return replace(made, paths=tuple(folder / path.name for path in made.paths))


def check_installed() -> None:
    """Raise ModuleNotFoundError where a package of the extra `onnx` is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX export needs {', '.join(missing)}: pip install attnopt[onnx]"
        )


def signatures_of(program: Program) -> dict[str, tuple[Program, Signature]] | No:
    """Return the graphs that become files, by the names of the files."""
    if program.parts and set(program.parts) != {"encode", "decode"}:
        return No("it was captured module by module; there is no graph of the whole model")
    parts = {f"{n}.onnx": program.parts[n] for n in ("encode", "decode") if n in program.parts}
    found: dict[str, tuple[Program, Signature]] = {}
    for name, part in (parts or {FILE: program}).items():
        signature = signature_of(part)
        if isinstance(signature, No):
            return signature
        found[name] = (part, signature)
    return found


def _written(program: Program, folder: Path, target: Target, steps: int) -> Export:
    """Write the files and what was measured; files that disagree get other names."""
    if target.genai:
        refuse_early(program)
    found = signatures_of(program)
    if isinstance(found, No):
        raise NotImplementedError(f"cannot export {program.name} to ONNX yet: {found}")
    model = in_float32(program)
    choices = write_files(found, model, folder, target)
    signatures = {folder / name: as_written(s, folder / name) for name, (_, s) in found.items()}
    cases = RIGHT_PADDED if target.genai else CASES
    parity = compare(model, program, signatures, steps, cases, target.ep)
    paths = tuple(signatures)
    if target.genai and parity.accepted:
        write_genai(program, paths[-1])
    if not parity.accepted:
        paths = tuple(path.rename(path.with_name(f"{path.name}.rejected")) for path in paths)
    made = Export(paths, program.name, target, choices, _dtype(program), parity)
    (folder / FOLDER).mkdir()
    text = json.dumps({"schema": "attnopt.export/1", **made.content()}, indent=2)
    (folder / FOLDER / "export.json").write_text(text + "\n", encoding="utf-8")
    write_manifest(folder)
    return made


def _dtype(program: Program) -> torch.dtype:
    part = next(iter(program.parts.values()), program)
    names = [b.name for b in part.bindings.values() if b.kind == "parameter"]
    found = (part.weights[name].dtype for name in names)
    return next((d for d in found if d.is_floating_point), torch.float32)


def write_files(
    graphs: Mapping[str, tuple[Program, Signature]],
    weights: nn.Module,
    folder: Path,
    target: Target,
) -> tuple[Choice, ...]:
    """Translate graphs, write them with their weights in one file beside them, and check them."""
    import onnx

    models: dict[Path, Any] = {}
    choices: list[Choice] = []
    for name, (program, signature) in graphs.items():
        module, chosen = standalone(program, signature, weights, target)
        choices += chosen
        models[folder / name] = _model(module, signature, target, program)
    save_together(models, folder / DATA)
    for path in models:
        onnx.checker.check_model(path, full_check=True)
    return tuple(choices)


def as_written(signature: Signature, path: Path) -> Signature:
    """Return the signature with the sizes that its file has as numbers."""
    import onnx

    if not isinstance(signature, PlainSignature):
        return signature
    inputs = onnx.load(path, load_external_data=False).graph.input
    axes = {i.name: i.type.tensor_type.shape.dim for i in inputs}
    written = {name: [d.dim_value for d in found] for name, found in axes.items()}
    return signature.narrowed(written)


def _model(module: fx.GraphModule, signature: Signature, target: Target, program: Program) -> Any:
    """Return the ONNX model of a graph."""
    with _quiet():
        made = _translated_somehow(module, signature, target.opset, program.name)
    _optimize(made.model, target, room(program.config))
    _describe(made.model, signature)
    assert made.model.opset_imports[""] == target.opset
    return made.model


def _optimize(model: Any, target: Target, most: int) -> None:
    """Write less, and what ONNX Runtime runs best, in place; it takes at most so many tokens."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    give_every_row_its_table(model)
    shorten(model)
    pack_products(model)
    fuse_norms(model)
    if target.ep == "cpu":
        attend_in_rows(model)
        if most >= LONG:
            attend_in_parts(model)
    RemoveUnusedNodesPass()(model)


# A size depends on another one, or the exporter fails to say how it does.
_TIED = ("Constraints violated", "Expected derived min value", "Dim with inconsistent min")


def _translated_somehow(module: fx.GraphModule, signature: Signature, opset: int, name: str) -> Any:
    """Translate a graph; where sizes hang together, let the exporter find out how."""
    try:
        return _translated(module, signature, opset, signature.dynamic())
    except torch.onnx.errors.OnnxExporterError as error:
        told = _whole_cause(error)
        if not any(words in told for words in _TIED):
            raise _refused(name, error) from error
    try:
        return _translated(module, signature, opset, signature.dynamic(loosely=True))
    except torch.onnx.errors.OnnxExporterError as error:
        raise _refused(name, error) from error


def _refused(name: str, error: BaseException) -> NotImplementedError:
    return NotImplementedError(f"cannot export {name} to ONNX: {_cause(error)}")


def _translated(
    module: fx.GraphModule, signature: Signature, opset: int, dynamic: dict[str, dict[int, Any]]
) -> Any:
    return torch.onnx.export(
        module,
        (),
        kwargs=signature.example(),
        dynamic_shapes=dynamic,
        input_names=signature.input_names,
        output_names=signature.output_names,
        opset_version=opset,
        custom_translation_table=table(),
        dynamo=True,
        verbose=False,
    )


def _whole_cause(error: BaseException) -> str:
    found = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
        found += str(error)
    return found


def _cause(error: BaseException) -> str:
    """Return the first line of what went wrong at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0]


def _describe(model: Any, signature: Signature) -> None:
    """Say who made the file; leave out where on this machine each node came from."""
    model.producer_name, model.producer_version = "attnopt", attnopt.__version__
    for node in model.graph:
        node.metadata_props.clear()
    if not isinstance(signature, StepSignature):
        return
    for value, name in zip(model.graph.inputs, signature.inputs, strict=False):
        for axis, size in enumerate(signature.shapes[name]):
            value.shape[axis] = size


@contextmanager
def _quiet() -> Generator[None]:
    """Keep what the exporter says of itself from the user, except when debugging."""
    if debug.level() >= 1:
        yield
        return
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
