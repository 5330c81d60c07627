"""Times a decoder layer of Llama-3-70B's shape on 1 and 2 GPUs, dense float16 against 2:4-sparse, and layers' slices.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_tp.py --out benchmarks/results/tp.json
    python benchmarks/bench_tp.py --slices --out benchmarks/results/tp_slices.json     # one GPU
    torchrun --standalone --nproc-per-node 2 benchmarks/bench_tp.py --device cpu --scale 16   # tries the script out

The layer: norm, fused q, k, v, rotary embedding, grouped-query attention, o, norm, fused gate and up, SiLU, down, with
residuals; the only difference between dense and sparse is the four linears. Decoding reads and writes a cache of
--context tokens; the prompt is one sequence of --prompt tokens. On one GPU every rank runs the whole layer by itself,
on two each runs its heads and inner features and sums with NCCL after o and down. --layers layers of different weights
run one after another in one CUDA graph, which is more than any cache keeps.

Correctness first: each packed linear of each rank against float64, and the result of two GPUs against that of one, no
further from it than the dense layers' are from each other, times two. Contestants take turns; a time is the slowest
rank's, the median of the replays counts. "all-reduce" is the share of a layer's time that disappears when the sums are
left out of the same graph (waiting for the other rank included), and beside it what the two sums take alone.

--slices: every linear of 8B, 70B and 405B on 1, 2, 4 and 8 ranks as one GPU runs it, as a fraction of the floor
(bench_gemm.py's), against the whole layer's.
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from timing import (
    REPLAYS,
    ROTATED_BYTES,
    WGMMA_SP_TFLOPS,
    copy_bandwidth,
    full_precision_sums,
    machine,
    positive_ints,
    sparse_tflops,
)
from torch import nn
from weights import check_rows, random_packed, random_scales, random_slices

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, _core
from sparse_marlin.info import planner_device
from sparse_marlin.parallel import RowParallelLinear, cut_linear, dense_linear
from sparse_marlin.shard_plan import split_heads, split_layer
from sparse_marlin.slicing import PackedLayer, concat_out, owned

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 8192, 28672, 64, 8, 128
ROUNDS = 2
GRAPH_US = 3000.0
Range = tuple[int, int]
Call = Callable[[torch.Tensor], torch.Tensor]


class Ranks:
    """This process's place: rank 0 of 1 without torchrun."""

    def __init__(self, device: str) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
        )
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=60),
                device_id=self.device if device == "cuda" else None,
            )

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.size > 1:
            dist.barrier()

    def slowest(self, values: list[float]) -> list[float]:
        times = torch.tensor(values, device=self.device)
        if self.size > 1:
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
        return times.tolist()

    def all_true(self, value: bool) -> bool:
        flag = torch.tensor(float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def time_us(self, call: Callable[[], object], passes: int) -> list[float]:
        """Microseconds of one call on the slowest rank, from replays of a CUDA graph of `passes` calls."""
        if self.device.type == "cpu":
            found = []
            for _ in range(2):
                self.barrier()
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e6)
            return self.slowest(found)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # loads kernels, opens connections
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.barrier()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread of this process, which may ask the driver something meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(passes):
                call()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        found = []
        for _ in range(REPLAYS):
            self.barrier()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / passes)
        return self.slowest(found)


