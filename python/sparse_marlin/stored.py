"""Packed layers as they lie in a checkpoint's files, of which a part is read without the rest.

What a rank of a tensor-parallel group needs of a layer is a range of output or input features. `StoredLayer.part` reads
the tiles and scale groups that cover it, and nothing else, and cuts them exactly. The files are reached through a
function from a tensor's name to something with `get_shape()` that slices, as safetensors' `get_slice` gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._extension import _core
from .checkpoint import LayerSpec
from .quantize import CHANNELWISE
from .shard_plan import Range
from .slicing import PackedWeight, slice_in, slice_out

Open = Callable[[str], Any]  # tensor name -> get_shape(), [rows, columns]


def cover(part: Range, unit: int, size: int) -> Range:
    """The whole units that hold `part`."""
    return part[0] // unit * unit, min(-(-part[1] // unit) * unit, size)


@dataclass(frozen=True)
class StoredLayer:
    """A layer in this library's own format: `{name}.weight_packed` and `{name}.scales`."""

    name: str
    spec: LayerSpec
    open: Open

    @property
    def size_n(self) -> int:
        return self.spec.out_features

    @property
    def size_k(self) -> int:
        return self.spec.in_features

    def part(self, column: bool, part: Range, device: torch.device | str = "cpu") -> PackedWeight:
        """Output features (`column`) or input features `part`, with scales as they are stored."""
        start, stop = part
        unit = self.unit(column)
        first, last = cover(part, unit, self.size_n if column else self.size_k)
        piece = self.piece(column, (first, last), device)
        return (slice_out if column else slice_in)(piece, start - first, stop - first)

    def whole(self, device: torch.device | str = "cpu") -> PackedWeight:
        return self.piece(True, (0, self.size_n), device)

    def unit(self, column: bool) -> int:
        """Multiples at which the stored tensors can be cut as they are."""
        if column:
            return _core.TILE_ROWS
        return math.lcm(_core.TILE_COLS, 1 if self.spec.group_size == CHANNELWISE else self.spec.group_size)

    def piece(self, column: bool, part: Range, device: torch.device | str) -> PackedWeight:
        """`part` at multiples of `unit`."""
        start, stop = part
        packed, scales = self.open(f"{self.name}.weight_packed"), self.open(f"{self.name}.scales")
        bits, group = self.spec.num_bits, self.spec.group_size
        if column:
            size_k = self.size_k
            packed = packed[start // _core.TILE_ROWS : -(-stop // _core.TILE_ROWS)]
            scales = scales[:, start:stop]
        else:
            size_k, words = stop - start, _core.tile_words(bits)
            packed = packed[:, start // _core.TILE_COLS * words : -(-stop // _core.TILE_COLS) * words]
            scales = scales[:] if group == CHANNELWISE else scales[start // group : -(-stop // group)]
        return PackedWeight(packed.to(device), scales.to(device), size_k, group, bits, self.name)


def stored_layer(name: str, layers: Mapping[str, LayerSpec], open_tensor: Open) -> StoredLayer:
    """The layer `name` of a checkpoint whose config has these layers.

    Raises:
        ValueError: the config does not have it.
    """
    spec = layers.get(name)
    if spec is None:
        raise ValueError(
            f"{name}: expected the layer in quantization_config's layers, got none of that name; the tensors and "
            "config.json are not of the same model"
        )
    return StoredLayer(name, spec, open_tensor)
