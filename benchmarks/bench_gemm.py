"""Times sparse_marlin_gemm against cuBLAS on the weight shapes of large language models.

    python benchmarks/bench_gemm.py --out benchmarks/results/gemm.json
    python benchmarks/bench_gemm.py --dtype bfloat16 --num-bits 8 --group-size -1 --tokens 1,16,64
    python benchmarks/bench_gemm.py --sparse-marlin libmarlin.so  # the public kernel too (float16, 4 bits, 128)

Protocol: correctness first (every element, against float64); each side in a CUDA graph of many launches, the weights
rotated through more than 250 MB so that no cache keeps them; median of the replays with the fastest and slowest; both
sides in turn, so that they see the same clocks. Bytes are activations, codes, metadata, scales and output. `floor` is
the larger of bytes over the bandwidth of a large kernel measured in the same run, and operations over the rate of
the sparse tensor cores: on Hopper 1380 TFLOP/s, wgmma.sp with weights dequantized in registers and everything on chip,
in short bursts (power allows less in long ones); elsewhere the 940 TFLOP/s that mma.sp reaches on an H200.
"""

import argparse
import ctypes
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sparse_marlin
from sparse_marlin import _core, testing
from sparse_marlin.info import planner_device

SHAPES = {
    "8B qkv": (4096, 6144),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B gate_up": (8192, 57344),
}
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192]
ROTATED_BYTES = 250e6
DRAWN_ROWS = 2048  # random weights are drawn on the CPU: so many rows, repeated
WGMMA_SP_TFLOPS, MMA_SP_TFLOPS = 1380.0, 940.0
REPLAYS = 5
PEER_SYMBOL = "_ZN6marlin15marlin_cuda_2_4EPKvS1_S1_PvS2_iiiS2_iiP11CUstream_stiiii"


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


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a kernel that inverts a gigabyte (a graph's own copy is slower)."""
    a = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * a.element_size() / statistics.median(graph_us(lambda _: torch.bitwise_not(a, out=b), 4))


def sparse_tflops() -> float:
    return WGMMA_SP_TFLOPS if planner_device(0).compute_capability == 90 else MMA_SP_TFLOPS


def peer_kernel(path: str | None) -> Callable[..., int] | None:
    if path is None:
        return None
    function = ctypes.CDLL(path)[PEER_SYMBOL]
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer] * 5 + [number] * 3 + [pointer, number, number, pointer, *[number] * 4]
    return function


