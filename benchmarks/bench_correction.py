"""What a low-rank correction costs: the time of a layer with rank 64 against the same layer without.

    python benchmarks/bench_correction.py --json benchmarks/results/correction_h100.json

Both in CUDA graphs that take turns, weights and factors each rotated through more memory than the L2 cache holds, as a
model's layers are, float16, 4 bits, group 128. The correction's factor `up` is packed, as `sparse_marlin.compress`
makes it; --dense: float16. --plain: launches of the same plans that do not start before the kernel before has ended, as
they follow a kernel that does not let them.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from timing import Recorder, machine

from sparse_marlin import SparseMarlinLinear, _core, testing
from sparse_marlin.info import planner_device
from sparse_marlin.low_rank import quantize_up

SHAPES = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B o": (8192, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
ROTATED_BYTES = 150e6
ROUNDS = 9


def without_dependent_launch(layer: SparseMarlinLinear, x: torch.Tensor, plan: _core.Plan) -> torch.Tensor:
    """What the layer's forward does; its plan has the correction, as every one of a packed factor does."""
    weights = x, layer.weight_packed, layer.scales
    how = layer.group_size, layer.num_bits, None, plan.tile, plan.splits
    if layer.rank == 0:
        return torch.ops.sparse_marlin._sparse_marlin_gemm_tile(*weights, *how, dependent=False)
    return torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by(
        *weights,
        layer.correction_down,
        layer.correction_up,
        *how,
        dependent=False,
        up_scales=layer.correction_scales,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096])
    parser.add_argument("--dense", action="store_true", help="factors of 16 bits")
    parser.add_argument("--plain", action="store_true", help="without dependent launch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.plain and options.dense:
        parser.error("--plain: expected no --dense, whose correction may be two products behind the launch")
    rows = []
    gpu, recorder = planner_device(), Recorder()
    for name, (n, k) in SHAPES.items():
        codes, scales = testing.random_codes(n, k).cuda(), testing.random_scales(n, k).cuda().half()
        factor_bytes = 2 * options.rank * k + (2 * options.rank if options.dense else 50) * n
        count = max(2, *(int(ROTATED_BYTES / size) + 1 for size in (n * k * 3.125 / 8, factor_bytes)))
        up, down = torch.randn(n, options.rank).cuda() * 0.01, torch.randn(options.rank, k).cuda() * 0.01
        factors = (up if options.dense else quantize_up(up, 128, 4, scale_dtype=torch.float16)), down
        layers = {}
        for rank in (0, options.rank):
            made = SparseMarlinLinear.from_codes(codes, scales, correction=factors if rank else None)
            layers[rank] = [made, *(copy.deepcopy(made) for _ in range(count - 1))]
        wanted_weight = layers[options.rank][0].to_linear().weight.float()
        for tokens in options.tokens:
            x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
            first = layers[options.rank][0]
            wanted = torch.nn.functional.linear(x.float(), wanted_weight)
            assert (first(x).float() - wanted).norm() / wanted.norm() < 5e-3
            problem = _core.Problem(tokens, n, k)
            plan = _core.plan_low_rank(problem, gpu, options.rank, not options.dense)
            plans = {0: _core.plan(problem, gpu), options.rank: plan}

            def call(layer: SparseMarlinLinear, x: torch.Tensor = x, plans: dict[int, _core.Plan] = plans) -> object:
                return without_dependent_launch(layer, x, plans[layer.rank]) if options.plain else layer(x)

            with torch.inference_mode():
                for of in layers.values():  # what a call loads cannot be captured
                    call(of[0])
                torch.cuda.synchronize()
                recorded = [
                    recorder.capture(lambda i, of=of, call=call: call(of[i % len(of)]), 4 * len(of))
                    for of in layers.values()
                ]
                plain, corrected = map(statistics.median, recorder.times(recorded, ROUNDS))
            share = corrected / plain - 1
            rows.append({"shape": name, "tokens": tokens, "plain_us": plain, "corrected_us": corrected, "more": share})
            how = "two products"
            if plan.rank:
                project = f"{plan.project_blocks} blocks project" if plan.project_blocks else "projected before"
                how = f"tile {plan.tile}, {plan.splits} splits, {project}"
            print(f"{name:12} M={tokens:<3} {plain:7.2f} us -> {corrected:7.2f} us  ({share:+.0%})  {how}", flush=True)
    for model in dict.fromkeys(name.split()[0] for name in SHAPES):
        for tokens in options.tokens:
            of_layer = [row for row in rows if row["shape"].split()[0] == model and row["tokens"] == tokens]
            plain, corrected = (sum(row[key] for row in of_layer) for key in ("plain_us", "corrected_us"))
            more = f"({corrected / plain - 1:+.0%})"
            print(f"{model} four linears M={tokens:<3} {plain:7.2f} us -> {corrected:7.2f} us  {more}")
    if options.json:
        asked = {"rank": options.rank, "packed": not options.dense, "dependent": not options.plain}
        result = {**machine(), **asked, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
