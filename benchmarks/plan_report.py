"""Prints what a sweep of bench_plan.py found: how far the planner's choices are from the best plans and from the peers.

Reads the sweep's JSON alone and needs no GPU.
"""

import statistics
from collections import defaultdict
from typing import Any

from rich.console import Console
from rich.table import Table

GOOD = 0.07  # a regret that the planner should not exceed


def regret(row: dict[str, object]) -> float:
    plans = row["plans"]
    assert isinstance(plans, list)
    return plans[0][3] / min(plan[3] for plan in plans) - 1


def plan_text(tiles: list[str], plan: list[float]) -> str:
    return f"{tiles[int(plan[0])]} splits {int(plan[1])}: {plan[3]:.2f} us ({plan[2]:.2f} predicted)"


def report(result: dict[str, object]) -> None:
    rows, tiles = result["problems"], result["tiles"]
    assert isinstance(rows, list)
    assert isinstance(tiles, list)
    if not rows:
        print("nothing measured")
        return
    table = Table(
        title=f"{result['gpu']}, {result['dtype']}, {result['num_bits']} bits, group {result['group_size']}: "
        f"regret of the planner, {len(rows)} problems, {sum(len(row['plans']) for row in rows)} plans"
    )
    columns = ("tokens", "problems", "mean", "90 %", "worst", f"within {GOOD:.0%}", "x cuBLAS", "least x")
    for column in columns:
        table.add_column(column, justify="right")
    bands: dict[str, list[dict[str, object]]] = defaultdict(list)
    for row in rows:
        low = max(limit for limit in (1, 17, 65, 257, 1025) if limit <= row["m"])
        bands[{1: "1-16", 17: "17-64", 65: "65-256", 257: "257-1024", 1025: "from 1025"}[low]].append(row)
    order = sorted(bands, key=lambda name: min(int(str(row["m"])) for row in bands[name]))
    for name, band in [*((name, bands[name]) for name in order), ("all", rows)]:
        values = sorted(regret(row) for row in band)
        speedups = [float(str(row["cublas_us"])) / row["plans"][0][3] for row in band if "cublas_us" in row]
        table.add_row(
            name, str(len(band)), f"{statistics.mean(values):.1%}", f"{values[int(0.9 * (len(values) - 1))]:.1%}",
            f"{values[-1]:.1%}", f"{sum(value <= GOOD for value in values) / len(values):.1%}",
            f"{statistics.geometric_mean(speedups):.2f}" if speedups else "",
            f"{min(speedups):.2f}" if speedups else "",
        )  # fmt: skip
    Console(width=130).print(table)
    print("worst:")
    for row in sorted(rows, key=regret, reverse=True)[:12]:
        best = min(row["plans"], key=lambda plan: plan[3])
        print(f"  {regret(row):6.1%}  M={row['m']} {row['k']} -> {row['n']} ({row['shape']})")
        print(f"          chosen {plan_text(tiles, row['plans'][0])}; best {plan_text(tiles, best)}")
    for key, name in (("cublas_us", "cuBLAS"), ("cusparselt_us", "cuSPARSELt")):
        against(rows, key, name)
    ratios = sorted(row["plans"][0][3] / row["plans"][0][2] for row in rows)
    deciles = [f"{ratios[int(share * (len(ratios) - 1))]:.2f}" for share in (0.1, 0.5, 0.9)]
    print(f"measured / predicted of the chosen plan, at 10, 50 and 90 %: {', '.join(deciles)}")


def against(rows: list[dict[str, Any]], key: str, name: str) -> None:
    """Where the chosen plan is slower than somebody else's kernel, and the least ratio."""
    ratios = sorted(((row[key] / row["plans"][0][3], i) for i, row in enumerate(rows) if key in row))
    if not ratios:
        return
    print(f"x {name}: least {ratios[0][0]:.2f}, below 1 at {sum(x < 1 for x, _ in ratios)} of {len(ratios)} problems")
    for ratio, i in ratios:
        if ratio < 1:
            row = rows[i]
            print(f"  {ratio:.2f}  M={row['m']} {row['k']} -> {row['n']}: {row['plans'][0][3]:.2f} us")
