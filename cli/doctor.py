"""Say what works on this machine, and what to install for the rest.

Exit status 6 means that attnopt itself cannot work here.
"""

import argparse
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import attnopt
from attnopt.cli._errors import Exit
from attnopt.cli._output import Output

SCHEMA = "attnopt.doctor/1"

# (distribution, oldest version that works, first version that is not yet known to work)
_NEEDED = (("torch", "2.11", "2.14"), ("transformers", "5.14", "6"))


@dataclass(frozen=True)
class Finding:
    """One thing that works, works badly, is off, or is missing."""

    state: Literal["ok", "warn", "off", "fail"]
    what: str
    detail: str
    remedy: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments of its own."""


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Look around and report."""
    with output.progress() as stages, stages.stage("look"):
        found = [*_needed(), *_device(), *_triton(), *_onnx()]
    broken = any(item.state == "fail" for item in found)
    if output.json:
        output.document(
            SCHEMA,
            {
                "attnopt": attnopt.__version__,
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "findings": [asdict(item) for item in found],
            },
        )
    else:
        output.line(
            f"attnopt {attnopt.__version__} on Python {platform.python_version()}, "
            f"{platform.system()} {platform.machine()}"
        )
        rows = [[item.state, item.what, item.detail, item.remedy] for item in found]
        output.table(["", "what", "found", "remedy"], rows, foldable={"found", "remedy"})
    return Exit.RESOURCES if broken else Exit.ACCEPTED


def _needed() -> Iterator[Finding]:
    for name, oldest, next_unknown in _NEEDED:
        found = _version(name)
        if found is None or _order(found) < _order(oldest):
            have = found or "not installed"
            yield Finding("fail", name, have, f'pip install "{name}>={oldest}"')
        elif _order(found) >= _order(next_unknown):
            yield Finding(
                "warn", name, f"{found}, newer than the tested {oldest} to {next_unknown}"
            )
        else:
            yield Finding("ok", name, found)


def _device() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        yield Finding("ok", "CUDA", torch.cuda.get_device_name())
    else:
        yield Finding("off", "CUDA", "no GPU found", "the CPU does everything, more slowly")


def _triton() -> Iterator[Finding]:
    found = _version("triton")
    if found is not None:
        # Triton before 3.7.1 miscompiles dot(trans(acc), ...) on Hopper without an error.
        old = _order(found) < _order("3.7.1")
        yield Finding("warn" if old else "ok", "Triton", found, _install("triton") if old else "")
    elif (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        yield Finding("off", "Triton", "not installed", _install("triton"))
    else:
        yield Finding("off", "Triton", "exists for Linux on x86-64 only")


def _onnx() -> Iterator[Finding]:
    runtimes = [n for n in ("onnxruntime", "onnxruntime-gpu") if _version(n) is not None]
    missing = [name for name in ("onnx", "onnxscript") if _version(name) is None]
    if len(runtimes) == 2:
        remedy = "pip uninstall onnxruntime onnxruntime-gpu, then " + _install("onnx")
        yield Finding(
            "warn", "ONNX Runtime", "both packages installed: they break each other", remedy
        )
    elif missing or not runtimes:
        absent = ", ".join([*missing, *([] if runtimes else ["onnxruntime"])])
        yield Finding("off", "ONNX", f"not installed: {absent}", _install("onnx"))
    else:
        yield Finding("ok", "ONNX Runtime", f"{runtimes[0]} {_version(runtimes[0])}")


def _install(extra: str) -> str:
    return f"pip install attnopt[{extra}]"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _order(text: str) -> tuple[int, ...]:
    """Return the numbers that begin a version, up to the first that is none."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
