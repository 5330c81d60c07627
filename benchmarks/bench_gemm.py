"""Times sparse_marlin_gemm against cuBLAS and other kernels on the weight shapes of large language models.

    python benchmarks/bench_gemm.py --out benchmarks/results/gemm.json
    python benchmarks/bench_gemm.py --dtype bfloat16 --num-bits 8 --group-size -1 --tokens 1,16,64 --peers none
    python benchmarks/bench_gemm.py --sparse-marlin libsparse_marlin.so --marlin libmarlin.so  # the public kernels too
    python benchmarks/bench_gemm.py --kernel sm80    # one family of our kernels alone

Protocol: correctness first (ours: every timed plan, every element of 256 features of the first and last 64 tokens,
against float64; peers: the same features against float32); each contestant in a CUDA graph of many launches, its
weights rotated through more than 250 MB so that no cache keeps them; median of the replays with the fastest and
slowest; contestants in turn, so that they see the same clocks, and from --rest-tokens up each replay after --rest
seconds of rest, so that none pays for the power that the one before it drew. Bytes are activations, codes, metadata,
scales and output. `floor` is the larger of bytes over the bandwidth of a large kernel measured in the same run, and
operations over the rate of the sparse tensor cores: on Hopper 1380 TFLOP/s, wgmma.sp with weights dequantized in
registers and everything on chip, in short bursts (power allows less in long ones); elsewhere the 940 TFLOP/s that
mma.sp reaches on an H200.

Peers are timed at --peer-tokens. cuSPARSELt has 16-bit 2:4 weights and the fastest of its default algorithm and the
one that its search prefers; torch's int4 has bfloat16 activations; fp8 has e4m3 weights and activations, converted
beforehand. A peer that fails at a place has no number there, and the result says why. tables.py and plots.py draw
what --out wrote, which is written after every shape.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peer_base import LeftOut, Peer, Weight
from peers import LIBRARY_PEERS, TORCH_PEERS, Setting, build, load_library, why_not
from rich.console import Console
from rich.table import Table
from summary import PEERS, PLAIN, Row, geometric_means, least_ratios, measured_peers, own_speedup, peer_speedup
from timing import (
    Recorded,
    Recorder,
    copies,
    copy_bandwidth,
    full_precision_sums,
    machine,
    positive_ints,
    sparse_tflops,
    tile_name,
)
from weights import check_rows, random_packed, several_scales

from sparse_marlin import _core
from sparse_marlin.info import planner_device

SHAPES = {
    "8B qkv": (4096, 6144),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B gate_up": (8192, 57344),
}  # K, N
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192]
PEER_TOKENS = [1, 16, 64, 256, 1024, 4096]
KERNELS = tuple(dict.fromkeys(tile.kernel for tile in _core.TILES))
CHECKED_TOKENS = 64
GRAPH_US, MOST_LAUNCHES, LEAST_LAUNCHES = 2000.0, 48, 2
ROUNDS, RESTED_ROUNDS = 5, 3
# Seconds, for the estimate alone: the start of CUDA and cuBLAS; a shape's weights; those of a peer; a measurement.
START_S, SHAPE_S, PEER_S, TIMING_S = 8.0, 1.5, 0.5, 0.1


def best_plan(problem: _core.Problem, device: _core.Device, kernel: str | None) -> _core.Plan | None:
    """The planner's choice; of one family, its plan of the least predicted time, None where it has none."""
    if kernel is None:
        return _core.plan(problem, device)
    plans = []
    for number, tile in enumerate(_core.TILES):
        if tile.kernel == kernel:
            try:
                plans.append(_core.plan_with_tile(problem, device, number))
            except ValueError:  # the tile does not fit the problem or the device
                continue
    return min(plans, key=lambda plan: plan.predicted_us, default=None)


