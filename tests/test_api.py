"""The public names, and what importing them costs."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import attnopt

NOUNS = "Choice Mask No Plan Program Report Site"
STAGES = (
    "apply calibrate capture compile_report export_onnx heal load lower optimize plan save verify"
)
PUBLIC = {*NOUNS.split(), *STAGES.split()}


def in_a_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_the_public_names_are_these():
    assert set(attnopt.__all__) == PUBLIC
    assert set(dir(attnopt)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_there(name: str):
    assert getattr(attnopt, name).__module__.startswith("attnopt.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        attnopt.optimise  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import attnopt",
        "import attnopt.nouns, attnopt.debug, attnopt.passes, attnopt.cli",
        "import attnopt.cli; attnopt.cli.main(['--help'])",
        "import attnopt.cli; attnopt.cli.main(['inspect', '--help'])",
        "import attnopt.cli; attnopt.cli.main(['passes', '--quiet'])",
        "import attnopt.cli; attnopt.cli.main(['inspect', 'no/such/model'])",
    ],
)
def test_cheap_things_import_neither_torch_nor_transformers(code: str):
    found = in_a_new_process(
        f"{code}\nimport sys; print('heavy:', {{'torch', 'transformers'}} & set(sys.modules))"
    )
    assert found.endswith("heavy: set()\n")


def test_help_is_quick(record_property: Callable[[str, object], None]):
    """The time is recorded, not judged: the test above holds what it depends on."""
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "attnopt", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    record_property("seconds", min(times))
    print(f"attnopt --help: best of three {min(times):.3f} s")