class Layer:
    """A decoder layer, or a rank's part of one."""

    def __init__(self, linears: dict[str, nn.Module], heads: int, kv_heads: int, device: torch.device) -> None:
        self.linears, self.heads, self.kv_heads = linears, heads, kv_heads
        self.norm = nn.RMSNorm(linears["qkv"].in_features, dtype=torch.float16, device=device).requires_grad_(False)  # type: ignore[arg-type]
        self.keys = self.values = torch.empty(0)

    def prepare(self, batch: int, context: int, device: torch.device) -> None:
        """A cache of `context` tokens; 0: a prompt, without a cache."""
        shape = (batch, self.kv_heads, context, HEAD)
        generator = torch.Generator(device).manual_seed(0)
        self.keys = torch.randn(shape, dtype=torch.float16, device=device, generator=generator)
        self.values = torch.randn(shape, dtype=torch.float16, device=device, generator=generator)

    def __call__(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[batch, tokens, hidden]"""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        split = self.linears["qkv"](self.norm(x)).unflatten(-1, (-1, HEAD)).transpose(1, 2).split(sizes, 1)
        query, key, value = rotated(split[0], angles), rotated(split[1], angles), split[2]
        if self.keys.shape[2]:
            self.keys[:, :, -1:].copy_(key)
            self.values[:, :, -1:].copy_(value)
            key, value = self.keys, self.values
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True
        )
        x = x + self.linears["o"](mixed.transpose(1, 2).flatten(2))
        gate, up = self.linears["gate_up"](self.norm(x)).chunk(2, -1)
        return x + self.linears["down"](nn.functional.silu(gate) * up)


def rotated(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = angles
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def rotary(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 500000.0 ** (-torch.arange(0, HEAD, 2, device=positions.device) / HEAD)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return angles.cos().half(), angles.sin().half()


class WithoutSums(nn.Module):
    """A row-parallel layer that keeps its part of the sum to itself: what the time without communication is."""

    def __init__(self, layer: RowParallelLinear) -> None:
        super().__init__()
        self.linear = layer.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Model:
    """--layers layers, whole and this rank's part of them, dense and sparse. All ranks draw the same weights."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        self.hidden, self.inner = HIDDEN // args.scale, INNER // args.scale
        self.heads, self.kv_heads = max(HEADS // args.scale, ranks.size), max(KV_HEADS // args.scale, ranks.size)
        self.args = args
        shares = split_heads(self.heads, self.kv_heads, ranks.size)
        (first, last), (first_kv, last_kv) = shares[ranks.rank]
        self.local = (last - first, last_kv - first_kv)
        self.query_part, self.kv_part = (first * HEAD, last * HEAD), (first_kv * HEAD, last_kv * HEAD)
        self.query_ranges = tuple((share[0][0] * HEAD, share[0][1] * HEAD) for share in shares)
        self.whole: dict[str, list[Layer]] = {"dense": [], "sparse": []}
        self.parts: dict[str, list[Layer]] = {"dense": [], "sparse": []}
        for _ in range(args.layers):
            for kind, make in (("dense", self.dense), ("sparse", self.sparse)):
                drawn = {
                    "q": make(self.heads * HEAD, self.hidden),
                    "k": make(self.kv_heads * HEAD, self.hidden),
                    "v": make(self.kv_heads * HEAD, self.hidden),
                    "o": make(self.hidden, self.heads * HEAD),
                    "gate": make(self.inner, self.hidden),
                    "up": make(self.inner, self.hidden),
                    "down": make(self.hidden, self.inner),
                }
                if kind == "sparse" and not self.whole["sparse"]:
                    self.check_linears(drawn)
                self.whole[kind].append(
                    Layer(
                        {
                            "qkv": fused([drawn["q"], drawn["k"], drawn["v"]]),
                            "o": drawn["o"],
                            "gate_up": fused([drawn["gate"], drawn["up"]]),
                            "down": drawn["down"],
                        },
                        self.heads,
                        self.kv_heads,
                        self.device,
                    )
                )
                self.parts[kind].append(self.part(drawn))

    def dense(self, n: int, k: int) -> nn.Module:
        return dense_linear(torch.randn(n, k, device=self.device, dtype=torch.float16).mul_(k**-0.5), None)

    def sparse(self, n: int, k: int) -> nn.Module:
        packed = random_packed(n, k, self.args.num_bits, self.device.type)
        scales = random_scales(n, k, self.args.group_size, self.args.num_bits, torch.float16, self.device.type)
        return PackedLayer(packed, scales, n, k, self.args.group_size, self.args.num_bits).to_linear()

    def part(self, drawn: dict[str, nn.Module]) -> Layer:
        rank = self.ranks.rank
        inner = split_layer(drawn["down"], self.ranks.size, False)

        # Column layers need nothing around them: what they give is this rank's part.
        def columns(names: list[str], parts: list[Range]) -> nn.Module:
            return fused([cut_linear(drawn[name], True, part) for name, part in zip(names, parts, strict=True)])

        def row(name: str, ranges: tuple[Range, ...]) -> nn.Module:
            return RowParallelLinear(cut_linear(drawn[name], False, ranges[rank], bias=rank == 0), ranges)

        qkv = columns(["q", "k", "v"], [self.query_part, self.kv_part, self.kv_part])
        return Layer(
            {
                "qkv": qkv,
                "o": row("o", self.query_ranges),
                "gate_up": columns(["gate", "up"], [inner[rank]] * 2),
                "down": row("down", inner),
            },
            *self.local,
            self.device,
        )

    def check_linears(self, drawn: dict[str, nn.Module]) -> None:
        generator = torch.Generator(self.device).manual_seed(2)  # parts differ in size, the ranks' weights may not
        for name, layer in drawn.items():
            assert isinstance(layer, SparseMarlinLinear)
            column = name not in ("o", "down")
            for part in (None, split_layer(layer, self.ranks.size, column)[self.ranks.rank]):
                linear: Any = layer if part is None else cut_linear(layer, column, part)
                for tokens in (1, 17):
                    a = torch.randn(tokens, linear.in_features, device=self.device, generator=generator).half()
                    check_rows(a, linear(a), linear.weight_packed, linear.scales, linear.group_size, self.args.num_bits)

    def walk(self, layers: list[Layer], x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        for layer in layers:
            x = layer(x, angles)
        return x

    def workloads(self) -> Iterator[tuple[str, int, int, int]]:
        """(what, batch, tokens of a sequence, context of the cache)"""
        for batch in self.args.batches:
            yield "decode", batch, 1, self.args.context
        yield "prefill", 1, self.args.prompt, 0

    def measure(self, what: str, batch: int, tokens: int, context: int) -> dict[str, object]:
        generator = torch.Generator(self.device).manual_seed(1)
        x = torch.randn(batch, tokens, self.hidden, device=self.device, dtype=torch.float16, generator=generator)
        angles = rotary(torch.arange(max(context - tokens, 0), max(context, tokens), device=self.device)[-tokens:])
        for layers in (*self.whole.values(), *self.parts.values()):
            for layer in layers:
                layer.prepare(batch, context, self.device)
        self.share_caches()
        self.check(x, angles)
        quiet = {kind: [without_sums(layer) for layer in layers] for kind, layers in self.parts.items()}
        sums = torch.randn_like(x)

        def both_sums() -> None:
            for _ in range(2 * self.args.layers if self.ranks.size > 1 else 0):
                dist.all_reduce(sums)

        contestants: dict[str, Callable[[], object]] = {}
        for kind in self.whole:
            contestants[f"{kind}_1"] = lambda kind=kind: self.walk(self.whole[kind], x, angles)  # type: ignore[misc]
            contestants[f"{kind}_n"] = lambda kind=kind: self.walk(self.parts[kind], x, angles)  # type: ignore[misc]
            contestants[f"{kind}_n_without_sums"] = lambda kind=kind: self.walk(quiet[kind], x, angles)  # type: ignore[misc]
        if self.ranks.size > 1:
            contestants["sums"] = both_sums
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, call in contestants.items():
                guess = statistics.median(times[name]) * self.args.layers if times[name] else GRAPH_US / 4
                passes = max(1, min(16, round(GRAPH_US / guess)))
                times[name] += [us / self.args.layers for us in self.ranks.time_us(call, passes)]
        median = {name: statistics.median(values) for name, values in times.items()}
        row: dict[str, object] = {"what": what, "batch": batch, "tokens": tokens, "context": context or tokens}
        row.update({f"{name}_us": value for name, value in median.items()})
        row.update({f"{name}_range": [min(values), max(values)] for name, values in times.items()})
        for count in ("1", "n"):
            row[f"speedup_{count}"] = median[f"dense_{count}"] / median[f"sparse_{count}"]
        for kind in self.whole:
            row[f"{kind}_scaling"] = median[f"{kind}_1"] / median[f"{kind}_n"]
            row[f"{kind}_sum_share"] = 1 - median[f"{kind}_n_without_sums"] / median[f"{kind}_n"]
        return row

    def share_caches(self) -> None:
        """The parts read the same keys and values as the whole."""
        first, last = (edge // HEAD for edge in self.kv_part)
        for kind, layers in self.parts.items():
            for part, whole in zip(layers, self.whole[kind], strict=True):
                part.keys = whole.keys[:, first:last].contiguous()
                part.values = whole.values[:, first:last].contiguous()

    def check(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> None:
        distance = {}
        for kind in self.whole:
            one, many = self.walk(self.whole[kind], x, angles).float(), self.walk(self.parts[kind], x, angles).float()
            if not bool(torch.isfinite(one).all()):
                raise AssertionError(f"{kind}: the layer overflows")
            distance[kind] = float((many - one).norm() / one.norm())
        good = distance["sparse"] <= 2 * distance["dense"] + 1e-3 and distance["dense"] < 0.02
        if not self.ranks.all_true(good):
            raise AssertionError(
                f"rank {self.ranks.rank}: results of {self.ranks.size} ranks and one differ: {distance}"
            )


def alone(linear: nn.Module) -> nn.Module:
    """A column layer needs nothing around it: its output is the rank's part."""
    return linear


def without_sums(layer: Layer) -> Layer:
    quiet = Layer(dict(layer.linears), layer.heads, layer.kv_heads, layer.keys.device)
    for name in ("o", "down"):
        row = layer.linears[name]
        assert isinstance(row, RowParallelLinear)
        quiet.linears[name] = WithoutSums(row)
    quiet.keys, quiet.values = layer.keys, layer.values
    return quiet


def fused(linears: list[nn.Module]) -> nn.Module:
    if isinstance(linears[0], SparseMarlinLinear):
        packed = [PackedLayer.of(each) for each in linears if isinstance(each, SparseMarlinLinear)]
        return owned(concat_out(packed)).to_linear()
    return dense_linear(torch.cat([each.weight.detach() for each in linears]), None)  # type: ignore[operator, union-attr]


# --- slices -----------------------------------------------------------------------------------------------------------


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
    copies = max(1, min(pool.numel() // length, 48))
    weights = [pool[i * length : (i + 1) * length].view(shape) for i in range(copies)]
    scales = random_scales(n, k, GROUP_SIZE, NUM_BITS, torch.float16, ranks.device.type)
    a = torch.randn(m, k, device=ranks.device).half()
    some = a[:17]
    out = sparse_marlin.sparse_marlin_gemm(some, weights[0], scales)
    check_rows(some, out, weights[0], scales, GROUP_SIZE, NUM_BITS)
    gemm, turn = torch.ops.sparse_marlin.sparse_marlin_gemm, itertools.count()

    def call() -> object:
        return gemm(a, weights[next(turn) % copies], scales, GROUP_SIZE, NUM_BITS)

    passes = max(3, min(48, int(1200 / (4 + length / 6e5 + 2 * m * n * k / 1e9))))
    return statistics.median(ranks.time_us(call, passes))


# --- output -----------------------------------------------------------------------------------------------------------


def print_layers(result: dict[str, object], rows: list[dict[str, object]]) -> None:
    table = Table(title=f"us a layer, {result['world_size']} x {result['gpu']}, {result['num_bits']} bits")
    heads = (
        "what",
        "batch",
        "dense 1",
        "sparse 1",
        "x",
        "dense n",
        "sparse n",
        "x",
        "sums alone",
        "of dense",
        "of sparse",
    )
    for column in heads:
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        v = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        table.add_row(
            str(row["what"]), str(row["batch"]), f"{v['dense_1_us']:.1f}", f"{v['sparse_1_us']:.1f}",
            f"{v['speedup_1']:.2f}", f"{v['dense_n_us']:.1f}", f"{v['sparse_n_us']:.1f}", f"{v['speedup_n']:.2f}",
            f"{v.get('sums_us', 0):.1f}", f"{v['dense_sum_share']:.0%}", f"{v['sparse_sum_share']:.0%}",
        )  # fmt: skip
    Console(width=130).print(table)


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
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="with different weights, in one graph")
    parser.add_argument("--batches", type=positive_ints, default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="tokens that a decoding step sees")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--slices", action="store_true", help="slices of single linears on one GPU instead")
    parser.add_argument("--tokens", type=positive_ints, default=[1, 16, 64, 256, 1024], help="with --slices")
    parser.add_argument("--world-sizes", type=positive_ints, default=list(WORLD_SIZES), help="with --slices")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try the script out")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    full_precision_sums()
    started = time.monotonic()
    ranks = Ranks(args.device)
    with torch.inference_mode():
        if args.slices:
            rows = measure_slices(args, ranks)
        else:
            model = Model(args, ranks)
            rows = [model.measure(*workload) for workload in model.workloads()]
    result: dict[str, object] = {
        **(machine() if args.device == "cuda" else {"gpu": "CPU", "torch": torch.__version__}),
        "world_size": ranks.size,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if args.device == "cuda" else None,
        "dtype": "float16",
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "layers": args.layers,
        "scale": args.scale,
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    if ranks.rank == 0:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
        if args.slices:
            print_slices(rows)
        else:
            print_layers(result, rows)
    if ranks.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
