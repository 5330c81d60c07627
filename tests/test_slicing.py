"""Slices and concatenations of packed weights: the bytes that packing the dense slice gives, and the same product."""

import itertools

import pytest
import torch

from sparse_marlin import SparseMarlinLinear, _core, pack_24_weights, sparse_marlin_gemm
from sparse_marlin.slicing import PackedLayer, concat_out, owned, slice_in, slice_out, with_group_size
from sparse_marlin.testing import (
    activations,
    assert_accepted,
    assert_same_bits,
    coordinate_codes,
    dequantized,
    group_scales,
    random_codes,
    random_scales,
)

ROWS, COLS = _core.TILE_ROWS, _core.TILE_COLS
GROUP_SIZES = sorted(_core.GROUP_SIZES)
N, K = 3 * ROWS + 20, 4 * COLS + 68


def packed(n=N, k=K, group_size=128, num_bits=4, device="cpu", seed=0, dtype=torch.float16):
    codes = random_codes(n, k, num_bits, seed, device)
    scales = random_scales(n, k, group_size, dtype, seed, device)
    return codes, PackedLayer(pack_24_weights(codes, scales, group_size, num_bits), scales, n, k, group_size, num_bits)


def dense(weight):
    return dequantized(weight.codes(), weight.scales, weight.group_size)


def assert_is(weight, codes, values):
    """`weight` holds these codes in canonical bytes, and its scales give these values."""
    assert_same_bits(weight.codes(), codes, "codes")
    assert_same_bits(
        weight.weight_packed, pack_24_weights(codes.contiguous(), weight.scales, weight.group_size, weight.num_bits)
    )
    assert_same_bits(dense(weight), values, "values")


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, N), (0, ROWS), (ROWS, 3 * ROWS), (2 * ROWS, N), (0, 1), (5, 6), (ROWS - 1, ROWS + 1), (16, 80), (N - 1, N)],
)
def test_output_features(device, start, stop, group_size, num_bits):
    codes, weight = packed(group_size=group_size, num_bits=num_bits, device=device)
    part = slice_out(weight, start, stop)
    assert_same_bits(part.scales, weight.scales[:, start:stop], "scales")
    assert_is(part, codes[start:stop], dense(weight)[start:stop])


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, K), (0, COLS), (COLS, 3 * COLS), (3 * COLS, K), (2 * COLS, 3 * COLS), (COLS, K - 4), (32, 96), (96, 480)],
)
def test_input_features(device, start, stop, group_size, num_bits):
    codes, weight = packed(group_size=group_size, num_bits=num_bits, device=device)
    part = slice_in(weight, start, stop)
    assert part.size_k == stop - start
    assert_is(part, codes[:, start:stop], dense(weight)[:, start:stop])


def test_every_cut_along_k_either_keeps_the_weight_or_is_refused():
    for group_size in GROUP_SIZES:
        codes, weight = packed(20, 300, group_size)
        values = dense(weight)
        for start, stop in itertools.combinations(range(0, 301, 4), 2):
            inside = group_size == -1 or start // group_size == (stop - 1) // group_size
            if inside or start % 32 == 0:
                part = slice_in(weight, start, stop)
                assert torch.equal(part.codes(), codes[:, start:stop]), (group_size, start, stop)
                assert torch.equal(dense(part), values[:, start:stop]), (group_size, start, stop)
            else:
                with pytest.raises(ValueError, match="smallest group size"):
                    slice_in(weight, start, stop)


@pytest.mark.parametrize(
    ("group_size", "start", "expected"),
    [(128, 128, 128), (128, 64, 64), (128, 32, 32), (256, 128, 128), (256, 64, 64), (64, 128, 64), (-1, 4, -1)],
)
def test_scale_groups_stay_as_large_as_the_cut_allows(group_size, start, expected):
    _, weight = packed(20, 1024, group_size)
    assert slice_in(weight, start, 1024).group_size == expected


def test_one_group_of_many_keeps_its_scales():
    # A shard of one group has the scales of that group in plain order: G == 1 changes nothing.
    codes = coordinate_codes(2 * ROWS, 2 * COLS)
    scales = group_scales(2 * ROWS, 2 * COLS, 128)
    weight = PackedLayer(pack_24_weights(codes, scales, 128, 8), scales, 2 * ROWS, 2 * COLS, 128, 8)
    part = slice_in(weight, COLS, 2 * COLS)
    assert torch.equal(part.scales, scales[1:])
    assert torch.equal(dense(part), dense(weight)[:, COLS:])


