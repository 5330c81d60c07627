"""Reads one layer of an opened checkpoint, whatever its format, into this library's.

marlin-24 layers move as they are. All others hold their zeros: their codes (or, for dense weights, codes found by the
weight-only method) are packed, which refuses what is not 2:4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._extension import _core
from .._shards import TensorFiles
from ..quantize import CHANNELWISE, is_24_sparse, quantize, relative_error
from .formats import BITMASK, DENSE, GPTQ_DENSE, INT_QUANTIZED, MARLIN_24, PACK_QUANTIZED, Source, SourceLayer
from .layouts import NAMES, PackedLayer, export_marlin_24, import_marlin_24

_WORD_BITS = torch.iinfo(torch.int32).bits  # of the words that other formats pack into


@dataclass(frozen=True)
class Reading:
    """A layer as it was read: packed, or left dense for `reason`."""

    packed: PackedLayer | None
    relative_error: float | None = None  # of what was quantized on the way; everything else is exact
    reason: str | None = None


@dataclass(frozen=True)
class Options:
    """For dense weights: how to quantize them. `permuted`: see `import_marlin_24`."""

    group_size: int = 128
    num_bits: int = 4
    permuted: bool | None = None
    device: torch.device | str = "cpu"


def read_layer(source: Source, layer: SourceLayer, options: Options) -> Reading:
    """The layer on `options.device`. Errors name the file and the layer."""
    info = source.files.infos[next(iter(layer.tensors.values()))]
    where = f"{info.path.name}: {layer.name}"
    read = _Reader(source.files, layer, where, options)
    try:
        return _READERS[layer.kind](read)
    except RuntimeError as error:
        text = str(error)
        raise (error if text.startswith(where) else RuntimeError(f"{where}: {text}")) from None


def same_as_source(source: Source, layer: SourceLayer, packed: PackedLayer, options: Options) -> bool:
    """Whether a marlin-24 layer, unpacked to its old format, is what the checkpoint holds; codes that the published
    packers would have stored otherwise are compared after import."""
    codes, meta, _ = (source.files.read(layer.tensors[key]).to(options.device) for key in NAMES[layer.naming])
    back = export_marlin_24(packed, naming=layer.naming)
    same_codes, same_meta = (back[key] for key in NAMES[layer.naming][:2])
    if torch.equal(codes[: same_codes.shape[0]], same_codes) and torch.equal(meta, same_meta):
        return True
    again = import_marlin_24(codes, meta, packed.scales, naming=layer.naming, permuted=False)
    return torch.equal(again.weight_packed, packed.weight_packed)


@dataclass(frozen=True)
class _Reader:
    files: TensorFiles
    layer: SourceLayer
    where: str
    options: Options

    def __call__(self, role: str) -> torch.Tensor:
        return self.files.read(self.layer.tensors[role]).to(self.options.device)

    def has(self, role: str) -> bool:
        return role in self.layer.tensors

    def refuse(self, role: str, expected: str, got: str) -> ValueError:
        return ValueError(f"{self.where}: {role}: expected {expected}, got {got}")

    def bits(self) -> int:
        if self.layer.scheme.num_bits is None:
            raise self.refuse("config", "the number of bits", "none")
        return self.layer.scheme.num_bits


def _read_marlin_24(read: _Reader) -> Reading:
    codes, meta, scales = (read(key) for key in NAMES[read.layer.naming])
    return Reading(
        import_marlin_24(
            codes,
            meta,
            scales,
            naming=read.layer.naming,
            permuted=read.options.permuted,
            group_size=read.layer.scheme.group_size,
            name=read.where,
        )
    )


def _read_pack_quantized(read: _Reader) -> Reading:
    words, num_bits = read("weight_packed"), read.bits()
    size_n, size_k = (int(size) for size in read("weight_shape").flatten().tolist())
    per_word = _WORD_BITS // num_bits
    if words.dtype != torch.int32 or tuple(words.shape) != (size_n, -(-size_k // per_word)):
        raise read.refuse(
            "weight_packed", f"int32 [{size_n}, {-(-size_k // per_word)}] for {num_bits} bits", _what(words)
        )
    codes = (_fields(words, num_bits).flatten(1)[:, :size_k] - (1 << (num_bits - 1))).to(torch.int8)
    _expect_no_zero_point(read)
    return _from_codes(read, codes, read("weight_scale"), num_bits)


def _read_int_quantized(read: _Reader) -> Reading:
    codes = read("weight")
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise read.refuse("weight", "int8 [N, K]", _what(codes))
    _expect_no_zero_point(read)
    return _from_codes(read, codes, read("weight_scale"), read.layer.scheme.num_bits or 8)


def _read_gptq(read: _Reader) -> Reading:
    words, scales, num_bits = read("qweight"), read("scales"), read.bits()
    per_word = _WORD_BITS // num_bits
    if words.dtype != torch.int32 or words.dim() != 2:
        raise read.refuse("qweight", "int32 [K * bits / 32, N]", _what(words))
    size_k, size_n = words.shape[0] * per_word, words.shape[1]
    if scales.dim() != 2 or scales.shape[1] != size_n:
        raise read.refuse("scales", f"[groups, {size_n}]", _what(scales))
    groups = scales.shape[0]
    group = _group_of_columns(read, "g_idx", size_k, groups)
    zeros = _fields(read("qzeros"), num_bits).flatten(1)
    if tuple(zeros.shape) != (groups, size_n):
        raise read.refuse("qzeros", f"int32 [{groups}, {size_n // per_word}]", _what(read("qzeros")))
    if read.layer.naming != "gptq_v2":  # the first version stores zero points minus one
        zeros = zeros + 1
    unsigned = _fields(words.t().contiguous(), num_bits).flatten(1)
    shifted = unsigned - zeros.t()[:, group]
    low, high = _core.code_min(num_bits), _core.code_max(num_bits)
    if bool(((shifted < low) | (shifted > high)).any()):
        raise read.refuse(
            "qzeros", "zero points in the middle (symmetric quantization)", f"codes beyond {low}..{high} around theirs"
        )
    return _packed(read, shifted.to(torch.int8), scales, num_bits, size_k, groups)


def _read_bitmask(read: _Reader) -> Reading:
    values, mask = read("compressed"), read("bitmask")
    size_n, size_k = (int(size) for size in read("shape").flatten().tolist())
    if tuple(values.shape) != (size_n, size_k // 2) or mask.dtype != torch.uint8:
        raise read.refuse("compressed", f"[{size_n}, {size_k // 2}] beside a uint8 bitmask", _what(values))
    if tuple(mask.shape) != (size_n, -(-size_k // 8)):
        raise read.refuse("bitmask", f"uint8 [{size_n}, {-(-size_k // 8)}]", _what(mask))
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    kept = (mask.unsqueeze(-1) >> bits & 1).flatten(1)[:, :size_k].bool()
    if int(kept.sum()) != values.numel():
        raise read.refuse("bitmask", f"{values.numel()} bits set, one for each value", f"{int(kept.sum())}")
    weight = torch.zeros((size_n, size_k), dtype=values.dtype, device=values.device)
    weight[kept] = values.flatten()
    if read.has("weight_scale"):
        if weight.dtype != torch.int8:
            raise read.refuse("compressed", "int8 beside a weight_scale", _what(values))
        _expect_no_zero_point(read)
        return _from_codes(read, weight, read("weight_scale"), 8)
    return _quantized(read, weight)


def _read_dense(read: _Reader) -> Reading:
    weight = read("weight")
    if not is_24_sparse(weight):
        return Reading(None, reason="its weight is not 2:4 sparse")
    return _quantized(read, weight)


_READERS: dict[str, Callable[[_Reader], Reading]] = {
    MARLIN_24: _read_marlin_24,
    PACK_QUANTIZED: _read_pack_quantized,
    INT_QUANTIZED: _read_int_quantized,
    GPTQ_DENSE: _read_gptq,
    BITMASK: _read_bitmask,
    DENSE: _read_dense,
}


def _quantized(read: _Reader, weight: torch.Tensor) -> Reading:
    """Weight-only: the zeros are given, the scales have the least squared error."""
    options = read.options
    found = quantize(weight, weight != 0, options.group_size, options.num_bits, name=read.where)
    packed = torch.ops.sparse_marlin.pack_24_weights(found.codes, found.scales, found.group_size, found.num_bits)
    size_n, size_k = weight.shape
    layer = PackedLayer(packed, found.scales, size_n, size_k, found.group_size, found.num_bits)
    return Reading(layer, relative_error(weight, found))


def _from_codes(read: _Reader, codes: torch.Tensor, scales: torch.Tensor, num_bits: int) -> Reading:
    """compressed-tensors' scales: [N, groups], [N, 1], or one value."""
    size_n, size_k = codes.shape
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(size_n, 1)
    if scales.dim() != 2 or scales.shape[0] != size_n:
        raise read.refuse("weight_scale", f"[{size_n}, groups]", _what(scales))
    _group_of_columns(read, "weight_g_idx", size_k, scales.shape[1])
    return _packed(read, codes, scales.t().contiguous(), num_bits, size_k, scales.shape[1])


