"""Fits the planner's constants to sweeps of benchmarks/bench_plan.py and writes csrc/plan/cost_table.h. Needs no GPU.

    python benchmarks/fit_plan.py benchmarks/results/plan_h100.json
    python benchmarks/fit_plan.py --report benchmarks/results/plan_h100.json  # of the constants compiled in

The formula is in csrc/plan/cost.cpp; what a plan makes the GPU do comes from there, too (`_core.effort`). Each tile has
constants of its own, found by non-linear least squares on the logarithm of the time. Plans near the best one of their
problem weigh most, since the choice is made among them. Constants that few measurements decide stay near those of the
tile's kernel as a whole, which are fitted first. A second step moves all constants a little so that the choices by them
cost least: it descends along the gradient of the expected regret, where a plan is chosen with a probability that falls
with its predicted time, ever more steeply; errors of the times themselves count a little, or plans that seldom compete
would drift to times that are far from theirs. Every problem counts twice, once with all its plans and once with those
of the portable kernel, which other GPUs than Hopper's choose among. Regrets are those of a choice among the plans that
were measured; --held-out N leaves out one N-th of the problems after the other and tells the regret of what was left
out, which differs by a tenth of a per cent from one way of parting them to another.
"""

import argparse
import json
import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_report import GOOD
from scipy.optimize import least_squares
from timing import tile_name, tile_numbers

from sparse_marlin import _core

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc" / "plan" / "cost_table.h"
NAMES = (
    "launch",
    "crowding",
    "turn",
    "turn_block",
    "tile",
    "dram",
    "l2",
    "power",
    "exchange",
    "exchange_split",
    "stream",
    "stream_part",
    "behind",
    "late",
)
START = (1.5, 0.3, 0.2, 0.1, 0.2, 1.0, 1.0, 3.0, 1.0, 0.2, 2.0, 0.5, 0.5, 0.5)
SMALLEST, LARGEST = 1e-4, 50.0
LOWEST = {"power": 1.2, "dram": 0.7, "launch": 0.2, "turn": 0.01, "turn_block": 0.01}
HIGHEST = {"power": 8.0, "dram": 2.0, "l2": 3.0}
# Of the distance from the kernel's constants, in units of the error that a measurement may have.
HOLD, KERNEL_HOLD = 0.02, 0.02
SHARPNESS = 15.0  # a plan 1 / 15 slower than the best one weighs half
# Of the second step: how much slower a plan is predicted that is chosen a third as often, at first, when many plans are
# to be told apart, and at last, when the choice is nearly the planner's; the weights of the distance from the first
# step's constants and of the squared errors of times; Adam's steps and their size.
BLUR, LAST_BLUR, REFINED_HOLD, REFINED_ERROR, STEPS, STEP = 0.03, 0.01, 0.03, 0.03, 1000, 0.01
WORST = 10  # regrets that are printed
L2_BYTES, HBM3_GB_PER_S = 50 << 20, 3352.0  # an H100's, where a result does not say


@dataclass
class Samples:
    """Plans of one tile, a column each."""

    problem: list[int]
    splits: Any  # arrays, tensors in the second step
    us: Any
    weight: Any
    effort: dict[str, Any]

    def where(self, wanted: np.ndarray) -> "Samples":
        return Samples(
            [p for p, w in zip(self.problem, wanted, strict=True) if w],
            *(each[wanted] for each in (self.splits, self.us, self.weight)),
            {name: column[wanted] for name, column in self.effort.items()},
        )


Choice = tuple[float, float, str]  # microseconds predicted and measured, tile and splits
EFFORT = (
    "turns",
    "full_waves",
    "resident",
    "last_wave",
    "tiles",
    "dram_us",
    "l2_us",
    "range_turns",
    "range_tiles",
    "range_dram_us",
    "range_l2_us",
    "crowding",
    "behind",
    "late",
    "exchanges",
    "streams",
    "parts",
    "reduce_us",
)
POWERS = ("turns", "tiles", "dram_us", "l2_us", "range_turns", "range_tiles", "range_dram_us", "range_l2_us")
LEAST = 1e-9  # their powers have no gradient at 0


