"""Solvers of one layer: valid results, monotone steps, optimality on problems small enough to enumerate, and the errors
on synthetic layers against other methods."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from sparse_marlin import _core
from sparse_marlin.compress import descent
from sparse_marlin.compress.admm import joint_codes, sparse_weights
from sparse_marlin.compress.descent import descend
from sparse_marlin.compress.hessian import Hessian, HessianAccumulator, output_error
from sparse_marlin.compress.problem import (
    Problem,
    Solution,
    clipped_scales,
    keep_about_two,
    keep_two,
    refit_scales,
    rounded,
)
from sparse_marlin.compress.solvers import QUALITIES, SOLVERS
from sparse_marlin.quantize import code_range
from sparse_marlin.testing.baselines import gptq_int4, old_recipe, sparsegpt_24


def correlated(seed, decay, size_k=512, size_n=128, tokens=8192):
    """A layer like those of a language model: heavy-tailed weights, inputs with a power-law spectrum and a few outlier
    channels. W [N, K], H of the calibration tokens and H of others."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((size_k, size_k)))
    spectrum = (1 + np.arange(size_k)) ** (-decay)
    channels = np.exp(rng.standard_normal(size_k) * 0.5)
    channels[rng.choice(size_k, 5, replace=False)] *= 8
    first, second = ((rng.standard_normal((tokens, size_k)) * np.sqrt(spectrum)) @ basis.T * channels for _ in range(2))
    weight = rng.standard_t(6, (size_n, size_k)) * 0.02
    return [
        torch.tensor(a, dtype=torch.float32) for a in (weight, first.T @ first / tokens, second.T @ second / tokens)
    ]


def problem_of(weight, hessian, **options):
    return Problem(weight.t().contiguous(), Hessian(hessian), **options)


def small(seed=0, size_k=96, size_n=24, device="cpu", **options):
    torch.manual_seed(seed)
    inputs = torch.randn(400, size_k) @ (torch.randn(size_k, size_k) / size_k**0.5 + 0.3 * torch.eye(size_k))
    weight = torch.randn(size_n, size_k) * 0.1
    return problem_of(weight.to(device), (inputs.t() @ inputs / 400).to(device), **options)


def squared_error(values, weight, hessian):
    return output_error(weight, values.t(), hessian) ** 2


def assert_valid(problem, solution):
    low, high = code_range(problem.num_bits)
    assert torch.equal(solution.codes, solution.codes.round())
    assert solution.codes.min() >= low
    assert solution.codes.max() <= high
    assert int((solution.codes.unflatten(0, (-1, _core.QUAD)) != 0).sum(1).max()) <= _core.KEPT_PER_QUAD
    assert solution.scales.shape == (problem.groups, problem.target.shape[1])
    assert torch.isfinite(solution.scales).all()
    assert (solution.scales > 0).all()
    assert torch.equal(solution.scales, solution.scales.to(problem.scale_dtype).float())


# --- H ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hessian_is_the_mean_over_all_tokens(device, dtype):
    batches = [torch.randn(count, 5, 37, device=device).to(dtype) for count in (3, 1, 0, 4)]
    sums = HessianAccumulator(37, device, "layer")
    for batch in batches:
        sums.add(batch)
    rows = torch.cat([batch.reshape(-1, 37) for batch in batches]).double()
    torch.testing.assert_close(sums.finish().double(), rows.t() @ rows / len(rows), atol=1e-5, rtol=1e-5)
    assert sums.tokens == 40


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_name_layer_and_feature(bad):
    sums = HessianAccumulator(8, torch.device("cpu"), "model.up")
    inputs = torch.randn(4, 8)
    inputs[2, 5] = bad
    sums.add(inputs)
    with pytest.raises(ValueError, match=r"^model\.up: activations: expected finite inputs, .* input feature 5;"):
        sums.finish()


def test_dead_inputs_are_pruned_and_singular_matrices_are_damped():
    torch.manual_seed(0)
    inputs = torch.randn(6, 32)  # rank 6 of 32
    inputs[:, [3, 4, 17]] = 0
    problem = problem_of(torch.randn(8, 32), inputs.t() @ inputs / 6, group_size=32)
    for quality in QUALITIES:
        solution = SOLVERS[quality](problem)
        assert_valid(problem, solution)
        assert not solution.codes[[3, 4, 17]].any(), quality
    nothing = problem_of(torch.randn(8, 32), torch.zeros(32, 32), group_size=32)
    assert not SOLVERS["joint"](nothing).codes.any()


