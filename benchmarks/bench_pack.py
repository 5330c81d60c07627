"""Times pack_24_weights and unpack_24_weights against a copy of as many bytes.

    python benchmarks/bench_pack.py                 # on the GPU where there is one, otherwise on the CPU
    python benchmarks/bench_pack.py --device cpu --json

Both operators wait for their result (an error must be known), so the times are of the wall clock, the copy's too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import sparse_marlin
from sparse_marlin import testing

WARM_UP = 3
DTYPES = {"int8": torch.int8, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def median_seconds(call: Callable[[], object], device: torch.device, calls: int) -> float:
    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        timed()
    return statistics.median(timed() for _ in range(calls))


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


def measure(name: str, case: Case, device: torch.device, calls: int) -> dict[str, str | float]:
    call, moved = case
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)  # a copy reads and writes: half each
    target = torch.ones_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, calls)
    seconds = median_seconds(call, device, calls)
    return {
        "case": name,
        "ms": seconds * 1e3,
        "gb_per_s": moved / seconds / 1e9,
        "copy_gb_per_s": moved / copy / 1e9,
        "share_of_copy": copy / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=14336)
    parser.add_argument("--num-bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)

    cases = make_cases(args.n, args.k, args.num_bits, device)
    rows = [measure(name, case, device, args.calls) for name, case in cases.items()]
    if args.json:
        print(json.dumps({"device": args.device, "n": args.n, "k": args.k, "num_bits": args.num_bits, "rows": rows}))
        return
    table = Table(title=f"{args.device}, {args.n} x {args.k}, int{args.num_bits}")
    for column in ("case", "ms", "GB/s read and written", "copy GB/s", "share of the copy"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["case"]),
            f"{row['ms']:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['copy_gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
