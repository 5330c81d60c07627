"""The qualities: each a function from a `Problem` to a `Solution`. A new one is a function here and a line in
`SOLVERS`.

| quality | pattern | codes and scales | cost, 4096 x 4096 |
| --- | --- | --- | --- |
| magnitude | two largest weights | least squares on the weights | no calibration used |
| wanda | two largest weights times input norms | nearest, scales clipped by input norms | one pass |
| sparsegpt | optimal brain surgery, column by column | in the same sweep | one sweep |
| alps | ADMM | coordinate descent on that pattern | 50 products of the size of a layer |
| joint | ADMM on the stored grid, then descent that moves patterns and codes | least-squares scales | 65 products |
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..quantize import quantize
from .admm import joint_codes, sparse_weights
from .descent import descend
from .problem import Problem, Solution, clipped_scales, keep_two, refit_scales, rounded
from .sweep import joint_sweep

# A tensor instead of a solution is a weight [K, R] that this format does not store: the linear stays dense with it.
Solver = Callable[[Problem], Solution | torch.Tensor]

DEFAULT_QUALITY = "joint"
_SWEEPS = 2
_ROUNDS = 2


def magnitude(problem: Problem) -> Solution:
    """Zhu and Gupta, arXiv 1710.01878; scales with the least squared error of the weights themselves."""
    mask = keep_two(problem.target.abs()) if problem.mask is None else problem.mask
    made = quantize(
        problem.target.t().contiguous(),
        mask.t(),
        problem.group_size,
        problem.num_bits,
        scale_dtype=problem.scale_dtype,
    )
    return Solution(made.codes.t().float().contiguous(), made.scales.float())


def wanda(problem: Problem) -> Solution:
    """|w| times the norm of its input (Sun et al., arXiv 2306.11695), nothing else moves."""
    importance = problem.hessian.diagonal
    mask = problem.mask
    if mask is None:
        mask = keep_two(problem.target.square() * importance[:, None])
    kept = torch.where(mask, problem.target, 0)
    return rounded(problem, kept, clipped_scales(problem, kept, importance))


def sparsegpt(problem: Problem) -> Solution:
    return joint_sweep(problem)


def alps(problem: Problem) -> Solution:
    """ALPS' pattern and weights, rounded, then codes that descend with the pattern held."""
    weights, mask = sparse_weights(problem)
    solution = rounded(problem, weights, clipped_scales(problem, weights, problem.hessian.diagonal))
    held = problem.with_mask(mask)
    return refit_scales(held, descend(held, solution, _SWEEPS))


def joint(problem: Problem) -> Solution:
    """Pattern, codes and scales together: scales from a short ALPS, codes from ADMM on the grid of these scales, then
    descent over quads in turn with least-squares scales."""
    weights, _ = sparse_weights(problem, draft=True)
    solution = rounded(problem, weights, clipped_scales(problem, weights, problem.hessian.diagonal))
    solution = refit_scales(problem, solution)
    searched = joint_codes(problem, solution.scales)
    for _ in range(_ROUNDS):
        searched = refit_scales(problem, descend(problem, searched, _SWEEPS))
    return searched


SOLVERS: dict[str, Solver] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
    "joint": joint,
}
QUALITIES = tuple(SOLVERS)


def solver(quality: str) -> Solver:
    if quality not in SOLVERS:
        raise ValueError(f"compress: quality: expected one of {', '.join(QUALITIES)}, got {quality!r}")
    return SOLVERS[quality]
