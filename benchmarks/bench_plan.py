"""Measures how good the planner's choice is: the chosen plan against every plan that could have been better.

    python benchmarks/bench_plan.py --out benchmarks/results/plan.json
    python benchmarks/bench_plan.py --budget 300 --problems 1000 --cublas
    python benchmarks/bench_plan.py --rank 64 --out benchmarks/results/plan_rank64.json  # with a low-rank correction
    python benchmarks/bench_plan.py --budget 240 --chosen-only --cublas --cusparselt
    python benchmarks/bench_plan.py --budget 240 --chosen-only --cublas --cusparselt --resume --out part.json
    python benchmarks/bench_plan.py --chosen-only --cusparselt --problem 1024,13312,16384    # M,N,K; as often as needed
    python benchmarks/bench_plan.py --report benchmarks/results/plan.json  # prints an earlier result; needs no GPU

Problems are the linears of language models from 1B to 405B, whole and as slices of 2, 4 and 8 GPUs, with 1 to 16384
tokens. They come in rounds of one problem for each number of tokens, the shape drawn at random: wherever the --budget
of seconds (set-up not counted) or --problems end the run, small and large ones are represented alike.

Candidates are the plans predicted within --factor of the best prediction, at most --most of them, and beside them the
best three of every kernel that are within 3. Each is a
CUDA graph of about a millisecond, its weights rotated through more than 250 MB (the activations are not); the graphs of
a problem are replayed in turn. Where other plans seem nearly as good as the best one, these and the chosen one are
timed again, longer, in turn, with a rest before each where they draw much power, and these times count: the least of
many short measurements is more luck than merit. The regret is the chosen plan's time over the best one's, minus 1.
Outputs of all candidates of a problem are compared with the chosen plan's.

A short multiplication is timed in a row with dependent launch and as a plain launch, and the geometric mean of both is
the plan's time: the planner does not know what runs before, and a plan that is good in a chain of our kernels need not
be good after a kernel that ends before ours may start.

--rank looks at plans of the decode kernel that add a low-rank correction of that rank in the same launch, for the
numbers of tokens that they take. Its second factor is packed, as `sparse_marlin.compress` makes it, where there are
groups.

--resume goes on where --out ends, for a sweep that needs more time than one run has: the same GPU and the same
arguments are expected.

--cublas and --cusparselt time these beside, the latter with the better of its default algorithm and, where its search
takes less than --search-seconds, the one that this prefers. JSON has every measurement, so that the cost model can be
fitted again.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peer_base import LeftOut
from peers_torch import CuSparseLt, prune_24
from plan_problems import LOW_RANK_TOKENS, MODELS, TOKENS, Shape, one_problem, problems, shapes
from plan_report import report
from timing import ROTATED_BYTES, Recorded, Recorder, full_precision_sums, machine, tile_name
from weights import FACTOR_DEVIATION, random_slices, several_scales

from sparse_marlin import _core
from sparse_marlin.info import planner_device

SPLITS = (-2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
BEST_OF_KERNEL, FACTOR_OF_KERNEL = 3, 3.0
GRAPH_US = 800.0
MAX_LAUNCHES = 128
CUSPARSELT_LAUNCHES = 32  # of which each takes the host 10 ms
ROUNDS = 3
LONG_US, LONG_ROUNDS = 2000.0, 2
BOTH_MODES_US = 100.0  # longer ones do not feel how they were launched
CONFIRM_WITHIN = 0.08  # of the best plan's time: plans that are timed again
CONFIRM_ROUNDS = 7
CONFIRM_REST_US, CONFIRM_REST = 200.0, 0.02  # plans that draw as much power as there is: seconds of rest before each
POOL_BYTES = 1 << 30  # at least
COMPARED_ELEMENTS = 1 << 22
WRITE_SECONDS = 10.0  # between two writings of what was measured so far


def packs(group_size: int) -> bool:
    """Whether the correction's second factor is packed."""
    return group_size != _core.CHANNELWISE


def chosen_plan(problem: _core.Problem, device: _core.Device, rank: int) -> _core.Plan:
    if rank:
        return _core.plan_low_rank(problem, device, rank, packs(problem.group_size))
    return _core.plan(problem, device)