def predicted(constants: Any, s: Samples) -> Any:
    """csrc/plan/cost.cpp, for all plans at once, arrays or tensors; constants for all, or a column for each plan."""
    launch, crowding, turn, turn_block, tile, dram, l2, power, exchange, exchange_split = constants[:10]
    stream, stream_part, behind, late = constants[10:]
    e = s.effort
    waves = e["full_waves"] * (turn + turn_block * e["resident"])
    waves = waves + (e["last_wave"] > 0) * (turn + turn_block * e["last_wave"])

    def phase(name: str) -> Any:
        work = e[name + "turns"] * waves + tile * e[name + "tiles"]
        memory = (dram * e[name + "dram_us"]) ** power + (l2 * e[name + "l2_us"]) ** power
        return (work**power + memory) ** (1 / power)

    return (
        launch
        + behind * e["behind"]
        + late * e["late"]
        + crowding * e["crowding"]
        + phase("")
        + phase("range_")
        + e["exchanges"] * (exchange + exchange_split * s.splits)
        + e["streams"] * (stream + stream_part * e["parts"])
        + e["reduce_us"]
    )


# Rows of the table: the tiles, then those that add a low-rank correction.
LOW_RANK = [i for i, tile in enumerate(_core.TILES) if tile.kernel == "decode"]
TILES = [*_core.TILES, *(_core.TILES[i] for i in LOW_RANK)]
PORTABLE = "sm80"
KERNELS = [*(tile.kernel for tile in _core.TILES), *("low rank" for _ in LOW_RANK)]


def device_of(result: dict[str, Any]) -> _core.Device:
    """The Hopper GPU that a sweep was measured on."""
    l2_bytes, bandwidth = result.get("l2_bytes", L2_BYTES), result.get("dram_gb_per_s", HBM3_GB_PER_S)
    return _core.Device(90, result["num_sms"], 227 << 10, 228 << 10, l2_bytes, bandwidth)


def load(paths: list[Path]) -> tuple[list[dict[int, Samples]], list[dict[str, object]]]:
    """Samples by row of the table, and the problems, each once more among the plans that every GPU has.

    Tiles that share activations have those of the tile before each, the same without. They read less from L2."""
    rows: list[dict[str, object]] = []
    columns: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for path in paths:
        result = json.loads(path.read_text())
        number = tile_numbers(result["tiles"])
        device = device_of(result)
        rank, packed = result.get("rank", 0), result.get("packed", False)
        for row in result["problems"]:
            problem = _core.Problem(
                row["m"], row["n"], row["k"], result["group_size"], result["num_bits"], result["dtype"]
            )
            measured = []
            for old, splits, _, us, *_ in row["plans"]:
                try:
                    tile = number[int(old)]
                    if not _core.may_share(problem, device, tile):  # the planner leaves it out
                        continue
                    if rank:
                        plan = _core.plan_low_rank_with_tile(problem, device, rank, tile, int(splits), packed)
                    else:
                        plan = _core.plan_with_tile(problem, device, tile, int(splits))
                except (KeyError, ValueError):  # tiles and splits that are gone
                    continue
                of_table = len(_core.TILES) + LOW_RANK.index(tile) if rank else tile - (_core.TILES[tile].share > 1)
                measured.append((of_table, plan.splits, us, _core.effort(problem, device, plan)))
            for among in (measured, [plan for plan in measured if KERNELS[plan[0]] == PORTABLE]):
                if not among:
                    continue
                best = min(us for _, _, us, _ in among)
                for tile, splits, us, effort in among:
                    weight = 1 / (1 + SHARPNESS * (us / best - 1))
                    columns[tile].append((len(rows), splits, us, weight, *(getattr(effort, name) for name in EFFORT)))
                rows.append({**row, "best_us": best, "portable": among is not measured})
    samples = {}
    for tile, values in columns.items():
        problem_of, splits, us, weight, *efforts = zip(*values, strict=True)
        found = {name: np.array(column, dtype=float) for name, column in zip(EFFORT, efforts, strict=True)}
        for name in POWERS:
            found[name] = found[name].clip(LEAST)
        samples[tile] = Samples(list(problem_of), np.array(splits), np.array(us), np.array(weight), found)
    return samples, rows


