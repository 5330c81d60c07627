"""Alternating direction method of multipliers for one layer: `sparse_weights` (ALPS) and `joint_codes`.

Both split the objective from the constraint: B minimizes the output error plus `rho/2 |B - D|^2`, D is the nearest
point of the constraint set to B + V/rho, and V is the multiplier that pulls them together while rho grows. All in
coordinates where H has a unit diagonal, so that "nearest" means nearest in what the output sees.

`sparse_weights` is ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): D is 2:4 with free values. `joint_codes` is the
same iteration with the set that the format stores: 2:4 *and* on the grid of the group scales. Which two of four stay is
then decided knowing how well each of them rounds. The set is not convex, so neither is guaranteed to find the optimum;
measured against rounding ALPS' result and descending from there, the second has 1 to 25 % less squared output error,
the more the stronger inputs correlate.

The paper's eigendecomposition serves every rho. Here rho takes few values, held for some iterations each, and each
costs one Cholesky inverse: on one core or on a GPU that is several times less work for the same result.
"""

from __future__ import annotations

import torch

from .problem import Problem, Solution, chunks, keep_two

_RHO = 0.1  # of the unit diagonal
# (iterations, iterations for one rho, growth of rho)
_SPARSE_SCHEDULE = (36, 4, 1.45)  # alone: until the pattern has settled
_DRAFT_SCHEDULE = (16, 4, 2.0)  # before joint_codes, which only needs weights to find scales for
_JOINT_SCHEDULE = (36, 4, 1.4)
_CONJUGATE_STEPS = 8


class _Normalized:
    """The problem with H scaled to a unit diagonal: target, matrix, and the scaling itself."""

    def __init__(self, problem: Problem) -> None:
        self.root = problem.hessian.diagonal.sqrt()[:, None]  # [K, 1]
        self.matrix = problem.hessian.damped / (self.root * self.root.t())
        self.target = problem.target * self.root

    def inverse(self, rho: float) -> torch.Tensor:
        shifted = self.matrix.clone()
        shifted.diagonal().add_(rho)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def sparse_weights(problem: Problem, *, draft: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """2:4 weights [K, R] with free values, and their mask. With a fixed mask: the least-squares weights on it."""
    space = _Normalized(problem)
    if problem.mask is not None:
        mask = problem.mask
        kept = torch.where(mask, space.target, 0)
    else:
        mask, kept = _search_pattern(problem, space, _DRAFT_SCHEDULE if draft else _SPARSE_SCHEDULE)
    return _least_squares_on(space, kept, mask) / space.root, mask


def _search_pattern(
    problem: Problem, space: _Normalized, schedule: tuple[int, int, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    iterations, hold, growth = schedule
    kept, multiplier = space.target.clone(), torch.zeros_like(space.target)
    mask = torch.ones_like(kept, dtype=torch.bool)
    rho = _RHO
    inverse = space.matrix
    for iteration in range(iterations):
        if iteration % hold == 0:
            rho = _RHO * growth ** (iteration // hold)
            inverse = space.inverse(rho)
            problem.step("pattern")
        free = _minimize(space, inverse, kept, multiplier, rho)
        for part in chunks(free):
            sought = free[part] + multiplier[part] / rho
            mask[part] = keep_two(sought.square())
            kept[part] = torch.where(mask[part], sought, 0)
            multiplier[part] = rho * (sought - kept[part])
    return mask, kept


def joint_codes(problem: Problem, scales: torch.Tensor) -> Solution:
    """Codes [K, R] on the grid of fixed `scales` [G, R], pattern and codes together."""
    space = _Normalized(problem)
    low, high = problem.limits
    iterations, hold, growth = _JOINT_SCHEDULE
    step = problem.expand(scales) * space.root  # one code, in normalized coordinates
    codes = torch.zeros_like(step)
    # The start is the dense weight itself: D = W, V = 0 makes the first B the target.
    kept, multiplier = space.target.clone(), torch.zeros_like(space.target)
    rho = _RHO
    inverse = space.matrix
    for iteration in range(iterations):
        if iteration % hold == 0:
            rho = _RHO * growth ** (iteration // hold)
            inverse = space.inverse(rho)
            problem.step("codes")
        free = _minimize(space, inverse, kept, multiplier, rho)
        for part in chunks(free):
            sought = free[part] + multiplier[part] / rho
            places = sought / step[part]
            nearest = places.round().clamp_(low, high)
            if problem.mask is None:
                # What keeping a weight is worth: x^2 - (x - q)^2, in steps squared.
                worth = (2 * places - nearest) * nearest * step[part].square()
                nearest *= keep_two(worth)
            else:
                nearest *= problem.mask[part]
            codes[part] = nearest
            kept[part] = nearest * step[part]
            multiplier[part] = rho * (sought - kept[part])
    return Solution(codes, scales)


def _minimize(
    space: _Normalized, inverse: torch.Tensor, kept: torch.Tensor, multiplier: torch.Tensor, rho: float
) -> torch.Tensor:
    """argmin over B of the augmented Lagrangian, `W + (A + rho I)^-1 (rho (D - W) - V)`."""
    right = torch.sub(kept, space.target).mul_(rho).sub_(multiplier)
    return torch.addmm(space.target, inverse, right)


def _least_squares_on(space: _Normalized, start: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Conjugate gradients on the support, all rows at once; the unit diagonal is the preconditioner."""
    matrix = space.matrix
    found = start.clone()
    residual = torch.where(mask, matrix @ (space.target - found), 0)
    direction = residual.clone()
    energy = residual.square().sum(0)
    for _ in range(_CONJUGATE_STEPS):
        moved = torch.where(mask, matrix @ direction, 0)
        length = energy / (direction * moved).sum(0).clamp_min(1e-30)
        found += length * direction
        residual -= length * moved
        left = residual.square().sum(0)
        direction = residual + (left / energy.clamp_min(1e-30)) * direction
        energy = left
    return found
