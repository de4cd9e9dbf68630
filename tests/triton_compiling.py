"""Compile kernels for GPUs that are not here, and read what the assembler says of them.

    TRITON_INTERPRET=0 python -m tests.triton_compiling

prints a line of JSON for every kernel and chip. It needs no GPU: Triton brings the assembler.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from attnopt.backends.triton_gpu.launching import Launch

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may have, in bytes, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a chip, a thread's registers and spilled bytes among it."""

    kernel: str
    capability: int
    shared: int
    registers: int
    spilled: int
    uses_tensor_cores: bool


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile the kernel of a launch as running it on that chip would."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel: Any = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, _ = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), arguments, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=target, options=options.__dict__)
    registers, spilled = _assembled(made.asm["ptx"], capability)
    products = re.search(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)", made.asm["ptx"])
    return Compiled(
        made.metadata.name,
        capability,
        made.metadata.shared,
        registers,
        spilled,
        products is not None,
    )


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers and spilled bytes, as the assembler says."""
    assembler = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kernel.ptx"
        place.write_text(ptx)
        command = [assembler.path, "-v", f"--gpu-name={target}", place, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", said)), spilled
