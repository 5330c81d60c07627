"""Weight-only compression: the mask, the codes and scales it finds, and what it refuses."""

import pytest
import torch

from sparse_marlin import _core
from sparse_marlin.quantize import (
    QuantizedWeight,
    expand_scales,
    prune_24_magnitude,
    quantize,
    quantize_weight_only,
    relative_error,
)

GROUP_SIZES = sorted(_core.GROUP_SIZES)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_weight(size_n, size_k, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size_n, size_k, generator=generator).to(device=device, dtype=dtype)


def kept_error(weight, quantized):
    """Relative error over the kept weights alone, in float64."""
    kept = (weight * prune_24_magnitude(weight)).double()
    return float((kept - quantized.dequantize().double()).norm() / kept.norm())


def test_mask_keeps_the_two_largest_of_four(device):
    weight = random_weight(33, 64, device)
    mask = prune_24_magnitude(weight)
    quads, kept = weight.abs().unflatten(1, (-1, 4)), mask.unflatten(1, (-1, 4))
    assert torch.equal(kept.sum(-1), torch.full_like(kept.sum(-1), 2))
    smallest_kept = quads.masked_fill(~kept, torch.inf).amin(-1)
    largest_dropped = quads.masked_fill(kept, -1).amax(-1)
    assert bool((smallest_kept >= largest_dropped).all())


@pytest.mark.parametrize(
    ("quad", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 0, 0]),
        ([0, 0, 0, 0], [1, 1, 0, 0]),
        ([1, 2, -2, 1], [0, 1, 1, 0]),
        ([1, 1, 3, 1], [1, 0, 1, 0]),
        ([-1, 5, 1, 1], [1, 1, 0, 0]),
        ([0, 0, 0, -7], [1, 0, 0, 1]),
    ],
)
def test_equal_magnitudes_keep_the_lower_index(device, quad, expected):
    weight = torch.tensor([quad], dtype=torch.float32, device=device)
    assert prune_24_magnitude(weight).int().tolist() == [expected]


def test_mask_refuses_a_k_not_divisible_by_four():
    with pytest.raises(ValueError, match=r"weight: expected .* divisible by 4, got shape \[3, 6\]"):
        prune_24_magnitude(torch.ones(3, 6))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_fit_the_stored_scales(device, group_size, num_bits, dtype):
    """The codes are the nearest ones to w / scale for the scale as stored, pruned positions are 0, shapes are the
    contract's."""
    weight = random_weight(19, 300, device, dtype)  # 300: the last group is partial
    found = quantize_weight_only(weight, group_size=group_size, num_bits=num_bits)
    low, high = _core.code_min(num_bits), _core.code_max(num_bits)
    assert found.codes.dtype == torch.int8
    assert found.codes.shape == weight.shape
    assert found.scales.dtype == dtype
    assert tuple(found.scales.shape) == _core.scales_shape(19, 300, group_size)
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())
    mask = prune_24_magnitude(weight)
    assert not bool(found.codes[~mask].any())
    wide = expand_scales(found.scales.float(), group_size, 300)
    nearest = torch.round(weight.float() / wide).clamp(low, high).mul(mask)
    assert torch.equal(found.codes.float(), nearest)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_bits", [4, 8])
def test_searched_scales_beat_unclipped_ones(group_size, num_bits):
    """Squared error of every (row, group) at most that of absmax scales, and lower in total."""
    weight = random_weight(64, 512)
    mask = prune_24_magnitude(weight)
    found = quantize(weight, mask, group_size, num_bits)
    kept = weight * mask
    width = 512 if group_size == -1 else group_size
    high = _core.code_max(num_bits)
    absmax = kept.unflatten(1, (-1, width)).abs().amax(-1).t() / high
    wide = expand_scales(absmax, group_size, 512)
    plain = torch.round(kept / wide).clamp(-high - 1, high) * wide
    searched_error = (kept - found.dequantize()).unflatten(1, (-1, width)).square().sum(-1)
    plain_error = (kept - plain).unflatten(1, (-1, width)).square().sum(-1)
    assert bool((searched_error <= plain_error * 1.0001).all())
    assert float(searched_error.sum()) < (0.95 if num_bits == 4 else 1.0) * float(plain_error.sum())


def test_error_of_normal_weights_is_the_expected_one():
    """Pruning takes 0.364 of the norm of normal weights; what 4-bit codes add to the kept half is known well enough to
    pin."""
    weight = random_weight(256, 1024)
    found = quantize_weight_only(weight, group_size=128, num_bits=4)
    assert kept_error(weight, found) == pytest.approx(0.077, abs=0.003)
    assert relative_error(weight, found) == pytest.approx(0.371, abs=0.004)
    fine = quantize_weight_only(weight, group_size=128, num_bits=8)
    assert kept_error(weight, fine) < 0.006
    assert relative_error(weight, fine) == pytest.approx(0.364, abs=0.004)


