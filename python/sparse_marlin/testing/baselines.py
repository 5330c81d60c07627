"""What others do in one shot, as solvers for `sparse_marlin.compress(quality=...)`: the measure for our own.

`old_recipe` is what the last maintained tool for this format did: SparseGPT on the dense weights, then GPTQ on the
pruned weights with the updates multiplied by the mask ("zero-preserving"), scales from the largest weight of a group.
`sparsegpt_24` prunes without rounding and `gptq_int4` rounds without pruning: both give dense weights.
"""

from __future__ import annotations

import torch

from ..compress.problem import Problem, Solution, keep_two
from ..compress.sweep import joint_sweep
from ..quantize import QUAD

_BLOCK = 128


def sparsegpt_24(problem: Problem) -> torch.Tensor:
    """2:4 weights [K, R] with free values (arXiv 2301.00774)."""
    upper = problem.hessian.inverse_upper()
    root = upper.diagonal()
    weights, kept = problem.target.clone(), torch.zeros_like(problem.target)
    mask = torch.zeros_like(weights, dtype=torch.bool)
    for start in range(0, problem.size_k, _BLOCK):
        end = min(start + _BLOCK, problem.size_k)
        block, errors = weights[start:end], torch.zeros_like(weights[start:end])
        for column in range(start, end):
            if column % QUAD == 0:
                quad = slice(column, column + QUAD)
                mask[quad] = keep_two((weights[quad] / root[quad, None]).square())
            kept[column] = weights[column] * mask[column]
            errors[column - start] = (weights[column] - kept[column]) / root[column]
            block[column - start :].addr_(upper[column, column:end], errors[column - start], alpha=-1)
        weights[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return kept


def gptq_int4(problem: Problem) -> torch.Tensor:
    """Rounded weights [K, R], none pruned (arXiv 2210.17323), scales clipped as ours are."""
    everything = problem.with_mask(torch.ones_like(problem.target, dtype=torch.bool))
    return joint_sweep(everything).values(everything)


def old_recipe(problem: Problem) -> Solution:
    """SparseGPT, then zero-preserving GPTQ on what it left."""
    low, high = problem.limits
    upper = problem.hessian.inverse_upper()
    root = upper.diagonal()
    weights = sparsegpt_24(problem)
    mask = weights != 0
    codes = torch.zeros_like(weights)
    scales = torch.ones((problem.groups, weights.shape[1]), dtype=torch.float32, device=weights.device)
    for start in range(0, problem.size_k, _BLOCK):
        end = min(start + _BLOCK, problem.size_k)
        errors = torch.zeros_like(weights[start:end])
        for column in range(start, end):
            group = column // problem.width
            if column % problem.width == 0:
                absmax = weights[column : column + problem.width].abs().amax(0)
                scales[group] = torch.where(absmax > 0, problem.storable(absmax * (2 / (high - low))), 1.0)
            code = (weights[column] / scales[group]).round_().clamp_(low, high) * mask[column]
            codes[column] = code
            error = (weights[column] - code * scales[group]) / root[column]
            errors[column - start] = error
            weights[column:end] -= torch.outer(upper[column, column:end], error) * mask[column:end]
        weights[end:] -= (upper[start:end, end:].t() @ errors) * mask[end:]
    return Solution(codes, scales)
