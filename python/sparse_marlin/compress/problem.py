"""What a solver gets and what it returns, and the operations on 2:4 patterns and group scales that solvers share.

Inside the solvers everything is transposed, [K, R] for R rows: a quad is then four contiguous rows of a tensor, and
every step over the columns works on whole rows. R stacks the output features of all linears with the same input.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .._extension import _core
from ..quantize import KEPT_PER_QUAD, QUAD, QuantizedWeight, code_range, group_width, keep_largest, storable_scale
from .hessian import Hessian

Step = Callable[[str], None]  # told what a solver is about to do

# Values per pass of an elementwise chain: on a CPU a pass should stay in the cache, on a GPU it should fill the device.
_CHUNK_VALUES = {"cpu": 1 << 17, "cuda": 1 << 26}
_CLIP_FRACTIONS = 25  # candidates of a clipped scale: 1, 0.97 ... 0.28 of the one that clips nothing
_LEAST_FRACTION = {4: 0.25, 8: 0.7}

# The ordered pairs of positions in a quad: round the first, then the second given the first.
PAIRS = [pair for kept in itertools.combinations(range(QUAD), KEPT_PER_QUAD) for pair in itertools.permutations(kept)]


@dataclass
class Problem:
    """Minimize `sum_r (w_r - v_r)^T H (w_r - v_r)` over 2:4 patterns, codes and group scales.

    `target` [K, R] float32 is the dense weight, transposed; `mask` [K, R] bool fixes the pattern where it is not None.
    `scale_dtype` is what scales are stored in: they are rounded to it before codes are chosen.
    """

    target: torch.Tensor
    hessian: Hessian
    group_size: int = 128
    num_bits: int = 4
    scale_dtype: torch.dtype = torch.float32
    mask: torch.Tensor | None = None
    step: Step = field(default=lambda _: None)

    def __post_init__(self) -> None:
        # Inputs that were never seen: whatever their weights are, nothing follows from the data. They are pruned first.
        if bool(self.hessian.dead.any()):
            self.target = torch.where(self.hessian.dead[:, None], torch.zeros_like(self.target), self.target)

    @functools.cached_property
    def pull(self) -> torch.Tensor:
        """H W [K, R], the linear part of the objective."""
        return self.hessian.damped @ self.target

    @property
    def size_k(self) -> int:
        return self.target.shape[0]

    @property
    def width(self) -> int:
        return group_width(self.size_k, self.group_size)

    @property
    def groups(self) -> int:
        return _core.num_groups(self.size_k, self.group_size)

    @property
    def limits(self) -> tuple[int, int]:
        return code_range(self.num_bits)

    def storable(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales as they will be stored, in float32."""
        return storable_scale(scales, self.scale_dtype).float()

    def expand(self, scales: torch.Tensor) -> torch.Tensor:
        """[G, R] -> [K, R]."""
        return scales.repeat_interleave(self.width, dim=0)[: self.size_k]

    def with_mask(self, mask: torch.Tensor) -> Problem:
        """The same problem with its pattern fixed."""
        return dataclasses.replace(self, mask=mask)

    def losses(self, values: torch.Tensor) -> torch.Tensor:
        """The objective of every row [R] for weights `values` [K, R], under the damped H."""
        left = values - self.target
        return ((self.hessian.damped @ left) * left).sum(0)


