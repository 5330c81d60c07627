"""Low-rank correction: factors up [N, r] and down [r, K] added to the output, `y = V x + up (down x)`.

What is to be corrected is E = W - V, and what counts is the output: minimize ||(E - up down) X||_F. With H = X X^T =
L L^T (Cholesky) that is ||(E - up down) L||_F, so by Eckart-Young `up down L` is the best rank-r approximation of E L:
with the singular value decomposition E L = P S Q^T, up = P_r S_r and down = Q_r^T L^-1. No other factors of rank r
leave less error on the calibration tokens (under the damped H).

Linears that read the same input have the same L, and most of what their E L have in common comes from it. So they can
share `down`: the factors of their E one below the other, of which each linear has its rows of `up`. That is more error
at the same rank, fewer bytes, and one product for all of them (`merge_linears`).

Where the kernels take it (`kernels_take_packed`), `up` is packed like the weight, in its number of bits: its columns
are brought to one length first, since they share scales and rounding then costs each direction in proportion to what
it corrects; `down`, which takes up the lengths, is fitted again behind the rounded `up`: the least squares of
E - up down over it do not depend on L.

With the default quality codes and correction then take turns: the codes descend towards W - up down, which the
correction leaves to them, and the correction is found again. Each turn lowers the same objective. The other qualities
keep their codes.
"""

from __future__ import annotations

import dataclasses

import torch

from ..low_rank import gather, kernels_take_packed, quantize_up
from ..quantize import QuantizedWeight
from .descent import descend
from .problem import Problem, Solution, refit_scales

Factors = tuple[torch.Tensor | QuantizedWeight, torch.Tensor]  # up, which may be rounded, and down

_OVERSAMPLE = 16  # more directions than asked for, so that the last ones asked for are accurate
_ITERATIONS = 6  # of subspace iteration
_SWEEPS = 2


def low_rank(
    error: torch.Tensor, lower: torch.Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up [R, rank], down [rank, K]) that minimize ||(error^T - up down) lower||_F for `error` [K, R].

    The singular vectors come from subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), which needs a few
    products with the matrix instead of its full decomposition. The factors have equal norms, so that both fit float16,
    and `up` is fitted again after `down` was rounded to `dtype`.
    """
    matrix = error.t() @ lower  # [R, K], E L
    rank = min(rank, *matrix.shape)
    count = min(rank + _OVERSAMPLE, *matrix.shape)
    # The same start on every device: generated on the CPU.
    start = torch.randn((matrix.shape[1], count), generator=torch.Generator().manual_seed(0)).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    up = (basis @ left[:, :rank]) * values[:rank]
    down = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    balance = (up.norm() / down.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    down = (down * balance).to(dtype).float()
    seen = down @ lower  # [rank, K]
    fitted, failed = torch.linalg.solve_ex(seen @ seen.t(), seen @ matrix.t())
    up = up / balance if bool(failed) or not bool(torch.isfinite(fitted).all()) else fitted.t()
    return up.to(dtype).float(), down


def packed(
    up: torch.Tensor, down: torch.Tensor, error: torch.Tensor, group_size: int, num_bits: int, dtype: torch.dtype
) -> tuple[QuantizedWeight, torch.Tensor]:
    """The factors of `error` [K, R] with `up` [R, rank] rounded to codes of `num_bits` bits and `down` fitted to it."""
    lengths = up.norm(dim=0).clamp_min(1e-30)
    up, down = up / lengths, down * lengths[:, None]
    balance = (down.norm() / up.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    rounded = quantize_up(up * balance, group_size, num_bits, scale_dtype=dtype)
    up = gather(rounded.dequantize().float(), up.shape[1])
    fitted, failed = torch.linalg.solve_ex(up.t() @ up, up.t() @ error.t())
    fits = not bool(failed) and bool(torch.isfinite(fitted).all())
    return rounded, (fitted if fits else down / balance).to(dtype).float()


def corrected(
    problem: Problem, solution: Solution, rows: list[slice], rank: int, *, shared: bool = False, turns: int = 2
) -> tuple[Solution, list[Factors]]:
    """The solution and the factors of every linear (`rows` of the problem) after they took `turns` turns; `shared`:
    with one `down` for all."""
    target = problem.target
    factors = _factors(problem, solution, rows, rank, shared)
    for _ in range(turns):
        problem.step("correction")
        aim = target.clone()
        for part, (up, down) in zip(rows, factors, strict=True):
            dense = gather(up.dequantize().float(), down.shape[0]) if isinstance(up, QuantizedWeight) else up
            aim[:, part] -= (dense @ down).t()
        rest = dataclasses.replace(problem, target=aim)
        solution = refit_scales(rest, descend(rest, solution, _SWEEPS))
        factors = _factors(problem, solution, rows, rank, shared)
    return solution, factors


def _factors(problem: Problem, solution: Solution, rows: list[slice], rank: int, shared: bool) -> list[Factors]:
    error, dtype = problem.target - solution.values(problem), problem.scale_dtype
    found: list[Factors] = []
    for parts in [rows] if shared else [[part] for part in rows]:
        together = slice(parts[0].start, parts[-1].stop)
        up, down = low_rank(error[:, together], problem.hessian.lower, rank, dtype)
        outputs = [part.stop - part.start for part in parts]
        if kernels_take_packed(problem.group_size, error.shape[0], down.shape[0], *outputs):
            found.append(packed(up, down, error[:, together], problem.group_size, problem.num_bits, dtype))
        else:
            found.append((up, down))
    return [(_rows(found[0][0], part), found[0][1]) for part in rows] if shared else found


def _rows(up: torch.Tensor | QuantizedWeight, part: slice) -> torch.Tensor | QuantizedWeight:
    if isinstance(up, torch.Tensor):
        return up[part]
    return dataclasses.replace(up, codes=up.codes[part], scales=up.scales[:, part])
