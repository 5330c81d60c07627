"""What the GPU benchmarks share: graphs, their times, the ceilings they are held against, and what machine it was."""

import contextlib
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))  # which has the same for its own records

from commit import commit

import sparse_marlin
from sparse_marlin import _core
from sparse_marlin.info import planner_device

ROTATED_BYTES = 250e6  # of weights that a graph walks through: more than the last-level cache of any GPU keeps
MAX_COPIES = 48
REPLAYS = 5
WGMMA_SP_TFLOPS, MMA_SP_TFLOPS = 1380.0, 940.0


def copies(size: int) -> int:
    """How many weights of `size` bytes a graph rotates through."""
    return max(2, min(MAX_COPIES, math.ceil(ROTATED_BYTES / size)))


def tile_name(tile: _core.Tile) -> str:
    """As results of benchmarks name it."""
    teams = f" teams {tile.teams}" if tile.teams > 1 else ""
    return f"{tile.block_m}x{tile.block_n} {tile.kernel} share {tile.share}{teams}"


def tile_numbers(names: Sequence[str]) -> dict[int, int]:
    """The numbers that the tiles of a result have now, if they are still there; of the same name, in their order."""
    now: dict[str, list[int]] = defaultdict(list)
    for number, tile in enumerate(_core.TILES):
        now[tile_name(tile)].append(number)
    return {i: now[name].pop(0) for i, name in enumerate(names) if now[name]}


def positive_ints(text: str) -> list[int]:
    """For argparse: positive numbers separated by commas."""
    numbers = [int(part) for part in text.split(",")]
    if not numbers or min(numbers) < 1:
        raise ValueError
    return numbers


positive_ints.__name__ = "positive numbers separated by commas"  # what argparse calls a value that it refuses


def graph_us(call: Callable[[int], object], launches: int) -> list[float]:
    """Microseconds of one call, sorted, from replays of a graph of `launches` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(0)
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                call(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return sorted(times)


@dataclass(frozen=True)
class Recorded:
    graph: torch.cuda.CUDAGraph
    launches: int


class Recorder:
    """Graphs that share one memory pool, captured and replayed on one stream."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        # a pool lives as long as a graph that uses it
        self.anchor = self.capture(lambda _: torch.zeros(1, device="cuda"), 1)

    def capture(self, call: Callable[[int], object], launches: int) -> Recorded:
        """What torch.cuda.graph does, less the waiting and the emptying of caches around it. The call has run before,
        or what it loads cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                for i in range(launches):
                    call(i)
            except BaseException:  # an unfinished capture would spoil every later one
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return Recorded(graph, launches)

    def times(self, recorded: Sequence[Recorded], rounds: int, rest: float = 0.0) -> list[list[float]]:
        """Microseconds of one call, of each graph in each round; one more round comes first. The graphs take turns, in
        an order of each round's own, so that none always comes after the same one.

        `rest` is so many seconds of an idle GPU before each replay: kernels that run at the limit of power slow down
        whatever comes after them.
        """
        marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in recorded]
        order = list(zip(recorded, marks, strict=True))
        draw = random.Random(0)
        with torch.cuda.stream(self.stream):
            for turn in range(rounds + 1):
                draw.shuffle(order)
                for one, events in order:
                    if rest > 0 and turn > 0:
                        self.stream.synchronize()
                        time.sleep(rest)
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    one.graph.replay()
                    end.record()
                    if turn > 0:
                        events.append((begin, end))
        self.stream.synchronize()
        return [
            [begin.elapsed_time(end) * 1e3 / one.launches for begin, end in events]
            for one, events in zip(recorded, marks, strict=True)
        ]


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a kernel that inverts a gigabyte (a graph's own copy is slower)."""
    a = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / statistics.median(graph_us(lambda _: torch.bitwise_not(a, out=b), 4))


def sparse_tflops() -> float:
    return WGMMA_SP_TFLOPS if planner_device(0).compute_capability == 90 else MMA_SP_TFLOPS


def full_precision_sums() -> None:
    """cuBLAS adds in float32 across its splits too, as everything here does."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def driver_and_power_limit() -> tuple[str | None, str | None]:
    """Of the first GPU; None where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        driver, power_limit = told.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None, None
    return driver, power_limit


def command_line(argv: Sequence[str]) -> str:
    """How the program was called, files by their names alone."""
    named = [Path(part).name if "/" in part else part for part in argv]
    return shlex.join(["python", f"benchmarks/{named[0]}", *named[1:]])


def machine() -> dict[str, object]:
    """What a result depends on besides the code."""
    driver, power_limit = driver_and_power_limit()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "power_limit": power_limit,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sparse_marlin": sparse_marlin.__version__,
        "commit": commit(),
        "command": command_line(sys.argv),
    }
