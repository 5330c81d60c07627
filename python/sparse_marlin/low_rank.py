"""The packed second factor of a low-rank correction (csrc/plan/low_rank.h): `up` [N, rank] as a packed 2:4 weight of
128 columns for every 64 ranks.

Rank r of 64 fills one column: r where r % 4 < 2, otherwise 64 + r. So every four columns hold two values and nothing is
pruned; what the weight multiplies is `a @ down.T`, twice for every 64 ranks. The kernels multiply it as more columns of
the layer's weight.
"""

import torch

from ._extension import _core
from .quantize import CHANNELWISE, KEPT_PER_QUAD, QUAD, QuantizedWeight, dequantize_codes, quantize

HALVES = 2  # of 128 columns


def kernels_take_packed(group_size: int, *sizes: int) -> bool:
    """Whether kernels multiply such a factor in one go with the weight, given K, the rank and N (of one layer, or of
    several); where they don't, a dense one is faster."""
    return group_size != CHANNELWISE and all(size % _core.RANK_MULTIPLE == 0 for size in sizes)


def tail_columns(rank: int) -> int:
    """Columns of the packed factor of so many ranks."""
    return -(-rank // _core.TAIL_RANKS) * _core.TILE_COLS


def spread(values: torch.Tensor) -> torch.Tensor:
    """[N, rank] -> [N, columns]: each rank's values into its column, zeros elsewhere."""
    size_n, rank = values.shape
    columns = tail_columns(rank)
    quads = torch.nn.functional.pad(values, (0, columns // HALVES - rank)).view(
        size_n, -1, _core.TAIL_RANKS // QUAD, QUAD
    )
    wide = values.new_zeros((size_n, quads.shape[1], HALVES, *quads.shape[2:]))
    wide[:, :, 0, :, :KEPT_PER_QUAD] = quads[..., :KEPT_PER_QUAD]
    wide[:, :, 1, :, KEPT_PER_QUAD:] = quads[..., KEPT_PER_QUAD:]
    return wide.view(size_n, columns)


def gather(wide: torch.Tensor, rank: int) -> torch.Tensor:
    """[N, columns] -> [N, rank]: what `spread` spread."""
    size_n, columns = wide.shape
    halves = wide.view(size_n, -1, HALVES, _core.TAIL_RANKS // QUAD, QUAD)
    quads = torch.cat((halves[:, :, 0, :, :KEPT_PER_QUAD], halves[:, :, 1, :, KEPT_PER_QUAD:]), dim=-1)
    return quads.reshape(size_n, columns // HALVES)[:, :rank]


def twice(projected: torch.Tensor) -> torch.Tensor:
    """[..., rank] -> [..., columns]: what the packed factor multiplies, `a @ down.T` twice for every 64 ranks."""
    rank, columns = projected.shape[-1], tail_columns(projected.shape[-1])
    padded = torch.nn.functional.pad(projected, (0, columns // HALVES - rank))
    lead = projected.shape[:-1]
    blocks = padded.reshape(*lead, -1, 1, _core.TAIL_RANKS).expand(*lead, -1, HALVES, -1)
    return blocks.reshape(*lead, columns)


def quantize_up(
    up: torch.Tensor, group_size: int, num_bits: int, *, scale_dtype: torch.dtype | None = None
) -> QuantizedWeight:
    """A factor [N, rank] in codes [N, columns], with the least squared error found. Groups are those of the columns."""
    kept = spread(torch.ones_like(up, dtype=torch.bool))
    return quantize(spread(up), kept, group_size, num_bits, scale_dtype=scale_dtype, name="quantize_up")


def dequantize_up(
    packed: torch.Tensor, scales: torch.Tensor, rank: int, group_size: int = 128, num_bits: int = 4
) -> torch.Tensor:
    """The factor [N, rank] that the packed one stands for, in the dtype of the scales."""
    codes = torch.ops.sparse_marlin.unpack_24_weights(packed, scales.shape[1], tail_columns(rank), num_bits)
    return gather(dequantize_codes(codes, scales, group_size), rank)