def joined(samples: list[Samples]) -> Samples:
    return Samples(
        [p for s in samples for p in s.problem],
        *(np.concatenate([getattr(s, name) for s in samples]) for name in ("splits", "us", "weight")),
        {name: np.concatenate([s.effort[name] for s in samples]) for name in EFFORT},
    )


def fitted(s: Samples, start: np.ndarray, hold: float) -> np.ndarray:
    def residuals(logs: np.ndarray) -> np.ndarray:
        error = np.log(predicted(np.exp(logs), s) / s.us) * np.sqrt(s.weight)
        return np.concatenate([error, hold * (logs - np.log(start))])

    low = np.log([LOWEST.get(name, SMALLEST) for name in NAMES])
    high = np.log([HIGHEST.get(name, LARGEST) for name in NAMES])
    begin = np.clip(np.log(start), low + 1e-6, high - 1e-6)
    return np.exp(least_squares(residuals, begin, bounds=(low, high), loss="soft_l1", f_scale=0.05).x)


def fit(samples: dict[int, Samples]) -> list[np.ndarray]:
    constants = compiled_in()
    for kernel in sorted(set(KERNELS)):
        tiles = [i for i, name in enumerate(KERNELS) if name == kernel]
        known = [i for i in tiles if i in samples]
        if not known:  # stays as it is
            continue
        whole = fitted(joined([samples[i] for i in known]), np.array(START), KERNEL_HOLD)
        for i in tiles:
            constants[i] = fitted(samples[i], whole, HOLD) if i in samples else whole
    return constants


def with_sharing(constants: list[np.ndarray]) -> list[np.ndarray]:
    """Of tiles that share activations: those of the tile before each."""
    return [constants[i - 1] if tile.share > 1 else constants[i] for i, tile in enumerate(TILES)]


def refined(constants: list[np.ndarray], samples: dict[int, Samples]) -> list[np.ndarray]:
    """The second step."""
    order = sorted(samples)
    all_plans = joined([samples[i] for i in order])
    s = Samples(
        all_plans.problem,
        *(
            torch.from_numpy(np.asarray(each, dtype=float))
            for each in (all_plans.splits, all_plans.us, all_plans.weight)
        ),
        {name: torch.from_numpy(column) for name, column in all_plans.effort.items()},
    )
    tile = torch.tensor([i for i in order for _ in samples[i].problem])
    problem = torch.tensor(s.problem)
    count = int(problem.max()) + 1

    def of_problem(values: torch.Tensor, how: str) -> torch.Tensor:
        return torch.zeros(count).double().scatter_reduce(0, problem, values, how, include_self=False)[problem]

    regret = s.us / of_problem(s.us, "amin") - 1
    first = torch.log(torch.from_numpy(np.array(constants)))
    low = torch.tensor([LOWEST.get(name, SMALLEST) for name in NAMES]).double().log()
    high = torch.tensor([HIGHEST.get(name, LARGEST) for name in NAMES]).double().log()
    logs = first.clamp(low, high).requires_grad_()
    adam = torch.optim.Adam([logs], lr=STEP)
    for step in range(STEPS):
        adam.zero_grad()
        blur = BLUR * (LAST_BLUR / BLUR) ** (step / STEPS)
        guess = torch.log(predicted(logs.exp()[tile].T, s))
        error = (s.weight * (guess - torch.log(s.us)) ** 2).sum()
        odds = -guess / blur
        odds = torch.exp(odds - of_problem(odds.detach(), "amax"))
        chosen = odds / of_problem(odds, "sum")
        loss = (chosen * regret).sum() + REFINED_HOLD * ((logs - first) ** 2).sum() + REFINED_ERROR * error
        loss.backward()
        adam.step()
        with torch.no_grad():
            logs.clamp_(low, high)
    return list(logs.detach().exp().numpy())


