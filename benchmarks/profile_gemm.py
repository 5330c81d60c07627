"""Profiles launches of the planner's choice with Nsight Compute: how busy each unit is, and what warps wait for.

    python benchmarks/profile_gemm.py --out benchmarks/results/profile_h100.json
    python benchmarks/profile_gemm.py --problem 64,6144,4096 --problem 128,4096,14336   # M,N,K
    python benchmarks/profile_gemm.py --report benchmarks/results/profile_h100.json    # the table; needs no GPU

Needs `ncu` on the path and the right to read performance counters. Random weights and activations, float16, 4 bits,
group 128; results are checked against float64 before the profiler starts. ncu empties the caches before a launch and
holds the clocks, so that times are longer than those of bench_gemm.py. Tensor cores, shared memory (its data pipe's
wavefronts, without what tensor copies write) and issue slots are in per cent of their peaks while SMs are active, L2,
DRAM and "SMs" (the time that an SM has a block) of the whole launch. "waits" are the largest shares of a warp's time
between two instructions.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import markdown

PROBLEMS = [
    *((m, 6144, 4096) for m in (1, 16, 64, 128, 256)),  # 8B qkv
    *((m, 4096, 14336) for m in (16, 64, 128, 256, 512)),  # 8B down
    *((m, 28672, 4096) for m in (1, 64, 128, 256, 512, 1024, 8192)),  # 8B gate_up
]
COLUMNS = {
    "SMs": "sm__cycles_active.avg.pct_of_peak_sustained_elapsed",
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_active",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
}
DURATION = "gpu__time_duration.sum"
STALLS = {  # metric's name: as the table calls it
    "barrier": "barrier of the block",
    "branch_resolving": "branch",
    "dispatch_stall": "dispatch",
    "gmma": "wgmma",
    "imc_miss": "constant cache",
    "long_scoreboard": "global memory, mbarrier",
    "math_pipe_throttle": "busy pipe",
    "membar": "fence",
    "mio_throttle": "memory queue",
    "no_instruction": "instruction cache",
    "not_selected": "another warp's turn",
    "short_scoreboard": "shared memory",
    "sleeping": "sleep",
    "wait": "fixed latency",
}
SHOWN_WAITS = 3
KERNEL = "gemm_"  # in the names of the kernels that multiply
SECONDS = 300  # that ncu may take
NANOSECONDS = {"ns": 1, "nsecond": 1, "us": 1000, "usecond": 1000, "ms": 1_000_000, "msecond": 1_000_000}


def stall_metric(name: str) -> str:
    return f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio"


def launches(problems: list[tuple[int, int, int]]) -> None:
    """What runs under ncu: each problem checked, then launched once more between start and stop of the profiler."""
    import torch
    from timing import machine, tile_name
    from weights import check_rows, random_packed, random_scales

    from sparse_marlin import _core
    from sparse_marlin.info import planner_device

    torch.manual_seed(0)
    cudart = torch.cuda.cudart()
    about = {**machine(), "problems": []}
    for m, n, k in problems:
        acts = torch.randn(m, k, device="cuda", dtype=torch.float16)
        packed, scales = random_packed(n, k, 4), random_scales(n, k, 128, 4, torch.float16)
        out = torch.ops.sparse_marlin.sparse_marlin_gemm(acts, packed, scales, 128, 4, None)
        check_rows(acts, out, packed, scales, 128, 4)
        torch.cuda.synchronize()
        cudart.cudaProfilerStart()
        torch.ops.sparse_marlin.sparse_marlin_gemm(acts, packed, scales, 128, 4, None)
        torch.cuda.synchronize()
        cudart.cudaProfilerStop()
        plan = _core.plan(_core.Problem(m, n, k, 128, 4, "float16"), planner_device(0))
        tile = tile_name(_core.TILES[plan.tile])
        about["problems"].append({"m": m, "n": n, "k": k, "tile": tile, "splits": plan.splits})
    print(f"\n{json.dumps(about)}")


def profile(problems: list[tuple[int, int, int]]) -> dict[str, Any]:
    from timing import command_line

    if shutil.which("ncu") is None:
        raise SystemExit("ncu: not found; expected Nsight Compute, which comes with the CUDA Toolkit, on the path")
    metrics = [DURATION, *COLUMNS.values(), *map(stall_metric, STALLS)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--profile-from-start", "off", "--metrics", ",".join(metrics), "--csv", "--page", "raw"]
        command += ["--log-file", str(log), sys.executable, __file__, "--launches"]
        command += [f"--problem={m},{n},{k}" for m, n, k in problems]
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if run.returncode != 0:
            said = log.read_text() if log.exists() else ""
            raise SystemExit(f"ncu: exit status {run.returncode}\n{run.stdout}{run.stderr}{said}")
        result: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
        measured = read(log.read_text())
    if len(measured) != len(result["problems"]):
        raise SystemExit(f"ncu: expected {len(result['problems'])} launches of our kernels, got {len(measured)}")
    result["command"] = command_line(sys.argv)  # not the one that ncu was given
    for row, values in zip(result["problems"], measured, strict=True):
        row |= values
    return result


def read(log: str) -> list[dict[str, Any]]:
    """The multiplications in ncu's table, whose second line has the units."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit(f"ncu: expected a table, got\n{log}")
    units, *rows = csv.DictReader(lines[first:])
    found = []
    for row in rows:
        if KERNEL not in row["Kernel Name"]:
            continue

        def number(name: str, row: dict[str, str] = row) -> float:
            return float(row[name].replace(",", ""))

        waits = {name: number(stall_metric(key)) for key, name in STALLS.items()}
        found.append(
            {
                "us": number(DURATION) * NANOSECONDS[units[DURATION]] / 1000,
                **{name: round(number(metric), 1) for name, metric in COLUMNS.items()},
                "waits": {name: round(value, 3) for name, value in sorted(waits.items(), key=lambda w: -w[1]) if value},
            }
        )
    return found


def table(result: dict[str, Any]) -> str:
    rows = []
    for row in result["problems"]:
        plan = row["tile"] + (f", {row['splits']} splits" if row["splits"] > 1 else "")
        plan += ", stream-K" if row["splits"] < 0 else ""
        total = sum(row["waits"].values()) + 1  # the instruction itself
        waits = ", ".join(f"{name} {value / total:.0%}" for name, value in list(row["waits"].items())[:SHOWN_WAITS])
        cells = [f"{row['k']} → {row['n']}", str(row["m"]), plan, f"{row['us']:.1f}"]
        rows.append([*cells, *(f"{row[name]:.0f}" for name in COLUMNS), waits])
    return markdown(["shape", "tokens", "plan", "us", *COLUMNS, "waits"], rows)


def problem(text: str) -> tuple[int, int, int]:
    m, n, k = map(int, text.split(","))
    return m, n, k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", type=problem, action="append", metavar="M,N,K", help="instead of the usual ones")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--report", type=Path, help="print the table of this JSON file and measure nothing")
    parser.add_argument("--launches", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    problems = args.problem or PROBLEMS
    if args.launches:
        launches(problems)
        return
    result = json.loads(args.report.read_text()) if args.report else profile(problems)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
