"""Inputs for tests: random ones that cover every 2:4 pattern, and structured ones whose wrong answers name the fault.

Everything is made on the CPU from the seed given and then moved, so that one case is the same case on every device.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._extension import _core


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(n: int, k: int, num_bits: int = 4, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int8 `[n, k]`, 2:4: the kept pair of every quad at random, both ends of the code range, and quads with fewer than
    two non-zero values (codes may be 0, and one quad in eight is emptied)."""
    g = _generator(seed)
    low, high = _core.code_min(num_bits), _core.code_max(num_bits)
    quads = k // _core.QUAD
    codes = torch.randint(low, high + 1, (n, quads, _core.QUAD), generator=g, dtype=torch.int16)
    extreme = torch.rand((n, quads, _core.QUAD), generator=g)
    codes = codes.where(extreme > 0.05, torch.tensor(low, dtype=torch.int16))
    codes = codes.where(extreme < 0.95, torch.tensor(high, dtype=torch.int16))
    kept = torch.rand((n, quads, _core.QUAD), generator=g).argsort(-1) < _core.KEPT_PER_QUAD
    filled = torch.rand((n, quads, 1), generator=g) >= 1 / 8
    return (codes * kept * filled).reshape(n, k).to(torch.int8).to(device)


def random_scales(
    n: int,
    k: int,
    group_size: int = 128,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`[G, n]` in 0.002 .. 0.02, the size of a language model's: no two groups alike."""
    scales = torch.rand(_core.scales_shape(n, k, group_size), generator=_generator(seed + 1)) * 0.018 + 0.002
    return scales.to(dtype).to(device)


def activations(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal values of the shape given (the last dimension is K)."""
    return torch.randn(shape, generator=_generator(seed + 2)).to(dtype).to(device)


def dequantized(codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight `[n, k]` from int8 codes and plain scales, in `dtype` (default: that of the scales)."""
    k = codes.shape[1]
    step = k if group_size == _core.CHANNELWISE else group_size
    spread = scales.t().repeat_interleave(step, dim=1)[:, :k]
    dtype = dtype or scales.dtype
    return codes.to(dtype) * spread.to(dtype)


def one_hot_activations(k: int, columns: Tensor | list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """`[len(columns), k]`: token i is 1 at columns[i] and 0 elsewhere, so the product reads out single weights."""
    index = torch.as_tensor(columns)
    return torch.nn.functional.one_hot(index, k).to(dtype)


def coordinate_codes(n: int, k: int, num_bits: int = 8) -> Tensor:
    """int8 `[n, k]` codes that encode where they stand: with unit scales and one-hot activations a layout fault prints
    as a permutation. Kept pairs walk through all six patterns; the value mixes row and column, so neighbours differ."""
    pairs = torch.combinations(torch.arange(_core.QUAD), 2)
    rows, cols = torch.arange(n)[:, None], torch.arange(k)[None, :]
    pair = pairs[(rows * 5 + cols // _core.QUAD) % len(pairs)]
    position = (cols % _core.QUAD)[..., None]
    kept = (pair == position).any(-1)
    span = _core.code_max(num_bits)
    value = 1 + (rows * 7 + cols * 3 + cols // _core.TILE_COLS) % span
    sign = 1 - 2 * ((rows + cols // _core.QUAD) % 2)
    return (value * sign * kept).to(torch.int8)


def group_scales(n: int, k: int, group_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[G, n]` powers of two that encode the group, exact in every dtype: a wrong group shows as a power of two."""
    groups, _ = _core.scales_shape(n, k, group_size)
    exponent = (torch.arange(groups)[:, None] + torch.arange(n)[None, :]) % 8 - 4
    return torch.exp2(exponent.float()).to(dtype)


@contextmanager
def poisoned_allocations(device: torch.device | str = "cpu", megabytes: int = 64) -> Iterator[None]:
    """Inside, memory that torch hands out without filling it holds NaN, so that a result element nobody wrote shows.

    On CUDA the blocks of the caching allocator are filled as well, which reaches the workspace that an operator takes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        sizes = [megabytes << 20] + [1 << bits for bits in range(9, 25)]
        blocks = [torch.full((size // 4,), float("nan"), device=device) for size in sizes]
        torch.cuda.synchronize(device)
        del blocks
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
