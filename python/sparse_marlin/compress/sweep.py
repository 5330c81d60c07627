"""The column sweep of optimal brain surgery: prune and round from left to right, each error made good by the weights
that are still free.

SparseGPT (Frantar and Alistarh, arXiv 2301.00774) with rounding in the same loop, so that one update answers for both
errors. At the start of a scale group the scales of the group are found on the weights as they are then, on the
predicted survivors, clipped with the weights of the inverse Hessian; they are then held.
"""

from __future__ import annotations

import torch

from ..quantize import QUAD
from .problem import Problem, Solution, clipped_scale, keep_two

_BLOCK = 128  # columns between updates of everything to their right


def joint_sweep(problem: Problem, *, clip: bool = True) -> Solution:
    """Pattern, codes and scales in one sweep. With a fixed mask only codes and scales are chosen."""
    low, high = problem.limits
    upper = problem.hessian.inverse_upper()
    root = upper.diagonal()  # U_jj
    weights = problem.target.clone()
    mask = problem.mask.clone() if problem.mask is not None else torch.ones_like(weights, dtype=torch.bool)
    codes = torch.zeros_like(weights)
    scales = torch.ones((problem.groups, weights.shape[1]), dtype=torch.float32, device=weights.device)
    for start in range(0, problem.size_k, _BLOCK):
        problem.step("sweep")
        end = min(start + _BLOCK, problem.size_k)
        block, errors = weights[start:end], torch.zeros_like(weights[start:end])
        for column in range(start, end):
            if column % problem.width == 0:
                scales[column // problem.width] = _group_scales(problem, weights, mask, root, column, clip)
            if problem.mask is None and column % QUAD == 0:
                quad = slice(column, column + QUAD)
                mask[quad] = keep_two((weights[quad] / root[quad, None]).square())
            scale = scales[column // problem.width]
            code = (weights[column] / scale).round_().clamp_(low, high) * mask[column]
            codes[column] = code
            error = (weights[column] - code * scale) / root[column]
            errors[column - start] = error
            block[column - start :].addr_(upper[column, column:end], error, alpha=-1)
        weights[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return Solution(codes, scales)


def _group_scales(
    problem: Problem, weights: torch.Tensor, mask: torch.Tensor, root: torch.Tensor, column: int, clip: bool
) -> torch.Tensor:
    """Scales [R] of the group that begins at `column`, from its weights as they are now."""
    group = slice(column, min(column + problem.width, problem.size_k))
    now = weights[group]
    kept = mask[group] if problem.mask is not None else keep_two((now / root[group, None]).square())
    survivors = torch.where(kept, now, 0)
    if not clip:
        low, high = problem.limits
        absmax = survivors.abs().amax(0)
        return torch.where(absmax > 0, problem.storable(absmax * (2 / (high - low))), 1.0)
    return clipped_scale(problem, survivors, 1 / root[group].square())
