"""Times pack_24_weights and unpack_24_weights against a copy of as many bytes.

    python benchmarks/bench_pack.py                 # on the GPU where there is one, otherwise on the CPU
    python benchmarks/bench_pack.py --device cpu --json
    python benchmarks/bench_pack.py --shapes 4096x4096,28672x4096 --num-bits 4,8

Both operators wait for their result (an error must be known), so a call is timed by the wall clock, the copy's too. On
the GPU the kernels are timed alone as well, by the profiler, with a cache that holds nothing of their tensors.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import sparse_marlin
from sparse_marlin import testing

WARM_UP = 3
DTYPES = {"int8": torch.int8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHE_BYTES = 1 << 28  # more than the last-level cache of any GPU


def wall_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        timed()
    return statistics.median(timed() for _ in range(calls))


def kernel_seconds(call: Callable[[], object], calls: int) -> float:
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            cache.zero_()
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    ours = [e.device_time for e in events if "pack_kernel" in e.name or "Memcpy DtoD" in e.name]
    if len(ours) != calls:
        raise RuntimeError(f"expected {calls} kernels or copies, the profiler saw {sorted({e.name for e in events})}")
    return statistics.median(ours) * 1e-6


Case = tuple[Callable[[], object], int]  # what to time, the bytes it reads and writes


def make_cases(n: int, k: int, num_bits: int, device: torch.device) -> dict[str, Case]:
    group_size = 128
    codes = testing.random_codes(n, k, num_bits, device=device)
    scales = testing.group_scales(n, k, group_size, torch.float32).to(device)
    dense = testing.dequantized(codes, scales, group_size)
    packed = sparse_marlin.pack_24_weights(codes, scales, group_size, num_bits)
    packed_bytes = packed.numel() * packed.element_size()
    cases: dict[str, Case] = {}
    for name, dtype in DTYPES.items():
        weight = codes if dtype == torch.int8 else dense.to(dtype)
        cases[f"pack {name}"] = (
            lambda weight=weight: sparse_marlin.pack_24_weights(weight, scales, group_size, num_bits),
            weight.numel() * weight.element_size() + packed_bytes,
        )
    cases["unpack"] = (
        lambda: sparse_marlin.unpack_24_weights(packed, n, k, num_bits),
        packed_bytes + codes.numel(),
    )
    return cases


def copy_of(moved: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)  # a copy reads and writes: half each
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def time_calls(case: Case, device: torch.device, calls: int) -> dict[str, float]:
    call, moved = case
    copy, ours = wall_seconds(copy_of(moved, device), device, calls), wall_seconds(call, device, calls)
    return {
        "ms": ours * 1e3,
        "gb_per_s": moved / ours / 1e9,
        "copy_gb_per_s": moved / copy / 1e9,
        "share_of_copy": copy / ours,
    }


def time_kernels(case: Case, device: torch.device, calls: int) -> dict[str, float]:
    call, moved = case
    copy, ours = kernel_seconds(copy_of(moved, device), calls), kernel_seconds(call, calls)
    return {
        "kernel_ms": ours * 1e3,
        "kernel_gb_per_s": moved / ours / 1e9,
        "copy_kernel_gb_per_s": moved / copy / 1e9,
        "kernel_share_of_copy": copy / ours,
    }


COLUMNS = {
    "ms": ("call, ms", ".3f"),
    "gb_per_s": ("GB/s", ".0f"),
    "copy_gb_per_s": ("copy's", ".0f"),
    "share_of_copy": ("share", ".0%"),
    "kernel_ms": ("kernel, ms", ".4f"),
    "kernel_gb_per_s": ("GB/s", ".0f"),
    "copy_kernel_gb_per_s": ("copy's", ".0f"),
    "kernel_share_of_copy": ("share", ".0%"),
}


def print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['device']}, {result['n']} x {result['k']}, int{result['num_bits']}")
    keys = [key for key in COLUMNS if all(key in row for row in result["rows"].values())]
    for column in ("case", *(COLUMNS[key][0] for key in keys)):
        table.add_column(column, justify="right")
    for case, row in result["rows"].items():
        table.add_row(case, *(format(row[key], COLUMNS[key][1]) for key in keys))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default="4096x14336", help="NxK, several separated by commas")
    parser.add_argument("--num-bits", default="4", help="4, 8 or 4,8")
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    sizes = [[int(size) for size in shape.split("x")] for shape in args.shapes.split(",")]
    problems = [(n, k, int(bits)) for n, k in sizes for bits in args.num_bits.split(",")]
    results: list[dict[str, Any]] = [
        {"device": name, "n": n, "k": k, "num_bits": bits, "rows": defaultdict(dict)} for n, k, bits in problems
    ]
    # All calls before all kernels: once the profiler has run, every call takes longer.
    for timer in (time_calls, time_kernels) if args.device == "cuda" else (time_calls,):
        for problem, result in zip(problems, results, strict=True):
            for case_name, case in make_cases(*problem, device).items():
                result["rows"][case_name] |= timer(case, device, args.calls)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print_table(result)


if __name__ == "__main__":
    main()
