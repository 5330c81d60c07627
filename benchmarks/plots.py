"""Draws the speed-up over cuBLAS against the number of tokens from bench_gemm.py's JSON files. Needs no GPU.

    python benchmarks/plots.py benchmarks/results/gemm_h100_float16_int4.json    # docs/gemm_h100_float16_int4.svg

On the left the geometric means over the shapes, ours and the peers'; on the right ours for each shape.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from summary import PEERS, Row, geometric_means, measured_peers, own_speedup, peer_speedup

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKERS = "osv^Dx"


def dress(axes: Axes, tokens: list[int], title: str) -> None:
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(tokens, [str(m) for m in tokens], fontsize=7, rotation=60)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def draw(result: Row) -> Figure:
    rows: list[Row] = result["rows"]
    if not rows or "tflops" not in rows[0]:
        raise ValueError("expected a file of bench_gemm.py with rows, got another")
    tokens = sorted({row["m"] for row in rows})
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    means = geometric_means(rows, own_speedup)
    left.plot(list(means), list(means.values()), marker="o", markersize=4, linewidth=2, label="sparse_marlin")
    for name, marker in zip(measured_peers(rows), MARKERS[1:], strict=False):
        means = geometric_means(rows, lambda row, name=name: peer_speedup(row, name))
        left.plot(list(means), list(means.values()), marker=marker, markersize=4, linewidth=1, label=PEERS[name])
    for shape, marker in zip(dict.fromkeys(row["shape"] for row in rows), MARKERS, strict=False):
        found = sorted((row["m"], row["speedup"], row["k"], row["n"]) for row in rows if row["shape"] == shape)
        label = f"{shape}, {found[0][2]} → {found[0][3]}"
        right.plot([f[0] for f in found], [f[1] for f in found], marker=marker, markersize=4, linewidth=1, label=label)
    left.set_ylabel(f"speed-up over cuBLAS {result['dtype']}")
    dress(left, tokens, "geometric mean of the shapes")
    dress(right, tokens, "sparse_marlin, each shape")
    kernel = f", the {result['kernel']} kernel alone" if result.get("kernel") else ""
    group = "one scale a row" if result["group_size"] < 0 else f"groups of {result['group_size']}"
    figure.suptitle(
        f"{result['gpu']}, {result['dtype']}, {result['num_bits']}-bit weights with 2:4 sparsity, {group}{kernel}",
        fontsize=10,
    )
    return figure


def save(figure: Figure, path: Path) -> None:
    """The same bytes from the same numbers."""
    with mpl.rc_context({"svg.hashsalt": "sparse_marlin", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out-dir", type=Path, default=DOCS, help="default: docs/")
    args = parser.parse_args()
    for path in args.files:
        drawn = args.out_dir / f"{path.stem}.svg"
        try:
            save(draw(json.loads(path.read_text())), drawn)
        except (ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
        print(f"wrote {drawn}")


if __name__ == "__main__":
    main()
