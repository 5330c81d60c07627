"""The acceptance rule of a multiplication, element by element, and a comparison of bits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .generate import dequantized

Correction = tuple[Tensor, Tensor]  # low-rank: (up [N, rank], down [rank, K])


def reference(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    correction: Correction | None = None,
) -> Tensor:
    """float64 `a @ weight.T + bias + (a @ down.T) @ up.T` on the CPU, from codes and scales as they are stored."""
    weight = dequantized(codes.cpu(), scales.cpu(), group_size, torch.float64)
    up_down = None if correction is None else (_wide(correction[0]), _wide(correction[1]))
    return _affine(_wide(a), weight, None if bias is None else _wide(bias), up_down)


@dataclass(frozen=True)
class Verdict:
    """What `acceptance` found; `str()` says it in one line."""

    accepted: bool
    worst: float  # largest normalised error of the result
    allowed: float  # 2 * that of the baseline
    where: tuple[int, ...]  # the element furthest above its limit
    got: float
    wanted: float
    note: str = ""

    def __str__(self) -> str:
        text = (
            f"worst element {list(self.where)}: got {self.got!r}, reference {self.wanted!r}; "
            f"normalised error {self.worst:.3g}, allowed {self.allowed:.3g}"
        )
        return f"{self.note}; {text}" if self.note else text


def acceptance(
    got: Tensor,
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    correction: Correction | None = None,
) -> Verdict:
    """Judge `got` against the float64 reference; no element may hide behind the others.

    With ref the float64 result, s = |a| @ |weight|.T + |bias| in float64 (what rounding errors scale with) and
    base = `a @ dequantized_weight.T + bias` computed by torch in the dtype and on the device of `a` (with a low-rank
    correction: s plus |a| @ |down|.T @ |up|.T, base plus both products):

    * NaN, +Inf and -Inf must stand exactly where the reference, rounded to the dtype, has them;
    * every element's |got - ref| must be at most 2 * s * max(|base - ref| / s) + floor, with the maximum over all
      elements of the baseline and floor = eps / 2 * |ref| + eps32 * s + tiny: the one rounding to the dtype that a
      perfect result has, a float32 rounding of the products (a baseline of few elements can be exact by luck), and the
      smallest normal number. A mean is nowhere.
    """
    dtype = got.dtype
    ref = reference(a, codes, scales, group_size, bias, correction)
    if got.shape != ref.shape:
        return Verdict(False, float("inf"), 0, (), 0, 0, f"shape {list(got.shape)}, expected {list(ref.shape)}")
    if got.numel() == 0:
        return Verdict(True, 0, 0, (), 0, 0)
    result = got.detach().cpu().double()
    rounded = ref.to(dtype).double()
    special = _special_values(result, rounded)
    if special is not None:
        return special
    weight = dequantized(codes.cpu(), scales.cpu(), group_size, torch.float64)
    up_down = None if correction is None else (_wide(correction[0]).abs(), _wide(correction[1]).abs())
    s = _affine(_wide(a).abs(), weight.abs(), None if bias is None else _wide(bias).abs(), up_down)
    finite = rounded.isfinite()
    tiny = torch.finfo(dtype).tiny
    base = _baseline(a, codes, scales, group_size, bias, correction)
    base_error = ((base - ref).abs() / s.clamp_min(tiny))[finite & base.isfinite()]
    allowed = 2 * base_error.max().item() if base_error.numel() else 0.0
    limit = (allowed + torch.finfo(torch.float32).eps) * s + torch.finfo(dtype).eps / 2 * ref.abs() + tiny
    excess = ((result - ref).abs() - limit).where(finite, torch.tensor(-float("inf"), dtype=torch.float64))
    where = _coordinate(int(excess.argmax()), excess.shape)
    worst = ((result - ref).abs() / s.clamp_min(tiny))[finite]
    return Verdict(
        accepted=bool(excess[where] <= 0) or not bool(finite.any()),
        worst=worst.max().item() if worst.numel() else 0.0,
        allowed=allowed,
        where=where,
        got=result[where].item(),
        wanted=ref[where].item(),
    )


def assert_accepted(
    got: Tensor,
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    what: str = "result",
    correction: Correction | None = None,
) -> None:
    """Raise AssertionError with the worst coordinate unless `acceptance` accepts."""
    verdict = acceptance(got, a, codes, scales, group_size, bias, correction)
    if not verdict.accepted:
        raise AssertionError(f"{what}: {verdict}")


def assert_same_bits(got: Tensor, wanted: Tensor, what: str = "result") -> None:
    """Raise AssertionError with the first differing coordinate unless both have the same bits (NaN included)."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        raise AssertionError(f"{what}: expected {wanted.dtype} {list(wanted.shape)}, got {got.dtype} {list(got.shape)}")
    left, right = _bits(got), _bits(wanted)
    different = left != right
    if different.any():
        where = _coordinate(int(different.to(torch.int8).argmax()), different.shape)
        count = int(different.sum())
        raise AssertionError(
            f"{what}: {count} of {different.numel()} elements differ, first at {list(where)}: "
            f"got {got.cpu()[where].item()!r}, expected {wanted.cpu()[where].item()!r}"
        )


def _bits(tensor: Tensor) -> Tensor:
    size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(size)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _affine(a: Tensor, weight: Tensor, bias: Tensor | None, correction: Correction | None) -> Tensor:
    out = a @ weight.t()
    if bias is not None:
        out = out + bias
    if correction is not None:
        up, down = correction
        out = out + (a @ down.t()) @ up.t()
    return out


def _baseline(
    a: Tensor, codes: Tensor, scales: Tensor, group_size: int, bias: Tensor | None, correction: Correction | None
) -> Tensor:
    weight = dequantized(codes.to(a.device), scales.to(a.device), group_size, a.dtype)
    return _wide(_affine(a.detach(), weight, bias, correction))


def _special_values(result: Tensor, rounded: Tensor) -> Verdict | None:
    """A verdict where NaN or an infinity stands in the wrong place, else None."""
    infinite = (result.isinf() | rounded.isinf()) & (result != rounded)
    wrong = (result.isnan() != rounded.isnan()) | (infinite & ~rounded.isnan())
    if not wrong.any():
        return None
    where = _coordinate(int(wrong.to(torch.int8).argmax()), wrong.shape)
    note = f"{int(wrong.sum())} elements with NaN or infinity in the wrong place"
    return Verdict(False, float("inf"), 0, where, result[where].item(), rounded[where].item(), note)


def _coordinate(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
