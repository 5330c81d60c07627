"""Times sparse_marlin_gemm on the CPU against torch's linear of the same type on the same threads.

    python benchmarks/bench_cpu.py                      # the table, and JSON under benchmarks/results/
    python benchmarks/bench_cpu.py --threads 2 --num-bits 8

Every time is the median of the calls that fit into --seconds, after a warm-up; the contestants take turns, so that
another program on the machine slows all of them. Dense weights (64 MB at 4096 x 4096) are larger than any cache.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sparse_marlin
from sparse_marlin import testing

RESULTS = Path(__file__).parent / "results"
SHAPES = [(4096, 4096), (4096, 14336)]  # N, K
TOKENS = [1, 4, 16, 64, 256]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARM_UP = 2
MIN_CALLS = 5


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def median_times(contestants: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Median and fastest time of each, in milliseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(WARM_UP):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < MIN_CALLS:
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"median_ms": statistics.median(t), "min_ms": min(t), "calls": len(t)} for name, t in times.items()}


def measure(n: int, k: int, args: argparse.Namespace) -> list[dict[str, object]]:
    codes = testing.random_codes(n, k, args.num_bits)
    scales = testing.random_scales(n, k, args.group_size, torch.float32)
    packed = sparse_marlin.pack_24_weights(codes, scales, args.group_size, args.num_bits)
    weight = torch.randn(n, k)
    dense = {dtype: weight.to(dtype) for dtype in DTYPES.values()}
    rows: list[dict[str, object]] = []
    for m in track(TOKENS, description=f"{n} x {k}", transient=True):
        acts = torch.randn(m, k)
        contestants: dict[str, Callable[[], object]] = {}
        for name, dtype in DTYPES.items():
            a, s, w = acts.to(dtype), scales.to(dtype), dense[dtype]
            contestants[f"torch_{name}"] = lambda a=a, w=w: torch.nn.functional.linear(a, w)
            contestants[name] = lambda a=a, s=s: sparse_marlin.sparse_marlin_gemm(
                a, packed, s, args.group_size, args.num_bits
            )
        times = median_times(contestants, args.seconds)
        speedup = {name: times[f"torch_{name}"]["median_ms"] / times[name]["median_ms"] for name in DTYPES}
        rows.append({"m": m, "n": n, "k": k, "times": times, "speedup_over_torch": speedup})
    return rows


def show(rows: list[dict], title: str) -> None:
    table = Table(title=title, caption="milliseconds, of torch's linear of the same type, speed-up")
    for column in ("N", "K", "M", *DTYPES):
        table.add_column(column, justify="right")
    for row in rows:
        times, speedup = row["times"], row["speedup_over_torch"]
        table.add_row(
            *(str(row[key]) for key in ("n", "k", "m")),
            *(
                f"{times[name]['median_ms']:.3g} {times[f'torch_{name}']['median_ms']:.3g} {speedup[name]:.1f}x"
                for name in DTYPES
            ),
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--num-bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group-size", type=int, default=128, choices=(-1, 32, 64, 128, 256))
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of a row")
    parser.add_argument("--output", type=Path, help="where to write the JSON (default: benchmarks/results/cpu_*.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    load_average = os.getloadavg()[0]  # what else the machine was doing
    rows = [row for n, k in SHAPES for row in measure(n, k, args)]
    report = {
        "benchmark": "sparse_marlin_gemm on the CPU",
        "cpu": cpu_model(),
        "instruction_set": torch.ops.sparse_marlin._cpu_isa(),
        "threads": args.threads,
        "load_average_at_start": round(load_average, 2),
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "torch": torch.__version__,
        "sparse_marlin": sparse_marlin.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    show(rows, f"{report['cpu']}, {args.threads} threads, int{args.num_bits}, group size {args.group_size}")
    slug = "".join(c if c.isalnum() else "_" for c in cpu_model().lower())
    isa = report["instruction_set"]
    path = args.output or RESULTS / f"cpu_{slug}_{isa}_t{args.threads}_int{args.num_bits}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