def test_damping_rises_until_the_matrix_is_positive_definite():
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 1.05  # not positive definite by 5 % of the mean diagonal
    assert Hessian(hessian).damping == pytest.approx(0.1)
    hessian[0, 1] = hessian[1, 0] = 10.0
    with pytest.raises(ValueError, match="positive definite"):
        Hessian(hessian)


def test_inverse_upper_is_a_factor_of_the_inverse():
    hessian = small().hessian
    upper = hessian.inverse_upper()
    torch.testing.assert_close(upper, upper.triu())
    product = (upper.t() @ upper) @ hessian.damped
    torch.testing.assert_close(product, torch.eye(len(upper)), atol=2e-3, rtol=0)


# --- validity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32},
        {"group_size": 64},  # the last group is half as long
        {"group_size": -1, "scale_dtype": torch.bfloat16},
        {"group_size": 32, "num_bits": 8, "scale_dtype": torch.float16},
    ],
    ids=str,
)
def test_every_quality_gives_valid_codes(quality, options, device):
    problem = small(device=device, **options)
    solution = SOLVERS[quality](problem)
    assert_valid(problem, solution)
    loss = problem.losses(solution.values(problem)).sum() / problem.losses(torch.zeros_like(problem.target)).sum()
    assert loss < 0.5


@pytest.mark.parametrize("quality", QUALITIES)
def test_fixed_patterns_are_kept(quality):
    mask = keep_two(torch.randn(96, 24))
    mask[8:12] = False  # a quad may keep fewer than two
    mask[13] = False
    problem = small(group_size=32, mask=mask)
    solution = SOLVERS[quality](problem)
    assert_valid(problem, solution)
    assert not solution.codes[~mask].any()
    assert solution.codes[mask].count_nonzero() > 0.5 * mask.sum()


def test_rows_do_not_depend_on_each_other(device):
    """Linears with one input are solved as one problem: each must get what it would get with any others."""
    problem = small(group_size=32, device=device)
    part = slice(5, 9)
    others = torch.randn_like(problem.target)
    others[:, part] = problem.target[:, part]
    other = dataclasses.replace(problem, target=others)
    for quality in ("joint", "alps"):
        first, second = SOLVERS[quality](problem), SOLVERS[quality](other)
        assert torch.equal(first.codes[:, part], second.codes[:, part])
        assert torch.equal(first.scales[:, part], second.scales[:, part])
        assert not torch.equal(first.codes, second.codes)


# --- optimality -------------------------------------------------------------------------------------------------------


def best_by_enumeration(problem, scales):
    """The least objective of every row over all patterns and codes of two quads, for fixed scales."""
    low, high = code_range(4)
    quads = {
        tuple(x if i == a else y if i == b else 0 for i in range(4))
        for a, b in itertools.combinations(range(4), 2)
        for x in range(low, high + 1)
        for y in range(low, high + 1)
    }
    options = torch.tensor(sorted(quads), dtype=torch.float32)
    damped = problem.hessian.damped
    best = []
    for row in range(problem.target.shape[1]):
        first, second = (options * scales[0, row] - problem.target[part, row] for part in (slice(0, 4), slice(4, 8)))
        own = [((d @ damped[p, p]) * d).sum(1) for d, p in ((first, slice(0, 4)), (second, slice(4, 8)))]
        best.append((own[0][:, None] + own[1] + 2 * (first @ damped[:4, 4:]) @ second.t()).min())
    return torch.stack(best)


def test_joint_finds_the_optimum_of_most_tiny_problems():
    found = nearest = 0
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = torch.randn(400, 8) @ torch.randn(8, 8)
        problem = problem_of(torch.randn(48, 8) * 0.1, inputs.t() @ inputs / 400, group_size=-1)
        solution = SOLVERS["joint"](problem)
        best = best_by_enumeration(problem, solution.scales)
        loss = problem.losses(solution.values(problem))
        assert (loss >= best * (1 - 1e-3) - 1e-6).all()
        found += int((loss <= best * (1 + 1e-3)).sum())
        start = rounded(problem, problem.target * keep_two(problem.target.abs()), solution.scales)
        nearest += int((problem.losses(start.values(problem)) <= best * (1 + 1e-3)).sum())
    assert found >= 0.65 * 3 * 48
    assert nearest <= 0.1 * 3 * 48  # so these problems are not easy


