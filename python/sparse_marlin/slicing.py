"""Slices and concatenations of packed weights: what tensor parallelism cuts, without a process or a device in sight.

A `PackedLayer` is a packed tensor with its scales and its sizes. `slice_out` keeps rows of the weight [N, K] (output
features), `slice_in` keeps columns (input features), `concat_out` stacks weights along N. Each gives exactly the bytes
that packing the dense slice would: slice(pack(w)) == pack(slice(w)).

Where a cut falls on the tiles of the packed format the result is a view (`owned` copies it). Anywhere else the tiles
that cover the slice, and only those, are unpacked, cut and packed again. Along K the scale groups are cut, too:

* channelwise, or the whole slice inside one group: one scale a row, any cut at a multiple of 4 (2:4 sparsity);
* the cut at a multiple of the group size: the groups that remain;
* the cut inside a group: the largest smaller group size whose boundaries hold both the groups and the cut, with the
  scales repeated. The weight is the same to the bit, the scales take more bytes;
* a cut that even the smallest group size cannot hold is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ._extension import _core
from .linear import SparseMarlinLinear
from .ops import pack_24_weights, unpack_24_weights
from .quantize import CHANNELWISE, QUAD

FINITE_GROUP_SIZES = sorted(size for size in _core.GROUP_SIZES if size != CHANNELWISE)


@dataclass(frozen=True)
class PackedLayer:
    """A weight [size_n, size_k] in this library's format, outside of a module: `weight_packed` int32, `scales` [G, N]
    in plain order. `name` opens the error messages."""

    weight_packed: torch.Tensor
    scales: torch.Tensor
    size_n: int
    size_k: int
    group_size: int
    num_bits: int
    name: str = "weight"

    def __post_init__(self) -> None:
        packed = tuple(_core.packed_shape(self.size_n, self.size_k, self.num_bits))
        if tuple(self.weight_packed.shape) != packed or self.weight_packed.dtype != torch.int32:
            raise ValueError(
                f"{self.name}: weight_packed: expected int32 {list(packed)} for N = {self.size_n}, K = {self.size_k}, "
                f"{self.num_bits} bits, got {str(self.weight_packed.dtype).removeprefix('torch.')} "
                f"{list(self.weight_packed.shape)}"
            )
        scales = tuple(_core.scales_shape(self.size_n, self.size_k, self.group_size))
        if tuple(self.scales.shape) != scales:
            raise ValueError(
                f"{self.name}: scales: expected {list(scales)} for K = {self.size_k}, group_size {self.group_size}, "
                f"got {list(self.scales.shape)}"
            )

    @classmethod
    def of(cls, layer: SparseMarlinLinear, name: str = "weight") -> PackedLayer:
        """The weight of a layer, not copied."""
        sizes = (layer.out_features, layer.in_features, layer.group_size, layer.num_bits)
        return cls(layer.weight_packed, layer.scales.detach(), *sizes, name)

    def codes(self) -> torch.Tensor:
        """The signed codes, int8 [N, K]."""
        return unpack_24_weights(self.weight_packed, self.size_n, self.size_k, self.num_bits)

    def to_linear(self, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> SparseMarlinLinear:
        """A module that holds these tensors, the scales and the bias in `dtype` (default: that of the scales)."""
        dtype = dtype or self.scales.dtype
        layer = SparseMarlinLinear(
            self.size_k,
            self.size_n,
            bias=False,
            group_size=self.group_size,
            num_bits=self.num_bits,
            device="meta",
            dtype=dtype,
        )
        layer.weight_packed = self.weight_packed
        layer.scales = self.scales.to(dtype)
        if bias is not None:
            if tuple(bias.shape) != (self.size_n,):
                raise ValueError(f"{self.name}: bias: expected [{self.size_n}], got {list(bias.shape)}")
            layer.bias = nn.Parameter(bias.detach().to(device=self.scales.device, dtype=dtype))
        return layer


def slice_out(weight: PackedLayer, start: int, stop: int) -> PackedLayer:
    """Output features `start` to `stop` (rows of the weight); a view where both fall on tiles of the format."""
    _check_range(weight, "output features", start, stop, weight.size_n, 1)
    unit = _core.TILE_ROWS
    first, last = start // unit, -(-stop // unit)
    tiles = replace(
        weight,
        weight_packed=weight.weight_packed[first:last],
        scales=weight.scales[:, first * unit : min(last * unit, weight.size_n)],
        size_n=min(last * unit, weight.size_n) - first * unit,
    )
    start, stop = start - first * unit, stop - first * unit
    if start == 0 and stop == tiles.size_n:
        return tiles
    return _packed(tiles, tiles.codes()[start:stop], tiles.scales[:, start:stop], weight.group_size)


def slice_in(weight: PackedLayer, start: int, stop: int) -> PackedLayer:
    """Input features `start` to `stop` (columns of the weight), with their scale groups; see the module's text.

    Raises:
        ValueError: outside of the weight, not at multiples of 4, or a cut that no supported group size can hold.
    """
    _check_range(weight, "input features", start, stop, weight.size_k, QUAD)
    group_size, scales = _sliced_groups(weight, start, stop)
    unit, words = _core.TILE_COLS, _core.tile_words(weight.num_bits)
    first, last = start // unit, -(-stop // unit)
    packed = weight.weight_packed[:, first * words : last * words]
    if start % unit == 0 and (stop % unit == 0 or stop == weight.size_k):
        return replace(weight, weight_packed=packed, scales=scales, size_k=stop - start, group_size=group_size)
    covered = min(last * unit, weight.size_k) - first * unit
    codes = unpack_24_weights(packed, weight.size_n, covered, weight.num_bits)
    return _packed(weight, codes[:, start - first * unit : stop - first * unit], scales, group_size)


def concat_out(weights: Sequence[PackedLayer]) -> PackedLayer:
    """The weights stacked along N (fused q, k, v or gate, up). Where group sizes differ, the finest of them.

    Raises:
        ValueError: no weights, or different K or bits.
    """
    if not weights:
        raise ValueError("concat_out: weights: expected at least one, got none")
    first = weights[0]
    for other in weights[1:]:
        if (other.size_k, other.num_bits) != (first.size_k, first.num_bits):
            raise ValueError(
                f"{other.name}: K and bits: expected {first.size_k} and {first.num_bits} as in {first.name}, "
                f"got {other.size_k} and {other.num_bits}; keep the two as layers of their own"
            )
    if len(weights) == 1:
        return first
    sizes = {weight.group_size for weight in weights}
    if len(sizes) > 1:
        finest = min(size for size in sizes if size != CHANNELWISE)
        weights = [with_group_size(weight, finest) for weight in weights]
    scales = torch.cat([weight.scales for weight in weights], dim=1)
    if any(weight.size_n % _core.TILE_ROWS for weight in weights[:-1]):
        return _packed(weights[0], torch.cat([weight.codes() for weight in weights]), scales, weights[0].group_size)
    packed = torch.cat([weight.weight_packed for weight in weights])
    return replace(weights[0], weight_packed=packed, scales=scales, size_n=scales.shape[1])


def with_group_size(weight: PackedLayer, group_size: int) -> PackedLayer:
    """The same weight with more scales: each stands for `group_size` input features, which must divide the present
    size."""
    if group_size == weight.group_size:
        return weight
    groups = _core.num_groups(weight.size_k, group_size)
    if weight.scales.shape[0] == 1:
        scales = weight.scales.expand(groups, -1)
    elif group_size == CHANNELWISE or weight.group_size % group_size:
        raise ValueError(
            f"{weight.name}: group_size: expected a divisor of {weight.group_size}, got {group_size}; scales can be "
            "repeated, not merged"
        )
    else:
        scales = weight.scales.repeat_interleave(weight.group_size // group_size, dim=0)[:groups]
    return replace(weight, scales=scales.contiguous(), group_size=group_size)


def owned(weight: PackedLayer) -> PackedLayer:
    """The weight in memory of its own, so that the tensors it was cut from can be freed."""
    copies = [
        tensor.clone(memory_format=torch.contiguous_format)
        if tensor.untyped_storage().nbytes() > tensor.nbytes or not tensor.is_contiguous()
        else tensor
        for tensor in (weight.weight_packed, weight.scales)
    ]
    return replace(weight, weight_packed=copies[0], scales=copies[1])


def _check_range(weight: PackedLayer, what: str, start: int, stop: int, size: int, multiple: int) -> None:
    if not 0 <= start < stop <= size:
        raise ValueError(f"{weight.name}: {what}: expected 0 <= start < stop <= {size}, got {start} to {stop}")
    if start % multiple or stop % multiple:
        raise ValueError(
            f"{weight.name}: {what}: expected a slice at multiples of {multiple} (2:4 sparsity), got {start} to {stop}"
        )


def _sliced_groups(weight: PackedLayer, start: int, stop: int) -> tuple[int, torch.Tensor]:
    """Group size and scales of input features `start` to `stop`."""
    size = weight.group_size
    if size == CHANNELWISE:
        return size, weight.scales
    first, last = start // size, -(-stop // size)
    if start % size == 0 or last - first == 1:
        return size, weight.scales[first:last]
    finer = [other for other in FINITE_GROUP_SIZES if size % other == 0 and start % other == 0]
    if not finer:
        raise ValueError(
            f"{weight.name}: input features: expected a slice that starts at a multiple of {FINITE_GROUP_SIZES[0]}, "
            f"the smallest group size (scales of group_size {size} can be repeated for smaller groups), "
            f"got {start} to {stop}; keep this layer whole"
        )
    repeated = weight.scales.repeat_interleave(size // max(finer), dim=0)
    return max(finer), repeated[start // max(finer) : -(-stop // max(finer))]


def _packed(like: PackedLayer, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> PackedLayer:
    """`codes` packed, as bytes that any packer would write."""
    packed = pack_24_weights(codes.contiguous(), scales.contiguous(), group_size, like.num_bits)
    size_n, size_k = codes.shape
    return PackedLayer(packed, scales.contiguous(), size_n, size_k, group_size, like.num_bits, like.name)