@dataclass
class Solution:
    """Codes [K, R] (float32 holding integers) and scales [G, R] (float32 holding storable values)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self, problem: Problem) -> torch.Tensor:
        return self.codes * problem.expand(self.scales)

    def quantized(self, problem: Problem, rows: slice, dtype: torch.dtype) -> QuantizedWeight:
        """The part of one linear, as the packer takes it, scales in `dtype`."""
        return QuantizedWeight(
            self.codes[:, rows].t().to(torch.int8).contiguous(),
            self.scales[:, rows].to(dtype).contiguous(),
            problem.group_size,
            problem.num_bits,
        )


def chunks(tensor: torch.Tensor, multiple: int = QUAD) -> list[slice]:
    """Slices of dimension 0 for passes of a cache's size, each a multiple of `multiple` long."""
    size, width = tensor.shape
    limit = _CHUNK_VALUES.get(tensor.device.type, _CHUNK_VALUES["cuda"])
    step = max(multiple, limit // max(width, 1) // multiple * multiple)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def keep_two(scores: torch.Tensor) -> torch.Tensor:
    """Mask [K, R] of the two largest scores of every quad; of equal ones the lower index."""
    return keep_largest(scores.unflatten(0, (-1, QUAD)).unbind(1), dim=1).flatten(0, 1)


def keep_about_two(scores: torch.Tensor) -> torch.Tensor:
    """As `keep_two`, in half the time, but of equal scores at the border all stay: for what is iterated further."""
    a, b, c, d = scores.unflatten(0, (-1, QUAD)).unbind(1)
    second = torch.minimum(torch.maximum(a, b), torch.maximum(c, d))
    second = torch.maximum(second, torch.maximum(torch.minimum(a, b), torch.minimum(c, d)))
    return (scores.unflatten(0, (-1, QUAD)) >= second[:, None]).flatten(0, 1)


def clipped_scales(problem: Problem, values: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Scales [G, R] for weights [K, R] (zero where pruned): per group the clipped scale with the least
    `sum_j importance_j (round(v_j) - v_j)^2`, importance [K] being the diagonal of H or of its OBS inverse."""
    found = torch.empty((problem.groups, values.shape[1]), dtype=torch.float32, device=values.device)
    for group in range(problem.groups):
        part = slice(group * problem.width, (group + 1) * problem.width)
        found[group] = clipped_scale(problem, values[part], importance[part])
    return found


def clipped_scale(problem: Problem, values: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The scales [R] of one group, see `clipped_scales`."""
    low, high = problem.limits
    weights = importance[:, None]
    # The codes reach from -8 to 7: half a step beyond 7 is where clipping begins.
    absmax = values.abs().amax(0)
    unclipped = absmax * (2 / (high - low))
    best = torch.ones_like(absmax)
    least = torch.full_like(absmax, math.inf)
    span = 1 - _LEAST_FRACTION[problem.num_bits]
    for index in range(_CLIP_FRACTIONS):
        scale = problem.storable(unclipped * (1 - span * index / _CLIP_FRACTIONS))
        left = (values / scale).round_().clamp_(low, high).mul_(scale).sub_(values)
        error = left.square_().mul_(weights).sum(0)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return torch.where(absmax > 0, best, torch.ones_like(best))


def rounded(problem: Problem, values: torch.Tensor, scales: torch.Tensor) -> Solution:
    """Nearest codes of weights [K, R]; zeros stay zeros."""
    low, high = problem.limits
    return Solution((values / problem.expand(scales)).round_().clamp_(low, high), scales)


def refit_scales(problem: Problem, solution: Solution) -> Solution:
    """Least-squares scales for fixed codes: per row a G x G system `[z_g^T H z_h] s = [z_g^T H w]`, with z_g the codes
    of group g. A row keeps its old scales where the new ones, rounded for storage, are not better."""
    normal, right = _normal_equations(problem, solution.codes)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    ridged = normal + torch.diag_embed(ridge[:, None].expand(-1, problem.groups))
    solved, _ = torch.linalg.solve_ex(ridged, right.unsqueeze(-1))
    found, old = solved.squeeze(-1), solution.scales.t()
    # A scale that runs away is a sign of a nearly singular system, not of a better scale.
    sane = torch.isfinite(found) & (found > 0.3 * old) & (found < 3 * old)
    new = problem.storable(torch.where(sane, found, old))
    # The objective is s^T N s - 2 r^T s and a constant: the change of it, without a product of H's size.
    change = new - old
    slope = torch.linalg.vecdot(normal, old[:, None]) - right
    better = torch.linalg.vecdot(torch.linalg.vecdot(normal, change[:, None]) + 2 * slope, change) < 0
    return Solution(solution.codes, torch.where(better[:, None], new, old).t().contiguous())


def _normal_equations(problem: Problem, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, G, G] and [R, G]. Only products of a group's columns of H with its own codes, and below the diagonal: all of
    them together cost half a product of H with the codes."""
    groups, width, damped = problem.groups, problem.width, problem.hessian.damped
    missing = groups * width - problem.size_k
    normal = torch.empty((groups, groups, codes.shape[1]), dtype=torch.float32, device=codes.device)
    for group in range(groups):
        start, end = group * width, min((group + 1) * width, problem.size_k)
        moved = (damped[start:, start:end] @ codes[start:end]).mul_(codes[start:])
        sums = torch.nn.functional.pad(moved, (0, 0, 0, missing)).unflatten(0, (groups - group, width)).sum(1)
        normal[group:, group] = sums
        normal[group, group:] = sums
    right = problem.pull * codes
    right = torch.nn.functional.pad(right, (0, 0, 0, missing)).unflatten(0, (groups, width)).sum(1)
    return normal.permute(2, 0, 1).contiguous(), right.t().contiguous()