def _packed(
    read: _Reader, codes: torch.Tensor, scales: torch.Tensor, num_bits: int, size_k: int, groups: int
) -> Reading:
    stated = read.layer.scheme.group_size
    group_size = CHANNELWISE if groups == 1 and stated in (None, CHANNELWISE) else stated
    if group_size is None and size_k % groups == 0:
        group_size = size_k // groups
    if group_size not in _core.GROUP_SIZES or groups != _core.num_groups(size_k, group_size):
        raise read.refuse(
            "scales",
            f"groups of one of {sorted(_core.GROUP_SIZES)} columns" + (f" ({stated})" if stated else ""),
            f"{groups} groups of K = {size_k}",
        )
    packed = torch.ops.sparse_marlin.pack_24_weights(codes.contiguous(), scales, group_size, num_bits)
    return Reading(PackedLayer(packed, scales, codes.shape[0], size_k, group_size, num_bits))


def _fields(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int32 [..., fields] of int32 words, the lowest bits first."""
    if words.dtype != torch.int32:
        raise ValueError(f"expected int32 words, got {_what(words)}")
    shifts = torch.arange(0, _WORD_BITS, num_bits, dtype=torch.int32, device=words.device)
    return words.unsqueeze(-1) >> shifts & (1 << num_bits) - 1


def _expect_no_zero_point(read: _Reader) -> None:
    if read.has("weight_zero_point") and bool(read("weight_zero_point").count_nonzero()):
        raise read.refuse("weight_zero_point", "zeros (symmetric quantization)", "other values")


def _group_of_columns(read: _Reader, role: str, size_k: int, groups: int) -> torch.Tensor:
    """Each column's group. Groups in order of activations have no place in a format of consecutive groups."""
    stated = read.layer.scheme.group_size
    width = size_k if groups == 1 else (stated if stated not in (None, CHANNELWISE) else -(-size_k // groups))
    in_order = torch.arange(size_k, device=read.options.device) // max(int(width or 1), 1)
    if int(in_order[-1]) >= groups:
        raise read.refuse("scales", f"{int(in_order[-1]) + 1} groups of {width} columns", f"{groups}")
    if read.has(role):
        index = read(role)
        if index.numel() != size_k or (not torch.equal(index.long(), in_order) and bool((index >= 0).all())):
            raise read.refuse(role, "consecutive groups (desc_act: false)", "groups in another order")
    return in_order


def _what(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