@pytest.mark.parametrize("start", [0, ROWS])
def test_tiles_are_not_copied_until_they_are_owned(start):
    _, weight = packed(3 * ROWS, 4 * COLS)
    for part in (slice_out(weight, start, start + ROWS), slice_in(weight, 2 * start, 2 * start + COLS)):
        assert part.weight_packed.untyped_storage().data_ptr() == weight.weight_packed.untyped_storage().data_ptr()
        copy = owned(part)
        assert copy.weight_packed.untyped_storage().nbytes() == part.weight_packed.nbytes
        assert copy.scales.untyped_storage().nbytes() == part.scales.nbytes
        assert torch.equal(copy.weight_packed, part.weight_packed)
        assert torch.equal(copy.scales, part.scales)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_slices_multiply_as_views_and_as_copies(device, num_bits):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    codes, weight = packed(num_bits=num_bits, device=device, dtype=dtype)
    for part, rows, cols in (
        (slice_out(weight, ROWS, 2 * ROWS), slice(ROWS, 2 * ROWS), slice(None)),
        (slice_out(weight, 3, 77), slice(3, 77), slice(None)),
        (slice_in(weight, COLS, 3 * COLS), slice(None), slice(COLS, 3 * COLS)),
        (slice_in(weight, 64, K), slice(None), slice(64, K)),
    ):
        a = activations(5, part.size_k, dtype=dtype, device=device)
        wanted = owned(part)
        for which in (part, wanted):
            out = sparse_marlin_gemm(a, which.weight_packed, which.scales, which.group_size, num_bits)
            assert_accepted(out, a, codes[rows, cols], which.scales, which.group_size)
        assert_same_bits(part.to_linear()(a), wanted.to_linear()(a))


@pytest.mark.parametrize("sizes", [(ROWS, 2 * ROWS, ROWS), (ROWS, 20), (20, ROWS, 5), (7,)])
@pytest.mark.parametrize("group_size", [64, -1])
def test_concatenation(device, sizes, group_size):
    parts = [packed(n, K, group_size, device=device, seed=i) for i, n in enumerate(sizes)]
    whole = concat_out([weight for _, weight in parts])
    assert whole.group_size == group_size
    assert_is(whole, torch.cat([codes for codes, _ in parts]), torch.cat([dense(weight) for _, weight in parts]))


def test_concatenation_takes_the_finest_group_size():
    parts = [packed(40, 300, group_size, seed=i) for i, group_size in enumerate((128, -1, 64))]
    whole = concat_out([weight for _, weight in parts])
    assert whole.group_size == 64
    assert_is(whole, torch.cat([codes for codes, _ in parts]), torch.cat([dense(weight) for _, weight in parts]))


def test_all_slices_together_are_the_weight():
    _, weight = packed()
    bounds = [0, ROWS, 100, 130, N]
    assert torch.equal(concat_out([slice_out(weight, *b) for b in itertools.pairwise(bounds)]).weight_packed,
                       weight.weight_packed)  # fmt: skip
    x = activations(4, K)
    total = sum(
        x[:, start:stop].double() @ dense(slice_in(weight, start, stop)).double().t()
        for start, stop in itertools.pairwise([0, 64, 160, 256, K])
    )
    assert torch.allclose(total, x.double() @ dense(weight).double().t(), rtol=1e-12, atol=1e-12)


def test_a_layer_and_back():
    layer = SparseMarlinLinear.from_linear(torch.nn.Linear(300, 100), group_size=64)
    weight = PackedLayer.of(layer, "proj")
    again = slice_in(slice_out(weight, 0, 100), 0, 300).to_linear(layer.bias)
    x = torch.randn(2, 300)
    assert torch.equal(again(x), layer(x))
    half = weight.to_linear(layer.bias, torch.bfloat16)
    assert half.scales.dtype == half.bias.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: slice_out(w, 0, N + 1), rf"proj: output features: expected 0 <= start < stop <= {N}, got 0 to"),
        (lambda w: slice_out(w, 5, 5), "proj: output features: expected 0 <= start < stop"),
        (lambda w: slice_in(w, 0, 30), r"proj: input features: expected a slice at multiples of 4 \(2:4 sparsity\)"),
        (lambda w: slice_in(w, 4, K), r"proj: input features: expected a slice that starts at a multiple of 32"),
        (lambda w: with_group_size(w, 256), "proj: group_size: expected a divisor of 128, got 256"),
        (lambda w: concat_out([]), "concat_out: weights: expected at least one"),
        (lambda w: concat_out([w, packed(64, 128)[1]]), r"weight: K and bits: expected 580 and 4 as in proj, got 128"),
        (lambda w: w.to_linear(torch.zeros(3)), r"proj: bias: expected \[212\], got \[3\]"),
        (
            lambda w: PackedLayer(w.weight_packed[:1], w.scales, N, K, 128, 4, "proj"),
            r"proj: weight_packed: expected int32 \[4, 3840\] for N = 212, K = 580, 4 bits, got int32 \[1, 3840\]",
        ),
        (
            lambda w: PackedLayer(w.weight_packed, w.scales, N, K, 64, 4, "proj"),
            r"proj: scales: expected \[10, 212\] for K = 580, group_size 64, got \[5, 212\]",
        ),
    ],
)
def test_what_cannot_be_cut_says_why(call, message):
    _, weight = packed()
    weight = PackedLayer(weight.weight_packed, weight.scales, N, K, 128, 4, "proj")
    with pytest.raises(ValueError, match=message):
        call(weight)
