"""pack_24_weights and unpack_24_weights: the round trip, the same bytes from every kind of input on every device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_marlin import _core, pack_24_weights, unpack_24_weights
from sparse_marlin import testing as smt
from sparse_marlin.ops import dequantize_24

SHAPES = [(1, 4), (7, 36), (63, 100), (64, 128), (65, 132), (100, 576), (192, 260)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_round_trip(device, n, k, num_bits):
    codes = smt.random_codes(n, k, num_bits, device=device)
    scales = smt.random_scales(n, k, 32, device=device)
    packed = pack_24_weights(codes, scales, 32, num_bits)
    assert packed.dtype == torch.int32
    assert tuple(packed.shape) == _core.packed_shape(n, k, num_bits)
    assert packed.device.type == device.type
    smt.assert_same_bits(unpack_24_weights(packed, n, k, num_bits), codes, "codes")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    quads=st.integers(1, 80),
    num_bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from(_core.GROUP_SIZES),
    seed=st.integers(0, 2**31),
)
def test_round_trip_random_shapes(n, quads, num_bits, group_size, seed):
    k = quads * _core.QUAD
    codes = smt.random_codes(n, k, num_bits, seed)
    packed = pack_24_weights(codes, smt.random_scales(n, k, group_size, seed=seed), group_size, num_bits)
    smt.assert_same_bits(unpack_24_weights(packed, n, k, num_bits), codes, "codes")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("group_size", _core.GROUP_SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_weights_give_the_bytes_of_their_codes(device, dtype, group_size, num_bits):
    n, k = 70, 388
    codes = smt.random_codes(n, k, num_bits, device=device)
    scales = smt.random_scales(n, k, group_size, dtype, device=device)
    weight = smt.dequantized(codes, scales, group_size)
    if num_bits == 8 and dtype == torch.bfloat16:
        # Eight bits of code and a rounded scale do not fit into bfloat16's eight bits: powers of two do.
        scales = smt.group_scales(n, k, group_size, dtype).to(device)
        weight = smt.dequantized(codes, scales, group_size)
    from_floats = pack_24_weights(weight, scales, group_size, num_bits)
    smt.assert_same_bits(from_floats, pack_24_weights(codes, scales, group_size, num_bits), "packed")


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_of_another_dtype_than_the_weight(device, dtype):
    codes = smt.random_codes(64, 128, device=device)
    scales = smt.group_scales(64, 128, 32).to(device)
    packed = pack_24_weights(smt.dequantized(codes, scales, 32), scales.to(dtype), 32)
    smt.assert_same_bits(unpack_24_weights(packed, 64, 128), codes, "codes")


def test_values_within_half_a_step_outside_the_range_are_accepted(device):
    weight = torch.zeros(1, 128, device=device)
    weight[0, 0], weight[0, 1] = 7.49, -8.49
    packed = pack_24_weights(weight, torch.ones(1, 1, device=device))
    assert unpack_24_weights(packed, 1, 128)[0, :2].tolist() == [7, -8]


def test_non_contiguous_and_misaligned_inputs(device):
    n, k = 66, 132
    codes = smt.random_codes(n, k, device=device)
    scales = smt.random_scales(n, k, 32, device=device)
    wanted = pack_24_weights(codes, scales, 32)
    transposed = codes.t().contiguous().t()
    assert not transposed.is_contiguous()
    smt.assert_same_bits(pack_24_weights(transposed, scales.t().contiguous().t(), 32), wanted, "transposed")
    shifted = torch.empty(n * k + 1, dtype=torch.int8, device=device)[1:].view(n, k).copy_(codes)
    smt.assert_same_bits(pack_24_weights(shifted, scales, 32), wanted, "misaligned")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
def test_slices_of_a_packed_tensor_are_slices_of_the_weight(device, num_bits):
    rows, cols = _core.TILE_ROWS, _core.TILE_COLS
    n, k = 3 * rows, 4 * cols
    codes = smt.random_codes(n, k, num_bits, device=device)
    packed = pack_24_weights(codes, smt.random_scales(n, k, -1, device=device), -1, num_bits)
    part = packed[1:3, _core.tile_words(num_bits) : 3 * _core.tile_words(num_bits)]
    assert not part.is_contiguous()
    smt.assert_same_bits(unpack_24_weights(part, 2 * rows, 2 * cols, num_bits), codes[rows:, cols : 3 * cols], "slice")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("group_size", _core.GROUP_SIZES)
def test_dequantize_is_code_times_scale(device, group_size, num_bits):
    n, k = 65, 292
    codes = smt.random_codes(n, k, num_bits, device=device)
    scales = smt.random_scales(n, k, group_size, torch.float16, device=device)
    packed = pack_24_weights(codes, scales, group_size, num_bits)
    weight = dequantize_24(packed, scales, k, group_size, num_bits)
    smt.assert_same_bits(weight, smt.dequantized(codes, scales, group_size), "weight")


@pytest.mark.gpu
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (1000, 4096)])
def test_cuda_writes_the_bytes_of_the_cpu(cuda, n, k, num_bits):
    codes, scales = smt.random_codes(n, k, num_bits), smt.random_scales(n, k, 64, torch.float16)
    wanted = pack_24_weights(codes, scales, 64, num_bits)
    smt.assert_same_bits(pack_24_weights(codes.to(cuda), scales.to(cuda), 64, num_bits), wanted, "from codes")
    weight = smt.dequantized(codes, scales, 64)
    smt.assert_same_bits(
        pack_24_weights(weight.to(cuda), scales.to(cuda), 64, num_bits),
        pack_24_weights(weight, scales, 64, num_bits),
        "from floats",
    )
    smt.assert_same_bits(unpack_24_weights(wanted.to(cuda), n, k, num_bits), codes, "codes")
