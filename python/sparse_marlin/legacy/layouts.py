"""Tensors of the old "marlin-24" formats into packed ones and back, one layer at a time, on the CPU and on CUDA.

The published payload is the same in three namings: `B_24`, `B_meta`, `s` (GPTQ checkpoints with `checkpoint_format:
marlin_24`), `weight_packed`, `meta`, `scale_packed` (compressed-tensors, `format: marlin-24`) and `B`, `meta`, `s` (the
original project's layer). Codes and metadata move to their new places without a dense weight in between
(`csrc/legacy`); scales are unpermuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .._extension import _core
from ..linear import SparseMarlinLinear
from ..quantize import CHANNELWISE, SCALE_DTYPES

GPTQ = "gptq"  # B_24, B_meta, s
COMPRESSED_TENSORS = "compressed-tensors"  # weight_packed, meta, scale_packed
ORIGINAL = "original"  # B, meta, s

# Codes, metadata, scales as each naming calls them.
NAMES: dict[str, tuple[str, str, str]] = {
    GPTQ: ("B_24", "B_meta", "s"),
    COMPRESSED_TENSORS: ("weight_packed", "meta", "scale_packed"),
    ORIGINAL: ("B", "meta", "s"),
}
GROUP_SIZES = (CHANNELWISE, 128)  # all that the old kernels knew
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of every eight features, where scales are grouped


@dataclass(frozen=True)
class PackedLayer:
    """A layer's tensors in this library's format: `weight_packed` int32, `scales` [G, N] in plain order."""

    weight_packed: torch.Tensor
    scales: torch.Tensor
    size_n: int
    size_k: int
    group_size: int
    num_bits: int

    def to_linear(self, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> SparseMarlinLinear:
        """The layer, with its scales and bias in `dtype` (default: that of the scales)."""
        dtype = dtype or self.scales.dtype
        layer = SparseMarlinLinear(
            self.size_k,
            self.size_n,
            False,
            group_size=self.group_size,
            num_bits=self.num_bits,
            device="meta",
            dtype=dtype,
        )
        layer.weight_packed, layer.scales = self.weight_packed, self.scales.to(dtype)
        if bias is not None:
            if list(bias.shape) != [self.size_n]:
                raise ValueError(f"to_linear: bias: expected [{self.size_n}], got {list(bias.shape)}")
            layer.bias = nn.Parameter(bias.detach().to(device=self.scales.device, dtype=dtype))
        return layer


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [G, N] in the order in which files with more than one group hold them."""
    _check_eights("permute_scales", scales)
    return scales.unflatten(1, (-1, len(_SCALE_ORDER)))[:, :, list(_SCALE_ORDER)].flatten(1)


