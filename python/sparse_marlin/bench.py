"""`sparse-marlin bench`: how fast the multiplication is on this machine, beside torch's own linear.

A user's quick look. The figures of the documentation come from `benchmarks/` in the source repository, which measure in
CUDA graphs, with cold caches and against other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from ._extension import _core
from ._progress import tracked
from .linear import SparseMarlinLinear
from .quantize import QUAD, code_range

# K and N of a small and of a large model's linears.
DEFAULT_SHAPES = ((4096, 4096), (4096, 14336))
DEFAULT_TOKENS = (1, 16, 256)
# Weights are rotated through more bytes than a processor's caches hold, as a model's layers are.
ROTATED_BYTES = 400e6
MOST_COPIES = 48
MIN_SECONDS = 0.3  # of a measurement


@dataclass(frozen=True)
class Measured:
    """Times of one shape and number of tokens, medians in microseconds."""

    in_features: int
    out_features: int
    tokens: int
    sparse_us: float
    dense_us: float
    sparse_bytes: int
    dense_bytes: int

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "speedup": self.speedup}


def random_layer(
    in_features: int, out_features: int, group_size: int, num_bits: int, device: torch.device, dtype: torch.dtype
) -> SparseMarlinLinear:
    """A layer with random codes at random places of its 2:4 pattern, and outputs about the size of its inputs."""
    low, high = code_range(num_bits)
    quads = (out_features, in_features // QUAD, QUAD)
    codes = torch.randint(low, high + 1, quads, dtype=torch.int8, device=device)
    dropped = torch.rand(quads, device=device).argsort(dim=-1)[..., : QUAD // 2]
    codes = codes.scatter_(-1, dropped, 0).view(out_features, in_features)
    spread = torch.rand(_core.scales_shape(out_features, in_features, group_size), device=device) + 0.5
    scales = (spread / (high * math.sqrt(in_features / 6))).to(dtype)
    return SparseMarlinLinear.from_codes(codes, scales, group_size=group_size, num_bits=num_bits)


def _bytes(layer: SparseMarlinLinear) -> int:
    return layer.weight_packed.nbytes + layer.scales.nbytes


def _more(size: int) -> int:
    """Copies to make of weights of that size."""
    return min(MOST_COPIES, math.ceil(ROTATED_BYTES / size)) - 1


def _median_us(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MIN_SECONDS).median * 1e6


def run_bench(
    shapes: Sequence[tuple[int, int]] = DEFAULT_SHAPES,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    *,
    group_size: int = 128,
    num_bits: int = 4,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = False,
) -> list[Measured]:
    """Time `SparseMarlinLinear` and `torch.nn.functional.linear` of the same shapes, (in features, out features) each.

    Raises ValueError for a shape or setting that the layer does not take.
    """
    for k, n in shapes:  # refuses what a layer cannot be
        SparseMarlinLinear(k, n, False, group_size=group_size, num_bits=num_bits, device="meta")
    found = []
    cases = [(shape, m) for shape in shapes for m in tokens]
    layers: dict[tuple[int, int], list[SparseMarlinLinear]] = {}
    dense: dict[tuple[int, int], list[torch.Tensor]] = {}
    with torch.inference_mode():
        for (k, n), m in tracked(cases, "Measuring", progress):
            if (k, n) not in layers:
                layers, dense = {}, {}  # one shape's weights at a time
                first = random_layer(k, n, group_size, num_bits, device, dtype)
                layers[k, n] = [first] + [deepcopy(first) for _ in range(_more(_bytes(first)))]
                weight = torch.randn(n, k, device=device).to(dtype) / math.sqrt(k)
                dense[k, n] = [weight] + [weight.clone() for _ in range(_more(weight.nbytes))]
            x = torch.randn(m, k, device=device).to(dtype)
            next_layer, next_weight = cycle(layers[k, n]), cycle(dense[k, n])

            def sparse(x: torch.Tensor = x, turn: cycle[SparseMarlinLinear] = next_layer) -> torch.Tensor:
                return next(turn)(x)

            def linear(x: torch.Tensor = x, turn: cycle[torch.Tensor] = next_weight) -> torch.Tensor:
                return F.linear(x, next(turn))

            sizes = _bytes(layers[k, n][0]), dense[k, n][0].nbytes
            found.append(Measured(k, n, m, _median_us(sparse), _median_us(linear), *sizes))
    return found
