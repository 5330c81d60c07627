"""Weight-only compression of one matrix: 2:4 pruning by magnitude, then codes and scales with the least squared error.

This is the seam for better methods: whoever has a `QuantizedWeight` can make a layer of it
(`SparseMarlinLinear.from_codes`), and `replace.convert_linears` takes any function from a linear layer to a
`QuantizedWeight`. Nothing here packs anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._extension import _core

QUAD = _core.QUAD  # 2:4 sparsity speaks of four consecutive input features, of which two are kept
KEPT_PER_QUAD = _core.KEPT_PER_QUAD
CHANNELWISE = _core.CHANNELWISE  # group_size: one scale group for a whole row
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Candidates for a scale, as a fraction of the one that clips nothing. 4-bit codes gain from clipping (for normally
# distributed weights the best fraction is near 0.8, heavy tails want less), 8-bit codes hardly do.
_SHRINK = {4: (0.35, 1.0, 27), 8: (0.80, 1.0, 9)}
_REFITS = 2  # least-squares refits after the grid: the third changes the error by less than 0.1 %
# Values per pass. On a CPU a pass should stay in the last-level cache, on a GPU it should fill the device.
_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class QuantizedWeight:
    """Signed codes int8 [N, K], 2:4 along K, and their scales [G, N]; the weight is `codes * scales` of the group."""

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    num_bits: int

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] these codes stand for, in the dtype of the scales, each product rounded once."""
        return dequantize_codes(self.codes, self.scales, self.group_size)


def code_range(num_bits: int) -> tuple[int, int]:
    """Lowest and highest signed code of `num_bits` bits."""
    return _core.code_min(num_bits), _core.code_max(num_bits)


def group_width(size_k: int, group_size: int) -> int:
    """Columns of a scale group, the channelwise case resolved."""
    return max(size_k, 1) if group_size == CHANNELWISE else group_size


def expand_scales(scales: torch.Tensor, group_size: int, size_k: int) -> torch.Tensor:
    """Scales [G, N] as one value for each weight, [N, K]."""
    if scales.shape[0] == 1:
        return scales.t().expand(-1, size_k)
    return scales.t().repeat_interleave(group_width(size_k, group_size), dim=1)[:, :size_k]


