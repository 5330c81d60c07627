"""Random packed weights, drawn on the GPU without packing anything, and the check of what is computed with them."""

import math

import torch

import sparse_marlin
from sparse_marlin import _core, testing

CHECKED_ROWS = 256
FACTOR_DEVIATION = 0.05  # of the values of a correction's factors: outputs stay within float16
META_NIBBLES = [4, 8, 12, 9, 13, 14]  # the six pairs of positions, csrc/format/packed_24.h


def random_slices(count: int, num_bits: int, device: str = "cuda") -> torch.Tensor:
    """`count` slices of the packed format on the GPU, int32 [count, words]: any run of them is a packed weight.

    Codes are drawn from -max to max, so that their mean is 0 and a chain of multiplications keeps its size."""
    code_words, words = _core.slice_code_words(num_bits), _core.slice_words(num_bits)
    codes = torch.randint(1, 2**num_bits, (count, code_words * 4 * 8 // num_bits), dtype=torch.uint8, device=device)
    if num_bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    pairs = torch.tensor([low | high << 4 for low in META_NIBBLES for high in META_NIBBLES], device=device)
    chosen = torch.randint(0, len(pairs), (count, (words - code_words) * 4), dtype=torch.int32, device=device)
    meta = pairs.to(torch.uint8).index_select(0, chosen.view(-1)).view(chosen.shape)
    return torch.cat([codes, meta], dim=1).view(torch.int32)


def random_packed(n: int, k: int, num_bits: int, device: str = "cuda") -> torch.Tensor:
    """A packed weight drawn on the GPU, without packing anything."""
    shape = _core.packed_shape(n, k, num_bits)
    return random_slices(shape[0] * shape[1] // _core.slice_words(num_bits), num_bits, device).view(shape)


def random_scales(
    n: int, k: int, group_size: int, num_bits: int, dtype: torch.dtype, device: str = "cuda"
) -> torch.Tensor:
    """Scales that give outputs the size of the activations, within a factor of 1.5 either way."""
    return several_scales(1, n, k, group_size, num_bits, dtype, device)[0]


def several_scales(
    count: int, n: int, k: int, group_size: int, num_bits: int, dtype: torch.dtype, device: str = "cuda"
) -> list[torch.Tensor]:
    """Those of as many weights: a scale that every launch reads would stay in the caches."""
    deviation = math.sqrt(((2**num_bits - 1) ** 2 - 1) / 12)  # of a code of random_slices
    spread = torch.rand((count, *_core.scales_shape(n, k, group_size)), device=device) + 0.5
    return list((spread / (deviation * math.sqrt(k / 2))).to(dtype).unbind())


def check_rows(
    a: torch.Tensor, out: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group_size: int, num_bits: int
) -> None:
    """The first features of an output against float64."""
    rows = min(CHECKED_ROWS, out.shape[-1]) // _core.TILE_ROWS * _core.TILE_ROWS
    head = packed[: rows // _core.TILE_ROWS].contiguous()
    codes = sparse_marlin.unpack_24_weights(head, rows, a.shape[-1], num_bits)
    testing.assert_accepted(out[:, :rows], a, codes, scales[:, :rows].contiguous(), group_size)
