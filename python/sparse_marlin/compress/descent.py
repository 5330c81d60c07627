"""Coordinate descent on codes with fixed scales: `descend_patterns` moves 2:4 patterns too, `descend_codes` does not.

The gradient G = H (V - W) is kept up to date, so a step costs only what it changes. `descend_patterns` takes the four
weights of a quad together: for each of the six patterns, in both orders, the first weight is rounded at the optimum of
the pair and the second at its optimum given the first; the best of these twelve replaces the quad if it is better than
what is there. Every step lowers the objective or changes nothing, and rows do not depend on each other.

A sweep visits the columns in order. Inside a block only the block's own rows of G are updated; the rest follows with
one matrix product at the end of the block, so nearly all arithmetic of a sweep is one K x K by K x R product.
"""

from __future__ import annotations

import torch

from ..quantize import QUAD
from .problem import PAIRS, Problem, Solution

_BLOCK = 128  # columns; a multiple of the quad
_MARGIN = 1e-6  # relative: less than this is rounding, not progress


def descend(problem: Problem, solution: Solution, sweeps: int) -> Solution:
    """`sweeps` sweeps over all columns: patterns and codes, or codes alone where the problem fixes the pattern."""
    codes, expanded = solution.codes.clone(), problem.expand(solution.scales)
    damped = problem.hessian.damped
    gradient = damped @ (codes * expanded - problem.target)
    for _ in range(sweeps):
        problem.step("descent")
        for start in range(0, problem.size_k, _BLOCK):
            block = slice(start, min(start + _BLOCK, problem.size_k))
            step = _pattern_block if problem.mask is None else _code_block
            moved = step(problem, block, damped[block, block], gradient[block].clone(), codes[block], expanded[block])
            gradient.addmm_(damped[:, block], moved)
    return Solution(codes, solution.scales)


def _pattern_block(
    problem: Problem,
    block: slice,
    matrix: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Visit the quads of a block; `codes` change in place, the change of the weights is returned."""
    low, high = problem.limits
    device = codes.device
    first = torch.tensor([pair[0] for pair in PAIRS], device=device)
    second = torch.tensor([pair[1] for pair in PAIRS], device=device)
    table = _pair_table(matrix, first, second)
    moved = torch.zeros_like(codes)
    pairs = len(PAIRS)
    index = torch.arange(QUAD, device=device)[:, None]
    for start in range(0, codes.shape[0], QUAD):
        quad = slice(start, start + QUAD)
        own = matrix[quad, quad]
        now, scale = codes[quad], scales[start]
        # In units of the scale: gradient of the objective at "this quad is zero".
        slope = torch.addmm(gradient[quad] / scale, own, now, alpha=-1)
        # Rows of the table: optimum of the first in the pair, optimum of the second alone, slopes of both.
        pair = (table.products[start // QUAD] @ slope).view(4, pairs, -1)
        one = pair[0].round_().clamp_(low, high)
        two = torch.addcmul(pair[1], table.coupling[start // QUAD], one).round_().clamp_(low, high)
        worth = _pair_objective(table, start // QUAD, one, two, pair[2], pair[3])
        least, chosen = worth.min(0)
        standing = (torch.addmm(slope, own, now, alpha=0.5) * now).sum(0)
        better = least < standing - _MARGIN * standing.abs()
        chosen = chosen[None]
        new = torch.where(index == first[chosen], one.gather(0, chosen), 0.0)
        new = torch.where(index == second[chosen], two.gather(0, chosen), new)
        new = torch.where(better, new, now)
        change = (new - now) * scale
        codes[quad] = new
        moved[quad] = change
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


def _pair_table(matrix: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> _PairTable:
    quads, pairs = matrix.shape[0] // QUAD, len(PAIRS)
    own = torch.stack([matrix[q * QUAD : (q + 1) * QUAD, q * QUAD : (q + 1) * QUAD] for q in range(quads)])
    h_uu, h_vv, h_uv = own[:, first, first], own[:, second, second], own[:, first, second]
    determinant = h_uu * h_vv - h_uv.square()
    table = _PairTable()
    products = torch.zeros((quads, 4, pairs, QUAD), dtype=matrix.dtype, device=matrix.device)
    row = torch.arange(pairs, device=matrix.device)
    products[:, 0, row, first] = -h_vv / determinant
    products[:, 0, row, second] = h_uv / determinant
    products[:, 1, row, second] = -1 / h_vv
    products[:, 2, row, first] = 1
    products[:, 3, row, second] = 1
    table.products = products.flatten(1, 2)
    table.coupling = (-h_uv / h_vv).unsqueeze(-1)
    table.half_first, table.half_second = (0.5 * h_uu).unsqueeze(-1), (0.5 * h_vv).unsqueeze(-1)
    table.cross = h_uv.unsqueeze(-1)
    return table


def _pair_objective(
    table: _PairTable,
    quad: int,
    one: torch.Tensor,
    two: torch.Tensor,
    slope_one: torch.Tensor,
    slope_two: torch.Tensor,
) -> torch.Tensor:
    """h_uu x^2 / 2 + h_uv x y + h_vv y^2 / 2 + slopes, for every pair and row."""
    left = torch.addcmul(slope_one, table.half_first[quad], one).addcmul_(table.cross[quad], two).mul_(one)
    right = torch.addcmul(slope_two, table.half_second[quad], two)
    return left.addcmul_(right, two)


def _code_block(
    problem: Problem,
    block: slice,
    matrix: torch.Tensor,
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Visit the columns of a block one by one; codes move only where the mask allows them."""
    low, high = problem.limits
    assert problem.mask is not None
    allowed = problem.mask[block]
    diagonal = matrix.diagonal()
    moved = torch.zeros_like(codes)
    for column in range(codes.shape[0]):
        scale, now = scales[column], codes[column]
        new = (now - gradient[column] / (diagonal[column] * scale)).round_().clamp_(low, high) * allowed[column]
        change = (new - now) * scale
        codes[column] = new
        moved[column] = change
        if column + 1 < codes.shape[0]:
            gradient[column + 1 :].addr_(matrix[column + 1 :, column], change)
    return moved
