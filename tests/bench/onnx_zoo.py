"""Time the ONNX file of every zoo model: ours beside Transformers' own export and torch.onnx's.

    python tests/bench/onnx_zoo.py                     # the models that have no row yet
    python tests/bench/onnx_zoo.py --only llama bert   # anew
    python tests/bench/onnx_zoo.py --files             # only make the files, in build/onnx_zoo

Who exports, and how, is as in onnx_speed.py. Decoders are timed in a prefill and in the step after
it, other models in one call, padding included, with one thread, each in a process of its own.
Everyone is compared with the stock model first: a rival that is wrong, cannot export, or cannot run
its own file is told and outruns nobody. The models are tiny, so that this weighs what is done
beside the arithmetic; onnx_speed.py times larger ones. Where the arrays of a process lie decides
by some percent, and the names of a file's values decide that: each process renames them. Where a
ratio is that close to one, more processes are asked, with the files opened in another order, and
all rounds count. Files stay on the shelf, and rows are written as they come. Exit status 1 where
our result differs, or where the interval of the speedup over a rival ends below 1, unless ONNX
Runtime makes the same graph of both files: then both run the same code.
"""

import argparse
import hashlib
import inspect
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from harness import RESULTS, Timing, as_row, compare, machine
from processes import answer, apart, speedup, while_close

ROOT: Final = Path(__file__).resolve().parents[2]
SHARED: Final = ROOT.parent / "shared" / "zoo"
PLACE: Final = RESULTS / "onnx_zoo.json"
SHELF: Final = ROOT / "build" / "onnx_zoo"
LIMIT: Final = 900
TOLERANCE: Final = 1e-3
"""Of the largest value: what float32 may differ by; parity proper is the business of deploy.py."""
CACHELESS: Final = ("openai_gpt",)
"""Decoders that have no cache to go on from."""
TURNS: Final = 6
WINDOW: Final = "_sliding_window_tensor"
"""A size that Transformers' files of windowed models take among their states."""

Row = dict[str, Any]
Feeds = dict[str, np.ndarray[Any, Any]]


def generates(name: str) -> bool:
    """Tell whether a model is timed in a prefill and a step."""
    import zoo

    return name in zoo.LM and zoo.ZOO[name].family != "encdec" and name not in CACHELESS


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """Build a model as it is deployed, and a call of it with padding."""
    import zoo

    task, pad = ("lm", "left") if generates(name) else ("base", "right")
    model, call, _ = zoo.build(name, None, task=task, pad=pad)
    return model.eval(), call


# ------------------------------------------------------------------------------------ the files


def make(name: str, who: str, folder: Path) -> None:
    """Export a model by one of the exporters."""
    if who == "attnopt":
        import attnopt

        model, call = built(name)
        program = attnopt.apply(attnopt.capture(model, (), call), "exact")
        made = attnopt.export_onnx(program, folder, steps=4)
        assert made.accepted, made.parity
        return
    import onnx_speed

    model, call = built(name)
    onnx_speed.rival(who, model, call, folder, generative=generates(name))


def files(name: str, shelf: Path) -> Row:
    """Make the files of a model that are missing; return why some cannot be made."""
    reasons: Row = {}
    for who in ("attnopt", *rivals()):
        folder = shelf / name / who
        note = folder / "reason.txt"
        if not folder.exists():
            told = apart(__file__, "--make", name, who, "--shelf", str(shelf), limit=LIMIT)
            if isinstance(told, str):
                folder.mkdir(parents=True, exist_ok=True)
                note.write_text(told)
        if note.exists():
            reasons[who] = note.read_text()
    return reasons


def rivals() -> tuple[str, ...]:
    import onnx_speed

    return onnx_speed.RIVALS


# ------------------------------------------------------------------------------------ the calls


