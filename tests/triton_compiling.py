"""Compile kernels for GPUs that are not here, and read what the assembler says of them.

    TRITON_INTERPRET=0 python -m tests.triton_compiling --capability 90 --width 64 --case causal

prints a line of JSON for every kernel. It needs no GPU: Triton brings the assembler.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from attnopt.backends.triton_gpu.backward import backward_launches, delta_launch
from attnopt.backends.triton_gpu.decoding import decode_launches
from attnopt.backends.triton_gpu.forward import forward_launch
from attnopt.backends.triton_gpu.launching import Launch
from attnopt.backends.triton_gpu.linear import far_launches
from attnopt.backends.triton_gpu.masking import Hidden, Rules
from attnopt.backends.triton_gpu.routed import routed_launch
from attnopt.ops.options import Options
from attnopt.ops.plans import plan_of_structure


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


CASES = ("dense", "causal", "window", "capped", "masked", "grid", "agents", "linear")
AGENTS = 64


def call_of(case: str, batch: int, heads: int, queries: int, keys: int) -> tuple[Any, Any, Any]:
    """Return the rules, the tensors that hide, and more options of a case."""
    shape = (batch, heads, queries, keys)
    dense = Options()
    match case:
        case "dense":
            return Rules(), Hidden.of(dense, shape), {}
        case "causal":
            return Rules.of(causal=True), Hidden.of(dense, shape), {}
        case "window":
            shown = Options(padding=torch.ones(batch, 1, 1, keys, dtype=torch.bool))
            return Rules.of(window=256, first=64), Hidden.of(shown, shape), {}
        case "capped":
            more = {"softcap": 50.0, "sinks": torch.zeros(heads)}
            return Rules.of(causal=True, chunk=512), Hidden.of(dense, shape), more
        case "masked":
            mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
            shown = Options(mask=mask, bias=torch.zeros(1, heads, queries, keys))
            return Rules.of(causal=True), Hidden.of(shown, shape), {}
        case _:
            start, stop = (torch.zeros(queries, 3, dtype=torch.int32) for _ in range(2))
            place = torch.zeros(keys, 3, dtype=torch.int32)
            seen = Hidden.of(dense, shape)._replace(start=start, stop=stop, place=place)
            return Rules(), seen, {}


def launches(width: int, case: str, chip: int, tokens: int = 1024) -> Iterator[Launch]:
    """Yield all kernels of a call in bfloat16."""
    if case == "agents":
        yield from agent_launches(width, chip, tokens)
        return
    if case == "linear":
        yield from linear_launches(width, tokens)
        return
    q = torch.empty(1, 8, tokens, width, dtype=torch.bfloat16)
    k = torch.empty(1, 2, tokens, width, dtype=torch.bfloat16)
    rules, hidden, more = call_of(case, 1, 8, tokens, tokens)
    plan = plan_of_structure(tokens, tokens, causal=True)
    scale = width**-0.5
    options = {"sinks": None, "softcap": None, "scale": scale, **more}
    launch, out, lse = forward_launch(q, k, k, plan, hidden, rules, chip=chip, **options)
    yield launch
    yield delta_launch(out, q)[0]
    options.pop("sinks")
    yield from backward_launches(q, k, k, q, lse, lse, plan, hidden, rules, chip=chip, **options)[0]
    if case != "grid":
        gates = torch.ones(1, 8, tokens, dtype=torch.bfloat16)
        options["sinks"] = more.get("sinks")
        yield routed_launch(q, k, k, gates, hidden, rules, chip=chip, **options)[0]
        rules, hidden, more = call_of(case, 1, 8, 1, tokens)
        options = {"sinks": None, "softcap": None, "scale": scale, **more}
        yield from decode_launches(q[:, :, -1:], k, k, hidden, rules, splits=4, **options)[0]


def agent_launches(width: int, chip: int, tokens: int) -> Iterator[Launch]:
    """Yield the kernels of agents in bfloat16, with biases: what they collect, and who reads it."""
    x = torch.empty(1, 8, tokens, width, dtype=torch.bfloat16)
    agents = torch.empty(1, 8, AGENTS, width, dtype=torch.bfloat16)
    bias = torch.zeros(1, 8, AGENTS, tokens, dtype=torch.bfloat16)
    options: dict[str, Any] = {"sinks": None, "softcap": None, "scale": width**-0.5}
    for given in (Options(), Options(bias=bias)):
        hidden = Hidden.of(given, tuple(bias.shape))
        yield from decode_launches(agents, x, x, hidden, Rules(), splits=4, **options)[0]
    hidden = Hidden.of(Options(bias=bias.mT.contiguous()), (1, 8, tokens, AGENTS))
    plan = plan_of_structure(tokens, AGENTS)
    yield forward_launch(x, agents, agents, plan, hidden, Rules(), chip=chip, **options)[0]


def linear_launches(width: int, tokens: int) -> Iterator[Launch]:
    """Yield the kernels of linear attention, both ways and for all roles of their operands."""
    features, values = (
        torch.empty(1, 8, tokens, n, dtype=torch.bfloat16) for n in (width, width + 1)
    )
    decay = torch.ones(8)
    for shift, of_heads in ((0, decay), (64, None)):
        yield from far_launches(features, features, values, of_heads, shift=shift)[0]
        yield from far_launches(values, values, features, of_heads, shift=shift)[0]
        yield from far_launches(features, features, values, of_heads, shift=shift, backwards=True)[
            0
        ]


def main() -> None:
    """Print what each kernel takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    given = parser.parse_args()
    for case, width, chip in itertools.product(given.case, given.width, given.capability):
        for launch in launches(width, case, chip):
            found = asdict(compiled(launch, chip))
            print(json.dumps({"case": case, "width": width, **found}), flush=True)


if __name__ == "__main__":
    main()
