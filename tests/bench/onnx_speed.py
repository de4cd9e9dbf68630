"""Time ONNX files in ONNX Runtime: ours, Transformers' own export, torch.onnx with fusions.

    python tests/bench/onnx_speed.py
    python tests/bench/onnx_speed.py --shapes llama bert --lengths 128 --most 15

"transformers" is `transformers.exporters.OnnxExporter(ort_fusions="cpu")`, "torch" the export
without fusions and then onnxscript's `optimize_for_ort`. Language models are timed in a prefill and
in a step after as many tokens. Weights are random, sessions have the same options. Exit status 1
where results differ, or where the interval of the speedup over the faster rival ends below 1.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import exact
import numpy as np
import onnxruntime
import torch
import transformers
from harness import Timing, as_row, compare, machine, write

import attnopt

TOLERANCE: Final = 1e-3
GENERATIVE: Final = ("llama", "gpt2")
NAMES: Final = ("llama", "gpt2", "bert", "bert padded", "vit")
RIVALS: Final = ("transformers", "torch")

Feeds = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Model:
    """A model as a session, by the stage it serves: "prefill" and "decode", or "whole"."""

    sessions: Mapping[str, onnxruntime.InferenceSession]

    def run(self, stage: str, feeds: Feeds) -> list[Any]:
        """Run a stage; what the session does not take is left out."""
        session = self.sessions[stage]
        names = {i.name for i in session.get_inputs()}
        found: list[Any] = session.run(None, {n: x for n, x in feeds.items() if n in names})
        return found


def opened(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Open a file with the options that all have."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ours(model: torch.nn.Module, call: exact.Call, folder: Path, name: str) -> Model:
    """Export by attnopt."""
    program = attnopt.apply(attnopt.capture(model, (), dict(call)), "exact")
    made = attnopt.export_onnx(program, folder / "attnopt", steps=4)
    assert made.accepted, made.parity
    session = opened(made.path)
    stages = ("prefill", "decode") if name in GENERATIVE else ("whole",)
    return Model(dict.fromkeys(stages, session))


def rivals(model: torch.nn.Module, call: exact.Call, folder: Path, name: str) -> dict[str, Model]:
    """Export by the others."""
    found: dict[str, Model] = {}
    generative = name in GENERATIVE
    for who in RIVALS:
        rival(who, model, call, folder / who, generative=generative)
        found[who] = Model(dict(_stages(folder / who, generative)))
    return found


def rival(
    who: str, model: torch.nn.Module, call: exact.Call, folder: Path, *, generative: bool
) -> None:
    """Export by one of the others: a file, or one for each stage of generation."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    config = OnnxConfig(dynamic=True, ort_fusions="cpu" if who == "transformers" else None)
    exporter: Any = OnnxExporter()
    export = exporter.export_for_generation if generative else exporter.export
    made = export(model, dict(call), config)
    if who == "torch":
        _fuse(made)
    made.save_pretrained(folder)


def _fuse(made: Any) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    for component in made.components.values():
        optimize_for_ort(component.program)


def _stages(folder: Path, generative: bool) -> Iterator[tuple[str, onnxruntime.InferenceSession]]:
    for path in sorted(folder.rglob("*.onnx")):
        yield (path.stem if generative else "whole"), opened(path)


def feeds(model: Model, stage: str, call: exact.Call, length: int) -> Feeds:
    """Return what a stage reads: a call of a length, or one token after so many."""
    made: Feeds = {n: x.numpy() for n, x in call.items()}
    if "input_ids" in made:
        rows = made["input_ids"].shape[0]
        mask = made.get("attention_mask", np.ones((rows, length), np.int64))
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        made |= {"attention_mask": mask, "position_ids": positions}
    chance = np.random.default_rng(0)
    for given in model.sessions[stage].get_inputs():
        if "past" in given.name:
            past = length if stage == "decode" else 0
            shape = (rows, int(given.shape[1]), past, int(given.shape[3]))
            made[given.name] = chance.standard_normal(shape, dtype=np.float32)
    if stage == "decode":
        made["input_ids"] = made["input_ids"][:, :1]
        made["attention_mask"] = np.ones((rows, length + 1), np.int64)
        made["position_ids"] = np.full((rows, 1), length)
    return made


def measure(name: str, length: int, most: int) -> Iterator[dict[str, Any]]:
    """Compare one model at one length, stage by stage."""
    shape = next(s for s in exact.SHAPES if s.name == name)
    # A rival cannot read a mask that it was not exported with.
    call = shape.call(length) if name == "vit" else exact.padded_text(16)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = shape.make("sdpa", length)
        models = {"attnopt": ours(stock, call, Path(folder), name)}
        models |= rivals(shape.make("sdpa", length), call, Path(folder), name)
        for stage in models["attnopt"].sessions:
            yield _timed(name, stage, length, models, shape.call(length), most)


def _timed(
    name: str, stage: str, length: int, models: Mapping[str, Model], call: exact.Call, most: int
) -> dict[str, Any]:
    given = {n: feeds(m, stage, call, length) for n, m in models.items()}
    results = {n: m.run(stage, given[n])[0] for n, m in models.items()}
    wrong = max(_difference(results["attnopt"], results[n], call) for n in RIVALS)
    calls: dict[str, Callable[[], Any]] = {
        n: lambda m=m, n=n: m.run(stage, given[n]) for n, m in models.items()
    }
    timing = compare(calls, base="attnopt", most=most)
    return _row(name, stage, length, timing, wrong)


def _difference(ours: Any, theirs: Any, call: exact.Call) -> float:
    """Return how far two results are apart, as a share of the largest; padding is left out."""
    mask = call.get("attention_mask")
    if theirs.shape != ours.shape:
        ours = ours[:, -theirs.shape[1] :]
        mask = None
    if mask is not None and mask.shape[1] == ours.shape[1]:
        ours, theirs = ours[mask.bool().numpy()], theirs[mask.bool().numpy()]
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def _row(name: str, stage: str, length: int, timing: Timing, wrong: float) -> dict[str, Any]:
    gains = {rival: timing.speedup("attnopt", rival) for rival in RIVALS}
    best = min(gains.values(), key=lambda gain: gain.ratio)
    passed = wrong <= TOLERANCE and best.high >= 1
    shown = "".join(f"{gains[rival]!s:>28}" for rival in RIVALS)
    verdict = "" if passed else f"  FAILED (differs by {wrong:.1e})"
    milliseconds = 1e3 * timing.median("attnopt")
    print(f"{name:<14}{stage:<10}{length:>7}{milliseconds:>9.2f}{shown}{verdict}", flush=True)
    return {
        "model": name,
        "stage": stage,
        "tokens": length,
        "rounds": len(timing.seconds["attnopt"]),
        "milliseconds": {n: round(1e3 * timing.median(n), 4) for n in timing.seconds},
        "speedup": {n: as_row(gain) for n, gain in gains.items()},
        "difference": wrong,
        "passed": passed,
    }


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--lengths", nargs="+", type=int, choices=(128, 1024), default=(128, 1024))
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    given = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    print("\n".join(f"{k}: {v}" for k, v in machine().items()))
    heading = "".join(f"{'speedup over ' + rival:>28}" for rival in RIVALS)
    print(f"{'model':<14}{'stage':<10}{'tokens':>7}{'ms':>9}{heading}")
    rows = [
        row
        for name in given.shapes
        for length in given.lengths
        for row in measure(name, length, given.most)
    ]
    write("onnx_speed", rows)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