class Case:
    """One weight shape: our packed weights, dense ones for cuBLAS, and the peers."""

    def __init__(
        self,
        shape: str,
        args: argparse.Namespace,
        recorder: Recorder,
        peers: list[str],
        libraries: dict[str, ctypes.CDLL],
        left_out: LeftOut,
    ) -> None:
        self.shape, self.args, self.recorder, self.left_out = shape, args, recorder, left_out
        self.k, self.n = SHAPES[shape]
        self.dtype, self.device = getattr(torch, args.dtype), planner_device(torch.cuda.current_device())
        packed = random_packed(self.n, self.k, args.num_bits)
        self.weight_bytes = packed.numel() * packed.element_size()
        self.packed = [packed] + [packed.clone() for _ in range(copies(self.weight_bytes) - 1)]
        self.scales = several_scales(len(self.packed), self.n, self.k, args.group_size, args.num_bits, self.dtype)
        dense = torch.randn(self.n, self.k, device="cuda", dtype=self.dtype).mul_(0.02)
        self.dense = [dense] + [dense.clone() for _ in range(copies(2 * dense.numel()) - 1)]
        self.peers: dict[str, Peer] = {}
        weight = Weight(dense, args.group_size)
        for name in peers:
            if peer := left_out.attempt(
                name, shape, build, name, weight, recorder, args.search_seconds, libraries.get(name)
            ):
                self.peers[name] = peer

    def ours(self, a: torch.Tensor, plan: _core.Plan) -> Callable[[int], torch.Tensor]:
        """As users call it; with --kernel, the plan of that family."""
        if self.args.kernel is not None:
            return self.planned(a, plan, True)
        group_size, num_bits = self.args.group_size, self.args.num_bits
        gemm = torch.ops.sparse_marlin.sparse_marlin_gemm
        count = len(self.packed)
        return lambda i: gemm(a, self.packed[i % count], self.scales[i % count], group_size, num_bits)

    def planned(self, a: torch.Tensor, plan: _core.Plan, dependent: bool) -> Callable[[int], torch.Tensor]:
        group_size, num_bits = self.args.group_size, self.args.num_bits
        gemm_tile, count = torch.ops.sparse_marlin._sparse_marlin_gemm_tile, len(self.packed)
        return lambda i: gemm_tile(
            a, self.packed[i % count], self.scales[i % count], group_size, num_bits, None, plan.tile, plan.splits,
            dependent,
        )  # fmt: skip

    def check(self, a: torch.Tensor, out: torch.Tensor) -> None:
        edge = min(CHECKED_TOKENS, len(a))
        for start in sorted({0, len(a) - edge}):
            tokens = slice(start, start + edge)
            weight = self.packed[0], self.scales[0], self.args.group_size, self.args.num_bits
            check_rows(a[tokens], out[tokens], *weight)

    @staticmethod
    def prepared(peer: Peer, a: torch.Tensor) -> Callable[[int], object]:
        call = peer.prepare(a)
        peer.check(a, call)
        return call

    def captured(self, call: Callable[[int], object], most: int) -> Recorded:
        """Of a peer, which may be much slower than ours: fewer launches then."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call(1)
        end.record()
        end.synchronize()
        launches = max(1, min(most, int(GRAPH_US / (begin.elapsed_time(end) * 1e3))))
        return self.recorder.capture(call, launches)

    def measure(self, tokens: int, bandwidth: float) -> Row | None:
        args, where = self.args, f"{self.shape} M={tokens}"
        problem = _core.Problem(tokens, self.n, self.k, args.group_size, args.num_bits, args.dtype)
        plan = best_plan(problem, self.device, args.kernel)
        if plan is None:
            self.left_out.add("ours", where, f"the {args.kernel} kernel has no tile for it")
            return None
        a = torch.randn(tokens, self.k, device="cuda").to(self.dtype)
        out = torch.empty(tokens, self.n, device="cuda", dtype=self.dtype)
        calls: dict[str, Callable[[int], object]] = {
            "cublas": lambda i: torch.mm(a, self.dense[i % len(self.dense)].t(), out=out),
            "ours": self.ours(a, plan),
        }
        if args.plain:
            calls[PLAIN] = self.planned(a, plan, False)
        self.check(a, self.ours(a, plan)(0))
        calls["cublas"](0)
        if tokens in args.peer_tokens:
            for name, peer in self.peers.items():
                if call := self.left_out.attempt(name, where, self.prepared, peer, a):
                    calls[name] = call
        most = max(LEAST_LAUNCHES, min(MOST_LAUNCHES, int(GRAPH_US / plan.predicted_us)))
        recorded = {}
        for name, call in calls.items():
            if name not in self.peers:
                recorded[name] = self.recorder.capture(call, most)
            elif graph := self.left_out.attempt(name, where, self.captured, call, most):
                recorded[name] = graph
        rested = tokens >= args.rest_tokens
        times = self.recorder.times(
            list(recorded.values()), RESTED_ROUNDS if rested else ROUNDS, args.rest if rested else 0.0
        )
        return self.row(plan, tokens, bandwidth, {name: sorted(t) for name, t in zip(recorded, times, strict=True)})

    def row(self, plan: _core.Plan, tokens: int, bandwidth: float, times: dict[str, list[float]]) -> Row:
        median = {name: statistics.median(values) for name, values in times.items()}
        us, cublas = median["ours"], median["cublas"]
        flops = 2 * tokens * self.n * self.k
        moved = self.weight_bytes + self.scales[0].numel() * 2 + tokens * (self.k + self.n) * 2
        tile = _core.TILES[plan.tile]
        row: Row = {
            "shape": self.shape,
            "k": self.k,
            "n": self.n,
            "m": tokens,
            "us": us,
            "us_range": [times["ours"][0], times["ours"][-1]],
            "cublas_us": cublas,
            "cublas_range": [times["cublas"][0], times["cublas"][-1]],
            "speedup": cublas / us,
            "tflops": flops / us / 1e6,
            "tb_per_s": moved / us / 1e6,
            "floor_fraction": max(moved / bandwidth, flops / sparse_tflops() / 1e6) / us,
            "tile": f"{tile_name(tile)} splits {plan.splits}",
        }
        for name in (PLAIN, *self.peers):
            if name in times:
                peer: Row = {"us": median[name], "us_range": [times[name][0], times[name][-1]]}
                peer["speedup"] = cublas / median[name]
                if name in self.peers and self.peers[name].note:
                    peer["note"] = self.peers[name].note
                row.setdefault("peers", {})[name] = peer
        return row


def usable_peers(args: argparse.Namespace, names: list[str], left_out: LeftOut) -> list[str]:
    """Of these names, the peers that have a kernel for what is measured."""
    if not set(args.peer_tokens) & set(args.tokens):
        return []
    capability = planner_device(torch.cuda.current_device()).compute_capability
    setting = Setting(args.dtype, args.num_bits, args.group_size, capability)
    reasons = {name: why_not(name, setting) for name in names}
    for name, reason in reasons.items():
        if reason is not None:
            left_out.add(name, "everywhere", reason)
    return [name for name, reason in reasons.items() if reason is None]


def estimate_seconds(args: argparse.Namespace, peers: int) -> float:
    """Roughly; a search of cuSPARSELt's may add up to --search-seconds at the larger sizes."""
    seconds = START_S
    for tokens in args.tokens:
        contestants = 2 + (peers if tokens in args.peer_tokens else 0)
        rest = RESTED_ROUNDS * args.rest if tokens >= args.rest_tokens else 0.0
        seconds += len(args.shapes) * contestants * (TIMING_S + rest)
    return seconds + len(args.shapes) * (SHAPE_S + PEER_S * peers)


