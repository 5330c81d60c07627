"""The factors of a low-rank correction: the best ones of their rank, own and shared, rounded and not."""

import dataclasses

import pytest
import torch
from test_compress_solvers import assert_valid, correlated, problem_of, small, squared_error

from sparse_marlin import low_rank
from sparse_marlin.compress.correction import _factors, corrected
from sparse_marlin.compress.correction import low_rank as low_rank_factors
from sparse_marlin.compress.solvers import SOLVERS
from sparse_marlin.quantize import CHANNELWISE


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_low_rank_is_as_good_as_the_singular_value_decomposition(rank, device):
    problem = small(device=device)
    error = torch.randn(96, 24, device=device) * problem.target
    up, down = low_rank_factors(error, problem.hessian.lower, rank)
    assert (up.shape, down.shape) == ((24, rank), (rank, 96))
    left = (error.t() - up @ down) @ problem.hessian.lower
    values = torch.linalg.svdvals(error.t() @ problem.hessian.lower)
    least = values[rank:].square().sum().sqrt()
    scale = values.square().sum().sqrt()
    assert abs(float(left.norm() - least)) <= 1e-3 * float(scale)


def test_correction_takes_more_than_its_share_of_the_error():
    weight, hessian, other = correlated(0, 1.0, size_k=256, size_n=128, tokens=4096)
    problem = problem_of(weight, hessian)
    solution = SOLVERS["joint"](problem)
    plain = squared_error(solution.values(problem), weight, other)
    rows = [slice(0, 64), slice(64, 128)]
    fixed, factors = corrected(problem, solution, rows, 16, turns=0)
    assert torch.equal(fixed.codes, solution.codes)
    errors = []
    for turns in (0, 2):
        found, factors = corrected(problem, solution, rows, 16, turns=turns)
        assert_valid(problem, found)
        low = torch.cat([dense(up, 16) @ down for up, down in factors])
        errors.append(squared_error(found.values(problem) + low.t(), weight, other))
    assert errors[0] < 0.75 * plain
    assert errors[1] < 0.9 * errors[0]


def dense(up, rank):
    return up if isinstance(up, torch.Tensor) else low_rank.gather(up.dequantize(), rank)


@pytest.mark.parametrize(("bits", "more"), [(4, 0.06), (8, 0.001)])
def test_a_packed_factor_costs_little_of_a_correction(bits, more):
    weight, hessian, _ = correlated(0, 1.0, size_k=256, size_n=192, tokens=4096)
    for shared in (False, True):
        left = []
        for group_size in (CHANNELWISE, 64):
            problem = dataclasses.replace(problem_of(weight, hessian), num_bits=bits)
            solution = SOLVERS["magnitude"](problem)  # of the groups of the problem, whatever those of the factor
            rows = [slice(0, 128), slice(128, 192)]
            one = dataclasses.replace(problem, group_size=group_size)
            error, lower = one.target - solution.values(problem), one.hessian.lower
            found = _factors(one, Given(error, one), rows, 16, shared)
            assert isinstance(found[0][0], torch.Tensor) == (group_size == CHANNELWISE)
            low = torch.cat([dense(up, 16) @ down for up, down in found])
            left.append(float(((error.t() - low) @ lower).square().sum()))
        assert left[0] < left[1] < (1 + more) * left[0]


class Given:
    """A solution whose error is given."""

    def __init__(self, error, problem):
        self.error, self.target = error, problem.target

    def values(self, _):
        return self.target - self.error


def test_a_shared_correction_is_the_best_one_of_its_rank():
    weight, hessian, _ = correlated(0, 1.0, size_k=96, size_n=64, tokens=2048)
    problem = dataclasses.replace(problem_of(weight, hessian), group_size=CHANNELWISE)  # factors that are not rounded
    solution = SOLVERS["magnitude"](problem)
    rows, lower = [slice(0, 48), slice(48, 64)], problem.hessian.lower
    error = problem.target - solution.values(problem)
    values = torch.linalg.svdvals(error.t() @ lower).square()
    for rank in (4, 16):
        _, own = corrected(problem, solution, rows, rank, turns=0)
        _, shared = corrected(problem, solution, rows, rank, shared=True, turns=0)
        assert shared[0][1] is shared[1][1]
        assert [up.shape[0] for up, _ in shared] == [48, 16]
        left = [
            float(((error.t() - torch.cat([up @ down for up, down in found])) @ lower).square().sum())
            for found in (own, shared)
        ]
        assert left[0] <= left[1] == pytest.approx(float(values[rank:].sum()), rel=2e-3)
