"""Run an ONNX file on prepared calls, in a process of its own: a crash there ends nothing else.

    python session.py MODEL CALLS.npz RESULTS.npz

CALLS has for each case `tokens.N`, `mask.N` (rows, length) and `sizes.N`, how many tokens each call
takes; RESULTS gets `logits.N` of all calls together. Or, for models without states, `input.N.NAME`
and `output.N.NAME`. It imports neither torch nor attnopt.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(model: str, calls: str, results: str) -> None:
    """Run every case and write what came out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(calls, allow_pickle=False) as given:
        count = sum(name.startswith("tokens.") for name in given.files)
        found = {f"logits.{n}": _case(session, given, n) for n in range(count)}
        found |= _plain_cases(session, given)
    with Path(results).open("wb") as file:
        np.savez(file, **found)


def _case(session: Any, given: Any, number: int) -> Any:
    """Call the session on part after part, its present states as the next past ones."""
    tokens, mask, sizes = (given[f"{name}.{number}"] for name in ("tokens", "mask", "sizes"))
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    names = [i.name for i in session.get_inputs()]
    shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_")}
    states = {n: np.zeros((len(tokens), s[1], 0, s[3]), np.float32) for n, s in shapes.items()}
    outputs = [o.name for o in session.get_outputs()]
    logits, start = [], 0
    for size in sizes.tolist():
        stop = start + size
        call = {
            "input_ids": tokens[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            **states,
        }
        results = dict(zip(outputs, session.run(None, {n: call[n] for n in names}), strict=True))
        logits.append(results["logits"])
        states = {n: results[n.replace("past_key_values", "present")] for n in states}
        start = stop
    return np.concatenate(logits, axis=1)


def _plain_cases(session: Any, given: Any) -> dict[str, Any]:
    calls: dict[str, dict[str, Any]] = {}
    for key in given.files:
        if key.startswith("input."):
            _, number, name = key.split(".", 2)
            calls.setdefault(number, {})[name] = given[key]
    taken = {i.name for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    found: dict[str, Any] = {}
    for number, call in calls.items():
        results = session.run(None, {n: x for n, x in call.items() if n in taken})
        found |= {f"output.{number}.{n}": x for n, x in zip(outputs, results, strict=True)}
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