def summarize(result: Row) -> None:
    """Adds what the rows say together."""
    rows: list[Row] = result["rows"]
    result["geomean"] = geometric_means(rows, own_speedup)
    result["geomean_peers"] = {
        name: geometric_means(rows, lambda row, name=name: peer_speedup(row, name)) for name in measured_peers(rows)
    }
    result["least"] = {name: {"x": ratio, "at": at} for name, (ratio, at) in least_ratios(rows).items()}


def write(path: Path, result: Row) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def print_table(result: Row) -> None:
    rows: list[Row] = result["rows"]
    table = Table(title=f"{result['gpu']}, {result['dtype']}, {result['num_bits']} bits, group {result['group_size']}")
    names = measured_peers(rows)
    columns = (
        "shape",
        "m",
        "cuBLAS us",
        "us",
        "x",
        *(f"{name} x" for name in names),
        "TFLOP/s",
        "TB/s",
        "of floor",
        "plan",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("shape", "plan") else "right")
    for row in rows:
        others = [peer_speedup(row, name) for name in names]
        table.add_row(
            row["shape"], str(row["m"]), f"{row['cublas_us']:.1f}", f"{row['us']:.1f}", f"{row['speedup']:.2f}",
            *("" if x is None else f"{x:.2f}" for x in others), f"{row['tflops']:.0f}", f"{row['tb_per_s']:.2f}",
            f"{row['floor_fraction']:.2f}", row["tile"],
        )  # fmt: skip
    Console(width=170).print(table)
    print("geometric means, x cuBLAS:")
    for label, means in [("ours", result["geomean"]), *((PEERS[p], m) for p, m in result["geomean_peers"].items())]:
        print(f"  {label}:", "  ".join(f"M={m} {value:.2f}" for m, value in means.items()))
    for name, found in result["least"].items():
        print(f"least x {name}: {found['x']:.2f} ({found['at']})")


