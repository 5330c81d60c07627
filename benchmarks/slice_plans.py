"""What a tensor-parallel slice does to the plan: predicted fraction of the floor against the whole layer's. No GPU.

    python benchmarks/slice_plans.py                # every slice below the limit, with the reason
    python benchmarks/slice_plans.py --all --tokens 1,64,1024

The linears are those of Llama 8B, 70B and 405B with q, k, v and gate, up fused; qkv and gate_up are cut along their
output features, o and down along their input features. `bench_slices.py` measures the same.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from timing import WGMMA_SP_TFLOPS, positive_ints

from sparse_marlin import _core

# hidden size, features of qkv, inner size of the MLP
MODELS = {"8B": (4096, 6144, 14336), "70B": (8192, 10240, 28672), "405B": (16384, 18432, 53248)}
WORLD_SIZES = (2, 4, 8)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LIMIT = 0.85  # of the whole layer's fraction of the floor
H100 = _core.Device(90, 132, 227 << 10, 228 << 10, 50 << 20)
H100_BYTES_PER_US = 2.9e6  # of a large kernel
GROUP_SIZE, NUM_BITS = 128, 4

FIXED_US = 3.0  # launch, first bytes, last store, exchange between splits: what does not shrink with a slice
MANY_TOKENS = 256  # from where the outputs of a row slice weigh
FULL_TILE, FULL_ROUNDS = (128, 256), 4  # tokens and features; with fewer rounds the last one, partly filled, weighs


@dataclass(frozen=True)
class Slice:
    """One linear (N x K) of a model on one of `world_size` ranks; world size 1 is the whole layer."""

    model: str
    linear: str
    column: bool
    world_size: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.linear}" + (f" / {self.world_size}" if self.world_size > 1 else "")


def slices(world_sizes: tuple[int, ...] = WORLD_SIZES) -> Iterator[tuple[Slice, Slice]]:
    """Every slice with its whole layer."""
    for model, (hidden, qkv, inner) in MODELS.items():
        linears = {
            "qkv": (qkv, hidden, True),
            "o": (hidden, hidden, False),
            "gate_up": (2 * inner, hidden, True),
            "down": (hidden, inner, False),
        }
        for linear, (n, k, column) in linears.items():
            whole = Slice(model, linear, column, 1, n, k)
            for world in world_sizes:
                yield (
                    Slice(model, linear, column, world, n // world if column else n, k if column else k // world),
                    whole,
                )


def floor_us(m: int, n: int, k: int, bytes_per_us: float = H100_BYTES_PER_US, tflops: float = WGMMA_SP_TFLOPS) -> float:
    """The larger of bytes over bandwidth and operations over the rate of the sparse tensor cores, as in bench_gemm."""
    rows, words = _core.packed_shape(n, k, NUM_BITS)
    moved = 4 * rows * words + 2 * (_core.num_groups(k, GROUP_SIZE) * n + m * (n + k))
    return max(moved / bytes_per_us, 2 * m * n * k / tflops / 1e6)


@dataclass(frozen=True)
class Prediction:
    """The planner's choice for a slice and how it compares."""

    what: Slice
    tokens: int
    plan: _core.Plan
    floor_us: float
    ratio: float  # fraction of the floor, slice over whole

    @property
    def reason(self) -> str | None:
        """Why a slice stays under the limit whatever the plan; None where nothing explains it."""
        if self.ratio >= LIMIT:
            return "reaches the limit"
        if not self.what.column and self.tokens >= MANY_TOKENS:
            return "outputs: every rank writes all of them, for a short loop over K"
        if self.plan.predicted_us * (1 - self.ratio / LIMIT) < FIXED_US:
            return f"fixed costs: the limit is missed by less than {FIXED_US:.0f} us"
        tiles = -(-self.tokens // FULL_TILE[0]) * -(-self.what.n // FULL_TILE[1])
        if tiles < FULL_ROUNDS * H100.num_sms:
            return f"few tiles: less than {FULL_ROUNDS} rounds of {FULL_TILE[0]} x {FULL_TILE[1]}"
        return None


def predictions(tokens: tuple[int, ...] = TOKENS) -> Iterator[Prediction]:
    for m in tokens:
        for part, whole in slices():
            plans = [_core.plan(_core.Problem(m, each.n, each.k, GROUP_SIZE, NUM_BITS), H100) for each in (part, whole)]
            floors = [floor_us(m, each.n, each.k) for each in (part, whole)]
            fractions = [floor / plan.predicted_us for floor, plan in zip(floors, plans, strict=True)]
            yield Prediction(part, m, plans[0], floors[0], fractions[0] / fractions[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive_ints, default=list(TOKENS))
    parser.add_argument("--all", action="store_true", help="those that reach the limit, too")
    args = parser.parse_args()
    found = list(predictions(tuple(args.tokens)))
    table = Table(title=f"H100, predicted; limit {LIMIT} of the whole layer's fraction of the floor")
    for column in ("slice", "tokens", "us", "floor us", "of whole", "plan", "reason"):
        table.add_column(column, justify="left" if column in ("slice", "plan", "reason") else "right")
    for each in found:
        if each.ratio >= LIMIT and not args.all:
            continue
        tile = _core.TILES[each.plan.tile]
        table.add_row(
            each.what.name, str(each.tokens), f"{each.plan.predicted_us:.1f}", f"{each.floor_us:.1f}",
            f"{each.ratio:.2f}", f"{tile.kernel} {tile.block_m}x{tile.block_n} splits {each.plan.splits}",
            each.reason or "not explained",
        )  # fmt: skip
    Console(width=150).print(table)
    for reason, count in Counter(each.reason or "not explained" for each in found).most_common():
        print(f"{count:4d} of {len(found)}: {reason}")


if __name__ == "__main__":
    main()