def rename(graph: Any, names: dict[str, str]) -> None:
    """Give the values of a graph other names, within its branches and loops, too."""
    for value in (*graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
        for part in node.attribute:
            if part.HasField("g"):
                rename(part.g, names)


def opened(path: Path, turn: int) -> onnxruntime.InferenceSession:
    """Open a file whose values have names of this turn; those of inputs and outputs stay."""
    import onnx

    model = onnx.load(path)
    kept = {x.name for x in (*model.graph.input, *model.graph.output)}
    prefix = hashlib.sha256(f"{turn}".encode()).hexdigest()[:8]
    own = [
        *(x.name for x in model.graph.initializer),
        *(x for n in model.graph.node for x in n.output),
    ]
    rename(model.graph, {x: f"{prefix}{x}" for x in own if x and x not in kept})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    content = model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


class File:
    """The sessions of one exporter, by stage, and what they are fed."""

    def __init__(self, folder: Path, who: str, name: str, turn: int) -> None:
        found = sorted(folder.rglob("*.onnx"))
        if who == "attnopt":
            # Of an encoder-decoder's two files, one makes a whole call.
            file = next((p for p in found if p.stem == "encode"), found[0])
            stages = ("prefill", "decode") if generates(name) else ("whole",)
            self.sessions = dict.fromkeys(stages, opened(file, turn))
        elif generates(name):
            self.sessions = {p.stem: opened(p, turn) for p in found}
        else:
            (only,) = found
            self.sessions = {"whole": opened(only, turn)}

    def run(self, stage: str, given: Feeds) -> dict[str, Any]:
        """Run a stage and name its results."""
        session = self.sessions[stage]
        results: Any = session.run(None, given)
        return dict(zip((o.name for o in session.get_outputs()), results, strict=True))

    def feeds(self, stage: str, call: Feeds, states: Feeds, window: int) -> Feeds:
        """Return what a stage reads: of a call, or of the states after it."""
        rows = len(next(iter(call.values())))
        given: Feeds = {}
        sizes = {i.name: i.shape for i in self.sessions[stage].get_inputs()}
        for wanted in self.sessions[stage].get_inputs():
            name = wanted.name
            if name == "attention_mask" and sizes[name][1] == sizes["input_ids"][1]:
                # The mask of what is new: the states of a recurrence need no other.
                given[name] = call[name][:, -call["input_ids"].shape[1] :]
            elif name in call:
                given[name] = call[name]
            elif name.endswith(WINDOW):
                given[name] = np.asarray(window)
            elif plain(name) in states:
                given[name] = states[plain(name)]
            elif stage == "prefill" and "past" in name:
                empty = [s if isinstance(s, int) else 0 for s in wanted.shape]
                given[name] = np.zeros([rows, *empty[1:]], np.float32)
            else:
                raise ValueError(f"{stage} takes {name}, which nothing gives")
        return given


def plain(name: str) -> str:
    """Return the name that a state has as an input and as an output."""
    for prefix in ("input.", "output.", "past_key_values.", "present."):
        name = name.removeprefix(prefix)
    return name


def calls(file: File, name: str, call: dict[str, Any], window: int) -> Iterator[tuple[str, Feeds]]:
    """List the stages of a file and what each is fed."""
    made: Feeds = {n: x.numpy() for n, x in call.items()}
    if not generates(name):
        yield "whole", file.feeds("whole", made, {}, window)
        return
    mask = made.get("attention_mask", np.ones_like(made["input_ids"]))
    made |= {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    given = file.feeds("prefill", made, {}, window)
    yield "prefill", given
    states = {plain(n): x for n, x in file.run("prefill", given).items()}
    step = {
        "input_ids": made["input_ids"][:, -1:],
        "attention_mask": np.concatenate([mask, np.ones_like(mask[:, :1])], 1),
        "position_ids": made["position_ids"][:, -1:] + 1,
    }
    yield "decode", file.feeds("decode", step, states, window)


def wanted(model: Any, call: dict[str, Any], name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return what the stock model computes in each stage, at the positions that count."""
    import torch
    import zoo_parity

    def result(**given: Any) -> Any:
        if generates(name) and "position_ids" in inspect.signature(model.forward).parameters:
            # As generate() numbers them, and whoever feeds a file: padding does not count.
            mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        torch.manual_seed(0)
        return next(iter(zoo_parity.compared(model(**given)).values()))

    with torch.no_grad():
        if not generates(name):
            return {"whole": result(**call).numpy()}
        longer = dict(call, input_ids=torch.cat([call["input_ids"], call["input_ids"][:, -1:]], 1))
        if "attention_mask" in call:
            mask = call["attention_mask"]
            longer["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return {"prefill": result(**call).numpy(), "decode": result(**longer)[:, -1:].numpy()}


def difference(got: dict[str, Any], want: Any, call: dict[str, Any]) -> float:
    """Return how far a result is from the stock model's, as a share of the largest value."""
    found = [x for x in got.values() if x.shape == want.shape]
    if not found:
        return float("inf")
    mask = call.get("attention_mask")
    where: Any = ...
    if mask is not None and want.ndim > 2 and tuple(mask.shape) == want.shape[:2]:
        where = mask.bool().numpy()
    return min(float(np.abs(x - want)[where].max() / np.abs(want)[where].max()) for x in found)


# -------------------------------------------------------------------------------------- the rows


def measure(name: str, shelf: Path, most: int, turn: int) -> list[Row]:
    """Compare and time the files of one model, stage by stage; return the seconds of all rounds."""
    model, call = built(name)
    want = wanted(model, call, name)
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    reasons = files(name, shelf)
    if "attnopt" in reasons:
        return [{"model": name, "reason": reasons["attnopt"]}]
    runs: dict[str, dict[str, Callable[[], Any]]] = {stage: {} for stage in want}
    wrong: dict[str, dict[str, float]] = {stage: {} for stage in want}
    everyone = ("attnopt", *rivals())
    for who in (*everyone[turn % 3 :], *everyone[: turn % 3]):
        if who in reasons:
            continue
        # A rival's file may not open, or not run: that is told, and ours must do both.
        try:
            file = File(shelf / name / who, who, name, turn)
            for stage, given in calls(file, name, call, window):
                wrong[stage][who] = difference(file.run(stage, given), want[stage], call)
                runs[stage][who] = lambda f=file, s=stage, g=given: f.run(s, g)
        except Exception as error:
            if who == "attnopt":
                raise
            reasons[who] = f"{type(error).__name__}: {error}"[:300]
    rows = [{"model": name, "stage": s, "differs": wrong[s], "reasons": reasons} for s in want]
    return [row | timed(runs[row["stage"]], row["differs"], most) for row in rows]


def timed(runs: dict[str, Callable[[], Any]], wrong: dict[str, float], most: int) -> Row:
    """Time who is right beside us."""
    right = {who: run for who, run in runs.items() if wrong[who] <= TOLERANCE}
    if "attnopt" not in right:
        return {"reason": f"ours differs by {wrong['attnopt']:.1e}"}
    if len(right) == 1:
        return {"seconds": {}}
    return {"seconds": dict(compare(right, base="attnopt", most=most).seconds)}


def row_of(parts: list[Row]) -> Row:
    """Return the row of one stage from what each process found."""
    seconds = [part.pop("seconds", None) for part in parts]
    first = parts[0]
    for part in parts:
        if "reason" in part:
            return {**first, "passed": False, "reason": part["reason"]}
    shared = set.intersection(*(set(x) for x in seconds))
    pooled = {who: tuple(t for x in seconds for t in x[who]) for who in seconds[0] if who in shared}
    if not pooled:
        return {**first, "speedup": {}, "passed": True}
    timing = Timing(pooled)
    gains = {who: speedup(who, "attnopt", seconds) for who in pooled if who != "attnopt"}
    return {
        **first,
        "milliseconds": {who: round(1e3 * timing.median(who), 4) for who in pooled},
        "speedup": {who: as_row(gain) for who, gain in gains.items()},
        "rounds": len(pooled["attnopt"]),
        "processes": len(parts),
        "passed": all(gain.high >= 1 for gain in gains.values()),
    }


def graph_of(file: Path) -> list[Any]:
    """Return what ONNX Runtime makes of a file: its nodes, with values by number or content."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        # What is optimized refers to the weights beside it.
        shutil.copytree(file.parent, folder, dirs_exist_ok=True)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    names: dict[str, Any] = {x.name: f"input {n}" for n, x in enumerate(graph.input)}
    for x in graph.initializer:
        content = onnx.numpy_helper.to_array(x)
        digest = hashlib.sha256(content.tobytes()).hexdigest()
        names[x.name] = f"{digest} {content.dtype} {content.shape}"
    found: list[Any] = []
    for number, node in enumerate(graph.node):
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        inputs = [names.get(x, x) for x in node.input]
        found.append((node.domain, node.op_type, attributes, inputs))
        names |= {x: f"{number} {n}" for n, x in enumerate(node.output)}
    return [*found, [names[x.name] for x in graph.output]]


def same_graphs(rows: list[Row], shelf: Path) -> None:
    """Note, in rows that lose, the rivals whose graph is ours; only of models of one file."""
    for row in rows:
        if row["passed"] or row.get("stage") != "whole" or "speedup" not in row:
            continue
        lost = [who for who, gain in row["speedup"].items() if gain["high"] < 1]
        made = {w: next((shelf / row["model"] / w).rglob("*.onnx")) for w in ("attnopt", *lost)}
        ours = graph_of(made["attnopt"])
        row["same_graph"] = [who for who in lost if graph_of(made[who]) == ours]
        row["passed"] = row["same_graph"] == lost


def rows_of(name: str, shelf: Path, most: int) -> list[Row]:
    """Measure a model in a process of its own, and in more where it is close."""

    def measured(turn: int) -> list[Row]:
        words = ("--one", name, "--shelf", str(shelf), "--most", str(most), "--turn", str(turn))
        found = apart(__file__, *words, limit=LIMIT)
        return [{"model": name, "reason": found}] if isinstance(found, str) else found

    def joined(found: list[list[Row]]) -> list[Row]:
        return [row_of([dict(p) for p in parts]) for parts in zip(*found, strict=False)]

    rows = while_close(TURNS, measured, joined)
    same_graphs(rows, shelf)
    return rows


def known() -> dict[str, list[Row]]:
    """Return the rows that there are, by model."""
    found: dict[str, list[Row]] = {}
    for row in json.loads(PLACE.read_text())["rows"] if PLACE.exists() else []:
        found.setdefault(row["model"], []).append(row)
    return found


def put(name: str, rows: list[Row], order: list[str]) -> None:
    """Put the rows of a model among the others, in the order of the zoo."""
    every = {**known(), name: rows}
    content = {"machine": machine(), "rows": [r for n in order for r in every.get(n, [])]}
    PLACE.write_text(json.dumps(content, indent=1) + "\n")


def told(row: Row) -> str:
    """Say how a row came out."""
    head = f"{row['model']:28} {row.get('stage', ''):8}"
    if "speedup" not in row:
        return f"{head} FAILED {row['reason']}"
    parts = []
    for who in rivals():
        if who in row["speedup"]:
            x = row["speedup"][who]
            same = " (the same graph)" if who in row.get("same_graph", ()) else ""
            parts.append(f"{who} {x['ratio']:.3f} [{x['low']:.3f}, {x['high']:.3f}]{same}")
        elif who in row["reasons"]:
            parts.append(f"{who} has no file that runs")
        else:
            parts.append(f"{who} is wrong by {row['differs'][who]:.0e}")
    return f"{head} {'; '.join(parts)}{'' if row['passed'] else '  FAILED'}"


def main(arguments: list[str]) -> int:
    """Make files, measure, print a line a stage, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shelf", type=Path, default=SHELF, help="where the files are kept")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, anew")
    parser.add_argument("--failed", action="store_true", help="anew the models that failed")
    parser.add_argument("--files", action="store_true", help="only make the files")
    parser.add_argument("--most", type=int, default=40, help="rounds at most")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not SHARED.is_dir():
        print("skipped: ../shared absent")
        return 0
    sys.path[1:1] = [str(SHARED), str(ROOT / "tests")]
    if given.one or given.make:
        import torch
        import transformers

        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(1)
    if given.make:
        name, who = given.make
        whole = given.shelf / name / who
        partial = whole.with_name(f"{who}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(name, who, partial)
        partial.rename(whole)
        return 0
    if given.one:
        answer(measure(given.one, given.shelf, given.most, given.turn))
        return 0
    import zoo

    order, rows = list(zoo.ZOO), known()
    failed = [n for n in order if not all(r["passed"] for r in rows.get(n, []))]
    todo = given.only or (failed if given.failed else [n for n in order if n not in rows])
    if given.files:
        for name in todo:
            print(name, files(name, given.shelf), flush=True)
        return 0
    for name in todo:
        files(name, given.shelf)
        found = rows_of(name, given.shelf, given.most)
        for row in found:
            print(told(row), flush=True)
        put(name, found, order)
    every = [row for found in known().values() for row in found]
    print(f"{sum(r['passed'] for r in every)} of {len(every)} passed")
    return int(not all(r["passed"] for r in every))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