def write(constants: list[np.ndarray], source: str) -> None:
    text = TABLE.read_text()
    lines = []
    for tile, values in zip(TILES, constants, strict=True):
        lines.append(
            f"    {{{', '.join(f'{v:.4g}' for v in values)}}},  // {tile.kernel} {tile.block_m} x {tile.block_n}"
        )
        lines[-1] += (", 2 teams" if tile.teams > 1 else "") + (", 2 share" if tile.share > 1 else "")
    count = len(_core.TILES)
    for name, part in (("kTileCosts", lines[:count]), ("kLowRankCosts", lines[count:])):
        start = text.index(f"{name}{{{{\n") + len(f"{name}{{{{\n")
        text = text[:start] + "\n".join(part) + "\n" + text[text.index("}};", start) :]
    TABLE.write_text(text)
    subprocess.run(["clang-format", "-i", str(TABLE)], check=True)
    print(f"{TABLE.relative_to(ROOT)}: from {source}")


def plans_of(constants: list[np.ndarray], samples: dict[int, Samples]) -> dict[int, list[Choice]]:
    """Of each problem, as the planner sees them."""
    plans: dict[int, list[Choice]] = defaultdict(list)
    for tile, s in samples.items():
        name = tile_name(TILES[tile])
        for problem, splits, us, guess in zip(s.problem, s.splits, s.us, predicted(constants[tile], s), strict=True):
            plans[problem].append((guess, us, f"{name} splits {splits}"))
    return plans


def held_out(samples: dict[int, Samples], rows: list[dict[str, object]], parts: int) -> dict[int, list[Choice]]:
    """The plans of each problem by constants that were fitted without it."""
    sizes = sorted({(row["m"], row["n"], row["k"]) for row in rows}, key=hash)
    plans = {}
    for first in range(parts):
        left_out = set(sizes[first::parts])
        held = np.array([(row["m"], row["n"], row["k"]) in left_out for row in rows])
        part = {tile: s.where(~held[s.problem]) for tile, s in samples.items()}
        part = {tile: s for tile, s in part.items() if s.problem}
        rest = {tile: s.where(held[s.problem]) for tile, s in samples.items()}
        plans.update(plans_of(refined(fit(part), part), {tile: s for tile, s in rest.items() if s.problem}))
    return plans


def report(choices: dict[int, list[Choice]], rows: list[dict[str, object]]) -> None:
    for portable in (False, True):
        found = []
        for problem, plans in choices.items():
            row = rows[problem]
            if row["portable"] is portable:
                chosen, best = min(plans), min(plans, key=lambda plan: plan[1])
                found.append((chosen[1] / best[1] - 1, row, chosen, best))
        if found:
            report_regrets("the portable kernel's plans alone" if portable else "all plans", found)


def report_regrets(title: str, found: list[tuple[float, Any, Any, Any]]) -> None:
    regrets = np.array([each[0] for each in found])
    print(
        f"{title}, {len(found)} problems: regret {regrets.mean():.2%} on average, {np.quantile(regrets, 0.9):.1%} at "
        f"90 %, {regrets.max():.1%} at worst, over {GOOD:.0%} at {(regrets > GOOD).sum()}"
    )
    for regret, row, chosen, best in sorted(found, key=lambda each: -each[0])[:WORST]:
        print(f"  {regret:6.1%}  M={row['m']} {row['k']} -> {row['n']}")
        print(
            f"          {chosen[2]}: {chosen[1]:.2f} us ({chosen[0]:.2f}); {best[2]}: {best[1]:.2f} us ({best[0]:.2f})"
        )


def compiled_in() -> list[np.ndarray]:
    text = TABLE.read_text()
    rows = re.findall(r"\{([-+.,e\d\s]+)\}", text[text.index("kTileCosts{{") :])
    return [np.array([float(v) for v in row.split(",")]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of bench_plan.py")
    parser.add_argument("--report", action="store_true", help="print the regret of the table as it is, fit nothing")
    parser.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="fit N times, each without another N-th of the problems; write nothing",
    )
    args = parser.parse_args()
    samples, rows = load(args.results)
    if args.held_out:
        report(held_out(samples, rows, args.held_out), rows)
        return
    constants = compiled_in() if args.report else with_sharing(refined(fit(samples), samples))
    report(plans_of(constants, samples), rows)
    if not args.report:
        write(constants, ", ".join(path.name for path in args.results))


if __name__ == "__main__":
    main()
