"""The block in README.md is what the demo prints, but for numbers that differ by machine."""

import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from attnopt.cli import main

ROOT = Path(__file__).parents[1]


def block() -> str:
    found = re.search(
        r"<!-- demo -->\n```console\n(.*?)```\n<!-- /demo -->",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert found is not None
    return found[1]


def structure(text: str) -> list[str]:
    """Return the lines with a mark for each number, and without the width of columns."""
    without_numbers = re.sub(r"\d[\d,.]*", "#", text)
    return [" ".join(line.split()) for line in without_numbers.strip().splitlines()]


def outputs(text: str) -> dict[str, str]:
    """Return what each command of a transcript printed."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_commands_are_those_of_the_demo():
    script = (ROOT / "examples" / "demo.sh").read_text()
    assert list(outputs(block())) == re.findall(r"^show (.*)$", script, re.MULTILINE)


def test_inspecting_the_bundled_image_model_prints_what_the_readme_says(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(ROOT)
    command = "attnopt inspect examples/models/vit-digits"
    with redirect_stdout(StringIO()) as printed:
        assert main(command.split()[1:]) == 0
    assert structure(printed.getvalue()) == structure(outputs(block())[command])


@pytest.mark.slow
def test_the_whole_demo_prints_what_the_readme_says():
    """ATTNOPT_DEMO_OUTPUT names a file of what it printed; else it runs for some minutes."""
    if "ATTNOPT_DEMO_OUTPUT" in os.environ:
        shown = Path(os.environ["ATTNOPT_DEMO_OUTPUT"]).read_text()
        assert structure(shown) == structure(block())
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "demo.sh")],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert structure(done.stdout) == structure(block())