class Case:
    """One weight shape: our packed weights, dense ones for cuBLAS, and what the public kernel reads."""

    def __init__(self, k: int, n: int, args: argparse.Namespace) -> None:
        self.k, self.n, self.args = k, n, args
        self.dtype = getattr(torch, args.dtype)
        codes = testing.random_codes(DRAWN_ROWS, k, args.num_bits, device="cuda").repeat(n // DRAWN_ROWS, 1)
        groups = _core.num_groups(k, args.group_size)
        self.scales = ((torch.rand(groups, n, device="cuda") + 0.5) / (k**0.5 * 2**args.num_bits)).to(self.dtype)
        packed = sparse_marlin.pack_24_weights(codes, self.scales, args.group_size, args.num_bits)
        self.weight_bytes = packed.numel() * 4
        self.packed = [packed] + [packed.clone() for _ in range(self.copies(self.weight_bytes) - 1)]
        dense_copies = self.copies(n * k * 2)
        self.dense = [torch.randn(n, k, device="cuda", dtype=self.dtype) * 0.02 for _ in range(dense_copies)]
        self.check(codes)

    @staticmethod
    def copies(size: int) -> int:
        return max(2, min(48, math.ceil(ROTATED_BYTES / size)))

    def check(self, codes: torch.Tensor) -> None:
        """On a slice of the rows, since a float64 product of everything would take longer than the benchmark."""
        rows = slice(0, 256)
        scales = self.scales[:, rows].contiguous()
        packed = sparse_marlin.pack_24_weights(
            codes[rows].contiguous(), scales, self.args.group_size, self.args.num_bits
        )
        for tokens in (1, 17, 300):
            a = torch.randn(tokens, self.k, device="cuda").to(self.dtype)
            out = sparse_marlin.sparse_marlin_gemm(a, packed, scales, self.args.group_size, self.args.num_bits)
            testing.assert_accepted(out, a, codes[rows], scales, self.args.group_size)
            whole = sparse_marlin.sparse_marlin_gemm(
                a, self.packed[-1], self.scales, self.args.group_size, self.args.num_bits
            )
            testing.assert_accepted(whole[:, rows], a, codes[rows], scales, self.args.group_size)

    def measure(self, tokens: int, bandwidth: float, peer: Callable[..., int] | None) -> dict[str, object]:
        a = torch.randn(tokens, self.k, device="cuda").to(self.dtype)
        out = torch.empty(tokens, self.n, device="cuda", dtype=self.dtype)
        flops = 2 * tokens * self.n * self.k
        launches = max(4, min(48, int(2000 / (max(self.weight_bytes / 2.5e6, flops / 5e8) + 4))))
        group_size, num_bits = self.args.group_size, self.args.num_bits
        gemm = torch.ops.sparse_marlin.sparse_marlin_gemm

        def ours(i: int) -> object:
            return gemm(a, self.packed[i % len(self.packed)], self.scales, group_size, num_bits)

        with torch.inference_mode():
            dense = graph_us(lambda i: torch.mm(a, self.dense[i % len(self.dense)].t(), out=out), launches)
            times = graph_us(ours, launches)
        us, cublas = statistics.median(times), statistics.median(dense)
        moved = self.weight_bytes + self.scales.numel() * 2 + a.numel() * 2 + out.numel() * 2
        floor = max(moved / bandwidth, flops / sparse_tflops() / 1e6)
        problem = _core.Problem(tokens, self.n, self.k, group_size, num_bits, self.args.dtype)
        plan = _core.plan(problem, planner_device(0))
        tile = _core.TILES[plan.tile]
        row: dict[str, object] = {
            "k": self.k,
            "n": self.n,
            "m": tokens,
            "us": us,
            "us_range": [times[0], times[-1]],
            "cublas_us": cublas,
            "cublas_range": [dense[0], dense[-1]],
            "speedup": cublas / us,
            "tflops": flops / us / 1e6,
            "tb_per_s": moved / us / 1e6,
            "floor_fraction": floor / us,
            "tile": f"{tile.kernel} {tile.block_m}x{tile.block_n} share {tile.share} splits {plan.splits}",
        }
        if peer is not None:
            row["sparse_marlin_us"] = self.peer_us(peer, a, out, launches)
            row["sparse_marlin_speedup"] = cublas / float(row["sparse_marlin_us"])
        return row

    def peer_us(self, peer: Callable[..., int], a: torch.Tensor, out: torch.Tensor, launches: int) -> float:
        """The public kernel on random codes and valid random metadata of the same size."""
        copies = len(self.packed)
        shape = (self.k // 32, 2 * self.n)
        codes = [torch.randint(-(2**31), 2**31 - 1, shape, device="cuda").int() for _ in range(copies)]
        nibbles = torch.tensor([4, 8, 12, 9, 13, 14], device="cuda")[
            torch.randint(0, 6, (self.n, self.k // 16, 4), device="cuda")
        ]
        words = sum(nibbles[..., i] << (4 * i) for i in range(4))
        meta = [torch.where(words >= 2**15, words - 2**16, words).short() for _ in range(copies)]
        locks = torch.zeros(self.n, dtype=torch.int32, device="cuda")

        def call(i: int) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            pointers = [t.data_ptr() for t in (a, codes[i % copies], meta[i % copies], out, self.scales)]
            status = peer(*pointers, self.n, a.shape[0], self.k, locks.data_ptr(), 64, 0, stream, -1, -1, -1, 16)
            if status != 0:
                raise RuntimeError(f"public Sparse-Marlin kernel: status {status}")

        return statistics.median(graph_us(call, launches))


def geometric_means(rows: list[dict[str, object]], key: str) -> dict[str, float]:
    tokens = sorted({int(str(row["m"])) for row in rows})
    values = {m: [float(str(row[key])) for row in rows if row["m"] == m and key in row] for m in tokens}
    return {str(m): statistics.geometric_mean(v) for m, v in values.items() if v}


def print_table(result: dict[str, object], rows: list[dict[str, object]]) -> None:
    table = Table(title=f"{result['gpu']}, {result['dtype']}, {result['num_bits']} bits, group {result['group_size']}")
    for column in ("shape", "m", "cuBLAS us", "us", "x", "public x", "TFLOP/s", "TB/s", "of floor", "plan"):
        table.add_column(column, justify="left" if column in ("shape", "plan") else "right")
    for row in rows:
        values = {name: float(str(row[name])) for name in ("cublas_us", "us", "speedup", "tflops", "tb_per_s")}
        public = f"{float(str(row['sparse_marlin_speedup'])):.2f}" if "sparse_marlin_speedup" in row else ""
        table.add_row(
            str(row["shape"]), str(row["m"]), f"{values['cublas_us']:.1f}", f"{values['us']:.1f}",
            f"{values['speedup']:.2f}", public, f"{values['tflops']:.0f}", f"{values['tb_per_s']:.2f}",
            f"{float(str(row['floor_fraction'])):.2f}", str(row["tile"]),
        )  # fmt: skip
    Console(width=130).print(table)
    for key in ("geomean", "geomean_sparse_marlin"):
        if result[key]:
            means = result[key]
            assert isinstance(means, dict)
            print(f"{key}, x cuBLAS:", "  ".join(f"M={m} {value:.2f}" for m, value in means.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--sparse-marlin", help="shared library with the public Sparse-Marlin kernel")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    bandwidth, peer = copy_bandwidth(), peer_kernel(args.sparse_marlin)
    rows = []
    for name, (k, n) in SHAPES.items():
        case = Case(k, n, args)
        rows += [{"shape": name, **case.measure(m, bandwidth, peer)} for m in map(int, args.tokens.split(","))]
        del case
        torch.cuda.empty_cache()
    result: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "dtype": args.dtype,
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "copy_tb_per_s": bandwidth / 1e6,
        "sparse_tflops": sparse_tflops(),
        "geomean": geometric_means(rows, "speedup"),
        "geomean_sparse_marlin": geometric_means(rows, "sparse_marlin_speedup"),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, rows)


if __name__ == "__main__":
    main()
