"""Markdown tables from the JSON files of the benchmarks, as docs/ and README.md show them. Needs no GPU.

    python benchmarks/tables.py benchmarks/results/gemm_h100_float16_int4.json benchmarks/results/layer_h100.json

For bench_plan.py's files: python benchmarks/bench_plan.py --report FILE.
"""

import argparse
import json
from pathlib import Path

from summary import PEERS, Row, geometric_means, least_ratios, measured_peers, own_speedup, peer_speedup


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def gemm_table(result: Row) -> str:
    """x cuBLAS: the geometric means, then every shape."""
    rows: list[Row] = result["rows"]
    tokens = sorted({row["m"] for row in rows})

    def line(label: str, values: dict[int, float], digits: int = 2) -> list[str]:
        return [label, *(f"{values[m]:.{digits}f}" if m in values else "" for m in tokens)]

    lines = [line("**geometric mean**", geometric_means(rows, own_speedup))]
    for name in measured_peers(rows):
        means = geometric_means(rows, lambda row, name=name: peer_speedup(row, name))
        lines.append(line(f"{PEERS[name]}, geometric mean", means))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["m"]: row for row in rows if row["shape"] == shape}
        k, n = next((row["k"], row["n"]) for row in found.values())
        lines += [
            line(f"{shape}, {k} → {n}", {m: row["speedup"] for m, row in found.items()}),
            line("us", {m: row["us"] for m, row in found.items()}, digits=1),
        ]
        if floors := {m: row["floor_fraction"] for m, row in found.items() if "floor_fraction" in row}:
            lines.append(line("of floor", floors))
        for name in measured_peers(found.values()):
            speedups = {m: peer_speedup(row, name) for m, row in found.items()}
            lines.append(line(PEERS[name], {m: x for m, x in speedups.items() if x is not None}))
    return markdown(["tokens", *map(str, tokens)], lines)


def gemm_remarks(result: Row) -> list[str]:
    """Where ours comes closest to being slower than the others, and what was left out."""
    rows: list[Row] = result["rows"]
    remarks = [f"Least x {name}: {ratio:.2f} ({at})." for name, (ratio, at) in least_ratios(rows).items()]
    for name, reasons in result.get("left_out", {}).items():
        for reason, places in reasons.items():
            where = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
            remarks.append(f"{PEERS.get(name, name)} left out: {reason} ({where}).")
    return remarks


def layer_table(result: Row) -> str:
    head = ["tokens", "cuBLAS us", "plain us", "x", "dependent us", "x", "told what comes next us", "x", "of floor"]
    rows = [
        [
            str(row["m"]), f"{row['cublas_us']:.1f}", f"{row['plain_us']:.1f}", f"{row['plain_speedup']:.2f}",
            f"{row['dependent_us']:.1f}", f"{row['dependent_speedup']:.2f}", f"{row['told_us']:.1f}",
            f"{row['told_speedup']:.2f}", f"{row['floor_fraction']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(head, rows)


def model_table(result: Row) -> str:
    rows = [
        [
            row["what"], str(row["batch"]), str(row["context"]), f"{row['dense_ms']:.2f}", f"{row['sparse_ms']:.2f}",
            f"{row['speedup']:.2f}", f"{row['sparse_tokens_per_s']:.0f}" if "sparse_tokens_per_s" in row else "",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(["", "batch", "tokens", "dense ms", "sparse ms", "x", "tokens/s"], rows)


def tensor_parallel_table(result: Row) -> str:
    count = result["world_size"]
    head = ["", "batch", "dense, 1 GPU us", "sparse us", "x", f"dense, {count} GPUs us", "sparse us", "x"]
    head += ["two sums alone us", "share of the dense layer", "of the sparse layer"]
    rows = [
        [
            row["what"], str(row["batch"]), f"{row['dense_1_us']:.1f}", f"{row['sparse_1_us']:.1f}",
            f"{row['speedup_1']:.2f}", f"{row['dense_n_us']:.1f}", f"{row['sparse_n_us']:.1f}",
            f"{row['speedup_n']:.2f}", f"{row.get('sums_us', 0):.1f}", f"{100 * row['dense_sum_share']:.0f} %",
            f"{100 * row['sparse_sum_share']:.0f} %",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return markdown(head, rows)


def slices_table(result: Row) -> str:
    """Fraction of the whole layer's fraction of the floor, a column for every number of tokens."""
    rows: list[Row] = result["rows"]
    tokens = sorted({row["m"] for row in rows})
    found = {(row["slice"], row["m"]): row["of_whole"] for row in rows}
    names = dict.fromkeys(row["slice"] for row in rows)
    body = [[name, *(f"{found[name, m]:.2f}" if (name, m) in found else "" for m in tokens)] for name in names]
    return markdown(["slice, tokens", *map(str, tokens)], body)


def table(result: Row) -> str:
    """The table of whichever benchmark wrote this."""
    rows = result.get("rows")
    if not rows:
        raise ValueError(
            "no rows: not a file of bench_gemm.py, bench_layer.py, bench_model.py, bench_tp.py or bench_slices.py"
        )
    kinds = (
        ("tflops", gemm_table),
        ("dependent_us", layer_table),
        ("dense_ms", model_table),
        ("dense_n_us", tensor_parallel_table),
        ("of_whole", slices_table),
    )
    for key, make in kinds:
        if key in rows[0]:
            return make(result)
    raise ValueError(f"rows of an unknown kind: {', '.join(rows[0])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        result = json.loads(path.read_text())
        what = [result["gpu"], result["dtype"], f"{result['num_bits']} bits", f"group {result['group_size']}"]
        if result.get("kernel"):
            what.append(f"the {result['kernel']} kernel alone")
        print(f"{path.name}: {', '.join(what)}")
        print(f"\n{table(result)}\n")
        if "tflops" in result["rows"][0]:
            print("\n".join(f"- {remark}" for remark in gemm_remarks(result)) + "\n")


if __name__ == "__main__":
    main()
