"""What the rows of bench_gemm.py say together; shared by the benchmark, tables.py and plots.py. Needs no torch."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

# Names of the contestants beside cuBLAS, in the order of tables, with what readers call them.
PEERS = {
    "cusparselt": "cuSPARSELt 2:4",
    "torch-int4": "torch int4",
    "fp8": "fp8 (torch._scaled_mm)",
    "sparse-marlin": "public Sparse-Marlin",
    "marlin": "public Marlin",
}


def own_speedup(row: Row) -> float:
    return float(row["speedup"])


def peer_speedup(row: Row, name: str) -> float | None:
    """A peer's speed-up over cuBLAS; None where it was not measured."""
    found = row.get("peers", {}).get(name)
    if found is not None:
        return float(found["speedup"])
    if name == "sparse-marlin" and "sparse_marlin_speedup" in row:  # files from before there were several peers
        return float(row["sparse_marlin_speedup"])
    return None


def measured_peers(rows: Iterable[Row]) -> list[str]:
    found = list(rows)
    return [name for name in PEERS if any(peer_speedup(row, name) is not None for row in found)]


def geometric_means(rows: list[Row], value: Callable[[Row], float | None]) -> dict[int, float]:
    """By the number of tokens; none where a shape has no value, since means of different shapes do not compare."""
    means: dict[int, float] = {}
    for m in sorted({row["m"] for row in rows}):
        values = [value(row) for row in rows if row["m"] == m]
        known = [v for v in values if v is not None]
        if len(known) == len(values):
            means[m] = statistics.geometric_mean(known)
    return means


def least(rows: list[Row], value: Callable[[Row], float | None]) -> tuple[float, str] | None:
    """The least value, and where it is."""
    found = [(ratio, f"{row['shape']}, M={row['m']}") for row in rows if (ratio := value(row)) is not None]
    return min(found, default=None)


def over_peer(row: Row, name: str) -> float | None:
    """How many times as fast as the peer ours is."""
    speedup = peer_speedup(row, name)
    return None if speedup is None else own_speedup(row) / speedup


def least_ratios(rows: list[Row]) -> dict[str, tuple[float, str]]:
    """Of ours over cuBLAS and over each peer: whether it is slower anywhere, and where it is closest to that."""
    found = {"cuBLAS": least(rows, own_speedup)}
    for name in measured_peers(rows):
        found[PEERS[name]] = least(rows, lambda row, name=name: over_peer(row, name))
    return {name: ratio for name, ratio in found.items() if ratio is not None}
