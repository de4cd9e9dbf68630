"""Settings of every test: no network, and as many threads as the worker was given."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels run in Triton's interpreter where there is no GPU; Triton asks when it is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(scope="module")
def captured_once() -> Iterator[dict[Any, Any]]:
    """Let the commands that a module runs capture each directory once; programs never change.

    What is held is handed out: who clears it makes the next command capture anew.
    """
    import attnopt

    held: dict[Any, Any] = {}
    own = attnopt.capture

    def capture(model: Any, *args: Any, **settings: Any) -> Any:
        if args or not Path(model).is_dir():
            return own(model, *args, **settings)
        files = ((p, p.stat()) for p in sorted(Path(model).rglob("*")))
        content = tuple((str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p, s in files)
        key = (content, *sorted(settings.items()))
        if key not in held:
            held[key] = own(model, **settings)
        return held[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnopt, "capture", capture)
        yield held
