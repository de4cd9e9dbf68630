"""What a command prints where its reader, its terminal or its disk are not what it would like."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from attnopt.cli import Exit, main
from attnopt.cli._output import Output, say

WORDS = [sys.executable, "-m", "attnopt", "recipes"]


def test_a_reader_that_has_had_enough_changes_no_status():
    end, start = os.pipe()
    os.close(end)
    made = subprocess.run(WORDS, stdout=start, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(start)
    assert (made.returncode, made.stderr) == (Exit.ACCEPTED, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_what_cannot_be_printed_is_a_matter_of_resources():
    with Path("/dev/full").open("w") as full:
        made = subprocess.run(WORDS, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert made.returncode == Exit.RESOURCES
    assert made.stderr.startswith("AO602 cannot print: ")
    assert made.stderr.count("\n") == 1


def test_without_a_standard_error_stages_run_in_silence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Output().progress() as stages, stages.stage("work"):
        pass
    assert main(["nonsense"]) == Exit.USAGE


@pytest.mark.parametrize("width", [10, 45, 100])
def test_a_narrow_terminal_cuts_nothing_off(width: int, capsys: pytest.CaptureFixture[str]):
    output = Output()
    vars(output)["console"] = Console(width=width)
    headings, row = ("name", "count", "why"), ("model.layers.0.self_attn", "1,234", "words " * 9)
    output.table(headings, [row], foldable={"why"})
    shown = capsys.readouterr().out
    assert all(text in shown for text in (*headings, *row[:2]))
    assert shown.count("words") == 9


def test_what_an_encoding_lacks_is_written_out(monkeypatch: pytest.MonkeyPatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    say("caf\xe9")
    Output(json=True).document("a/1", {"text": "caf\xe9"})
    line, _, document = written.getvalue().decode("ascii").partition("\n")
    assert line == "caf\\xe9"
    assert json.loads(document) == {"schema": "a/1", "text": "caf\xe9"}