def candidates(problem: _core.Problem, device: _core.Device, rank: int, factor: float, most: int) -> list[_core.Plan]:
    """The chosen plan first, unless that is one of another kernel for a correction."""
    chosen = chosen_plan(problem, device, rank)
    first, plans = [chosen] if not rank or chosen.project_blocks else [], []
    for number in range(len(_core.TILES)):
        if not _core.may_share(problem, device, number):  # the planner leaves it out, too
            continue
        for splits in SPLITS:
            try:
                if rank:
                    plan = _core.plan_low_rank_with_tile(
                        problem, device, rank, number, splits, packs(problem.group_size)
                    )
                    if not plan.project_blocks:
                        continue
                else:
                    plan = _core.plan_with_tile(problem, device, number, splits)
            except ValueError:  # tile and splits do not fit the problem
                continue
            plans.append(plan)
    plans.sort(key=lambda plan: plan.predicted_us)
    taken = [plan for plan in plans if plan.predicted_us <= factor * plans[0].predicted_us][:most]
    possible = [plan for plan in plans if plan.predicted_us <= FACTOR_OF_KERNEL * plans[0].predicted_us]
    for kernel in sorted({tile.kernel for tile in _core.TILES}):
        taken += [plan for plan in possible if _core.TILES[plan.tile].kernel == kernel][:BEST_OF_KERNEL]
    unique = {(plan.tile, plan.splits): plan for plan in [*first, *taken]}
    return list(unique.values())


