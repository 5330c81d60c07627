"""Packed layers as they lie in a checkpoint's files, of which a part is read without the rest.

What a rank of a tensor-parallel group needs of a layer is a range of output or input features. `part` reads the tiles
and scale groups that cover it, and nothing else, and cuts them exactly. The files are reached through a function from a
tensor's name to something with `get_shape()` that slices, as safetensors' `get_slice` gives it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._extension import _core
from .checkpoint import LayerSpec
from .legacy import NAMES, ORIGINAL, import_marlin_24, scales_are_permuted
from .quantize import CHANNELWISE
from .shard_plan import Range
from .slicing import PackedLayer, slice_in, slice_out

Open = Callable[[str], Any]  # tensor name -> get_shape(), [rows, columns]


class StoredLayer(ABC):
    """A layer of a checkpoint, its sizes known and its data not read yet."""

    name: str
    size_n: int
    size_k: int

    def part(self, column: bool, part: Range, device: torch.device | str = "cpu") -> PackedLayer:
        """Output features (`column`) or input features `part`; scales as they are stored."""
        start, stop = part
        size, unit = self.size_n if column else self.size_k, self._unit(column)
        first, last = start // unit * unit, min(-(-stop // unit) * unit, size)
        piece = self._piece(column, first, last, torch.device(device))
        return (slice_out if column else slice_in)(piece, start - first, stop - first)

    def whole(self, device: torch.device | str = "cpu") -> PackedLayer:
        return self.part(True, (0, self.size_n), device)

    @abstractmethod
    def _unit(self, column: bool) -> int:
        """Multiples at which the stored tensors can be cut as they are."""

    @abstractmethod
    def _piece(self, column: bool, start: int, stop: int, device: torch.device) -> PackedLayer:
        """Features `start` to `stop`, multiples of the unit or the end."""


@dataclass(frozen=True)
class OwnLayer(StoredLayer):
    """This library's format: `{name}.weight_packed` and `{name}.scales`; the sizes are in the checkpoint's config."""

    name: str
    spec: LayerSpec
    open: Open

    @property
    def size_n(self) -> int:  # type: ignore[override]
        return self.spec.out_features

    @property
    def size_k(self) -> int:  # type: ignore[override]
        return self.spec.in_features

    def _unit(self, column: bool) -> int:
        if column:
            return _core.TILE_ROWS
        return math.lcm(_core.TILE_COLS, 1 if self.spec.group_size == CHANNELWISE else self.spec.group_size)

    def _piece(self, column: bool, start: int, stop: int, device: torch.device) -> PackedLayer:
        packed, scales = self.open(f"{self.name}.weight_packed"), self.open(f"{self.name}.scales")
        bits, group = self.spec.num_bits, self.spec.group_size
        if column:
            size_n, size_k = stop - start, self.size_k
            packed = packed[start // _core.TILE_ROWS : -(-stop // _core.TILE_ROWS)]
            scales = scales[:, start:stop]
        else:
            size_n, size_k, words = self.size_n, stop - start, _core.tile_words(bits)
            packed = packed[:, start // _core.TILE_COLS * words : -(-stop // _core.TILE_COLS) * words]
            scales = scales[:] if group == CHANNELWISE else scales[start // group : -(-stop // group)]
        return PackedLayer(packed.to(device), scales.to(device), size_n, size_k, group, bits, self.name)


@dataclass(frozen=True)
class Marlin24Layer(StoredLayer):
    """One of the marlin-24 formats (`sparse_marlin.legacy`); all sizes are those of the tensors.

    Scales are put into plain order as the whole layer's file has them: a part with one group of a layer with many is in
    the grouped order, which its shape alone does not show.
    """

    name: str
    naming: str
    open: Open
    size_n: int
    size_k: int
    groups: int
    group_size: int

    @classmethod
    def of(cls, name: str, naming: str, open_tensor: Open) -> Marlin24Layer:
        """The layer whose tensors `open_tensor` finds under these names.

        Raises:
            ValueError: scales that are not whole groups.
        """
        packed, meta, scales = (list(open_tensor(f"{name}.{key}").get_shape()) for key in NAMES[naming])
        if any(len(shape) != 2 for shape in (packed, meta, scales)):
            raise ValueError(f"{name}: {naming} tensors: expected 2 dimensions each, got {packed}, {meta}, {scales}")
        groups, size_n = scales
        size_k = meta[1] * 16 if naming == ORIGINAL else packed[0] * _core.MARLIN_24_COLS
        if groups < 1 or size_k % groups:
            raise ValueError(f"{name}: scales: expected whole groups of K = {size_k}, got {groups} of them")
        return cls(name, naming, open_tensor, size_n, size_k, groups, CHANNELWISE if groups == 1 else size_k // groups)

    def _unit(self, column: bool) -> int:
        if self.naming == ORIGINAL:  # its shapes do not tell rows from columns: read whole
            return self.size_n if column else self.size_k
        if column:
            return _core.MARLIN_24_ROWS
        return math.lcm(_core.MARLIN_24_COLS, 1 if self.groups == 1 else self.group_size)

    def _piece(self, column: bool, start: int, stop: int, device: torch.device) -> PackedLayer:
        stored = [self.open(f"{self.name}.{key}") for key in NAMES[self.naming]]
        if start == 0 and stop == (self.size_n if column else self.size_k):
            tensors = [each[:] for each in stored]
        elif column:
            widths = [each.get_shape()[1] // self.size_n for each in stored]  # of one output feature
            tensors = [each[:, start * w : stop * w] for each, w in zip(stored, widths, strict=True)]
        else:
            first, last = start // _core.MARLIN_24_COLS, stop // _core.MARLIN_24_COLS
            tensors = [each[first:last] for each in stored[:2]]
            tensors.append(
                stored[2][:] if self.groups == 1 else stored[2][start // self.group_size : stop // self.group_size]
            )
        packed, meta, scales = (tensor.to(device) for tensor in tensors)
        piece = import_marlin_24(
            packed,
            meta,
            scales,
            naming=self.naming,
            permuted=scales_are_permuted(self.size_k, self.groups, self.naming),
            group_size=self.group_size,
            name=self.name,
        )
        return replace(piece, name=self.name)