def unpermute_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse: scales [G, N] in plain order. Unpermute before you slice a grouped tensor down to one row."""
    _check_eights("unpermute_scales", scales)
    back = [_SCALE_ORDER.index(i) for i in range(len(_SCALE_ORDER))]
    return scales.unflatten(1, (-1, len(_SCALE_ORDER)))[:, :, back].flatten(1)


def scales_are_permuted(size_k: int, num_groups: int, naming: str) -> bool:
    """Whether a published packer permuted the scales of a whole layer.

    One group is never permuted, several are, with one exception: the compressed-tensors packer compares the group size
    with K / 2, so that at K = 256 the two groups of 128 lie in plain order (and every kernel read them wrongly).
    """
    if num_groups <= 1:
        return False
    return naming != COMPRESSED_TENSORS or size_k // num_groups < size_k // 2


def import_marlin_24(
    packed: torch.Tensor,
    meta: torch.Tensor,
    scales: torch.Tensor,
    *,
    naming: str = GPTQ,
    permuted: bool | None = None,
    group_size: int | None = None,
    name: str = "import_marlin_24",
) -> PackedLayer:
    """The tensors of an old layer, or of a slice of one, in this library's format.

    Args:
        packed: int32 `[K / 32, N * bits / 2]`; the original project's may have twice as many rows, of which the first
            half is read.
        meta: int16 `[K / 32, N * 2]` (the original project: `[N, K / 16]`, the same bytes).
        scales: float16, bfloat16 or float32 `[G, N]`; their dtype is kept.
        naming: which packer wrote them; decides about its oddities (`scales_are_permuted`).
        permuted: whether the scales lie in the grouped order, where the caller knows better: True for one row that was
            cut out of a grouped tensor.
        group_size: what the checkpoint's config says; checked against the shapes.
        name: opens the messages.

    Raises:
        ValueError: dtypes or shapes that no packer writes or that do not fit one another.
        RuntimeError: metadata that is not two rising indices (with row and column).
    """
    packed, meta = _as_rows(packed, meta, naming, name)
    size_k, size_n = packed.shape[0] * _core.MARLIN_24_COLS, meta.shape[1] // 2
    num_bits = _bits(packed, size_n)
    if num_bits is None or size_n % _core.MARLIN_24_ROWS:
        raise ValueError(f"{name}: meta: expected N to be a multiple of {_core.MARLIN_24_ROWS}, got {size_n}")
    if scales.dtype not in SCALE_DTYPES or scales.dim() != 2 or scales.shape[1] != size_n:
        raise ValueError(
            f"{name}: scales: expected a floating type [groups, {size_n}], got {_what(scales)}; "
            "packed, meta and scales must be of one layer"
        )
    found = _group_size(scales.shape[0], size_k, group_size, name)
    if permuted is None:
        permuted = scales_are_permuted(size_k, scales.shape[0], naming)
    plain = unpermute_scales(scales) if permuted else scales
    if not plain.is_meta and not bool((torch.isfinite(plain) & (plain > 0)).all()):
        raise ValueError(
            f"{name}: scales: expected finite values > 0, got NaN, infinity, zero or less; the file is damaged"
        )
    try:
        weight_packed = torch.ops.sparse_marlin.import_marlin_24(packed, meta, num_bits)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from None
    return PackedLayer(weight_packed, plain.contiguous(), size_n, size_k, found, num_bits)


def export_marlin_24(
    layer: SparseMarlinLinear | PackedLayer, *, naming: str = GPTQ, name: str = "export_marlin_24"
) -> dict[str, torch.Tensor]:
    """The layer as the old packers write it, byte for byte, under the names of `naming` (without the layer's own).

    `import_marlin_24` and this undo one another. The format has float16 scales and no others: those of other types are
    rounded to it.

    Raises:
        ValueError: what the old format cannot hold: N not a multiple of 64, K not a multiple of 32, groups other than
            128 or whole rows, scales beyond float16, a low-rank correction.
    """
    if isinstance(layer, SparseMarlinLinear):
        if getattr(layer, "rank", 0):
            raise ValueError(f"{name}: expected a layer without a low-rank correction, got one of rank {layer.rank}")
        layer = PackedLayer(
            layer.weight_packed,
            layer.scales.detach(),
            layer.out_features,
            layer.in_features,
            layer.group_size,
            layer.num_bits,
        )
    groups = layer.scales.shape[0]
    if layer.group_size not in GROUP_SIZES and groups > 1:
        raise ValueError(
            f"{name}: group_size: expected one of {sorted(GROUP_SIZES)}, all that the old format has, "
            f"got {layer.group_size}"
        )
    if groups > 1 and layer.size_k % layer.group_size:
        raise ValueError(
            f"{name}: in_features: expected a multiple of {layer.group_size} (whole groups), got {layer.size_k}"
        )
    scales = layer.scales.to(torch.float16)
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"{name}: scales: expected values that float16 holds, got larger or smaller ones")
    try:
        packed, meta = torch.ops.sparse_marlin.export_marlin_24(
            layer.weight_packed, layer.size_n, layer.size_k, layer.num_bits
        )
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from None
    if scales_are_permuted(layer.size_k, groups, naming):
        scales = permute_scales(scales)
    if naming == ORIGINAL:
        meta = meta.view(layer.size_n, -1)
    return dict(zip(NAMES[naming], (packed, meta, scales.contiguous()), strict=True))


def from_marlin_24(
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    group_size: int | None = None,
    permuted: bool | None = None,
    name: str = "from_marlin_24",
) -> SparseMarlinLinear:
    """A layer from the state dict of an old one (`B_24`, ..., or `weight_packed`, ..., or `B`, ..., and `bias`)."""
    naming = naming_of(tensors)
    if naming is None:
        wanted = ", or ".join(" ".join(names) for names in NAMES.values())
        raise ValueError(f"{name}: tensors: expected {wanted}, got {sorted(tensors)}")
    packed, meta, scales = (tensors[key] for key in NAMES[naming])
    layer = import_marlin_24(packed, meta, scales, naming=naming, permuted=permuted, group_size=group_size, name=name)
    return layer.to_linear(tensors.get("bias"), dtype)


def naming_of(names: Mapping[str, object]) -> str | None:
    """The naming that a layer's tensor names belong to."""
    return next((naming for naming, keys in NAMES.items() if all(key in names for key in keys)), None)


def _as_rows(packed: torch.Tensor, meta: torch.Tensor, naming: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and metadata with as many rows, the original project's shapes resolved."""
    if packed.dtype != torch.int32 or packed.dim() != 2:
        raise ValueError(f"{name}: packed: expected int32 [K / 32, N * bits / 2], got {_what(packed)}")
    form = "[N, K / 16]" if naming == ORIGINAL else "[K / 32, N * 2]"
    if meta.dtype != torch.int16 or meta.dim() != 2:
        raise ValueError(f"{name}: meta: expected int16 {form}, got {_what(meta)}")
    if naming == ORIGINAL:
        # The same bytes. Codes have K / 32 rows, or twice as many of which the second half was never written.
        size_n, steps = meta.shape[0], meta.shape[1] // 2
        if steps and meta.shape[1] % 2 == 0 and packed.shape[0] in (steps, 2 * steps) and _bits(packed, size_n) == 4:
            return packed[:steps], meta.contiguous().view(steps, 2 * size_n)
    elif meta.shape[0] == packed.shape[0] and _bits(packed, meta.shape[1] // 2) is not None:
        return packed, meta
    raise ValueError(
        f"{name}: meta: expected int16 {form} with the K and N of packed ([K / 32, N * bits / 2]), "
        f"got {_what(meta)} beside {_what(packed)}"
    )


def _bits(packed: torch.Tensor, size_n: int) -> int | None:
    return next((bits for bits in _core.NUM_BITS if size_n > 0 and packed.shape[1] == size_n * bits // 2), None)


def _group_size(groups: int, size_k: int, stated: int | None, name: str) -> int:
    """From the number of groups; what the config states must agree."""
    if groups == 1:
        found = CHANNELWISE
    elif groups > 1 and size_k % groups == 0 and size_k // groups in _core.GROUP_SIZES:
        found = size_k // groups
    else:
        raise ValueError(f"{name}: scales: expected 1 group or whole groups of K = {size_k}, got {groups} rows")
    if stated is None or stated == found:
        return found
    if groups == _core.num_groups(size_k, stated):  # K is one group: both are right
        return stated
    raise ValueError(
        f"{name}: scales: expected {_core.num_groups(size_k, stated)} groups for group_size {stated} as the config "
        f"says, got {groups}"
    )


def _check_eights(name: str, scales: torch.Tensor) -> None:
    if scales.dim() != 2 or scales.shape[1] % len(_SCALE_ORDER):
        raise ValueError(
            f"{name}: scales: expected [G, N] with N a multiple of {len(_SCALE_ORDER)}, got {list(scales.shape)}"
        )


def _what(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
