"""Times the linears of Llama 8B, 70B and 405B on one GPU as 1, 2, 4 and 8 tensor-parallel ranks run them.

    python benchmarks/bench_slices.py --out benchmarks/results/slices.json
    python benchmarks/bench_slices.py --tokens 1,64 --world-sizes 8
    python benchmarks/bench_slices.py --device cpu --tokens 1 --world-sizes 8     # tries the script out

Each slice's fraction of the floor (bytes over the bandwidth measured in the same run, or operations over the sparse
tensor cores' rate) is held against the whole layer's. Every shape is checked against float64 first; one CUDA graph
holds many launches with weights in turn, more than any cache keeps. `slice_plans.py` has the planner's prediction.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from ranks import Ranks
from rich.console import Console
from rich.table import Table
from slice_plans import (
    GROUP_SIZE,
    H100,
    H100_BYTES_PER_US,
    LIMIT,
    NUM_BITS,
    WORLD_SIZES,
    Slice,
    floor_us,
    slices,
)
from timing import ROTATED_BYTES, WGMMA_SP_TFLOPS, copy_bandwidth, machine, positive_ints, sparse_tflops
from weights import check_rows, random_scales, random_slices

import sparse_marlin
from sparse_marlin import _core
from sparse_marlin.info import planner_device

MOST_LAUNCHES = 320  # of a graph: the smallest slices together are still more than a cache keeps


def measure_slices(args: argparse.Namespace, ranks: Ranks) -> list[dict[str, object]]:
    """Microseconds and fraction of the floor of every slice and whole layer, on one GPU."""
    on_gpu = args.device == "cuda"
    bandwidth, tflops = (copy_bandwidth(), sparse_tflops()) if on_gpu else (H100_BYTES_PER_US, WGMMA_SP_TFLOPS)
    device = planner_device(torch.cuda.current_device()) if on_gpu else H100
    shapes = [_core.packed_shape(whole.n, whole.k, NUM_BITS) for _, whole in slices()]
    words = max(*(rows * words for rows, words in shapes), int(4 * ROTATED_BYTES if on_gpu else 0) // 4)
    pool = random_slices(-(-words // _core.slice_words(NUM_BITS)), NUM_BITS, args.device).view(-1)
    found: dict[tuple[int, int, int], tuple[float, float]] = {}
    rows: list[dict[str, object]] = []

    def fraction(m: int, each: Slice) -> tuple[float, float]:
        key = (m, each.n, each.k)
        if key not in found:
            us = gemm_us(ranks, pool, *key)
            found[key] = us, floor_us(*key, bandwidth, tflops) / us
        return found[key]

    for m in args.tokens:
        for part, whole in slices(tuple(args.world_sizes)):
            us, of_floor = fraction(m, part)
            plan = _core.plan(_core.Problem(m, part.n, part.k, GROUP_SIZE, NUM_BITS), device)
            tile = _core.TILES[plan.tile]
            ratio = of_floor / fraction(m, whole)[1]
            rows.append(
                {
                    "slice": part.name,
                    "m": m,
                    "n": part.n,
                    "k": part.k,
                    "slice_us": us,
                    "predicted_us": plan.predicted_us,
                    "whole_us": fraction(m, whole)[0],
                    "floor_us": of_floor * us,
                    "floor_fraction": of_floor,
                    "of_whole": ratio,
                    "under_limit": ratio < LIMIT,
                    "plan": f"{tile.kernel} {tile.block_m}x{tile.block_n} splits {plan.splits}",
                }
            )
    return rows


def gemm_us(ranks: Ranks, pool: torch.Tensor, m: int, n: int, k: int) -> float:
    """One multiplication with weights from the pool, in turn, so that no cache keeps them; the median of replays."""
    shape = _core.packed_shape(n, k, NUM_BITS)
    length = shape[0] * shape[1]
    copies = max(1, min(pool.numel() // length, MOST_LAUNCHES))
    weights = [pool[i * length : (i + 1) * length].view(shape) for i in range(copies)]
    scales = random_scales(n, k, GROUP_SIZE, NUM_BITS, torch.float16, ranks.device.type)
    a = torch.randn(m, k, device=ranks.device).half()
    some = a[:17]
    out = sparse_marlin.sparse_marlin_gemm(some, weights[0], scales)
    check_rows(some, out, weights[0], scales, GROUP_SIZE, NUM_BITS)
    gemm, turn = torch.ops.sparse_marlin.sparse_marlin_gemm, itertools.count()

    def call() -> object:
        return gemm(a, weights[next(turn) % copies], scales, GROUP_SIZE, NUM_BITS)

    passes = max(3, min(MOST_LAUNCHES, int(1200 / (4 + length / 6e5 + 2 * m * n * k / 1e9))))
    return statistics.median(ranks.time_us(call, passes))


def print_slices(rows: list[dict[str, object]]) -> None:
    under = [row for row in rows if row["under_limit"]]
    table = Table(title=f"slices under {LIMIT} of the whole layer's fraction of the floor: {len(under)} of {len(rows)}")
    for column in ("slice", "m", "us", "predicted", "floor us", "of whole", "plan"):
        table.add_column(column, justify="left" if column in ("slice", "plan") else "right")
    for row in under:
        values = [f"{float(str(row[key])):.1f}" for key in ("slice_us", "predicted_us", "floor_us")]
        table.add_row(str(row["slice"]), str(row["m"]), *values, f"{float(str(row['of_whole'])):.2f}", str(row["plan"]))
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive_ints, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--world-sizes", type=positive_ints, default=list(WORLD_SIZES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    started = time.monotonic()
    with torch.inference_mode():
        rows = measure_slices(args, Ranks(args.device))
    result: dict[str, object] = {
        **(machine() if args.device == "cuda" else {"gpu": "CPU", "torch": torch.__version__}),
        "dtype": "float16",
        "num_bits": NUM_BITS,
        "group_size": GROUP_SIZE,
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_slices(rows)


if __name__ == "__main__":
    main()
