"""Export a program as an ONNX file, and have ONNX Runtime prove it."""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

import attnopt
from attnopt import debug
from attnopt.artifacts.manifest import FOLDER, write_manifest
from attnopt.artifacts.saving import refuse_foreign
from attnopt.artifacts.staging import staged
from attnopt.backends.ort.genai import refuse_early, write_genai
from attnopt.backends.ort.parity import Parity, compare
from attnopt.backends.ort.signature import Signature, signature_of
from attnopt.backends.ort.standalone import standalone
from attnopt.backends.ort.translations import table
from attnopt.frontend import capture
from attnopt.nouns import No
from attnopt.ops import attention
from attnopt.program import Program
from attnopt.rewriting import apply
from attnopt.verifying import in_float32

FILE = "model.onnx"
OPSET = 21
STEPS = 64
_OPSETS = range(18, 24)
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    """What was written where, from what, and how it compares with the program."""

    path: Path
    name: str
    opset: int
    attentions: int
    dtype: torch.dtype
    parity: Parity

    @property
    def accepted(self) -> bool:
        """Whether ONNX Runtime computes what the program does."""
        return self.parity.accepted

    def content(self) -> dict[str, Any]:
        """Return this as JSON values."""
        return {
            "accepted": self.accepted,
            "file": self.path.name,
            "model": self.name,
            "opset": self.opset,
            "attentions": self.attentions,
            "source_dtype": str(self.dtype).removeprefix("torch."),
            "dtype": "float32",
            "parity": self.parity.content(),
        }


def export_onnx(
    program: Program | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    steps: int = STEPS,
    genai: bool = False,
) -> Export:
    """Write `out`/model.onnx with its weights beside it, in float32, and compare it when it runs.

    That of a causal language model takes and gives the cache: `past_key_values.N.key` in,
    `present.N.key` out; with `genai`, what ONNX Runtime GenAI generates with lies beside it. One
    that computes something else is kept as `out`.rejected/model.onnx.rejected.
    """
    check_installed()
    if opset not in _OPSETS:
        raise ValueError(f"opset {opset}; there is {_OPSETS[0]} to {_OPSETS[-1]}")
    target = Path(out).absolute()
    refuse_foreign(target)
    program = program if isinstance(program, Program) else capture(program)
    if not program.parts and not program.graph.find_nodes(op="call_function", target=attention):
        program = apply(program, "exact")
    with staged(target) as staging:
        made = _written(program, staging, opset, steps, genai)
        if made.accepted:
            return _placed(made, target)
        aside = target.with_name(f"{target.name}.rejected")
        refuse_foreign(aside)
        with staged(aside) as kept:
            kept.rmdir()
            staging.rename(kept)
        return _placed(made, aside)


def _placed(made: Export, folder: Path) -> Export:
    return replace(made, path=folder / made.path.name)


def check_installed() -> None:
    """Raise ModuleNotFoundError where a package of the extra `onnx` is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX export needs {', '.join(missing)}: pip install attnopt[onnx]"
        )


def _written(program: Program, folder: Path, opset: int, steps: int, genai: bool) -> Export:
    """Write the file and what was measured; a file that disagrees gets another name."""
    if genai:
        refuse_early(program)
    signature = signature_of(program)
    if isinstance(signature, No):
        raise NotImplementedError(f"cannot export {program.name} to ONNX yet: {signature}")
    model = in_float32(program)
    path = folder / FILE
    write_file(standalone(program, signature, model), signature, path, opset, program.name)
    parity = compare(model, program, signature, path, steps)
    if genai and parity.accepted:
        write_genai(program, path)
    if not parity.accepted:
        path = path.rename(path.with_name(f"{FILE}.rejected"))
    count = len(program.graph.find_nodes(op="call_function", target=attention))
    made = Export(path, program.name, opset, count, _dtype(program), parity)
    (folder / FOLDER).mkdir()
    text = json.dumps({"schema": "attnopt.export/1", **made.content()}, indent=2)
    (folder / FOLDER / "export.json").write_text(text + "\n", encoding="utf-8")
    write_manifest(folder)
    return made


def _dtype(program: Program) -> torch.dtype:
    names = [b.name for b in program.bindings.values() if b.kind == "parameter"]
    found = (program.weights[name].dtype for name in names)
    return next((d for d in found if d.is_floating_point), torch.float32)


def write_file(
    module: fx.GraphModule, signature: Signature, path: Path, opset: int, name: str
) -> None:
    """Translate a module, write it with its weights in a file beside it, and check the result."""
    import onnx

    with _quiet():
        try:
            made = _translated(module, signature, opset, signature.dynamic())
        except torch.onnx.errors.OnnxExporterError as error:
            if "Constraints violated" not in _whole_cause(error):
                raise NotImplementedError(
                    f"cannot export {name} to ONNX: {_cause(error)}"
                ) from error
            made = _translated(module, signature, opset, signature.dynamic(loosely=True))
    _describe(made.model, signature)
    made.save(path, external_data=True)
    onnx.checker.check_model(path, full_check=True)
    (written,) = (o.version for o in onnx.load(path, load_external_data=False).opset_import)
    assert written == opset


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
    for value, name in zip(model.graph.inputs, signature.input_names, strict=True):
        if name == "attention_mask":
            value.shape[1] = "total"


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
