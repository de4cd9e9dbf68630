"""Flip bits, cut files off, exchange them: what is harmed is refused, and never another model.

A tenth as often the artifact is loaded with strict=False, which checks no hash: there an edit is
allowed, but what fails has to fail clearly.
"""

import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from subjects import TIERS, Subjects, main

import attnopt
from attnopt.artifacts.manifest import IntegrityError

FULL: Final = 1000


def flip(place: Path, draw: random.Random) -> str:
    """Flip one bit."""
    content = bytearray(place.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    place.write_bytes(content)
    return f"bit {bit} of byte {at}"


def cut(place: Path, draw: random.Random) -> str:
    """Cut a file off, a third of the time at its last byte or its first."""
    content = place.read_bytes()
    kept = draw.choice([len(content) - 1, 0, *(draw.randrange(len(content)) for _ in range(4))])
    place.write_bytes(content[:kept])
    return f"cut off after {kept} bytes"


def lengthen(place: Path, draw: random.Random) -> str:
    """Append a byte, as often as not one that JSON and YAML pass over."""
    with place.open("ab") as file:
        file.write(draw.choice([b"\n", b" ", b"\0", b"x"]))
    return "a byte too many"


def blank(place: Path, draw: random.Random) -> str:
    """Fill a block with zeros, as a disk does that loses one."""
    content = bytearray(place.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    place.write_bytes(content)
    return f"zeros from byte {start}"


def exchange(place: Path, draw: random.Random) -> str:
    """Exchange a file with another of its folder."""
    other = draw.choice([p for p in sorted(place.parent.iterdir()) if p.is_file() and p != place])
    first, second = place.read_bytes(), other.read_bytes()
    place.write_bytes(second)
    other.write_bytes(first)
    return f"exchanged with {other.name}"


def remove(place: Path, draw: random.Random) -> str:
    """Remove a file."""
    place.unlink()
    return "removed"


HARMS: Final[tuple[tuple[Callable[[Path, random.Random], str], int], ...]] = (
    (flip, 60),
    (cut, 20),
    (lengthen, 5),
    (blank, 5),
    (exchange, 5),
    (remove, 5),
)


def ended(out: Path, *, strict: bool) -> str:
    """Load; return the class of the error, or that there was none."""
    try:
        attnopt.load(out, strict=strict)
    except IntegrityError as error:
        return "refused" if str(error) else "an error without words"
    except Exception as error:  # any other class is what the battery looks for
        return type(error).__name__
    return "loaded"


def battery(subjects: Subjects, points: int, seed: int) -> dict[str, Any]:
    """Do so much harm, to any file of any tier; every harm that changes a byte must be seen."""
    draw = random.Random(seed)
    saved = {t: subjects.artifact(t, subjects.folder / f"whole{t}") for t in TIERS}
    harms, weights = zip(*HARMS, strict=True)
    done: Counter[str] = Counter()
    loose: Counter[str] = Counter()
    failures: list[str] = []
    out = subjects.folder / "harmed"
    for number in range(points):
        tier = TIERS[number % len(TIERS)]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(saved[tier], out)
        files = sorted(p for p in out.rglob("*") if p.is_file() and p.stat().st_size)
        place = draw.choice(files)
        before = place.read_bytes()
        harm = draw.choices(harms, weights)[0]
        said = harm(place, draw)
        if place.exists() and place.read_bytes() == before:
            done["nothing changed"] += 1
            continue
        end = ended(out, strict=True)
        done[f"{harm.__name__}: {end}"] += 1
        done["in the manifest"] += place.name == "manifest.json"
        if end != "refused":
            failures.append(f"tier {tier}, {place.relative_to(out)}, {said}: {end}")
        if number % 10 == 0:
            loose[ended(out, strict=False)] += 1
    whole = [t for t in TIERS if ended(saved[t], strict=True) != "loaded"]
    failures += [f"tier {t} is refused as it was saved" for t in whole]
    return {
        "points": points,
        "detected": sum(n for k, n in done.items() if k.endswith(": refused")),
        "ends": dict(sorted(done.items())),
        "not strict": dict(sorted(loose.items())),
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main(battery, FULL))
