"""SparseMarlinLinear: a linear layer whose weight is stored as 2:4-sparse codes and multiplied straight from them,
optionally with a low-rank correction beside it.

The layer holds the packed bytes and the scales as buffers; what the bytes mean is the operators' business, so no size
of the packed format appears here (shapes are asked of `_core`). TorchScript reads the annotations of this class, so
they are types and not strings (no `from __future__ import annotations`).
"""

from typing import Any, ClassVar

import torch
from torch import nn

from ._extension import _core
from .low_rank import dequantize_up, tail_columns
from .ops import _gemm, _low_rank, _prefetch
from .quantize import CHANNELWISE, QUAD, SCALE_DTYPES, QuantizedWeight, dequantize_codes, quantize_weight_only


class SparseMarlinLinear(nn.Module):
    """`y = x @ W.T + bias` with `W` [out_features, in_features] in 2:4-sparse codes of `num_bits` bits.

    Buffers: `weight_packed` (int32) and `scales` [G, out_features], one scale for every `group_size` input features
    (-1: one for a whole row). `.to(dtype)` moves the scales and the bias, never the codes. The weight is frozen;
    gradients reach the input and the bias. A fresh layer has codes 0 and scales 1.

    With `rank` > 0 the layer adds `correction_up @ (correction_down @ x)`: two small factors, buffers
    [out_features, rank] and [rank, in_features] in the dtype of the scales, that make good some of what pruning and
    rounding lost (`sparse_marlin.compress` finds them). With `packed_correction`, which needs groups, `correction_up`
    is int32, packed in codes of `num_bits` bits as the weight is, and has `correction_scales`
    (`sparse_marlin.low_rank`): smaller, and for many tokens much faster. They are buffers, frozen like the weight.
    """

    __constants__: ClassVar[list[str]] = [
        "in_features", "out_features", "group_size", "num_bits", "rank", "packed_correction"
    ]  # fmt: skip
    _version = _core.FORMAT_VERSION  # nn.Module writes it to the metadata of every state_dict

    in_features: int
    out_features: int
    group_size: int
    num_bits: int
    rank: int
    packed_correction: bool
    weight_packed: torch.Tensor
    scales: torch.Tensor
    correction_up: torch.Tensor | None
    correction_scales: torch.Tensor | None
    correction_down: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        num_bits: int = 4,
        rank: int = 0,
        packed_correction: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._following: tuple[SparseMarlinLinear, ...] = ()  # in a tuple, or it would be a submodule
        dtype = dtype or torch.get_default_dtype()
        _check_geometry(type(self).__name__, in_features, out_features, group_size, num_bits)
        if dtype not in SCALE_DTYPES:
            raise TypeError(
                f"{type(self).__name__}: dtype: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}"
            )
        if rank < 0:
            raise ValueError(f"{type(self).__name__}: rank: expected 0 (no correction) or more, got {rank}")
        if packed_correction and not (rank and group_size != CHANNELWISE):
            raise ValueError(
                f"{type(self).__name__}: packed_correction: expected a rank > 0 and groups of 32 or more, "
                f"got rank={rank}, group_size={group_size}"
            )
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.group_size, self.num_bits, self.rank = int(group_size), int(num_bits), int(rank)
        self.packed_correction = bool(packed_correction)
        packed_shape = tuple(_core.packed_shape(self.out_features, self.in_features, self.num_bits))
        scales_shape = tuple(_core.scales_shape(self.out_features, self.in_features, self.group_size))
        self.register_buffer("weight_packed", torch.empty(packed_shape, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(scales_shape, dtype=dtype, device=device))
        up, up_scales, down = None, None, None
        if self.packed_correction:
            columns = tail_columns(self.rank)
            packed_shape = tuple(_core.packed_shape(self.out_features, columns, self.num_bits))
            scales_shape = tuple(_core.scales_shape(self.out_features, columns, self.group_size))
            up = torch.empty(packed_shape, dtype=torch.int32, device=device)
            up_scales = torch.empty(scales_shape, dtype=dtype, device=device)
        elif self.rank:
            up = torch.empty((self.out_features, self.rank), dtype=dtype, device=device)
        if self.rank:
            down = torch.empty((self.rank, self.in_features), dtype=dtype, device=device)
        self.register_buffer("correction_up", up)
        self.register_buffer("correction_scales", up_scales)
        self.register_buffer("correction_down", down)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Codes 0, scales 1, bias and correction 0: a valid layer, also after `to_empty()`. On the meta device there is
        nothing to do."""
        if self.weight_packed.is_meta:
            return
        with torch.no_grad():
            self._clear(self.weight_packed, self.scales, self.in_features)
            if self.correction_up is not None and self.correction_scales is not None:
                self._clear(self.correction_up, self.correction_scales, tail_columns(self.rank))
            elif self.correction_up is not None:
                self.correction_up.zero_()
            for tensor in (self.bias, self.correction_down):
                if tensor is not None:
                    tensor.zero_()

    @torch.jit.unused
    def _clear(self, packed: torch.Tensor, scales: torch.Tensor, size_k: int) -> None:
        scales.fill_(1)
        zeros = torch.zeros((self.out_features, size_k), dtype=torch.int8, device=scales.device)
        packed.copy_(torch.ops.sparse_marlin.pack_24_weights(zeros, scales, self.group_size, self.num_bits))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The packed tensor knows K only up to its padding, so a wrong K can look right to the operator.
        if x.size(-1) != self.in_features:
            raise ValueError(
                f"SparseMarlinLinear: x: expected [..., {self.in_features}] (in_features), got {list(x.shape)}"
            )
        if not torch.jit.is_scripting():
            return self._product(x)
        up, down = self.correction_up, self.correction_down
        if up is not None and down is not None:
            return torch.ops.sparse_marlin.sparse_marlin_gemm_low_rank(
                x, self.weight_packed, self.scales, down, up, self.group_size, self.num_bits, self.bias, None,
                self.correction_scales,
            )  # fmt: skip
        return torch.ops.sparse_marlin.sparse_marlin_gemm(
            x, self.weight_packed, self.scales, self.group_size, self.num_bits, self.bias
        )

    @torch.jit.unused
    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self, x)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not be a copy of all that follow it.
        return {**super().__getstate__(), "_following": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_following": (), "packed_correction": False, **state})
        self._buffers.setdefault("correction_scales", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, group_size: int = 128, num_bits: int = 4) -> "SparseMarlinLinear":
        """Weight-only conversion: the two largest of every four weights stay, their scales minimize the squared
        error."""
        name = f"{cls.__name__}.from_linear"
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name}: linear: expected torch.nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if weight.dtype not in SCALE_DTYPES:
            raise TypeError(
                f"{name}: linear.weight: expected float32, float16 or bfloat16, got {weight.dtype}; "
                "convert it with linear.to(dtype) first"
            )
        if weight.is_meta:
            raise ValueError(f"{name}: linear.weight: expected a tensor with data, got one on the meta device")
        _check_geometry(name, linear.in_features, linear.out_features, group_size, num_bits)
        quantized = quantize_weight_only(weight, group_size=group_size, num_bits=num_bits, name=name)
        return cls._from_quantized(quantized, linear.bias).train(linear.training)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        group_size: int = 128,
        num_bits: int = 4,
        correction: tuple[torch.Tensor | QuantizedWeight, torch.Tensor] | None = None,
    ) -> "SparseMarlinLinear":
        """A layer from signed codes int8 [N, K], 2:4 along K, and scales [G, N]; `correction` is (up [N, rank],
        down [rank, K]), where up may be what `low_rank.quantize_up` made of one, with the layer's bits and groups."""
        name = f"{cls.__name__}.from_codes"
        if codes.dim() != 2 or codes.dtype != torch.int8:
            raise TypeError(f"{name}: codes: expected int8 [N, K], got {codes.dtype} {list(codes.shape)}")
        size_n, size_k = codes.shape
        _check_geometry(name, size_k, size_n, group_size, num_bits)
        expected = list(_core.scales_shape(size_n, size_k, group_size))
        if list(scales.shape) != expected or scales.dtype not in SCALE_DTYPES:
            raise ValueError(
                f"{name}: scales: expected {expected} in float32, float16 or bfloat16 (group_size {group_size}), "
                f"got {list(scales.shape)} in {scales.dtype}"
            )
        if bias is not None and list(bias.shape) != [size_n]:
            raise ValueError(f"{name}: bias: expected [{size_n}], got {list(bias.shape)}")
        layer = cls._from_quantized(QuantizedWeight(codes, scales, group_size, num_bits), bias)
        if correction is not None:
            layer._set_correction(name, *correction)
        return layer

    @classmethod
    def _from_quantized(cls, quantized: QuantizedWeight, bias: torch.Tensor | None) -> "SparseMarlinLinear":
        size_n, size_k = quantized.codes.shape
        scales = quantized.scales.detach()
        layer = cls(
            size_k,
            size_n,
            bias=False,
            group_size=quantized.group_size,
            num_bits=quantized.num_bits,
            device="meta",
            dtype=scales.dtype,
        )
        layer.weight_packed = torch.ops.sparse_marlin.pack_24_weights(
            quantized.codes, scales, quantized.group_size, quantized.num_bits
        )
        layer.scales = scales.clone()
        if bias is not None:
            moved = bias.detach().to(device=scales.device, dtype=scales.dtype, copy=True)
            layer.bias = nn.Parameter(moved, requires_grad=bias.requires_grad)
        return layer

    def _set_correction(self, name: str, up: torch.Tensor | QuantizedWeight, down: torch.Tensor) -> None:
        place: dict[str, Any] = {"device": self.scales.device, "dtype": self.scales.dtype}
        if isinstance(up, QuantizedWeight):
            rank, group_size, num_bits = down.shape[0], self.group_size, self.num_bits
            wanted = ([self.out_features, tail_columns(rank)], [rank, self.in_features], group_size, num_bits)
            got = (list(up.codes.shape), list(down.shape), up.group_size, up.num_bits)
            if got != wanted or group_size == CHANNELWISE:
                raise ValueError(
                    f"{name}: correction: expected codes {wanted[0]}, {wanted[1]}, group_size {group_size}, "
                    f"num_bits {num_bits}, where group_size is not {CHANNELWISE}, got {got[0]}, {got[1]}, {got[2]}, "
                    f"{got[3]}"
                )
            self.rank, self.packed_correction = rank, True
            self.correction_scales = up.scales.detach().to(**place, copy=True).contiguous()
            self.correction_up = torch.ops.sparse_marlin.pack_24_weights(
                up.codes, self.correction_scales, group_size, num_bits
            )
            self.correction_down = down.detach().to(**place, copy=True).contiguous()
            return
        rank = up.shape[-1]
        if up.dim() != 2 or list(up.shape) != [self.out_features, rank] or list(down.shape) != [rank, self.in_features]:
            raise ValueError(
                f"{name}: correction: expected ([{self.out_features}, rank], [rank, {self.in_features}]), "
                f"got ({list(up.shape)}, {list(down.shape)})"
            )
        self.rank, self.packed_correction, self.correction_scales = rank, False, None
        self.correction_up = up.detach().to(**place, copy=True).contiguous()
        self.correction_down = down.detach().to(**place, copy=True).contiguous()

    def codes(self) -> torch.Tensor:
        """The signed codes, int8 [out_features, in_features]."""
        return torch.ops.sparse_marlin.unpack_24_weights(
            self.weight_packed, self.out_features, self.in_features, self.num_bits
        )

    def correction(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up [out_features, rank], down [rank, in_features]) of the low-rank correction in the dtype of the scales, a
        packed factor dequantized; None without one."""
        up, scales, down = self.correction_up, self.correction_scales, self.correction_down
        if up is None or down is None:
            return None
        return (up if scales is None else dequantize_up(up, scales, self.rank, self.group_size, self.num_bits)), down

    def dequantize(self) -> torch.Tensor:
        """The weight [out_features, in_features] that the codes stand for, in the dtype of the scales; a low-rank
        correction is not in it."""
        return dequantize_codes(self.codes(), self.scales, self.group_size)

    def to_linear(self) -> nn.Linear:
        """The dense twin: an nn.Linear with the dequantized weight, the correction added to it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = self.dequantize()
        correction = self.correction()
        if correction is not None:
            weight = (weight.float() + correction[0].float() @ correction[1].float()).to(weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, num_bits={self.num_bits}"
            + (f", rank={self.rank}" if self.rank else "")
            + (", packed_correction=True" if self.packed_correction else "")
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = self._loading_problem(state_dict, prefix, local_metadata)
        if problem:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {problem}")
            return
        self._load_tensors(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _load_tensors(self, *arguments: Any) -> None:
        """`_load_from_state_dict`'s, for tensors that fit."""
        super()._load_from_state_dict(*arguments)

    def _loading_problem(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> str | None:
        """What makes these tensors unfit for this layer, or None. A wrong dtype or shape would otherwise be copied or
        only show as a size mismatch, and a non-finite scale as nonsense text much later."""
        version = local_metadata.get("version", self._version)
        if version != self._version:
            return (
                f"weight_packed: expected packed format version {self._version}, got version {version}; "
                "save the model again with a matching sparse_marlin"
            )
        if prefix + "weight" in state_dict and prefix + "weight_packed" not in state_dict:
            return (
                "weight_packed: expected packed codes, got a dense 'weight'; load it into torch.nn.Linear and convert "
                "that with SparseMarlinLinear.from_linear"
            )
        settings = f"out_features={self.out_features}, in_features={self.in_features}, "
        settings += f"group_size={self.group_size}, num_bits={self.num_bits}"
        packed, scales = state_dict.get(prefix + "weight_packed"), state_dict.get(prefix + "scales")
        if packed is not None and (packed.dtype != torch.int32 or packed.shape != self.weight_packed.shape):
            return (
                f"weight_packed: expected int32 {list(self.weight_packed.shape)} for {settings}, "
                f"got {str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
            )
        if scales is not None and (scales.dtype not in SCALE_DTYPES or scales.shape != self.scales.shape):
            return (
                f"scales: expected a floating type {list(self.scales.shape)} for {settings}, "
                f"got {str(scales.dtype).removeprefix('torch.')} {list(scales.shape)}"
            )
        if scales is not None and not scales.is_meta and not bool((torch.isfinite(scales) & (scales > 0)).all()):
            return "scales: expected finite values > 0, got NaN, infinity, zero or less; the checkpoint is damaged"
        return self._correction_problem(state_dict, prefix)

    def _correction_problem(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        for name in ("correction_up", "correction_scales", "correction_down"):
            mine, given = getattr(self, name), state_dict.get(prefix + name)
            if given is None:
                continue
            if mine is None:
                if name == "correction_scales" and self.rank:
                    return f"{name}: expected none, since correction_up is dense; make it with packed_correction=True"
                down = state_dict.get(prefix + "correction_down")
                rank = "R of correction_down [R, in_features]" if down is None else down.shape[0]
                return f"{name}: expected none, since rank=0, got {list(given.shape)}; make the layer with rank={rank}"
            packed = name == "correction_up" and self.packed_correction
            fits = given.dtype == torch.int32 if packed else given.dtype in SCALE_DTYPES
            if not fits or given.shape != mine.shape:
                kind = "int32" if packed else "a floating type"
                return (
                    f"{name}: expected {kind} {list(mine.shape)} for rank={self.rank}, "
                    f"packed_correction={self.packed_correction}, "
                    f"got {str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
                )
            if packed or given.is_meta:
                continue
            if not bool(torch.isfinite(given).all()):
                return f"{name}: expected finite values, got NaN or infinity; the checkpoint is damaged"
            if name == "correction_scales" and not bool((given > 0).all()):
                return f"{name}: expected values > 0, got zero or less; the checkpoint is damaged"
        return None


def multiply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The product of a layer, which is a SparseMarlinLinear or a merge.MergedWeight, as Python runs it. `_following`:
    whose packed weight is read after this one, where `enable_prefetch` has said so.

    By the operators' overloads, not the packets of them, which choose anew at every call and take a sixth of its time.
    """
    weight, scales, bias, group_size, num_bits = (
        layer.weight_packed, layer.scales, layer.bias, layer.group_size, layer.num_bits,
    )  # fmt: skip
    following = layer._following[0].weight_packed if layer._following else None
    if following is not None and following.device != x.device:
        following = None
    if layer.rank:
        down, up = layer.correction_down, layer.correction_up
        return _low_rank(x, weight, scales, down, up, group_size, num_bits, bias, following, layer.correction_scales)
    if following is not None:
        return _prefetch(x, weight, scales, following, group_size, num_bits, bias)
    return _gemm(x, weight, scales, group_size, num_bits, bias)


def _check_geometry(name: str, in_features: int, out_features: int, group_size: int, num_bits: int) -> None:
    if out_features < 1:
        raise ValueError(f"{name}: out_features: expected at least 1, got {out_features}")
    if in_features < QUAD or in_features % QUAD:
        raise ValueError(
            f"{name}: in_features: expected a positive multiple of {QUAD} (2:4 sparsity), got {in_features}; "
            "leave this layer dense"
        )
    allowed = sorted(_core.GROUP_SIZES)
    if group_size not in allowed:
        raise ValueError(
            f"{name}: group_size: expected one of {allowed} ({CHANNELWISE}: one group a row), got {group_size}"
        )
    if num_bits not in _core.NUM_BITS:
        raise ValueError(f"{name}: num_bits: expected one of {sorted(_core.NUM_BITS)}, got {num_bits}")
