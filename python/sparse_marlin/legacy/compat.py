"""The removed operators under the names and argument orders that code still calls: vLLM's `gptq_marlin_24_gemm`,
torchao's `marlin_24_gemm`, and the `marlin_24_quantize` of both.

They take tensors in the old format. The packed form is made at the first call with a weight and kept as long as that
tensor lives, so both forms are in memory: convert the layer once with `from_marlin_24` where you can. Limits are this
library's: any M, float16 and bfloat16 (float32 on a CPU), N a multiple of 64 (what the old format holds), any leading
dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._extension import _core
from ..ops import sparse_marlin_gemm
from ..quantize import CHANNELWISE, dequantize_codes, quantize_weight_only
from .layouts import PackedLayer, export_marlin_24, import_marlin_24

# What callers of the old operators import beside them. Nothing here is limited by these numbers any more.
GPTQ_MARLIN_24_TILE = 16
GPTQ_MARLIN_24_MIN_THREAD_N = 128
GPTQ_MARLIN_24_MIN_THREAD_K = 128
GPTQ_MARLIN_24_MAX_PARALLEL = 64
GPTQ_MARLIN_24_SUPPORTED_NUM_BITS = [4, 8]
GPTQ_MARLIN_24_SUPPORTED_GROUP_SIZES = [CHANNELWISE, 128]


def gptq_marlin_24_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    b_meta: Tensor,
    b_scales: Tensor,
    workspace: Tensor | None,
    b_q_type: Any,
    size_m: int,
    size_n: int,
    size_k: int,
) -> Tensor:
    """vLLM's operator: `a [..., K] @ weight.T`, in the dtype of `a`.

    Args:
        b_q_weight, b_meta, b_scales: as in the files (`B_24`, `B_meta`, `s`); more than one row of scales means that
            they are in the grouped order.
        workspace: not looked at; None will do.
        b_q_type: 4 or 8, or vLLM's scalar type (uint4b8, uint8b128) or its id; must agree with the shapes.
        size_m, size_n, size_k: checked.
    """
    return _gemm("gptq_marlin_24_gemm", a, b_q_weight, b_meta, b_scales, _type_bits(b_q_type), size_m, size_n, size_k)


def marlin_24_gemm(
    x: Tensor,
    weight_marlin: Tensor,
    meta: Tensor,
    s: Tensor,
    workspace: Tensor | None,
    bits: int,
    size_m: int,
    size_n: int,
    size_k: int,
) -> Tensor:
    """torchao's operator; see `gptq_marlin_24_gemm`."""
    return _gemm("marlin_24_gemm", x, weight_marlin, meta, s, bits, size_m, size_n, size_k)


def marlin_24_quantize(w: Tensor, quant_type: Any, group_size: int) -> list[Tensor]:
    """Prune to 2:4 by magnitude, quantize, and pack in the old format.

    Args:
        w: `[K, N]`, float16, bfloat16 or float32.
        quant_type: 4 or 8, or vLLM's scalar type.
        group_size: 128, -1 or K (one group a column).

    Returns:
        `[w_ref [K, N], b_q_weight, b_meta, b_scales]`: the weight that the codes stand for, in the dtype of `w`, and
        the arguments of the operators. Scales are those with the least squared error, so they differ a little from what
        the old function found.
    """
    name = "marlin_24_quantize"
    if w.dim() != 2:
        raise ValueError(f"{name}: w: expected [K, N], got {list(w.shape)}")
    num_bits = _type_bits(quant_type)
    if num_bits not in _core.NUM_BITS:
        raise ValueError(f"{name}: quant_type: expected 4 or 8 bits, got {quant_type}")
    size_k = w.shape[0]
    group_size = CHANNELWISE if group_size == size_k else group_size
    if group_size not in GPTQ_MARLIN_24_SUPPORTED_GROUP_SIZES:
        raise ValueError(f"{name}: group_size: expected -1, 128 or K = {size_k}, got {group_size}")
    weight = w.detach().t().contiguous()
    # The format has float16 scales: found in float16, so that the codes fit those that are stored.
    found = quantize_weight_only(weight.to(torch.float16), group_size=group_size, num_bits=num_bits, name=name)
    packed = torch.ops.sparse_marlin.pack_24_weights(found.codes, found.scales, group_size, num_bits)
    layer = PackedLayer(packed, found.scales, weight.shape[0], size_k, group_size, num_bits)
    reference = dequantize_codes(found.codes, found.scales.float(), group_size).to(w.dtype).t().contiguous()
    return [reference, *export_marlin_24(layer, name=name).values()]


