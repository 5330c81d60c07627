"""The operators with types and documentation, and their fake kernels, gradient and autocast rule.

The operators themselves are C++ (`torch.ops.sparse_marlin`). Notation: M tokens, N out features, K in features, G
groups along K.
Argument errors are `RuntimeError`s of the form `op: argument: expected ..., got ...`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._extension import _core
from .low_rank import twice

__all__ = [
    "dequantize_24",
    "pack_24_weights",
    "sparse_marlin_gemm",
    "sparse_marlin_gemm_low_rank",
    "sparse_marlin_gemm_prefetch",
    "unpack_24_weights",
]

_ops = torch.ops.sparse_marlin


def pack_24_weights(weight: Tensor, scales: Tensor, group_size: int = 128, num_bits: int = 4) -> Tensor:
    """Pack a 2:4-sparse weight into one int32 stream of codes and metadata.

    Args:
        weight: `[N, K]`, at most two non-zero values in every four consecutive columns. int8: the signed codes.
            float32, float16, bfloat16: dequantized values, the code is `round(w / scale)`.
        scales: `[G, N]` float32, float16 or bfloat16, finite and > 0. For int8 weights they are only checked.
        group_size: columns that share a scale: 32, 64, 128, 256, or -1 for one group a row.
        num_bits: 4 (codes -8..7) or 8 (codes -128..127).

    Returns:
        int32, 2-D, on the device of `weight`: rows of tiles along N, words along K.

    Raises:
        RuntimeError: wrong dtype, shape or device; a weight that is not 2:4, a code out of range or a value that is not
            finite (with its row and column); a bad scale (with its group and feature); K not divisible by 4.
    """
    return _ops.pack_24_weights(weight, scales, group_size, num_bits)


def unpack_24_weights(weight_packed: Tensor, size_n: int, size_k: int, num_bits: int = 4) -> Tensor:
    """The int8 codes `[size_n, size_k]` that were packed, zeros included.

    Raises:
        RuntimeError: `weight_packed` is not of the shape that N, K and `num_bits` give, or its metadata is corrupted
            (with the row and column).
    """
    return _ops.unpack_24_weights(weight_packed, size_n, size_k, num_bits)


def sparse_marlin_gemm(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    """`a @ weight.T + bias`, accumulated in float32 and rounded once; bitwise the same from run to run.

    Args:
        a: `[..., K]`, any leading dimensions, M may be 0. CUDA: float16 or bfloat16; CPU: also float32.
        weight_packed: from `pack_24_weights`; a slice of it along either dimension at tile boundaries is used in place.
        scales: `[G, N]`, dtype of `a`.
        group_size, num_bits: as packed.
        bias: `[N]`, dtype of `a`, or None.

    Returns:
        `[..., N]`, dtype and device of `a`. Differentiable with respect to `a` and `bias`; the packed weight is frozen.
        Under `torch.autocast` the floating-point arguments are cast to its dtype first, as those of
        `torch.nn.functional.linear` are; outside of it a dtype mismatch is an error.

    Raises:
        RuntimeError: wrong dtype, shape or device of an argument, unsupported `group_size` or `num_bits`, a GPU below
            compute capability 8.0.
    """
    return _ops.sparse_marlin_gemm(a, weight_packed, scales, group_size, num_bits, bias)


def sparse_marlin_gemm_low_rank(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    down: Tensor,
    up: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
    next_packed: Tensor | None = None,
    up_scales: Tensor | None = None,
) -> Tensor:
    """`sparse_marlin_gemm` plus a low-rank correction: `a @ weight.T + bias + (a @ down.T) @ up.T`.

    On a GPU of compute capability 9.0, up to 16 tokens, with K a multiple of 64 and a rank that is a multiple of 8, at
    most 128, both are one launch: sums in float32, `a @ down.T` rounded to the dtype of `a` and the result once more,
    bitwise the same from run to run. For any other number of tokens, and for ranks up to 1024, a packed `up` is
    multiplied like more columns of the weight, where K, N and the rank are multiples of 8, behind a product that makes
    `a @ down.T`. Elsewhere two products follow the multiplication, which is rounded, too.

    `down` and `up` are read like the packed weight, possibly before the kernel before has finished: they must not be
    the output of a kernel that signals its successor early (torch's do not).

    Args:
        down: `[rank, K]`, dtype of `a`.
        up: `[N, rank]`, dtype of `a`; or packed, int32, a weight of 128 columns for every 64 ranks (module
            `sparse_marlin.low_rank`), in codes of `num_bits` bits and groups of `group_size`, which is not -1.
        next_packed: the hint of `sparse_marlin_gemm_prefetch`.
        up_scales: `[groups, N]` of a packed `up`, dtype of `a`.
        others: as those of `sparse_marlin_gemm`.

    Returns:
        `[..., N]`, dtype and device of `a`. Differentiable with respect to `a`, `bias`, `down` and a dense `up`.

    Raises:
        RuntimeError: as `sparse_marlin_gemm`; wrong dtype, shape or device of `down`, `up`, `next_packed` or
            `up_scales`.
    """
    return _ops.sparse_marlin_gemm_low_rank(
        a, weight_packed, scales, down, up, group_size, num_bits, bias, next_packed, up_scales
    )


def sparse_marlin_gemm_prefetch(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    next_packed: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    """`sparse_marlin_gemm`, told which packed weight the multiplication after it reads.

    A hint: the result is the same, bit for bit. On a GPU of compute capability 9.0 with few tokens (where the decode
    kernel runs), the first 8 MiB of that weight are brought into L2 from when the last bytes of `weight_packed` are
    asked for, so that memory does not rest while this multiplication ends and whatever lies between the two runs.
    Where little lies between, less is better: give the first rows of the weight, `weight[:rows]`. Elsewhere nothing is
    done about it.

    Args:
        next_packed: int32, 2-D, on the device of `a`: from `pack_24_weights`, of any N, K and number of bits.
        others: as those of `sparse_marlin_gemm`.

    Returns:
        As `sparse_marlin_gemm`. Differentiable with respect to `a` and `bias`.

    Raises:
        RuntimeError: as `sparse_marlin_gemm`; wrong dtype, dimensions or device of `next_packed`.
    """
    return _ops.sparse_marlin_gemm_prefetch(a, weight_packed, scales, next_packed, group_size, num_bits, bias)


def dequantize_24(
    weight_packed: Tensor, scales: Tensor, size_k: int, group_size: int = 128, num_bits: int = 4
) -> Tensor:
    """The dense weight `[N, size_k]` in the dtype of `scales`: code times scale."""
    codes = unpack_24_weights(weight_packed, scales.shape[1], size_k, num_bits)
    step = size_k if group_size == _core.CHANNELWISE else group_size
    return codes.to(scales.dtype) * scales.t().repeat_interleave(step, dim=1)[:, :size_k]


# --- fake kernels: shapes only; the real kernels check ----------------------------------------------------------------


@torch.library.register_fake("sparse_marlin::pack_24_weights")
def _(weight: Tensor, scales: Tensor, group_size: int = 128, num_bits: int = 4) -> Tensor:
    torch._check(weight.dim() == 2, lambda: f"pack_24_weights: weight: expected [N, K], got {list(weight.shape)}")
    return weight.new_empty(_core.packed_shape(weight.shape[0], weight.shape[1], num_bits), dtype=torch.int32)


@torch.library.register_fake("sparse_marlin::unpack_24_weights")
def _(weight_packed: Tensor, size_n: int, size_k: int, num_bits: int = 4) -> Tensor:
    return weight_packed.new_empty((size_n, size_k), dtype=torch.int8)


def _gemm_shape(a: Tensor, scales: Tensor, op: str = "sparse_marlin_gemm") -> tuple[int, ...]:
    torch._check(a.dim() >= 1, lambda: f"{op}: a: expected [..., K], got a scalar")
    torch._check(scales.dim() == 2, lambda: f"{op}: scales: expected [G, N], got {list(scales.shape)}")
    return (*a.shape[:-1], scales.shape[1])


def _low_rank_shape(a: Tensor, scales: Tensor, down: Tensor, up: Tensor, up_scales: Tensor | None) -> tuple[int, ...]:
    op = "sparse_marlin_gemm_low_rank"
    shape = _gemm_shape(a, scales, op)
    torch._check(
        down.dim() == 2 and down.shape[1] == a.shape[-1],
        lambda: f"{op}: down: expected [rank, {a.shape[-1]}], got {list(down.shape)}",
    )
    if up.dtype == torch.int32:
        torch._check(
            up_scales is not None and up_scales.dim() == 2 and up_scales.shape[1] == shape[-1],
            lambda: (
                f"{op}: up_scales: expected [groups, {shape[-1]}], got "
                f"{None if up_scales is None else list(up_scales.shape)}"
            ),
        )
        return shape
    torch._check(
        up.dim() == 2 and up.shape[0] == shape[-1] and up.shape[1] == down.shape[0],
        lambda: f"{op}: up: expected [{shape[-1]}, {down.shape[0]}], got {list(up.shape)}",
    )
    return shape


@torch.library.register_fake("sparse_marlin::sparse_marlin_gemm")
def _(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    return a.new_empty(_gemm_shape(a, scales))


@torch.library.register_fake("sparse_marlin::sparse_marlin_gemm_prefetch")
def _(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    next_packed: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    return a.new_empty(_gemm_shape(a, scales, "sparse_marlin_gemm_prefetch"))


@torch.library.register_fake("sparse_marlin::_sparse_marlin_gemm_tile")
def _(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    group_size: int,
    num_bits: int,
    bias: Tensor | None,
    tile: int,
    splits: int,
    dependent: bool = True,
) -> Tensor:
    return a.new_empty(_gemm_shape(a, scales))


@torch.library.register_fake("sparse_marlin::sparse_marlin_gemm_low_rank")
def _(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    down: Tensor,
    up: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
    next_packed: Tensor | None = None,
    up_scales: Tensor | None = None,
) -> Tensor:
    return a.new_empty(_low_rank_shape(a, scales, down, up, up_scales))


@torch.library.register_fake("sparse_marlin::_sparse_marlin_gemm_low_rank_by")
def _(
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    down: Tensor,
    up: Tensor,
    group_size: int,
    num_bits: int,
    bias: Tensor | None,
    tile: int,
    splits: int,
    dependent: bool = True,
    up_scales: Tensor | None = None,
) -> Tensor:
    return a.new_empty(_low_rank_shape(a, scales, down, up, up_scales))


@torch.library.register_fake("sparse_marlin::import_marlin_24")
def _(packed: Tensor, meta: Tensor, num_bits: int = 4) -> Tensor:
    torch._check(meta.dim() == 2, lambda: f"import_marlin_24: meta: expected [K / 32, N * 2], got {list(meta.shape)}")
    size_n, size_k = meta.shape[1] // 2, meta.shape[0] * _core.MARLIN_24_COLS
    return packed.new_empty(_core.packed_shape(size_n, size_k, num_bits), dtype=torch.int32)


@torch.library.register_fake("sparse_marlin::export_marlin_24")
def _(weight_packed: Tensor, size_n: int, size_k: int, num_bits: int = 4) -> tuple[Tensor, Tensor]:
    steps = size_k // _core.MARLIN_24_COLS
    codes = weight_packed.new_empty((steps, size_n * num_bits // 2), dtype=torch.int32)
    return codes, weight_packed.new_empty((steps, size_n * 2), dtype=torch.int16)


# --- gradient ---------------------------------------------------------------------------------------------------------
# Not torch.library.register_autograd: its kernel is general, and inference without inference_mode passes through it at
# every call, which costs more than the dispatch of the operator itself. This one does the least that it must.

_library = torch.library.Library("sparse_marlin", "IMPL")
_gemm = _ops.sparse_marlin_gemm.default
_after_autograd = torch._C._after_autograd_keyset


class _Gemm(torch.autograd.Function):
    """The multiplication with its gradient for `a` and `bias`; the packed weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        a: Tensor,
        weight_packed: Tensor,
        scales: Tensor,
        group_size: int,
        num_bits: int,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight_packed, scales)
        ctx.save_for_forward(weight_packed, scales)
        ctx.size_k, ctx.group_size, ctx.num_bits = a.shape[-1], group_size, num_bits
        with torch._C._AutoDispatchBelowAutograd():
            return _gemm.redispatch(keyset & _after_autograd, a, weight_packed, scales, group_size, num_bits, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        weight_packed, scales = ctx.saved_tensors
        grad_a = grad_bias = None
        if ctx.needs_input_grad[1]:
            # Dequantized for the moment of this product and not kept: the memory of one layer.
            grad_a = grad_out @ dequantize_24(weight_packed, scales, ctx.size_k, ctx.group_size, ctx.num_bits)
        if ctx.needs_input_grad[6]:
            leading = list(range(grad_out.dim() - 1))
            total = grad_out.float().sum(leading) if leading else grad_out
            grad_bias = total.to(grad_out.dtype)
        return None, grad_a, None, None, None, None, grad_bias

    @staticmethod
    def jvp(ctx: Any, _: Any, a: Tensor, *others: Any) -> Tensor:
        weight_packed, scales = ctx.saved_tensors
        bias = others[-1]
        return _ops.sparse_marlin_gemm(a, weight_packed, scales, ctx.group_size, ctx.num_bits, bias)


# The dispatcher leaves out trailing arguments that equal their defaults.
def _autograd_kernel(
    keyset: Any,
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    wanted = torch.is_grad_enabled() and (a.requires_grad or (bias is not None and bias.requires_grad))
    if wanted or forward_ad._current_level >= 0:  # a tangent passed by would be lost without a word
        return _Gemm.apply(keyset, a, weight_packed, scales, group_size, num_bits, bias)
    return _gemm.redispatch(keyset & _after_autograd, a, weight_packed, scales, group_size, num_bits, bias)


_library.impl("sparse_marlin_gemm", _autograd_kernel, "Autograd", with_keyset=True)

_prefetch = _ops.sparse_marlin_gemm_prefetch.default


def _prefetch_autograd_kernel(
    keyset: Any,
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    next_packed: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
) -> Tensor:
    needs_grad = a.requires_grad or (bias is not None and bias.requires_grad)
    if (torch.is_grad_enabled() and needs_grad) or forward_ad._current_level >= 0:
        return _ops.sparse_marlin_gemm(a, weight_packed, scales, group_size, num_bits, bias)  # which has gradients
    return _prefetch.redispatch(
        keyset & _after_autograd, a, weight_packed, scales, next_packed, group_size, num_bits, bias
    )


_library.impl("sparse_marlin_gemm_prefetch", _prefetch_autograd_kernel, "Autograd", with_keyset=True)

_low_rank = _ops.sparse_marlin_gemm_low_rank.default


def _low_rank_autograd_kernel(
    keyset: Any,
    a: Tensor,
    weight_packed: Tensor,
    scales: Tensor,
    down: Tensor,
    up: Tensor,
    group_size: int = 128,
    num_bits: int = 4,
    bias: Tensor | None = None,
    next_packed: Tensor | None = None,
    up_scales: Tensor | None = None,
) -> Tensor:
    needs_grad = any(t is not None and t.requires_grad for t in (a, bias, down, up))
    if (torch.is_grad_enabled() and needs_grad) or forward_ad._current_level >= 0:
        # The sum of operators that have gradients.
        shape = _low_rank_shape(a, scales, down, up, up_scales)
        out = _ops.sparse_marlin_gemm(a, weight_packed, scales, group_size, num_bits, bias)
        low = torch.nn.functional.linear(a, down)
        if up_scales is not None:
            return out + _ops.sparse_marlin_gemm(twice(low), up, up_scales, group_size, num_bits, None)
        return torch.addmm(out.reshape(-1, shape[-1]), low.reshape(-1, down.shape[0]), up.t()).reshape(shape)
    return _low_rank.redispatch(
        keyset & _after_autograd,
        a, weight_packed, scales, down, up, group_size, num_bits, bias, next_packed, up_scales,
    )  # fmt: skip


_library.impl("sparse_marlin_gemm_low_rank", _low_rank_autograd_kernel, "Autograd", with_keyset=True)


# --- autocast ---------------------------------------------------------------------------------------------------------
# torch.library.register_autocast fixes the dtype at registration; F.linear follows the autocast region's, and so do we.


def _autocast_kernel(name: str, device_type: str, key: str) -> None:
    op = getattr(_ops, name)
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(argument: Any, dtype: torch.dtype) -> Any:
        eligible = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        return argument.to(dtype) if eligible else argument

    def kernel(*arguments: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*(cast(argument, dtype) for argument in arguments))

    _library.impl(name, kernel, key)


for _name in ("sparse_marlin_gemm", "sparse_marlin_gemm_low_rank", "sparse_marlin_gemm_prefetch"):
    _autocast_kernel(_name, "cpu", "AutocastCPU")
    _autocast_kernel(_name, "cuda", "AutocastCUDA")