def peer_names(text: str) -> list[str]:
    """For argparse."""
    names = {"all": list(TORCH_PEERS), "none": []}.get(text, text.split(","))
    if not set(names) <= set(TORCH_PEERS):
        raise ValueError
    return list(dict.fromkeys(names))


def shape_names(text: str) -> list[str]:
    """For argparse."""
    names = text.split(",")
    if not set(names) <= set(SHAPES):
        raise ValueError
    return names


peer_names.__name__ = f"all, none or names of {', '.join(TORCH_PEERS)} separated by commas"
shape_names.__name__ = f"names of {', '.join(SHAPES)} separated by commas"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    made.add_argument("--num-bits", type=int, choices=_core.NUM_BITS, default=4)
    made.add_argument("--group-size", type=int, choices=_core.GROUP_SIZES, default=128)
    made.add_argument("--shapes", type=shape_names, default=list(SHAPES))
    made.add_argument("--tokens", type=positive_ints, default=TOKENS)
    made.add_argument("--kernel", choices=KERNELS, help="this family of our kernels instead of the planner's choice")
    made.add_argument("--peers", type=peer_names, default=list(TORCH_PEERS), help="of torch: all, none or names")
    made.add_argument("--peer-tokens", type=positive_ints, default=PEER_TOKENS, help="where peers are timed")
    made.add_argument("--plain", action="store_true", help="ours without dependent launch, too")
    made.add_argument("--sparse-marlin", type=Path, help="shared library with the public Sparse-Marlin kernel")
    made.add_argument("--marlin", type=Path, help="shared library with the public dense Marlin kernel")
    made.add_argument("--search-seconds", type=float, default=2.0, help="the longest of cuSPARSELt's searches")
    made.add_argument("--rest", type=float, default=0.05, help="seconds before a replay, from --rest-tokens up")
    made.add_argument("--rest-tokens", type=int, default=1024)
    made.add_argument("--out", type=Path, help="JSON file to write")
    return made


def main() -> int:
    made = parser()
    args = made.parse_args()
    paths = {name: getattr(args, name.replace("-", "_")) for name in LIBRARY_PEERS}
    try:
        libraries = {name: load_library(name, path) for name, path in paths.items() if path is not None}
    except ValueError as error:
        made.error(str(error))
    if not torch.cuda.is_available():
        made.error("expected a CUDA device, found none")
    torch.manual_seed(0)
    full_precision_sums()
    start, left_out, rows, failure = time.monotonic(), LeftOut(), [], ""
    peers = usable_peers(args, [*args.peers, *libraries], left_out)
    print(f"about {estimate_seconds(args, len(peers)):.0f} s", flush=True)
    result: Row = {}
    with torch.inference_mode():
        recorder = Recorder()
        with torch.cuda.stream(recorder.stream):  # everything on one stream
            bandwidth = copy_bandwidth()
            result = {
                **machine(),
                "dtype": args.dtype,
                "num_bits": args.num_bits,
                "group_size": args.group_size,
                "kernel": args.kernel,
                "rest_s": args.rest,
                "rest_tokens": args.rest_tokens,
                "copy_tb_per_s": bandwidth / 1e6,
                "sparse_tflops": sparse_tflops(),
                "left_out": left_out.reasons,
                "rows": rows,
            }
            for shape in args.shapes:
                try:
                    case = Case(shape, args, recorder, peers, libraries, left_out)
                    for tokens in args.tokens:
                        row = case.measure(tokens, bandwidth)
                        if row is not None:
                            rows.append(row)
                except (RuntimeError, AssertionError) as error:  # what was measured so far is kept
                    failure = f"{shape}: {error}"
                else:
                    del case
                    torch.cuda.empty_cache()
                result["seconds"] = round(time.monotonic() - start, 1)
                summarize(result)
                if args.out:
                    write(args.out, result)
                if failure:
                    break
    print_table(result)
    print(f"{result['seconds']:.0f} s")
    if failure:
        print(f"stopped at {failure}", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