def dequantize_codes(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """`codes * scales` computed in float32, in the dtype of the scales."""
    wide = expand_scales(scales.float(), group_size, codes.shape[1])
    return (codes.float() * wide).to(scales.dtype)


def prune_24_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Mask, True where a weight stays: the two largest |w| of every four along K; of equal ones the lower index."""
    if weight.dim() != 2 or weight.shape[1] % QUAD:
        raise ValueError(
            f"prune_24_magnitude: weight: expected 2 dimensions with K divisible by {QUAD}, "
            f"got shape {list(weight.shape)}"
        )
    return keep_largest(weight.detach().abs().unflatten(1, (-1, QUAD)).unbind(-1), dim=-1).flatten(1)


def keep_largest(scores: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Mask of the two largest of four tensors, stacked along `dim`; of equal ones the lower index.

    One stays that wins two of its three comparisons, so the CPU and a GPU choose the same positions (a sort need not).
    """
    wins: list[list[torch.Tensor]] = [[] for _ in range(QUAD)]
    for i in range(QUAD):
        for j in range(i + 1, QUAD):
            first_wins = scores[i] >= scores[j]
            wins[i].append(first_wins)
            wins[j].append(~first_wins)
    return torch.stack([(a & b) | (c & (a | b)) for a, b, c in wins], dim=dim)


def quantize(
    weight: torch.Tensor,
    mask: torch.Tensor,
    group_size: int,
    num_bits: int,
    *,
    scale_dtype: torch.dtype | None = None,
    name: str = "quantize",
) -> QuantizedWeight:
    """Codes and scales for the weights that `mask` keeps, with the least squared error found for every (row, group).

    A scale is rounded to `scale_dtype` (the weight's own if not given) before the codes are computed, so the codes fit
    the scale that is stored. `name` opens the error messages.
    """
    scale_dtype = scale_dtype or weight.dtype
    if num_bits not in _SHRINK:
        raise ValueError(f"{name}: num_bits: expected one of {sorted(_SHRINK)}, got {num_bits}")
    if group_size != CHANNELWISE and group_size < 1:
        raise ValueError(f"{name}: group_size: expected {CHANNELWISE} or a positive number, got {group_size}")
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"{name}: scale_dtype: expected float32, float16 or bfloat16, got {scale_dtype}")
    if weight.dim() != 2 or weight.shape[1] % QUAD:
        raise ValueError(
            f"{name}: weight: expected 2 dimensions with K divisible by {QUAD}, got shape {list(weight.shape)}"
        )
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(f"{name}: mask: expected bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
    check_finite(weight, name)
    size_n, size_k = weight.shape
    width, groups = group_width(size_k, group_size), _core.num_groups(size_k, group_size)
    codes = torch.zeros((size_n, size_k), dtype=torch.int8, device=weight.device)
    scales = torch.ones((groups, size_n), dtype=scale_dtype, device=weight.device)
    rows = max(1, _CHUNK_VALUES.get(weight.device.type, _CHUNK_VALUES["cpu"]) // max(size_k, 1))
    for start in range(0, size_n, rows):
        part = slice(start, min(start + rows, size_n))
        values = weight[part].detach().float() * mask[part]
        found = _best_scales(_kept_by_group(values, width, groups), num_bits, scale_dtype)
        scales[:, part] = found.t()
        wide = expand_scales(found.t().float(), group_size, size_k)
        codes[part] = torch.round(values / wide).clamp_(*code_range(num_bits)).to(torch.int8)
    return QuantizedWeight(codes, scales, group_size, num_bits)


def quantize_weight_only(
    weight: torch.Tensor, *, group_size: int, num_bits: int, name: str = "quantize_weight_only"
) -> QuantizedWeight:
    """The weight-only recipe: keep the two largest of every four, then `quantize`."""
    check_finite(weight, name)
    return quantize(weight, prune_24_magnitude(weight), group_size, num_bits, name=name)


def is_24_sparse(weight: torch.Tensor) -> bool:
    """At most two non-zero values in every four along K."""
    if weight.shape[1] % QUAD:
        return False
    return bool((weight.unflatten(1, (-1, QUAD)).count_nonzero(-1) <= KEPT_PER_QUAD).all())


def relative_error(weight: torch.Tensor, quantized: QuantizedWeight) -> float:
    """||W - W^||_F / ||W||_F, in chunks of rows so that a large layer needs no second copy in float32."""
    size_k = max(weight.shape[1], 1)
    rows = max(1, _CHUNK_VALUES["cuda"] // size_k)
    lost = total = 0.0
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        exact = weight[part].detach().float()
        approximate = dequantize_codes(quantized.codes[part], quantized.scales[:, part], quantized.group_size).float()
        lost += float((exact - approximate).double().square().sum())
        total += float(exact.double().square().sum())
    return (lost / total) ** 0.5 if total > 0 else 0.0


def check_finite(weight: torch.Tensor, name: str) -> None:
    """ValueError that names the layer and the first NaN or infinity of its weight."""
    finite = torch.isfinite(weight.detach())
    if bool(finite.all()):
        return
    flat = int(torch.argmin(finite.flatten().to(torch.int8)))
    row, column = divmod(flat, weight.shape[1])
    raise ValueError(
        f"{name}: weight: expected finite values, got {float(weight.detach()[row, column])} "
        f"at row {row}, column {column}; repair the checkpoint, or leave this layer dense"
    )


def _kept_by_group(values: torch.Tensor, width: int, groups: int) -> torch.Tensor:
    """The masked weights [R, K] as [R, G, v]: pruned positions are dropped where the group allows it (they cost time
    and their error is zero under any scale), a last partial group is filled with zeros."""
    missing = groups * width - values.shape[1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    grouped = values.unflatten(1, (groups, width))
    if width % QUAD:
        return grouped
    quads = grouped.unflatten(2, (-1, QUAD))
    index = quads.abs().topk(KEPT_PER_QUAD, dim=-1).indices
    kept = quads.gather(-1, index)
    if bool((kept.count_nonzero() != quads.count_nonzero()).item()):  # a mask that is not 2:4: keep everything
        return grouped
    return kept.flatten(2).contiguous()


def _best_scales(values: torch.Tensor, num_bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Scales [R, G] for values [R, G, v]: the best of a grid of clipped scales, refined by least squares."""
    low, high = code_range(num_bits)
    absmax = values.abs().amax(dim=-1)
    unclipped = absmax / high
    best = storable_scale(unclipped, dtype)
    least = torch.full_like(absmax, torch.inf)
    for fraction in torch.linspace(*_SHRINK[num_bits]).tolist():
        scale = storable_scale(unclipped * fraction, dtype)
        error = _error(values, scale, low, high)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    for _ in range(_REFITS):
        codes = torch.round(values / best.float().unsqueeze(-1)).clamp_(low, high)
        energy = codes.square().sum(-1)
        refit = torch.where(energy > 0, (codes * values).sum(-1) / energy.clamp_min(1), best.float())
        scale = storable_scale(refit, dtype)
        error = _error(values, scale, low, high)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return torch.where(absmax > 0, best, torch.ones_like(best))


def _error(values: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    wide = scale.float().unsqueeze(-1)
    left = torch.div(values, wide).round_().clamp_(low, high).mul_(wide).sub_(values)
    return torch.linalg.vecdot(left, left)


def storable_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` rounded to `dtype`, held inside its positive finite values.

    float16 reaches down to its smallest subnormal, which hardware multiplies at full speed; float32 and bfloat16 stop
    at the smallest normal, since a subnormal there may be flushed to zero.
    """
    info = torch.finfo(dtype)
    floor = info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal
    return scale.clamp(floor, info.max).to(dtype)
