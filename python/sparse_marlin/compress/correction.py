"""Low-rank correction: factors up [N, r] and down [r, K] added to the output, `y = V x + up (down x)`.

What is to be corrected is E = W - V, and what counts is the output: minimize ||(E - up down) X||_F. With H = X X^T =
L L^T (Cholesky) that is ||(E - up down) L||_F, so by Eckart-Young `up down L` is the best rank-r approximation of E L:
with the singular value decomposition E L = P S Q^T, up = P_r S_r and down = Q_r^T L^-1. No other factors of rank r
leave less error on the calibration tokens (under the damped H).

Linears that read the same input have the same L, and most of what their E L have in common comes from it. So they can
share `down`: the factors of their E one below the other, of which each linear has its rows of `up`. That is more error
at the same rank, fewer bytes, and one product for all of them (`merge_linears`).

With the default quality codes and correction then take turns: the codes descend towards W - up down, which the
correction leaves to them, and the correction is found again. Each turn lowers the same objective. The other qualities
keep their codes.
"""

from __future__ import annotations

import dataclasses

import torch

from .descent import descend
from .problem import Problem, Solution, refit_scales

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


def corrected(
    problem: Problem, solution: Solution, rows: list[slice], rank: int, *, shared: bool = False, turns: int = 2
) -> tuple[Solution, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The solution and the factors of every linear (`rows` of the problem) after they took `turns` turns; `shared`:
    with one `down` for all."""
    target = problem.target
    factors = _factors(problem, solution, rows, rank, shared)
    for _ in range(turns):
        problem.step("correction")
        aim = target.clone()
        for part, (up, down) in zip(rows, factors, strict=True):
            aim[:, part] -= (up @ down).t()
        rest = dataclasses.replace(problem, target=aim)
        solution = refit_scales(rest, descend(rest, solution, _SWEEPS))
        factors = _factors(problem, solution, rows, rank, shared)
    return solution, factors


def _factors(
    problem: Problem, solution: Solution, rows: list[slice], rank: int, shared: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    error, lower, dtype = problem.target - solution.values(problem), problem.hessian.lower, problem.scale_dtype
    if not shared:
        return [low_rank(error[:, part], lower, rank, dtype) for part in rows]
    up, down = low_rank(error, lower, rank, dtype)
    return [(up[part], down) for part in rows]