def test_descent_never_rises_and_ends_where_no_code_helps():
    problem = small(group_size=32)
    kept = problem.target * keep_two(problem.target.abs())
    solution = rounded(problem, kept, clipped_scales(problem, kept, problem.hessian.diagonal))
    before = problem.losses(solution.values(problem))
    first = before
    for _ in range(12):
        solution = descend(problem, solution, 1)
        after = problem.losses(solution.values(problem))
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.8 * first.sum()
    # Any single code moved by one within the pattern makes it worse.
    for index in range(problem.size_k):
        for step in (-1, 1):
            codes = solution.codes.clone()
            codes[index] = (codes[index] + step * (codes[index] != 0)).clamp(-8, 7)
            worse = problem.losses(Solution(codes, solution.scales).values(problem))
            assert (worse >= before * (1 - 1e-4)).all()


def test_descent_on_a_fixed_pattern_never_rises():
    problem = small(group_size=32)
    problem = problem.with_mask(keep_two(problem.target.abs()))
    solution = rounded(problem, problem.target * problem.mask, torch.full((3, 24), 0.05))
    before = problem.losses(solution.values(problem))
    solution = descend(problem, solution, 3)
    after = problem.losses(solution.values(problem))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.9 * before.sum()
    assert not solution.codes[~problem.mask].any()


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_refitted_scales_are_the_least_squares_ones(group_size):
    problem = small(group_size=group_size)
    kept = problem.target * keep_two(problem.target.abs())
    start = rounded(problem, kept, clipped_scales(problem, kept, problem.hessian.diagonal))
    solution = refit_scales(problem, start)
    loss = problem.losses(solution.values(problem))
    assert (loss <= problem.losses(start.values(problem))).all()
    for group in range(problem.groups):
        for factor in (0.99, 1.01):
            scales = solution.scales.clone()
            scales[group] *= factor
            assert (problem.losses(Solution(solution.codes, scales).values(problem)) >= loss * (1 - 1e-5)).all()


def test_alps_on_a_fixed_pattern_is_least_squares():
    problem = small()
    mask = keep_two(problem.target.abs())
    weights, _ = sparse_weights(problem.with_mask(mask))
    damped = problem.hessian.damped
    for row in range(4):
        on = mask[:, row]
        exact = torch.linalg.solve(damped[on][:, on], (damped @ problem.target[:, row])[on])
        loss, least = (
            problem.losses(torch.zeros_like(weights).index_put((on.nonzero()[:, 0], torch.tensor(row)), w))[row]
            for w in (weights[on, row], exact)
        )
        assert loss <= least * 1.02


def test_joint_codes_use_the_scales_that_they_are_given():
    problem = small(group_size=32)
    scales = torch.full((3, 24), 0.04)
    solution = joint_codes(problem, scales)
    assert_valid(problem, solution)
    assert torch.equal(solution.scales, scales)


# --- against other methods --------------------------------------------------------------------------------------------

# Squared relative output error on held-out tokens (seed 0; K 512, N 128, group 128): the best rows of an independent
# implementation of the published methods and of descent from ALPS, and SparseGPT's for 2:4 without rounding.
REFERENCE = {0.5: (0.0478, 0.0413), 1.0: (0.0209, 0.0213), 2.0: (0.0010, 0.0015)}


@pytest.mark.parametrize("decay", REFERENCE)
def test_errors_on_correlated_layers(decay):
    weight, hessian, other = correlated(0, decay)
    problem = problem_of(weight, hessian)
    error = {name: squared_error(SOLVERS[name](problem).values(problem), weight, other) for name in QUALITIES}
    old = squared_error(old_recipe(problem).values(problem), weight, other)
    pruned = squared_error(sparsegpt_24(problem), weight, other)
    best, sparse_only = REFERENCE[decay]
    assert error["joint"] <= best
    assert pruned == pytest.approx(sparse_only, abs=6e-5)
    if decay >= 1:
        assert error["joint"] <= pruned
    assert error["joint"] < error["alps"] < error["sparsegpt"] < old < error["wanda"] * 1.1
    assert error["wanda"] < error["magnitude"]
    assert squared_error(gptq_int4(problem), weight, other) < error["joint"]