def test_weights_on_the_grid_come_back_exactly():
    """Codes that use the whole range with a power-of-two scale: nothing is lost."""
    codes = torch.tensor([[7, 0, -8, 0, 0, 3, 0, -5] * 16], dtype=torch.float32)
    found = quantize_weight_only(codes * 0.125, group_size=64, num_bits=4)
    assert torch.equal(found.dequantize(), codes * 0.125)


def test_relative_error_is_the_frobenius_ratio():
    weight = torch.tensor([[3.0, 0, 4.0, 0]])
    found = QuantizedWeight(torch.tensor([[3, 0, 0, 0]], dtype=torch.int8), torch.ones(1, 1), -1, 4)
    assert relative_error(weight, found) == pytest.approx(4 / 5)
    assert relative_error(torch.zeros(1, 4), found) == 0.0


def test_a_group_of_zeros_gets_scale_one(device):
    weight = random_weight(4, 256, device)
    weight[1, 64:128] = 0
    found = quantize_weight_only(weight, group_size=64, num_bits=4)
    assert float(found.scales[1, 1]) == 1.0
    assert not bool(found.codes[1, 64:128].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e30])
def test_scales_stay_positive_and_finite_at_the_edges(dtype, size):
    """Weights whose scale would round to 0 or infinity in the dtype of the scales: clamped, not an error."""
    weight = random_weight(8, 64) * size
    found = quantize(weight, prune_24_magnitude(weight), 32, 4, scale_dtype=dtype)
    assert bool((torch.isfinite(found.scales) & (found.scales > 0)).all())


def test_tiny_float16_weights_keep_their_precision():
    """Scales below float16's smallest normal number are stored as subnormals, not flushed."""
    weight = random_weight(16, 256) * 1e-4
    found = quantize(weight, prune_24_magnitude(weight), 64, 4, scale_dtype=torch.float16)
    assert float(found.scales.max()) < 1e-4
    assert relative_error(weight, found) < 0.4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named_with_their_position(bad):
    weight = random_weight(6, 64)
    weight[3, 17] = bad
    weight[5, 0] = bad
    with pytest.raises(
        ValueError, match=rf"^model.layers.0: weight: expected finite values, got {bad} at row 3, column 17"
    ):
        quantize_weight_only(weight, group_size=64, num_bits=4, name="model.layers.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 3}, r"num_bits: expected one of \[4, 8\], got 3"),
        ({"group_size": 0}, "group_size: expected -1 or a positive number, got 0"),
        ({"mask": torch.ones(4, 32, dtype=torch.bool)}, r"mask: expected bool \[4, 64\], got torch.bool \[4, 32\]"),
        ({"mask": torch.ones(4, 64)}, r"mask: expected bool \[4, 64\], got torch.float32"),
        ({"weight": torch.ones(4, 66)}, r"weight: expected .* divisible by 4, got shape \[4, 66\]"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "weight": torch.ones(4, 64),
        "mask": torch.ones(4, 64, dtype=torch.bool),
        "group_size": 64,
        "num_bits": 4,
    }
    with pytest.raises(ValueError, match=message):
        quantize(**{**arguments, **change})


def test_integer_weights_have_no_scale_type():
    with pytest.raises(TypeError, match=r"scale_dtype: expected float32, float16 or bfloat16, got torch\.int32"):
        quantize(torch.ones(4, 64, dtype=torch.int32), torch.ones(4, 64, dtype=torch.bool), 64, 4)


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    weight = random_weight(50, 128)
    whole = quantize_weight_only(weight, group_size=32, num_bits=4)
    monkeypatch.setattr("sparse_marlin.quantize._CHUNK_VALUES", {"cpu": 7 * 128, "cuda": 7 * 128})
    parts = quantize_weight_only(weight, group_size=32, num_bits=4)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)
    assert relative_error(weight, parts) == pytest.approx(relative_error(weight, whole), rel=1e-6)


def test_a_mask_that_is_not_24_is_quantized_as_it_is():
    """`quantize` serves any mask; that the result can be packed is `from_codes`' business."""
    weight = random_weight(8, 64)
    dense = quantize(weight, torch.ones_like(weight, dtype=torch.bool), 64, 8)
    assert relative_error(weight, dense) < 0.01
