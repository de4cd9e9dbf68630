"""The kernels compiled for chips that are not here: shared memory, spills, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may have, in bytes: an A100 has 163 KB, but its kin whose shapes are the same 99."""
KERNELS = {
    "forward_kernel", "delta_kernel", "queries_kernel", "keys_kernel", "decode_kernel",
    "join_kernel", "routed_kernel",
}  # fmt: skip


def compiled(*words):
    """Return what the assembler says, asked for in a process without the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_compiling", *map(str, words)],
        cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows):
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED_MEMORY[row["capability"]], row
        assert row["uses_tensor_cores"] or row["kernel"] in ("delta_kernel", "join_kernel"), row


def test_the_kernels_of_a_window_fit_a_chip():
    rows = compiled("--capability", 90, "--width", 64, "--case", "window")
    assert {row["kernel"] for row in rows} == KERNELS
    check(rows)


def test_the_kernels_of_linear_attention_fit_a_chip():
    rows = compiled("--capability", 90, "--width", 64, "--case", "linear")
    assert {row["kernel"] for row in rows} == {"linear_states_kernel", "linear_output_kernel"}
    check(rows)


CASES = ["dense", "causal", "window", "capped", "masked", "grid", "agents", "linear"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_every_chip(case, capability):
    check(compiled("--capability", capability, "--case", case))