@pytest.mark.gpu
@pytest.mark.parametrize("quality", QUALITIES)
def test_gpu_and_cpu_give_the_same_codes_up_to_ties(quality, cuda):
    weight, hessian, _ = correlated(3, 1.0, size_k=256, size_n=64, tokens=2048)
    here, there = problem_of(weight, hessian), problem_of(weight.to(cuda), hessian.to(cuda))
    on_cpu, on_gpu = SOLVERS[quality](here), SOLVERS[quality](there)
    losses = here.losses(on_cpu.values(here)), here.losses(on_gpu.values(there).cpu())
    # A tie broken otherwise changes what follows it in its row, and rows go apart by no more than local optima do.
    torch.testing.assert_close(losses[0].sum(), losses[1].sum(), rtol=0.01, atol=0)
    same = (on_cpu.codes == on_gpu.codes.cpu()).float().mean()
    assert same > (0.9 if quality in ("alps", "joint") else 0.99), float(same)


# --- what the CPU has operators for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size_n", [1, 8, 37, 200])  # whole vectors and less, one task and several
@pytest.mark.parametrize("bits", [4, 8])
def test_descent_of_the_cpu_is_that_of_the_gpu(size_n, bits):
    problem = small(size_k=64, size_n=size_n, num_bits=bits)
    matrix, scale = problem.hessian.damped, 0.02
    codes = (problem.target / scale).round().clamp_(*problem.limits)
    codes *= keep_two(codes.abs())
    gradient = matrix @ (codes - problem.target / scale)
    here, there, moved = codes.clone(), codes.clone(), torch.full_like(codes, torch.nan)
    wanted = descent._pattern_block(problem.limits, matrix, gradient.clone(), there)
    torch.ops.sparse_marlin._descend_quads(matrix, gradient, here, moved, *problem.limits, descent._MARGIN)
    assert torch.equal(moved, here - codes)
    # Products are summed in another order: a near tie may go the other way, and what follows it in its column.
    assert (here == there).all(0).float().mean() >= (0.9 if size_n > 8 else 1.0)
    assert torch.equal(wanted, there - codes)


@pytest.mark.parametrize("size_n", [1, 8, 37, 4100])
@pytest.mark.parametrize("free", [True, False])
def test_projection_of_the_cpu_is_that_of_the_gpu(size_n, free):
    torch.manual_seed(0)
    sought, target = torch.randn(2, 64, size_n)
    step = None if free else torch.rand(64, size_n) + 0.05
    nearest = sought if free else (sought / step).round().clamp(-8, 7) * step
    projected = nearest * keep_about_two((2 * sought - nearest) * nearest)
    carried, behind = torch.full((2, 64, size_n), torch.nan)
    torch.ops.sparse_marlin._project_quads(sought, target, step, carried, behind, 0.7, -8, 7)
    wanted = target + 0.7 * (sought - projected)
    torch.testing.assert_close(carried, wanted)
    torch.testing.assert_close(behind, projected - wanted)


def test_operators_of_the_solvers_refuse_what_they_cannot_read():
    whole = torch.zeros(8, 4)
    for wrong, message in [
        (torch.zeros(6, 4), "sought: expected whole quads"),
        (torch.zeros(4, 8).t(), "sought: expected rows without gaps"),
        (torch.zeros(8, 4, dtype=torch.float64), "sought: expected dtype float32"),
    ]:
        with pytest.raises(RuntimeError, match=f"_project_quads: {message}"):
            torch.ops.sparse_marlin._project_quads(wrong, whole, None, whole.clone(), whole.clone(), 1.0, -8, 7)
    with pytest.raises(RuntimeError, match=r"_descend_quads: matrix: expected shape \[8, 8\]"):
        torch.ops.sparse_marlin._descend_quads(whole, whole, whole.clone(), whole.clone(), -8, 7, 0.0)