class Pools:
    """Memory drawn once, of which every problem takes views: slices of packed weights, and values."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dtype = args, getattr(torch, args.dtype)
        largest = max(shape.k * shape.n for shape in shapes())
        needed = max(shape.k for shape in shapes()) * TOKENS[-1]
        slice_words = _core.slice_words(args.num_bits)
        words = max(POOL_BYTES // 4, *(self.packed_words(shape) for shape in shapes()))
        self.slices = random_slices(words // slice_words, args.num_bits)
        size = max(needed, largest if args.cublas or args.cusparselt else 0)
        self.values = torch.randn(size, device="cuda", dtype=self.dtype)
        if args.rank:  # small values of their own: products with themselves would overflow float16
            size = int(ROTATED_BYTES) // self.dtype.itemsize
            self.small = torch.randn(size, device="cuda", dtype=self.dtype).mul_(FACTOR_DEVIATION)
        if args.cusparselt:  # whatever the shape, K is a multiple of 4: one pattern serves all
            row = 1 << 13
            self.pruned = prune_24(self.values[: size // row * row].clone().view(-1, row)).view(-1)

    def packed_words(self, shape: Shape) -> int:
        rows, row_words = _core.packed_shape(shape.n, shape.k, self.args.num_bits)
        return rows * row_words

    def packed(self, shape: Shape) -> list[torch.Tensor]:
        """Different weights that together exceed the caches, as far as the pool reaches; at least one."""
        packed_shape = _core.packed_shape(shape.n, shape.k, self.args.num_bits)
        count = self.packed_words(shape) // self.slices.shape[1]
        return [self.slices[i * count : (i + 1) * count].view(packed_shape) for i in range(self.copies(shape))]

    def copies(self, shape: Shape) -> int:
        words = self.packed_words(shape)
        return min(int(ROTATED_BYTES / (4 * words)) + 1, self.slices.numel() // words)

    def dense(self, shape: Shape, pool: torch.Tensor) -> list[torch.Tensor]:
        size = shape.n * shape.k
        copies = min(int(ROTATED_BYTES / (2 * size)) + 1, pool.numel() // size)
        return [pool[i * size : (i + 1) * size].view(shape.n, shape.k) for i in range(copies)]

    def acts(self, tokens: int, k: int) -> torch.Tensor:
        return self.values[: tokens * k].view(tokens, k)

    def factors(self, shape: Shape, rank: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """down [rank, K], up [N, rank] or packed, its scales: different ones, more than the caches hold."""
        group_size, num_bits = self.args.group_size, self.args.num_bits
        packed = packs(group_size)
        size = rank * (shape.k + (0 if packed else shape.n))
        parts = self.small[: self.small.numel() // size * size].view(-1, size)
        if not packed:
            return [
                (part[: rank * shape.k].view(rank, shape.k), part[rank * shape.k :].view(shape.n, rank), None)
                for part in parts
            ]
        tail = Shape("up", k=-(-rank // _core.TAIL_RANKS) * _core.TILE_COLS, n=shape.n)
        ups = self.packed(tail)[:MAX_LAUNCHES]
        scales = several_scales(len(ups), tail.n, tail.k, group_size, num_bits, self.dtype)
        return [(part.view(rank, shape.k), *rest) for part, *rest in zip(parts, ups, scales, strict=False)]


class Sweep:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pools, self.recorder, self.left_out = Pools(args), Recorder(), LeftOut()
        torch.cuda.synchronize()  # the pools; everything from here on is on the recorder's stream
        self.device = planner_device(torch.cuda.current_device())

    def measure(self, tokens: int, shape: Shape) -> dict[str, object]:
        with torch.cuda.stream(self.recorder.stream):
            return self.measure_here(tokens, shape)

    def others(self, a: torch.Tensor, shape: Shape) -> dict[str, Callable[[int], object]]:
        """Other people's multiplications, run once."""
        calls: dict[str, Callable[[int], object]] = {}
        if self.args.cublas:
            dense = self.pools.dense(shape, self.pools.values)
            calls["cublas"] = lambda i: torch.mm(a, dense[i % len(dense)].t())
            calls["cublas"](0)
        if self.args.cusparselt:
            where = f"M={a.shape[0]} {shape.k} -> {shape.n}"
            if call := self.left_out.attempt("cusparselt", where, self.cusparselt, a, shape):
                calls["cusparselt"] = call
        return calls

    def cusparselt(self, a: torch.Tensor, shape: Shape) -> Callable[[int], object]:
        pruned = self.pools.dense(shape, self.pools.pruned)
        weights = [torch._cslt_compress(weight) for weight in pruned]
        peer = CuSparseLt(pruned[0], self.recorder, self.args.search_seconds, weights)
        call = peer.prepare(a)
        peer.check(a, call)
        return call

    def measure_here(self, tokens: int, shape: Shape) -> dict[str, object]:
        args = self.args
        problem = _core.Problem(tokens, shape.n, shape.k, args.group_size, args.num_bits, args.dtype)
        if args.chosen_only:
            plans = [chosen_plan(problem, self.device, args.rank)]
        else:
            plans = candidates(problem, self.device, args.rank, args.factor, args.most)
        a, packed = self.pools.acts(tokens, shape.k), self.pools.packed(shape)
        scales = several_scales(len(packed), shape.n, shape.k, args.group_size, args.num_bits, self.pools.dtype)
        factors = self.pools.factors(shape, args.rank) if args.rank else []
        gemm, corrected = (
            torch.ops.sparse_marlin._sparse_marlin_gemm_tile,
            torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by,
        )

        def run(plan: _core.Plan, i: int, dependent: bool = True) -> torch.Tensor:
            weights = packed[i % len(packed)], scales[i % len(packed)]
            how = args.group_size, args.num_bits, None, plan.tile, plan.splits
            if plan.rank:
                down, up, up_scales = factors[i % len(factors)]
                return corrected(a, *weights, down, up, *how, dependent=dependent, up_scales=up_scales)
            return gemm(a, *weights, *how, dependent=dependent)

        self.compare(plans, run)
        others = self.others(a, shape)
        launches = max(1, min(MAX_LAUNCHES, int(GRAPH_US / plans[0].predicted_us)))
        modes = (True, False) if plans[0].predicted_us < BOTH_MODES_US else (True,)
        graphs: list[list[Recorded]] = [  # of a contestant
            [self.recorder.capture(partial(run, plan, dependent=mode), launches) for mode in modes] for plan in plans
        ] + [
            [self.recorder.capture(call, min(launches, CUSPARSELT_LAUNCHES) if name == "cusparselt" else launches)]
            for name, call in others.items()
        ]
        times = self.times(graphs, ROUNDS if plans[0].predicted_us < LONG_US else LONG_ROUNDS)
        self.confirm(graphs[: len(plans)], times)
        medians = [middle(of_modes) for of_modes in times]
        row: dict[str, object] = {"shape": shape.name, "m": tokens, "n": shape.n, "k": shape.k}
        row |= {f"{name}_us": round(us, 3) for name, us in zip(others, medians[len(plans) :], strict=True)}
        row["plans"] = [
            [plan.tile, plan.splits]
            + [round(us, 3) for us in (plan.predicted_us, median, *(statistics.median(t) for t in of_modes))]
            for plan, median, of_modes in zip(plans, medians, times, strict=False)
        ]
        return row

    def times(self, graphs: list[list[Recorded]], rounds: int, rest: float = 0.0) -> list[list[list[float]]]:
        """Of every contestant and mode."""
        flat = iter(self.recorder.times([graph for of_modes in graphs for graph in of_modes], rounds, rest))
        return [[next(flat) for _ in of_modes] for of_modes in graphs]

    def confirm(self, graphs: list[list[Recorded]], times: list[list[list[float]]]) -> None:
        """Times the chosen plan (the first) and those near the best one again, until the best is one of these."""
        again: set[int] = set()
        while True:
            limit = (1 + CONFIRM_WITHIN) * min(middle(times[i]) for i in range(len(graphs)))
            near = {i for i in range(len(graphs)) if i == 0 or middle(times[i]) <= limit}
            if near <= again or near == {0}:
                return
            again |= near
            order, rest = sorted(again), CONFIRM_REST if limit > CONFIRM_REST_US else 0.0
            longer = self.times([graphs[i] for i in order], CONFIRM_ROUNDS, rest)
            for i, of_modes in zip(order, longer, strict=True):
                times[i] = of_modes

    def compare(self, plans: list[_core.Plan], run: Callable[[_core.Plan, int], torch.Tensor]) -> None:
        """No candidate is timed whose result differs by more than roundings do. Loads the kernels, too."""
        wanted = self.last_rows(run(plans[0], 0))
        tolerance = 4 * torch.finfo(self.pools.dtype).eps * wanted.norm()
        for plan in plans[1:]:
            error = (self.last_rows(run(plan, 0)) - wanted).norm()
            if not bool(error <= tolerance):  # NaN, too
                raise AssertionError(
                    f"tile {plan.tile} ({tile_name(_core.TILES[plan.tile])}) splits {plan.splits}: "
                    f"differs from the chosen plan by {float(error / wanted.norm()):.2e}"
                )

    @staticmethod
    def last_rows(out: torch.Tensor) -> torch.Tensor:
        return out[-max(1, COMPARED_ELEMENTS // out.shape[1]) :].float()


def middle(of_modes: list[list[float]]) -> float:
    return statistics.geometric_mean(statistics.median(times) for times in of_modes)


def write(path: Path, result: dict[str, object]) -> None:
    """One problem a line."""
    rows = result["problems"]
    assert isinstance(rows, list)
    head = json.dumps({key: value for key, value in result.items() if key != "problems"}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    part = path.with_name(path.name + ".part")
    part.write_text(head.rstrip("}\n") + f',\n "problems": [\n  {lines}\n ]\n}}\n')
    part.replace(path)


def result_of(
    args: argparse.Namespace, sweep: Sweep, here: dict[str, object], rows: list[dict[str, object]]
) -> dict[str, object]:
    """To be made once: `rows` and what is left out grow in it."""
    return {
        **here,
        "left_out": sweep.left_out.reasons,
        "num_sms": sweep.device.num_sms,
        "l2_bytes": sweep.device.l2_bytes,
        "dram_gb_per_s": sweep.device.dram_gb_per_s,
        "factor": args.factor,
        "most": args.most,
        "plan_columns": ["tile", "splits", "predicted_us", "us", "dependent_us", "plain_us"],  # the chosen plan first
        "tiles": [tile_name(tile) for tile in _core.TILES],
        "problems": rows,
    }


def kept(
    args: argparse.Namespace, here: dict[str, object], wanted: list[tuple[int, Shape]]
) -> tuple[list[dict[str, object]], dict[str, dict[str, list[str]]]]:
    """What an earlier run has measured and left out, if this one goes on with it."""
    if not args.resume or not args.out.exists():
        return [], {}
    before = json.loads(args.out.read_text())
    for key in ("gpu", "dtype", "num_bits", "group_size", "rank", "packed"):
        if before.get(key, 0) != here[key]:
            raise SystemExit(
                f"--resume: {key}: expected {here[key]}, as in this run, got {before.get(key)} in {args.out}"
            )
    for flag, given in (
        ("--cublas", args.cublas),
        ("--cusparselt", args.cusparselt),
        ("--chosen-only", args.chosen_only),
    ):
        if (flag in before["command"].split()) != given:
            raise SystemExit(f"--resume: {flag}: expected as in the run that made {args.out}, {before['command']!r}")
    rows: list[dict[str, object]] = before["problems"]
    for row, (tokens, shape) in zip(rows, wanted, strict=False):
        if (row["m"], row["n"], row["k"]) != (tokens, shape.n, shape.k):
            raise SystemExit(f"--resume: problems: expected this run's, in its order, got others in {args.out}")
    return rows, before["left_out"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--num-bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=0, help="with a low-rank correction")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of measuring, without set-up")
    parser.add_argument("--problems", type=int, default=330, help="at most so many")
    parser.add_argument("--problem", type=one_problem, action="append", help="this one alone: M,N,K")
    parser.add_argument("--models", nargs="+", default=[], choices=list(MODELS), help="only these, and no slices")
    parser.add_argument("--factor", type=float, default=1.6, help="predicted time over the best one, of candidates")
    parser.add_argument("--most", type=int, default=14, help="candidates within the factor, at most")
    parser.add_argument("--cublas", action="store_true", help="time cuBLAS beside")
    parser.add_argument("--cusparselt", action="store_true", help="time cuSPARSELt beside; takes as long again")
    parser.add_argument("--chosen-only", action="store_true", help="no other plans than the planner's choice")
    parser.add_argument("--search-seconds", type=float, default=0.1, help="the longest of cuSPARSELt's searches")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--resume", action="store_true", help="keep what is in --out and go on after it")
    parser.add_argument("--report", type=Path, help="print the summary of this JSON file and measure nothing")
    args = parser.parse_args()
    if args.report:
        report(json.loads(args.report.read_text()))
        return 0
    if args.resume and not args.out:
        parser.error("--resume: expected --out, the file to go on with")
    if args.rank % _core.RANK_MULTIPLE or not 0 <= args.rank <= _core.MAX_RANK:
        takes = f"a multiple of {_core.RANK_MULTIPLE} up to {_core.MAX_RANK}"
        parser.error(f"--rank: expected {takes}, which a launch takes, got {args.rank}")
    if args.rank and (args.chosen_only or args.cublas or args.cusparselt):
        parser.error("--rank: expected none of --chosen-only, --cublas, --cusparselt, which have no correction beside")
    torch.manual_seed(0)
    full_precision_sums()
    wanted = args.problem or problems(args.problems, args.models, args.rank)
    here = {
        **machine(),
        "dtype": args.dtype,
        "num_bits": args.num_bits,
        "group_size": args.group_size,
        "rank": args.rank,
        "packed": args.rank > 0 and packs(args.group_size),
    }
    rows, left_out = kept(args, here, wanted)
    failure = ""
    with torch.inference_mode():
        sweep = Sweep(args)
        sweep.measure(LOW_RANK_TOKENS[-1] if args.rank else 256, shapes()[0])  # warms up
        for name, of_name in left_out.items():
            for reason, places in of_name.items():
                sweep.left_out.reasons[name][reason] += places
        result = result_of(args, sweep, here, rows)
        end, written = time.monotonic() + args.budget, time.monotonic()
        for tokens, shape in wanted[len(rows) :]:
            if args.out and time.monotonic() > written + WRITE_SECONDS:  # who stops the sweep loses no more
                write(args.out, result)
                written = time.monotonic()
            if time.monotonic() > end:
                break
            try:
                rows.append(sweep.measure(tokens, shape))
            except (RuntimeError, AssertionError) as error:  # what was measured so far is kept
                failure = f"M={tokens} {shape.k} -> {shape.n}: {error}"
                break
        left = end - time.monotonic()
    if args.out:
        write(args.out, result)
    report(result)
    print(f"{len(rows)} of {len(wanted)} problems measured, {max(0.0, left):.0f} of {args.budget:.0f} s left")
    if failure:
        print(f"stopped at {failure}", file=sys.stderr)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
