"""What is left of the speed-up when a GPU works without a pause, at its limit of power: times of launches that follow
each other for as long as --seconds, against cuBLAS, with the clock and the power that nvidia-smi reads meanwhile.

    python benchmarks/bench_sustained.py --json benchmarks/results/sustained_h100.json

bench_gemm.py measures a GPU that has rested, as one launch among others meets it; here a GPU does nothing else, as a
server's does that only reads prompts. float16, 4 bits, group 128, plain launches of the planner's choice in CUDA
graphs, weights and scales rotated through more memory than the L2 cache holds. "rested": the fastest of three graphs
of about a millisecond, each after 0.15 s of rest. "sustained", clock and power: of the second half of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_gemm import SHAPES
from timing import Recorder, copies, full_precision_sums, machine, positive_ints
from weights import random_packed, several_scales

from sparse_marlin import _core
from sparse_marlin.info import planner_device

TOKENS = [1, 16, 64, 128, 256, 512, 1024, 4096]
GROUP_SIZE, NUM_BITS = 128, 4
REST_S = 0.15
GRAPH_US = 1e3
READ_MS = 20  # between two readings of clock and power


class Meter:
    """Readings of the first GPU's clock (MHz) and power (W), each with its time, while `lines` tells them."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = lines
        self.readings: list[tuple[float, float, float]] = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        for line in self.lines:
            with contextlib.suppress(ValueError):  # what the driver cannot tell
                clock, power = line.split(", ")
                self.readings.append((time.monotonic(), float(clock), float(power)))

    def mean(self, since: float) -> tuple[float | None, float | None]:
        """Clock and power from then on; None where nothing was read."""
        found = [reading[1:] for reading in self.readings if reading[0] >= since]
        if not found:
            return None, None
        return statistics.mean(clock for clock, _ in found), statistics.mean(power for _, power in found)


@contextlib.contextmanager
def meter() -> Iterator[Meter]:
    """Reads nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen([*command, "--id=0", f"--loop-ms={READ_MS}"], stdout=subprocess.PIPE, text=True)
    except OSError:
        yield Meter([])
        return
    with process:
        found = Meter(process.stdout or [])
        try:
            yield found
        finally:
            process.terminate()
            found.thread.join()  # reads to the end before the pipe is closed


def measure(
    recorder: Recorder, call: Callable[[int], object], seconds: float, readings: Meter
) -> dict[str, float | None]:
    """Microseconds of one call after a rest and without any, and clock and power without any."""
    with torch.cuda.stream(recorder.stream):
        call(0)  # loads the kernel and what it needs
    one_us = min(recorder.times([recorder.capture(call, 2)], 3)[0])
    graph = recorder.capture(call, max(2, round(GRAPH_US / one_us)))
    rested = min(recorder.times([graph], 3, REST_S)[0])
    rounds = max(1, round(READ_MS * 1e3 / (graph.launches * one_us)))
    begin = time.monotonic()
    times: list[tuple[float, float]] = []
    while time.monotonic() < begin + seconds:
        found = recorder.times([graph], rounds)[0]
        times.append((time.monotonic(), statistics.mean(found)))
    half = (begin + times[-1][0]) / 2
    clock, power = readings.mean(half)
    return {
        "rested_us": rested,
        "sustained_us": statistics.mean(us for end, us in times if end >= half),
        "clock_mhz": clock,
        "power_w": power,
    }


def dense_call(acts: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[int], object]:
    return lambda i: torch.nn.functional.linear(acts, weights[i % len(weights)])


def our_call(
    acts: torch.Tensor, weights: list[torch.Tensor], scales: list[torch.Tensor], n: int
) -> Callable[[int], object]:
    plan = _core.plan(_core.Problem(acts.shape[0], n, acts.shape[1]), planner_device())
    gemm, count = torch.ops.sparse_marlin._sparse_marlin_gemm_tile, len(weights)
    return lambda i: gemm(
        acts, weights[i % count], scales[i % count], GROUP_SIZE, NUM_BITS, None, plan.tile, plan.splits, False
    )


def line(row: dict[str, Any]) -> str:
    parts = []
    for key in ("cublas", "ours"):
        r = row[key]
        read = "" if r["clock_mhz"] is None else f", {r['clock_mhz']:4.0f} MHz, {r['power_w']:3.0f} W"
        parts.append(f"{key} {r['rested_us']:8.1f} us rested, {r['sustained_us']:8.1f} sustained{read}")
    speedup = row["cublas"]["sustained_us"] / row["ours"]["sustained_us"]
    return f"{row['shape']:12} M={row['m']:<5} {'; '.join(parts)}: {speedup:.2f} x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive_ints, default=TOKENS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=0.6, help="of each kernel and problem")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    full_precision_sums()
    rows = []
    with meter() as readings:
        for name in options.shapes:
            k, n = SHAPES[name]
            dense = [torch.randn(n, k, device="cuda").half() for _ in range(copies(2 * n * k))]
            packed = [random_packed(n, k, NUM_BITS) for _ in range(copies(n * k * 3 // 8))]
            scales = several_scales(len(packed), n, k, GROUP_SIZE, NUM_BITS, torch.float16)
            for m in options.tokens:
                acts = torch.randn(m, k, device="cuda").half()
                recorder = Recorder()
                row: dict[str, Any] = {"shape": name, "m": m}
                for key, call in (("cublas", dense_call(acts, dense)), ("ours", our_call(acts, packed, scales, n))):
                    row[key] = measure(recorder, call, options.seconds, readings)
                rows.append(row)
                print(line(row), flush=True)
    for m in options.tokens:
        rested, sustained = (
            statistics.geometric_mean(row["cublas"][way] / row["ours"][way] for row in rows if row["m"] == m)
            for way in ("rested_us", "sustained_us")
        )
        print(f"M={m:<5} geometric mean of the speed-ups: {rested:.2f} rested, {sustained:.2f} sustained")
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
