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

from collections.abc import Callable, Iterator

import torch

from .problem import Problem, Solution, chunks, keep_about_two, keep_two

_RHO = 0.1  # of the unit diagonal
# (iterations, iterations for one rho, growth of rho)
_SPARSE_SCHEDULE = (36, 4, 1.45)  # alone: until the pattern has settled
_DRAFT_SCHEDULE = (16, 4, 2.0)  # before joint_codes, which only needs weights to find scales for
_JOINT_SCHEDULE = (36, 4, 1.4)
_CONJUGATE_STEPS = 8
_DRAFT_CONJUGATE_STEPS = 3


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
    steps = _DRAFT_CONJUGATE_STEPS if draft and problem.mask is None else _CONJUGATE_STEPS
    return _least_squares_on(space, kept, mask, steps) / space.root, mask


def _search_pattern(
    problem: Problem, space: _Normalized, schedule: tuple[int, int, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    search = _Search(space)
    mask = torch.ones_like(space.target, dtype=torch.bool)
    for sought, ratio, last in search.iterations(schedule, lambda: problem.step("pattern")):
        if sought.is_cpu and not last:
            search.project(None, problem.limits, ratio)
            continue
        for part in chunks(sought):
            values = sought[part]
            if last:
                mask[part] = keep_two(values.square())
            else:
                search.settle(part, values, values * keep_about_two(values.square()), ratio)
    return mask, torch.where(mask, search.sought, 0)


def joint_codes(problem: Problem, scales: torch.Tensor) -> Solution:
    """Codes [K, R] on the grid of fixed `scales` [G, R], pattern and codes together."""
    space = _Normalized(problem)
    search = _Search(space)
    low, high = problem.limits
    step = problem.expand(scales).mul_(space.root)  # one code, in normalized coordinates
    codes = torch.zeros_like(step)
    diagonal = problem.hessian.diagonal[:, None]
    for sought, ratio, last in search.iterations(_JOINT_SCHEDULE, lambda: problem.step("codes")):
        if sought.is_cpu and problem.mask is None and not last:
            search.project(step, problem.limits, ratio)
            continue
        for part in chunks(sought):
            places = sought[part] / step[part]
            nearest = places.round().clamp_(low, high)
            if problem.mask is None:
                # What keeping a weight is worth: x^2 - (x - q)^2, in scales squared, which are the same for a quad.
                worth = places.mul_(2).sub_(nearest).mul_(nearest).mul_(diagonal[part])
                nearest *= keep_two(worth) if last else keep_about_two(worth)
            else:
                nearest *= problem.mask[part]
            if last:
                codes[part] = nearest
            else:
                search.settle(part, sought[part], nearest.mul_(step[part]), ratio)
    return Solution(codes, scales)


class _Search:
    """The iteration that both share, in two tensors of the size of the layer.

    With the scaled multiplier U = V / rho, B = W + rho (A + rho I)^-1 (D - W - U), and what is projected is B + U. So
    `carried` W + U and `behind` D - (W + U) are all that an iteration needs: sought = carried + M behind.
    """

    def __init__(self, space: _Normalized) -> None:
        # The start is the dense weight itself: D = W, U = 0 makes the first B the target.
        self._space = space
        self._carried, self._behind = space.target.clone(), torch.zeros_like(space.target)
        self.sought = torch.empty_like(space.target)

    def iterations(
        self, schedule: tuple[int, int, float], step: Callable[[], None]
    ) -> Iterator[tuple[torch.Tensor, float, bool]]:
        """Points to be projected [K, R], each with what `settle` must know of rho, and whether it is the last."""
        count, hold, growth = schedule
        matrix = self._space.matrix
        for iteration in range(count):
            if iteration % hold == 0:
                step()
                rho = _RHO * growth ** (iteration // hold)
                matrix = self._space.matrix  # lets go of the inverse before, which is large
                matrix = self._space.inverse(rho).mul_(rho)
            torch.addmm(self._carried, matrix, self._behind, out=self.sought)
            ratio = 1 / growth if (iteration + 1) % hold == 0 else 1.0
            yield self.sought, ratio, iteration == count - 1

    def settle(self, part: slice, sought: torch.Tensor, projected: torch.Tensor, ratio: float) -> None:
        """The next iteration's state for some rows; `ratio` is rho now over rho then, which keeps V what it is."""
        torch.sub(sought, projected, out=self._carried[part])
        torch.add(self._space.target[part], self._carried[part], alpha=ratio, out=self._carried[part])
        torch.sub(projected, self._carried[part], out=self._behind[part])

    def project(self, step: torch.Tensor | None, limits: tuple[int, int], ratio: float) -> None:
        """On a CPU: `sought` projected on the grid of `step`, or free, two of four kept, and settled, in one pass over
        memory instead of fifteen (csrc/cpu/solve.cpp)."""
        state = (self._carried, self._behind)
        torch.ops.sparse_marlin._project_quads(self.sought, self._space.target, step, *state, ratio, *limits)


def _least_squares_on(space: _Normalized, start: torch.Tensor, mask: torch.Tensor, steps: int) -> torch.Tensor:
    """Conjugate gradients on the support, all rows at once; the unit diagonal is the preconditioner."""
    matrix = space.matrix
    found = start.clone()
    residual = torch.where(mask, matrix @ (space.target - found), 0)
    direction = residual.clone()
    energy = residual.square().sum(0)
    for _ in range(steps):
        moved = torch.where(mask, matrix @ direction, 0)
        length = energy / (direction * moved).sum(0).clamp_min(1e-30)
        found += length * direction
        residual -= length * moved
        left = residual.square().sum(0)
        direction = residual + (left / energy.clamp_min(1e-30)) * direction
        energy = left
    return found
