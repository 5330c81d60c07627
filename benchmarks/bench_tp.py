"""Times a decoder layer of Llama-3-70B's shape on 1 and 2 GPUs, dense float16 against 2:4-sparse.

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_tp.py --out benchmarks/results/tp.json
    python benchmarks/bench_tp.py                   # one GPU, or whatever a single process has
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
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Ranks
from rich.console import Console
from rich.table import Table
from timing import (
    full_precision_sums,
    machine,
    positive_ints,
)
from torch import nn
from weights import check_rows, random_packed, random_scales

from sparse_marlin import SparseMarlinLinear
from sparse_marlin.parallel import RowParallelLinear, cut_linear, dense_linear
from sparse_marlin.shard_plan import split_heads, split_layer
from sparse_marlin.slicing import PackedLayer, concat_out, owned

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 8192, 28672, 64, 8, 128
ROUNDS = 2
GRAPH_US = 3000.0
Range = tuple[int, int]
Call = Callable[[torch.Tensor], torch.Tensor]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="with different weights, in one graph")
    parser.add_argument("--batches", type=positive_ints, default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=1024, help="tokens that a decoding step sees")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divides every size, to try the script out")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    full_precision_sums()
    started = time.monotonic()
    ranks = Ranks(args.device)
    with torch.inference_mode():
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
        print_layers(result, rows)
    if ranks.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
