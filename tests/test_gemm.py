"""sparse_marlin_gemm against the float64 reference: every dtype, group size and code width over odd shapes, inputs in
every layout. The rule is sparse_marlin.testing.acceptance; what only a GPU can get wrong is in test_gemm_cuda.py."""

import itertools

import pytest
import torch

from sparse_marlin import _core, pack_24_weights, sparse_marlin_gemm
from sparse_marlin import testing as smt

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 255, 1000]
OUT_FEATURES = [1, 7, 63, 65, 100, 192, 576]
IN_FEATURES = [4, 36, 100, 128, 132, 576, 1024]


def cases() -> list[tuple[torch.dtype, int, int, int, int, int, bool]]:
    """(dtype, bits, group, m, n, k, bias): five shapes for every dtype x bits x group. The strides share no factor with
    the lists' lengths, so that every size is met."""
    found = []
    for i, (dtype, bits, group) in enumerate(itertools.product(FLOATS, _core.NUM_BITS, _core.GROUP_SIZES)):
        for j in range(5):
            at = 5 * i + j
            m, n = TOKENS[at * 7 % len(TOKENS)], OUT_FEATURES[at * 3 % len(OUT_FEATURES)]
            k = IN_FEATURES[(at * 5 + at // 7) % len(IN_FEATURES)]
            found.append((dtype, bits, group, m, n, k, at % 2 == 0))
    return found


def need_dtype(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("float32 activations are for the CPU")


class Layer:
    """Random codes and scales on a device, packed."""

    def __init__(self, n, k, group_size=128, num_bits=4, dtype=torch.float16, device="cpu", bias=False, seed=0):
        self.group_size, self.num_bits = group_size, num_bits
        self.codes = smt.random_codes(n, k, num_bits, seed, device)
        self.scales = smt.random_scales(n, k, group_size, dtype, seed, device)
        self.bias = smt.activations(n, dtype=dtype, seed=seed + 9, device=device) if bias else None
        self.packed = pack_24_weights(self.codes, self.scales, group_size, num_bits)

    def __call__(self, a):
        return sparse_marlin_gemm(a, self.packed, self.scales, self.group_size, self.num_bits, self.bias)

    def check(self, got, a, what="result"):
        k = a.shape[-1]
        flat, out = a.reshape(-1, k), got.reshape(-1, got.shape[-1])
        smt.assert_accepted(out, flat, self.codes, self.scales, self.group_size, self.bias, what)


@pytest.mark.parametrize(("dtype", "num_bits", "group_size", "m", "n", "k", "bias"), cases())
def test_against_float64(device, dtype, num_bits, group_size, m, n, k, bias):
    need_dtype(device, dtype)
    layer = Layer(n, k, group_size, num_bits, dtype, device, bias)
    a = smt.activations(m, k, dtype=dtype, device=device)
    with smt.poisoned_allocations(device):
        got = layer(a)
    assert got.dtype == dtype
    assert got.device == a.device
    layer.check(got, a)
    smt.assert_same_bits(layer(a), got, "second run")


def test_the_cases_cover_every_size():
    assert {c[3] for c in cases()} == set(TOKENS)
    assert {c[4] for c in cases()} == set(OUT_FEATURES)
    assert {c[5] for c in cases()} == set(IN_FEATURES)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (0, 3, 128)])
def test_no_tokens(device, dtype, shape):
    need_dtype(device, dtype)
    layer = Layer(65, 128, dtype=dtype, device=device, bias=True)
    got = layer(torch.empty(shape, dtype=dtype, device=device))
    assert tuple(got.shape) == (*shape[:-1], 65)
    assert got.dtype == dtype


@pytest.mark.parametrize("shape", [(132,), (1, 132), (2, 3, 132), (2, 1, 4, 132)])
@pytest.mark.parametrize("bias", [False, True])
def test_leading_dimensions(device, shape, bias):
    layer = Layer(70, 132, 32, device=device, bias=bias)
    a = smt.activations(*shape, dtype=torch.float16, device=device)
    got = layer(a)
    assert tuple(got.shape) == (*shape[:-1], 70)
    smt.assert_same_bits(got.reshape(-1, 70), layer(a.reshape(-1, 132).clone()), "flattened")
    layer.check(got, a)


def layouts(a: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of `a` [m, k] lying in memory in other ways."""
    m, k = a.shape
    shifted = torch.empty(m * k + 1, dtype=a.dtype, device=a.device)[1:].view(m, k).copy_(a)
    padded = torch.full((m, k + 12), float("nan"), dtype=a.dtype, device=a.device)
    padded[:, 4 : k + 4] = a
    every_other = torch.full((m, 2 * k), float("nan"), dtype=a.dtype, device=a.device)
    every_other[:, ::2] = a
    return {
        "transposed": a.t().contiguous().t(),
        "misaligned": shifted,
        "columns of a wider tensor": padded[:, 4 : k + 4],
        "every other column": every_other[:, ::2],
        "expanded": a[:1].expand(m, k),
    }


@pytest.mark.parametrize(
    "kind", ["transposed", "misaligned", "columns of a wider tensor", "every other column", "expanded"]
)
@pytest.mark.parametrize("m", [1, 9, 65])
def test_activations_in_any_layout(device, kind, m):
    layer = Layer(65, 132, 32, dtype=torch.bfloat16, device=device)
    a = layouts(smt.activations(m, 132, dtype=torch.bfloat16, device=device))[kind]
    smt.assert_same_bits(layer(a), layer(a.clone(memory_format=torch.contiguous_format)), kind)


def test_scales_and_bias_in_any_layout(device):
    layer = Layer(66, 128, 32, device=device, bias=True)
    a = smt.activations(5, 128, dtype=torch.float16, device=device)
    wanted = layer(a)
    layer.scales = layer.scales.t().contiguous().t()
    layer.bias = torch.cat([layer.bias[:1], layer.bias])[1:]
    assert not layer.scales.is_contiguous()
    assert layer.bias.data_ptr() % 16 != 0
    smt.assert_same_bits(layer(a), wanted)


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("m", [1, 40])
def test_tensor_parallel_slices(device, num_bits, m):
    """A slice of the packed tensor along either dimension, with its slice of the scales, is the slice of the layer."""
    n, k, group = 4 * _core.TILE_ROWS, 4 * _core.TILE_COLS, 64
    layer = Layer(n, k, group, num_bits, device=device)
    a = smt.activations(m, k, dtype=torch.float16, device=device)
    for first, last in [(0, 1), (1, 4)]:
        rows = slice(first * _core.TILE_ROWS, last * _core.TILE_ROWS)
        part = sparse_marlin_gemm(a, layer.packed[first:last], layer.scales[:, rows], group, num_bits)
        smt.assert_accepted(part, a, layer.codes[rows], layer.scales[:, rows], group, what=f"out features {rows}")
        cols = slice(first * _core.TILE_COLS, last * _core.TILE_COLS)
        words = slice(first * _core.tile_words(num_bits), last * _core.tile_words(num_bits))
        groups = slice(cols.start // group, cols.stop // group)
        weight, scales = layer.packed[:, words], layer.scales[groups]
        assert not weight.is_contiguous()
        part = sparse_marlin_gemm(a[:, cols].contiguous(), weight, scales, group, num_bits)
        smt.assert_accepted(part, a[:, cols], layer.codes[:, cols], scales, group, what=f"in features {cols}")


def test_a_packed_tensor_at_an_odd_address(device):
    layer = Layer(130, 260, device=device)
    a = smt.activations(3, 260, dtype=torch.float16, device=device)
    wanted = layer(a)
    size = layer.packed.numel()
    shifted = torch.empty(size + 1, dtype=torch.int32, device=device)[1:].view_as(layer.packed).copy_(layer.packed)
    assert shifted.data_ptr() % 16 != 0
    layer.packed = shifted
    smt.assert_same_bits(layer(a), wanted, "misaligned")
    layer.packed = layer.packed.t().contiguous().t()
    smt.assert_same_bits(layer(a), wanted, "transposed")


@pytest.mark.parametrize("m", [1, 2, 8, 33, 129])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(device, m, special):
    """NaN or infinity in one token spoils that token's row and no other: padding and neighbours never mix in."""
    layer = Layer(65, 132, 32, device=device)
    a = smt.activations(m + 1, 132, dtype=torch.float16, device=device)
    clean = layer(a)
    bad = m // 2
    a[bad, 131] = special
    got = layer(a)
    others = [i for i in range(m + 1) if i != bad]
    smt.assert_same_bits(got[others], clean[others], "other tokens")
    # Infinity times a zero that the format does not store is left out, as are the products of all unstored zeros.
    spoiled = ~got[bad].isfinite()
    assert spoiled[layer.codes[:, 131] != 0].all()


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
def test_one_hot_tokens_read_out_the_weights(device, num_bits):
    """With codes that encode their coordinate a layout fault shows as a permutation, and nothing here rounds."""
    n, k = 2 * _core.TILE_ROWS + 3, 2 * _core.TILE_COLS + 4
    codes = smt.coordinate_codes(n, k, num_bits).to(device)
    scales = torch.ones(1, n, dtype=torch.float16, device=device)
    packed = pack_24_weights(codes, scales, -1, num_bits)
    a = smt.one_hot_activations(k, range(k), torch.float16).to(device)
    got = sparse_marlin_gemm(a, packed, scales, -1, num_bits)
    smt.assert_same_bits(got, codes.t().to(torch.float16).contiguous(), "weights")


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("m", [1, 32, 300])
def test_every_group_has_its_own_scale(device, group_size, m):
    n, k = 66, 1028
    codes = smt.coordinate_codes(n, k, 4).to(device)
    scales = smt.group_scales(n, k, group_size, torch.float16).to(device)
    packed = pack_24_weights(codes, scales, group_size, 4)
    columns = torch.arange(m) * 37 % k
    got = sparse_marlin_gemm(
        smt.one_hot_activations(k, columns, torch.float16).to(device), packed, scales, group_size, 4
    )
    wanted = smt.dequantized(codes, scales, group_size).t()[columns.to(device)]
    smt.assert_same_bits(got, wanted.contiguous(), "weights")


def test_bias_is_added_before_the_only_rounding(device):
    """4096 + 2 + 1 in float16 (spacing 4 there) is 4100 rounded once, 4096 if the product is rounded first."""
    codes = torch.zeros(1, 8, dtype=torch.int8, device=device)
    codes[0, 0] = codes[0, 4] = 1
    scales = torch.ones(1, 1, dtype=torch.float16, device=device)
    packed = pack_24_weights(codes, scales, -1)
    a = torch.zeros(1, 8, dtype=torch.float16, device=device)
    a[0, 0], a[0, 4] = 4096, 2
    bias = torch.tensor([1.0], dtype=torch.float16, device=device)
    assert sparse_marlin_gemm(a, packed, scales, -1, 4, bias).item() == 4100
    assert sparse_marlin_gemm(a, packed, scales, -1, 4).item() == 4096


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_a_bit(threads):
    layer = Layer(200, 520, 32, dtype=torch.float32)
    a = smt.activations(5, 520)
    before = torch.get_num_threads()
    wanted = layer(a)
    try:
        torch.set_num_threads(threads)
        smt.assert_same_bits(layer(a), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_in_its_dtype(device, autocast_dtype):
    scales_dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = Layer(65, 132, 32, dtype=scales_dtype, device=device, bias=True)
    a = smt.activations(6, 132, device=device)
    with torch.autocast(device.type, autocast_dtype):
        got = layer(a)
    assert got.dtype == autocast_dtype
    layer.scales, layer.bias = layer.scales.to(autocast_dtype), layer.bias.to(autocast_dtype)
    smt.assert_same_bits(got, layer(a.to(autocast_dtype)))
