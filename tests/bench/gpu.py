"""Time the Triton kernels on a GPU against what else there is, side by side in one process.

    python tests/bench/gpu.py
    python tests/bench/gpu.py --groups masks decode --tokens 8192 --most 15
    python tests/bench/gpu.py --dry

Groups: "masks" (forward, and forward with backward, of the masks of LongCA-bench), "densities"
(random plans of tiles), "decode" (one query a row), "grid" (neighbourhoods of 1, 2 and 3 axes).
Rivals: scaled_dot_product_attention as torch chooses and by cuDNN, where no mask is needed or, for
small sizes, with a mask of booleans; compiled flex_attention; flash_attn, where it is installed.
Results are compared with float32 on some rows first. `rho` is the share of tiles visited of all
tiles, `tflops` counts the tiles visited, `again` times the kernel twice and must read 1. Exit
status 1 where results differ, 3 where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from gpu_masks import DEVICE, MASKS, STRUCTURES, Shown, mask, neighborhood
from harness import as_row, compare, machine, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnopt.ops import attention_reference
from attnopt.ops.plans import BlockPlan
from attnopt.timing import Timing

Call = Callable[[], Tensor]

TOKENS: Final = (1024, 2048, 4096, 8192, 16384, 24576, 32768, 40960, 49152)
DENSITIES: Final = (0.1, 0.2, 0.5, 0.8, 1.0)
CACHES: Final = (1024, 8192, 32768, 131072)
HEADS: Final = ((32, 32), (32, 8), (32, 4), (64, 8))
DECODED: Final = ("full", "duo 0.25", "duo 0.5", "window and first")
GRIDS: Final = {
    "line": ((32768,), (2048,), (128,), ((1,), (256,)), 1),
    "plane": ((256, 256), (80, 80), (16, 8), ((1, 1), (16, 16)), 24),
    "space": ((30, 48, 80), (18, 24, 24), (2, 8, 8), ((1, 1, 1), (16, 8, 8)), 24),
}
"""Lengths, windows, tiles, strides of two rows, and heads."""
FIRST, RECENT = 64, 256
MASKED_TOKENS: Final = 16384
"""A mask of booleans is given to others up to so many tokens."""
MOST_BYTES: Final = 24 << 30
TOLERANCE: Final = 2e-2
ROWS: Final = slice(200, 264)
"""The queries whose results are compared."""


@dataclass(frozen=True)
class Case:
    """One row: what is computed, at what size."""

    group: str
    name: str
    tokens: int
    heads: int = 64
    kv_heads: int = 8
    batch: int = 1
    width: int = 128
    tile: int = 128
    density: float = 1.0
    stride: tuple[int, ...] = ()
    trains: bool = False

    def __str__(self) -> str:
        words = [self.group, self.name, f"{self.tokens} tokens", f"{self.heads}/{self.kv_heads}"]
        more = {"batch": self.batch, "tile": self.tile, "density": self.density}
        usual = {"batch": 1, "tile": 128, "density": 1.0}
        words += [f"{name} {x}" for name, x in more.items() if x != usual[name]]
        words += [f"stride {' x '.join(map(str, self.stride))}"] if self.stride else []
        return ", ".join(words + (["with gradients"] if self.trains else []))

    @property
    def cache_bytes(self) -> int:
        """Return how many bytes the keys and values have."""
        return 4 * self.batch * self.kv_heads * self.tokens * self.width


def cases() -> Iterator[Case]:
    """Yield the whole grid."""
    for tokens in TOKENS:
        for name in MASKS:
            yield Case("masks", name, tokens)
            yield Case("masks", name, tokens, trains=True)
    for tokens in (16384, 49152):
        for tile in (64, 128):
            for density in DENSITIES:
                yield Case("densities", "random", tokens, tile=tile, density=density)
    for name in DECODED:
        for batch in (1, 8, 64):
            for tokens in CACHES:
                for heads, kv_heads in HEADS:
                    found = Case("decode", name, tokens, heads, kv_heads, batch)
                    if found.cache_bytes <= MOST_BYTES:
                        yield found
    for name, (lengths, _, _, strides, heads) in GRIDS.items():
        for stride in strides:
            tokens = int(torch.tensor(lengths).prod())
            yield Case("grid", name, tokens, heads, heads, stride=stride)


def draw(case: Case, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values in bfloat16."""
    sizes = ((case.heads, queries), (case.kv_heads, case.tokens), (case.kv_heads, case.tokens))
    return tuple(  # type: ignore[return-value]
        torch.randn(case.batch, *size, case.width, device=DEVICE, dtype=torch.bfloat16)
        for size in sizes
    )


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, cudnn: bool = False, **options: Any) -> Tensor:
    """Call scaled_dot_product_attention, by cuDNN or as torch chooses."""
    function = torch.nn.functional.scaled_dot_product_attention
    if not cudnn:
        return function(q, k, v, enable_gqa=True, **options)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return function(q, k, v, enable_gqa=True, **options)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """Call flash_attn, which has its heads behind its tokens."""
    from flash_attn import flash_attn_func

    moved = (x.transpose(1, 2) for x in (q, k, v))
    found: Tensor = flash_attn_func(*moved, causal=causal, window_size=window)
    return found.transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
    """Call flex_attention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if flex not in _COMPILED:
        _COMPILED[flex] = torch.compile(flex_attention, dynamic=False)
    found: Tensor = _COMPILED[flex](q, k, v, block_mask=block_mask, enable_gqa=True)
    return found


_COMPILED: dict[Any, Callable[..., Any]] = {}


def block_mask_of(plan: BlockPlan, tokens: int, rule: Callable[..., Tensor] | None) -> Any:
    """Return a plan as FlexAttention takes it."""
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        *plan.tensors, BLOCK_SIZE=(plan.q_tile, plan.k_tile), mask_mod=rule,
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def of_mask(case: Case, shown: Shown) -> tuple[dict[str, Call], Tensor, float]:
    """Return calls that compute the same, the result of some rows in float32, and rho."""
    from attnopt.backends.triton_gpu.attending import attend_by_plan

    q, k, v = draw(case, case.tokens)
    plan = shown.plan(case.tile)
    options = {**shown.structure, "windows": shown.windows}
    calls: dict[str, Call] = {
        "triton": lambda: attend_by_plan(q, k, v, plan, **options)[0],
        "again": lambda: attend_by_plan(q, k, v, plan, **options)[0],
        "flex": partial(flex, q, k, v, block_mask_of(plan, case.tokens, shown.rule)),
    }
    dense = {"full": {}, "causal": {"is_causal": True}}.get(case.name)
    if dense is None and case.tokens <= MASKED_TOKENS:
        calls["sdpa"] = partial(sdpa, q, k, v, attn_mask=shown.rows(0, case.tokens))
    if dense is not None:
        calls["sdpa"] = partial(sdpa, q, k, v, **dense)
        calls["cudnn"] = partial(sdpa, q, k, v, cudnn=True, **dense)
    if (
        find_spec("flash_attn")
        and case.name in STRUCTURES
        and not {"chunk", "prefix", "first"} & {*shown.structure}
    ):
        reach = shown.structure.get("window", 0) - 1
        right = shown.structure.get("right")
        window = (reach, 0) if right is None else (reach + 1, right)
        calls["flash"] = partial(flash, q, k, v, case.name == "causal", window)
    wanted = attention_reference(
        q[:, :, ROWS].float(), k.float(), v.float(),
        mask=shown.rows(ROWS.start, ROWS.stop - ROWS.start),
    )[0]  # fmt: skip
    tiles = -((-case.tokens // case.tile) ** 2)
    rho = float(plan.visited().float().mean()) / (-(-case.tokens // case.tile)) ** 2
    assert tiles
    if case.trains:
        for x in (q, k, v):
            x.requires_grad_()
        calls = {name: partial(trained, call, (q, k, v)) for name, call in calls.items()}
    return calls, wanted, rho


def trained(call: Call, inputs: tuple[Tensor, ...]) -> Tensor:
    """Call, and compute the gradients."""
    out = call()
    torch.autograd.grad(out, inputs, out)
    return out


def of_density(case: Case) -> tuple[dict[str, Call], Tensor, float]:
    """Return calls by a random plan of full tiles for each key head."""
    from attnopt.backends.triton_gpu.attending import attend_by_plan

    q, k, v = draw(case, case.tokens)
    tiles = -(-case.tokens // case.tile)
    kept = max(1, round(case.density * tiles))
    draws = torch.rand(1, case.kv_heads, tiles, tiles, device=DEVICE)
    index = draws.topk(kept).indices.sort().values.int()
    rest = torch.zeros(1, case.kv_heads, tiles, tiles, dtype=torch.int32, device=DEVICE)
    rest[..., :kept] = index
    none = torch.zeros(1, case.kv_heads, tiles, dtype=torch.int32, device=DEVICE)
    plan = BlockPlan(none, torch.zeros_like(rest), none + kept, rest, case.tile, case.tile)
    wide = replace(plan, **{
        name: getattr(plan, name).repeat_interleave(case.heads // case.kv_heads, dim=1)
        for name in ("count", "index", "full_count", "full_index")
    })  # fmt: skip
    calls: dict[str, Call] = {
        "triton": lambda: attend_by_plan(q, k, v, plan)[0],
        "again": lambda: attend_by_plan(q, k, v, plan)[0],
        "flex": partial(flex, q, k, v, block_mask_of(wide, case.tokens, None)),
        "dense sdpa": partial(sdpa, q, k, v),
        "dense cudnn": partial(sdpa, q, k, v, cudnn=True),
    }
    of_row = index[0, :, torch.arange(ROWS.start, ROWS.stop, device=DEVICE) // case.tile]
    columns = torch.arange(case.tokens, device=DEVICE) // case.tile
    seen = torch.zeros(case.kv_heads, len(of_row[0]), tiles, dtype=torch.bool, device=DEVICE)
    seen = seen.scatter(-1, of_row.long(), value=True)[..., columns]
    seen = seen.repeat_interleave(case.heads // case.kv_heads, dim=0).unsqueeze(0)
    wanted = attention_reference(q[:, :, ROWS].float(), k.float(), v.float(), mask=seen)[0]
    return calls, wanted, kept / tiles


def of_decode(case: Case) -> tuple[dict[str, Call], Tensor, float]:
    """Return calls of one query; a part of the key heads of "duo" keeps every key."""
    from attnopt.backends.triton_gpu.attending import attend_few

    q, k, v = draw(case, 1)
    window: dict[str, Any] = {"causal": True, "window": RECENT, "first": FIRST}
    share = {"full": 1.0, "window and first": 0.0}.get(case.name)
    share = float(case.name.split()[1]) if share is None else share
    whole = round(share * case.kv_heads)
    split = whole * case.heads // case.kv_heads
    place = torch.arange(FIRST + RECENT, dtype=torch.int32, device=DEVICE)
    keys = min(case.tokens, FIRST + RECENT)
    late = -(keys - FIRST)
    few = tuple(torch.cat([x[:, whole:, :FIRST], x[:, whole:, late:]], 2) for x in (k, v))
    place = torch.where(place < FIRST, place, place - keys + case.tokens)

    def ours() -> Tensor:
        parts = []
        if whole:
            parts.append(attend_few(q[:, :split], k[:, :whole], v[:, :whole])[0])
        if whole < case.kv_heads:
            ring = {"positions": place, "place": case.tokens - 1, **window}
            parts.append(attend_few(q[:, split:], *few, **ring)[0])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    calls: dict[str, Call] = {"triton": ours, "again": ours}
    name = "sdpa" if whole == case.kv_heads else "dense sdpa"
    calls[name] = partial(sdpa, q, k, v)
    calls[name.replace("sdpa", "cudnn")] = partial(sdpa, q, k, v, cudnn=True)
    if find_spec("flash_attn"):
        calls[name.replace("sdpa", "flash")] = partial(flash, q, k, v, False, (-1, -1))
    wanted = torch.cat([
        attention_reference(a.float(), b.float(), c.float(), **options)[0]
        for a, b, c, options in (
            (q[:, :split], k[:, :whole], v[:, :whole], {}),
            (q[:, split:], k[:, whole:], v[:, whole:], window),
        )
        if a.shape[1]
    ], dim=1)  # fmt: skip
    read = whole * case.tokens + (case.kv_heads - whole) * keys
    return calls, wanted, read / (case.kv_heads * case.tokens)


def of_grid(case: Case) -> tuple[dict[str, Call], Tensor, float]:
    """Return calls of a neighbourhood whose tokens lie tile after tile, and are put there."""
    lengths, window, tile, _, _ = GRIDS[case.name]
    shown, order = neighborhood(lengths, window, case.stride, tile)
    calls, wanted, rho = of_mask(case, shown)
    x, back = draw(case, case.tokens)[0], order.argsort()
    attend = calls["triton"]

    def permuted() -> Tensor:
        # Three tensors are put in order before, and one after.
        for _ in range(3):
            x[:, :, order]
        return attend()[:, :, back]

    return {**calls, "permuted": permuted}, wanted, rho


def calls_of(case: Case) -> tuple[dict[str, Call], Tensor, float]:
    """Return the calls of a row, the result wanted of some rows, and rho."""
    match case.group:
        case "masks":
            return of_mask(case, mask(case.name, case.tokens))
        case "densities":
            return of_density(case)
        case "decode":
            return of_decode(case)
        case _:
            return of_grid(case)


def measure(case: Case, most: int) -> dict[str, Any]:
    """Check and time a row."""
    calls, wanted, rho = calls_of(case)
    errors: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            out = call()
        except (RuntimeError, torch.OutOfMemoryError) as refusal:
            print(f"    {name} does not run: {str(refusal).splitlines()[0]}")
            calls.pop(name)
            continue
        if "dense" not in name and name != "permuted":
            part = out if case.group == "decode" else out[:, :, ROWS]
            errors[name] = float((part.float() - wanted).abs().max() / wanted.abs().max())
    passed = all(error <= TOLERANCE for error in errors.values())
    timing = compare(calls, base="triton", most=most)
    seconds = timing.median("triton")
    queries = 1 if case.group == "decode" else case.tokens
    work = 4 * case.batch * case.heads * queries * case.tokens * case.width * rho
    row = {
        **case.__dict__,
        "rho": round(rho, 4),
        "milliseconds": {name: round(1e3 * timing.median(name), 4) for name in calls},
        "tflops": round(work * (3.5 if case.trains else 1.0) / seconds / 1e12, 1),
        "gigabytes_per_second": round(case.cache_bytes * rho / seconds / 1e9, 1),
        "speedup": {n: as_row(timing.speedup("triton", n)) for n in calls if n != "triton"},
        "errors": {name: round(error, 5) for name, error in errors.items()},
        "passed": passed,
    }
    show(case, timing, row)
    return row


def show(case: Case, timing: Timing, row: dict[str, Any]) -> None:
    """Print a row."""
    print(f"{case}: rho {row['rho']}, {1e3 * timing.median('triton'):.3f} ms, "
          f"{row['tflops']} TFLOP/s, {row['gigabytes_per_second']} GB/s"
          f"{'' if row['passed'] else '  FAILED'}")  # fmt: skip
    for name in row["speedup"]:
        print(f"    {timing.speedup('triton', name)} times as fast as {name}", flush=True)


def main(arguments: list[str]) -> int:
    """Measure what is asked for, print it, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ("masks", "densities", "decode", "grid")
    parser.add_argument("--groups", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--names", nargs="+", help="masks or caches of these names only")
    parser.add_argument("--tokens", nargs="+", type=int, help="these lengths only")
    parser.add_argument("--most", type=int, default=20, help="rounds at most")
    parser.add_argument("--dry", action="store_true", help="list the rows, and measure nothing")
    given = parser.parse_args(arguments)
    chosen = [
        c for c in cases()
        if c.group in given.groups
        and (not given.names or c.name in given.names)
        and (not given.tokens or c.tokens in given.tokens)
    ]  # fmt: skip
    if given.dry:
        print("\n".join(map(str, chosen)))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device is here; --dry lists what would be measured", file=sys.stderr)
        return 3
    print("\n".join(f"{k}: {v}" for k, v in machine().items()))
    rows = [measure(case, given.most) for case in chosen]
    write("gpu", rows)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
