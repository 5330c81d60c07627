"""Times the four linears of a Llama-3-8B decoder layer, one after another, with and without dependent launch, and told
which weight comes next.

    python benchmarks/bench_layer.py --out benchmarks/results/layer.json
    python benchmarks/bench_layer.py --dtype bfloat16 --num-bits 8 --tokens 1,16

Each linear reads the first M x K values of what the one before it wrote, so no two can run at the same time; what lies
between them in a model (attention, norms, the activation function) is left out. One CUDA graph holds --layers layers of
different weights, more than any cache keeps. Correctness comes first: every linear against float64, and the chain with
dependent launch must give the bits of the chain without it, in every output, and so must that which is told what comes
next (`sparse_marlin_gemm_prefetch` with the first --ahead KB of that weight, few, since nothing lies between). Then
cuBLAS and ours, without dependent launch, with it, and told what comes next are timed in turn, several rounds; the
median counts.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import copy_bandwidth, full_precision_sums, graph_us, machine, positive_ints, tile_name
from weights import check_rows, random_packed, several_scales

from sparse_marlin import _core, testing
from sparse_marlin.info import planner_device

LINEARS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}  # K, N
TOKENS = [1, 8, 16, 32, 64, 128]
ROUNDS = 3
DENSE_LAYERS = 2  # 870 MB of float16: as cold as any number of layers

Linear = Callable[[torch.Tensor, int, str], torch.Tensor]  # activations, layer, name -> output


class Chain:
    """Weights of several layers, and the walk through them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.group_size, self.num_bits, self.layers = args.group_size, args.num_bits, args.layers
        self.ahead = args.ahead << 10
        self.dtype = getattr(torch, args.dtype)
        self.device = planner_device(torch.cuda.current_device())
        self.packed = {
            name: [random_packed(n, k, self.num_bits) for _ in range(self.layers)] for name, (k, n) in LINEARS.items()
        }
        self.scales = {
            name: several_scales(self.layers, n, k, self.group_size, self.num_bits, self.dtype)
            for name, (k, n) in LINEARS.items()
        }
        self.dense = {
            name: [
                torch.randn(n, k, device="cuda", dtype=self.dtype).mul_(k**-0.5)
                for _ in range(min(self.layers, DENSE_LAYERS))
            ]
            for name, (k, n) in LINEARS.items()
        }

    def bytes_read(self) -> int:
        """Of weights and scales, a layer."""
        return sum(self.packed[name][0].numel() * 4 + self.scales[name][0].numel() * 2 for name in LINEARS)

    def plan(self, tokens: int, name: str) -> _core.Plan:
        k, n = LINEARS[name]
        problem = _core.Problem(tokens, n, k, self.group_size, self.num_bits, str(self.dtype).removeprefix("torch."))
        return _core.plan(problem, self.device)

    def ours(self, tokens: int, dependent: bool) -> Linear:
        if dependent:  # the operator as users call it
            gemm = torch.ops.sparse_marlin.sparse_marlin_gemm
            return lambda a, layer, name: gemm(
                a, self.packed[name][layer], self.scales[name][layer], self.group_size, self.num_bits
            )
        gemm_tile = torch.ops.sparse_marlin._sparse_marlin_gemm_tile
        plans = {name: self.plan(tokens, name) for name in LINEARS}
        return lambda a, layer, name: gemm_tile(
            a, self.packed[name][layer], self.scales[name][layer], self.group_size, self.num_bits, None,
            plans[name].tile, plans[name].splits, dependent=False,
        )  # fmt: skip

    def told(self, a: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        """The operator that is told what comes next."""
        names = list(LINEARS)
        place = names.index(name) + 1
        following = self.packed[names[place % len(names)]][(layer + place // len(names)) % self.layers]
        rows = max(1, round(self.ahead / (following[0].numel() * following.element_size())))
        return torch.ops.sparse_marlin.sparse_marlin_gemm_prefetch(
            a, self.packed[name][layer], self.scales[name][layer], following[:rows], self.group_size, self.num_bits
        )

    def cublas(self, a: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        weights = self.dense[name]
        return torch.mm(a, weights[layer % len(weights)].t())

    def walk(
        self, start: torch.Tensor, linear: Linear, keep: list[torch.Tensor] | None = None
    ) -> Callable[[int], None]:
        """call(i) runs the i-th linear of the chain on the output of the one before."""
        names, tokens, last = list(LINEARS), start.shape[0], start

        def call(i: int) -> None:
            nonlocal last
            layer, place = divmod(i, len(names))
            name = names[place]
            k = LINEARS[name][0]
            a = start if i == 0 else last.view(-1)[: tokens * k].view(tokens, k)
            last = linear(a, layer % self.layers, name)
            if keep is not None:
                keep.append(last)

        return call

    @property
    def length(self) -> int:
        return self.layers * len(LINEARS)

    def replayed(self, start: torch.Tensor, linear: Linear) -> list[torch.Tensor]:
        """Every output of the chain, from the second replay of a graph."""
        outputs: list[torch.Tensor] = []
        call = self.walk(start, linear, outputs)
        for i in range(self.length):  # kernels are loaded before anything is captured
            call(i)
        outputs.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.length):
                call(i)
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        return [out.clone() for out in outputs]

    def check(self, start: torch.Tensor) -> None:
        tokens = start.shape[0]
        plain = self.replayed(start, self.ours(tokens, dependent=False))
        names = list(LINEARS)
        for what, linear in (("with dependent launch", self.ours(tokens, dependent=True)), ("and told", self.told)):
            for i, (got, wanted) in enumerate(zip(self.replayed(start, linear), plain, strict=True)):
                testing.assert_same_bits(got, wanted, f"linear {i} ({names[i % len(names)]}) {what}")
        if not bool(torch.isfinite(plain[-1]).all()):
            raise AssertionError("the chain overflows")
        a = start
        for name, out in zip(names, plain, strict=False):  # of the first layer
            k = LINEARS[name][0]
            a = a.view(-1)[: tokens * k].view(tokens, k)
            check_rows(a, out, self.packed[name][0], self.scales[name][0], self.group_size, self.num_bits)
            a = out

    def measure(self, tokens: int, bandwidth: float) -> dict[str, object]:
        start = torch.randn(tokens, LINEARS["qkv"][0], device="cuda").to(self.dtype)
        self.check(start)
        contestants: dict[str, Linear] = {
            "cublas": self.cublas,
            "plain": self.ours(tokens, dependent=False),
            "dependent": self.ours(tokens, dependent=True),
            "told": self.told,
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, linear in contestants.items():
                call = self.walk(start, linear)
                times[name] += [us * len(LINEARS) for us in graph_us(call, self.length)]
        median = {name: statistics.median(values) for name, values in times.items()}
        plans = {name: self.plan(tokens, name) for name in LINEARS}
        return {
            "m": tokens,
            **{f"{name}_us": value for name, value in median.items()},
            **{f"{name}_range": [min(values), max(values)] for name, values in times.items()},
            "plain_speedup": median["cublas"] / median["plain"],
            "dependent_speedup": median["cublas"] / median["dependent"],
            "told_speedup": median["cublas"] / median["told"],
            "floor_fraction": self.bytes_read() / bandwidth / min(median["dependent"], median["told"]),
            "plans": {
                name: f"{tile_name(_core.TILES[plan.tile])} splits {plan.splits}" for name, plan in plans.items()
            },
        }


def print_table(result: dict[str, object], rows: list[dict[str, object]]) -> None:
    table = Table(
        title=f"us a layer, {result['gpu']}, {result['dtype']}, {result['num_bits']} bits, group {result['group_size']}"
    )
    for column in ("m", "cuBLAS", "plain", "x", "dependent", "x", "told", "x", "of floor"):
        table.add_column(column, justify="right")
    for row in rows:
        v = {key: float(str(value)) for key, value in row.items() if isinstance(value, (int, float))}
        table.add_row(
            str(row["m"]), f"{v['cublas_us']:.1f}", f"{v['plain_us']:.1f}", f"{v['plain_speedup']:.2f}",
            f"{v['dependent_us']:.1f}", f"{v['dependent_speedup']:.2f}", f"{v['told_us']:.1f}",
            f"{v['told_speedup']:.2f}", f"{v['floor_fraction']:.2f}",
        )  # fmt: skip
    Console(width=130).print(table)
    for row in rows:
        plans = row["plans"]
        assert isinstance(plans, dict)
        print(f"M={row['m']}:", ", ".join(f"{name} {plan}" for name, plan in plans.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ahead", type=int, default=1536, help="KB of the next weight that are asked for")
    parser.add_argument("--tokens", type=positive_ints, default=TOKENS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    full_precision_sums()
    with torch.inference_mode():
        bandwidth, chain = copy_bandwidth(), Chain(args)
        rows = [chain.measure(m, bandwidth) for m in args.tokens]
    result: dict[str, object] = {
        **machine(),
        "dtype": args.dtype,
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "layers": args.layers,
        "ahead_kb": args.ahead,
        "copy_tb_per_s": bandwidth / 1e6,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result, rows)


if __name__ == "__main__":
    main()
