"""Run ONNX files on prepared calls, in a process of its own: a crash there ends nothing else.

    python session.py CALLS.npz RESULTS.npz MODEL [ENCODE]

CALLS has for each case `tokens.N`, `mask.N` (rows, length) and `sizes.N`, how many tokens each call
takes; RESULTS gets `logits.N` of all calls together. ENCODE makes the first call of a case, with
its `encoder.N.NAME`. Or, for models without states, `input.N.NAME` and `output.N.NAME`. CALLS may
name a `provider`. It imports neither torch nor attnopt.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(calls: str, results: str, model: str, *encode: str) -> None:
    """Run every case and write what came out."""
    with np.load(calls, allow_pickle=False) as given:
        provider = str(given["provider"]) if "provider" in given.files else _CPU
        sessions = [_opened(place, provider) for place in (model, *encode)]
        count = sum(name.startswith("tokens.") for name in given.files)
        found = {f"logits.{n}": _case(sessions, given, n) for n in range(count)}
        found |= _plain_cases(sessions[0], given)
    with Path(results).open("wb") as file:
        np.savez(file, **found)


_CPU = "CPUExecutionProvider"


def _opened(model: str, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = list(dict.fromkeys([provider, _CPU]))
    session = onnxruntime.InferenceSession(model, options, providers=providers)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} does not run here")
    return session


def _case(sessions: Any, given: Any, number: int) -> Any:
    """Make call after call, its present states as the next past ones."""
    tokens, mask, sizes = (given[f"{name}.{number}"] for name in ("tokens", "mask", "sizes"))
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    paired = len(sessions) > 1
    start_of = f"encoder.{number}."
    kept = {n.removeprefix(start_of): given[n] for n in given.files if n.startswith(start_of)}
    if not paired:
        kept = _empty(sessions[0], len(tokens))
    logits: list[Any] = []
    start = 0
    for call_number, size in enumerate(sizes.tolist()):
        stop = start + size
        session = sessions[1 if paired and call_number == 0 else 0]
        shapes = {i.name: i.shape for i in session.get_inputs()}
        side = "decoder_" if paired else ""
        only_new = shapes.get("attention_mask", [])[1:] == ["sequence"]
        kept[f"{side}input_ids"] = tokens[:, start:stop]
        kept[f"{side}attention_mask"] = mask[:, start if only_new else 0 : stop]
        kept["position_ids"] = positions[:, start:stop]
        outputs = [o.name for o in session.get_outputs()]
        results = dict(zip(outputs, session.run(None, {n: kept[n] for n in shapes}), strict=True))
        logits.append(results.get("logits", results[outputs[0]]))
        for name, value in results.items():
            kept[_TAKEN_AS.get(name, name.replace("present", "past_key_values"))] = value
        start = stop
    return np.concatenate(logits, axis=1)


_TAKEN_AS = {"encoder_last_hidden_state": "encoder_hidden_states"}


def _empty(session: Any, rows: int) -> dict[str, Any]:
    """Return the states before the first token: of the sizes that vary, the first is the rows."""
    states = [i for i in session.get_inputs() if i.name.startswith("past_")]
    return {i.name: np.zeros([rows, *map(_start_size, i.shape[1:])], np.float32) for i in states}


def _start_size(size: Any) -> int:
    return size if isinstance(size, int) else 0


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
