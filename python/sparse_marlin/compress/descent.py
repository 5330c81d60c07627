"""Coordinate descent on codes with fixed scales: `descend_patterns` moves 2:4 patterns too, `descend_codes` does not.

The gradient G = H (V - W) is kept up to date, so a step costs only what it changes. `descend_patterns` takes the four
weights of a quad together: for each of the six patterns, in both orders, the first weight is rounded at the optimum of
the pair and the second at its optimum given the first; the best of these twelve replaces the quad if it is better than
what is there. Every step lowers the objective or changes nothing, and rows do not depend on each other.

A sweep visits the columns in order. Inside a block only the block's own rows of G are updated; the rest follows with
one matrix product at the end of the block, so nearly all arithmetic of a sweep is one K x K by K x R product. A block
lies in one scale group, so everything in it is counted in scales, and weights are codes.
"""

from __future__ import annotations

import torch

from ..quantize import QUAD
from .problem import PAIRS, Problem, Solution

_BLOCK = 128  # columns; a multiple of every group size below it
_MARGIN = 1e-6  # relative: less than this is rounding, not progress


def descend(problem: Problem, solution: Solution, sweeps: int) -> Solution:
    """`sweeps` sweeps over all columns: patterns and codes, or codes alone where the problem fixes the pattern."""
    codes, damped = solution.codes.clone(memory_format=torch.contiguous_format), problem.hessian.damped
    gradient = damped @ (solution.values(problem) - problem.target)
    size = min(_BLOCK, problem.width)
    for _ in range(sweeps):
        problem.step("descent")
        for start in range(0, problem.size_k, size):
            block, scale = slice(start, min(start + size, problem.size_k)), solution.scales[start // problem.width]
            own, slope = damped[block, block], gradient[block] / scale
            if problem.mask is None and codes.is_cpu:
                moved = torch.empty_like(slope)
                torch.ops.sparse_marlin._descend_quads(own, slope, codes[block], moved, *problem.limits, _MARGIN)
            elif problem.mask is None:
                moved = _pattern_block(problem.limits, own, slope, codes[block])
            else:
                moved = _code_block(problem.limits, own, slope, codes[block], problem.mask[block])
            gradient.addmm_(damped[:, block], moved.mul_(scale))
    return Solution(codes, solution.scales)


def _pattern_block(
    limits: tuple[int, int], matrix: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Visit the quads of a block; `codes` and `gradient` change in place, the change of the codes is returned.

    The CPU has an operator for it (csrc/cpu/solve.cpp): these operations are too small to be worth starting there.
    """
    low, high = limits
    table = _pair_table(matrix)
    moved = torch.empty_like(codes)
    # Few and simple operations: on a GPU the time of a sweep is that of their launches.
    for index, start in enumerate(range(0, codes.shape[0], QUAD)):
        quad = slice(start, start + QUAD)
        own, now, change = matrix[quad, quad], codes[quad], moved[quad]
        # The gradient of the objective at "this quad is zero".
        slope = torch.addmm(gradient[quad], own, now, alpha=-1)
        # For every pair: optimum of the first in the pair, optimum of the second alone, slopes of both.
        found = table.products[index] @ slope
        one, two, slope_one, slope_two = found.chunk(4)
        one.round_().clamp_(low, high)
        two.addcmul_(table.coupling[index], one).round_().clamp_(low, high)
        # h_uu x^2 / 2 + h_uv x y + h_vv y^2 / 2 + slopes
        left = slope_one.addcmul_(table.half_first[index], one).addcmul_(table.cross[index], two).mul_(one)
        worth = left.addcmul_(slope_two.addcmul_(table.half_second[index], two), two)
        least, chosen = worth.min(0)
        standing = torch.addmm(slope, own, now, alpha=0.5).mul_(now).sum(0)
        better = least * (1 - _MARGIN) < standing
        both = chosen + table.offsets
        new = torch.zeros_like(now).scatter_(0, table.places[both], found.gather(0, both))
        torch.sub(new, now, out=change).mul_(better)
        now.add_(change)
        if start + QUAD < codes.shape[0]:
            gradient[start + QUAD :].addmm_(matrix[start + QUAD :, quad], change)
    return moved


class _PairTable:
    """Coefficients of the twelve ordered pairs for every quad of a block."""

    products: torch.Tensor  # [quads, 4 * pairs, QUAD]
    coupling: torch.Tensor  # [quads, pairs, 1]: -h_uv / h_vv
    half_first: torch.Tensor  # [quads, pairs, 1]: h_uu / 2
    half_second: torch.Tensor
    cross: torch.Tensor
    offsets: torch.Tensor  # [2, 1]: rows of the first and of the second of a pair in the products
    places: torch.Tensor  # [2 * pairs]: the position in the quad that such a row is about


def _pair_table(matrix: torch.Tensor) -> _PairTable:
    quads, pairs, device = matrix.shape[0] // QUAD, len(PAIRS), matrix.device
    first, second = torch.tensor(PAIRS, device=device).t()
    own = matrix.unflatten(0, (quads, QUAD)).unflatten(2, (quads, QUAD)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    h_uu, h_vv, h_uv = own[:, first, first], own[:, second, second], own[:, first, second]
    determinant = h_uu * h_vv - h_uv.square()
    table = _PairTable()
    products = torch.zeros((quads, 4, pairs, QUAD), dtype=matrix.dtype, device=device)
    row = torch.arange(pairs, device=device)
    products[:, 0, row, first] = -h_vv / determinant
    products[:, 0, row, second] = h_uv / determinant
    products[:, 1, row, second] = -1 / h_vv
    products[:, 2, row, first] = 1
    products[:, 3, row, second] = 1
    table.products = products.flatten(1, 2)
    table.coupling = (-h_uv / h_vv).unsqueeze(-1)
    table.half_first, table.half_second = (0.5 * h_uu).unsqueeze(-1), (0.5 * h_vv).unsqueeze(-1)
    table.cross = h_uv.unsqueeze(-1)
    table.offsets = torch.tensor([[0], [pairs]], device=device)
    table.places = torch.cat([first, second])
    return table


def _code_block(
    limits: tuple[int, int], matrix: torch.Tensor, gradient: torch.Tensor, codes: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Visit the columns of a block one by one; codes move only where the mask allows them."""
    diagonal = matrix.diagonal()
    moved = torch.empty_like(codes)
    for column in range(codes.shape[0]):
        now, change = codes[column], moved[column]
        new = torch.sub(now, gradient[column] / diagonal[column]).round_().clamp_(*limits).mul_(allowed[column])
        torch.sub(new, now, out=change)
        now.add_(change)
        if column + 1 < codes.shape[0]:
            gradient[column + 1 :].addr_(matrix[column + 1 :, column], change)
    return moved