def marlin_24_workspace(
    out_features: int, min_thread_n: int = GPTQ_MARLIN_24_MIN_THREAD_N, max_parallel: int = GPTQ_MARLIN_24_MAX_PARALLEL
) -> Tensor:
    """torchao's helper. The operators here need no workspace: one element, so that code that makes one goes on."""
    return torch.zeros(1, dtype=torch.int32)


def _gemm(
    op: str,
    a: Tensor,
    b_q_weight: Tensor,
    b_meta: Tensor,
    b_scales: Tensor,
    num_bits: int | None,
    size_m: int,
    size_n: int,
    size_k: int,
) -> Tensor:
    got = (a.numel() // max(a.shape[-1], 1), b_scales.shape[-1], a.shape[-1])
    for name, value, wanted in zip(("size_m", "size_n", "size_k"), got, (size_m, size_n, size_k), strict=True):
        if value != wanted:
            of = "b_scales" if name == "size_n" else "a"
            raise ValueError(f"{op}: {name}: expected {value}, the size of {of}, got {wanted}")
    if b_q_weight.dim() == 2 and b_q_weight.shape[0] * _core.MARLIN_24_COLS != size_k:
        held = b_q_weight.shape[0] * _core.MARLIN_24_COLS
        raise ValueError(f"{op}: size_k: expected {held}, the size of b_q_weight, got {size_k}")
    if num_bits is not None and b_q_weight.dim() == 2 and b_q_weight.shape[1] * 2 != size_n * num_bits:
        raise ValueError(
            f"{op}: b_q_type: expected {b_q_weight.shape[1] * 2 / size_n:g} bits, as the shape of b_q_weight says, "
            f"got {num_bits}"
        )
    return torch.ops.sparse_marlin._marlin_24_gemm(a, b_q_weight, b_meta, b_scales)


# The packed form of old weights, by the tensor that holds their codes.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@torch.library.custom_op("sparse_marlin::_marlin_24_gemm", mutates_args=())
def _marlin_24_gemm(a: Tensor, b_q_weight: Tensor, b_meta: Tensor, b_scales: Tensor) -> Tensor:
    state = tuple(_state(tensor) for tensor in (b_q_weight, b_meta, b_scales))
    entry = _packed.get(b_q_weight)
    if entry is None or entry[0] != state:
        grouped = b_scales.shape[0] > 1  # what the old kernels go by
        layer = import_marlin_24(b_q_weight, b_meta, b_scales, permuted=grouped, name="gptq_marlin_24_gemm")
        entry = (state, layer, {})
        _packed[b_q_weight] = entry
    _, layer, scales = entry
    if a.dtype not in scales:
        scales[a.dtype] = layer.scales.to(a.dtype)
    return sparse_marlin_gemm(a, layer.weight_packed, scales[a.dtype], layer.group_size, layer.num_bits)


@_marlin_24_gemm.register_fake
def _(a: Tensor, b_q_weight: Tensor, b_meta: Tensor, b_scales: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b_scales.shape[1]))


def _state(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor's data does."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _type_bits(quant_type: Any) -> int | None:
    """Bits of 4, 8, vLLM's scalar types or their names; None for an id, which the shapes speak for."""
    bits = getattr(quant_type, "size_bits", None)
    if bits is None and isinstance(quant_type, str):
        bits = {"uint4b8": 4, "uint8b128": 8}.get(quant_type)
    if bits is None and isinstance(quant_type, int):
        bits = quant_type if quant_type < 1 << 8 else None
        if bits is not None and bits not in _core.NUM_BITS:
            raise ValueError(f"b_q_type: expected 4 or 8 bits, got {quant_type}")
        return bits
    if bits not in _core.NUM_BITS:
        raise ValueError(f"b_q_type: expected 4 or 8 bits (uint4b8, uint8b128), got {quant_type}")
    return int(bits)
