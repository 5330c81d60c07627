"""Bad input: one clear error each, `op: argument: expected ..., got ...`, with the argument and the actual value."""

import re

import pytest
import torch

from sparse_marlin import _core, pack_24_weights, sparse_marlin_gemm, unpack_24_weights
from sparse_marlin import testing as smt

N, K, GROUP = 65, 256, 64


def error(function, *args, **kwargs) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text, f"one line expected: {text}"
    return text


def matches(text: str, op: str, argument: str, expected: str, got: str) -> None:
    pattern = f"^{op}: {argument}: expected .*{expected}.*, got .*{got}"
    assert re.search(pattern, text), f"{text!r} does not match {pattern!r}"


@pytest.fixture
def good(device) -> dict:
    """Arguments of a multiplication that works; each test spoils one."""
    codes = smt.random_codes(N, K, device=device)
    scales = smt.random_scales(N, K, GROUP, torch.float16, device=device)
    return {
        "a": smt.activations(3, K, dtype=torch.float16, device=device),
        "weight_packed": pack_24_weights(codes, scales, GROUP),
        "scales": scales,
        "group_size": GROUP,
        "num_bits": 4,
        "bias": torch.zeros(N, dtype=torch.float16, device=device),
    }


def test_the_good_arguments_are_good(good):
    assert sparse_marlin_gemm(**good).shape == (3, N)


GEMM_CASES = {
    "dtype of a": (lambda g: {"a": g["a"].double()}, "a", "float16 or bfloat16", "float64"),
    "integer a": (lambda g: {"a": g["a"].int()}, "a", "float16", "int32"),
    "scalar a": (lambda g: {"a": g["a"][0, 0]}, "a", r"\[\.\.\., K\]", "a scalar"),
    "K of a": (lambda g: {"a": g["a"][:, :128]}, "a", "132..256", "128"),
    "K of a not in quads": (lambda g: {"a": g["a"][:, :254]}, "a", "divisible by 4", "254"),
    "K of a is 0": (lambda g: {"a": g["a"][:, :0]}, "a", "in features", "0"),
    "dtype of weight_packed": (
        lambda g: {"weight_packed": g["weight_packed"].long()}, "weight_packed", "int32", "int64",
    ),
    "dimensions of weight_packed": (
        lambda g: {"weight_packed": g["weight_packed"][None]}, "weight_packed", "2 dimensions", r"\[1, 2, ",
    ),
    "rows of weight_packed": (
        lambda g: {"weight_packed": g["weight_packed"][:1]}, "weight_packed", r"shape \[2, ", r"\[1, ",
    ),
    "words of weight_packed": (
        lambda g: {"weight_packed": g["weight_packed"][:, :-4]}, "weight_packed", r"shape \[2, ", r"\[2, ",
    ),
    "other width than packed": (lambda g: {"num_bits": 8}, "weight_packed", "num_bits=8", r"\[2, "),
    "dtype of scales": (lambda g: {"scales": g["scales"].float()}, "scales", "float16 .that of a", "float32"),
    "dimensions of scales": (lambda g: {"scales": g["scales"][0]}, "scales", "2 dimensions", r"\[65\]"),
    "groups of scales": (lambda g: {"scales": g["scales"][:3]}, "scales", r"shape \[4, 65\]", r"\[3, 65\]"),
    "N of scales": (lambda g: {"scales": g["scales"][:, :64]}, "weight_packed", r"shape \[1, .*N=64", r"\[2, "),
    "transposed scales": (lambda g: {"scales": g["scales"].t()}, "weight_packed", "N=4", r"\[2, "),
    "other group size": (lambda g: {"group_size": 32}, "scales", r"shape \[8, 65\]", r"\[4, 65\]"),
    "unsupported group size": (lambda g: {"group_size": 48}, "group_size", "-1, 32, 64, 128, 256", "48"),
    "unsupported bits": (lambda g: {"num_bits": 3}, "num_bits", "4 or 8", "3"),
    "shape of bias": (lambda g: {"bias": g["bias"][:-1]}, "bias", r"shape \[65\]", r"\[64\]"),
    "dtype of bias": (lambda g: {"bias": g["bias"].float()}, "bias", "float16", "float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", GEMM_CASES)
def test_gemm(good, case):
    spoil, argument, expected, got = GEMM_CASES[case]
    good.update(spoil(good))
    matches(error(sparse_marlin_gemm, **good), "sparse_marlin_gemm", argument, expected, got)


@pytest.mark.parametrize("argument", ["weight_packed", "scales"])
def test_none_instead_of_a_tensor(good, argument):
    good[argument] = None
    matches(error(sparse_marlin_gemm, **good), "sparse_marlin_gemm", argument, "a tensor", "None")


def test_the_remedies_are_told(good):
    good["scales"] = good["scales"].float()
    assert ".to(dtype)" in error(sparse_marlin_gemm, **good)


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["a", "weight_packed", "scales", "bias"])
def test_gemm_with_one_argument_on_another_device(cuda, argument):
    codes, scales = smt.random_codes(N, K), smt.random_scales(N, K, GROUP, torch.float16)
    good = {
        "a": smt.activations(3, K, dtype=torch.float16, device=cuda),
        "weight_packed": pack_24_weights(codes, scales, GROUP).to(cuda),
        "scales": scales.to(cuda),
        "bias": torch.zeros(N, dtype=torch.float16, device=cuda),
    }
    good[argument] = good[argument].cpu()
    text = error(sparse_marlin_gemm, **good, group_size=GROUP)
    blamed, wanted, got = ("weight_packed", "cpu", "cuda:0") if argument == "a" else (argument, "cuda:0", "cpu")
    matches(text, "sparse_marlin_gemm", blamed, wanted, got)
    assert f'.to("{wanted}")' in text


@pytest.mark.gpu
def test_pack_with_scales_on_another_device(cuda):
    codes, scales = smt.random_codes(N, K), smt.random_scales(N, K)
    matches(error(pack_24_weights, codes.to(cuda), scales), "pack_24_weights", "scales", "cuda:0", "cpu")


@pytest.mark.gpu
def test_float32_on_cuda(cuda):
    codes, scales = smt.random_codes(N, K, device=cuda), smt.random_scales(N, K, device=cuda)
    text = error(sparse_marlin_gemm, smt.activations(1, K, device=cuda), pack_24_weights(codes, scales), scales)
    matches(text, "sparse_marlin_gemm", "a", "float16 or bfloat16", "float32")
    assert ".half()" in text


@pytest.mark.parametrize("capability", [70, 75])
def test_a_gpu_below_sm80(capability):
    old = _core.Device(capability, 80, 96 * 1024, 96 * 1024, 6 << 20)
    reason = _core.why_unsupported(_core.Problem(1, N, K), old)
    assert re.search(f"expected .*8.0.*, got .*{capability // 10}.{capability % 10}", reason)
    with pytest.raises(ValueError, match=re.escape(reason)):
        _core.plan(_core.Problem(1, N, K), old)


PACK_CASES = {
    "dtype of weight": (lambda w, s: (w.int(), s), "weight", "int8 or float32", "int32"),
    "dimensions of weight": (lambda w, s: (w[None], s), "weight", r"2 dimensions \[N, K\]", r"\[1, 65, 256\]"),
    "K not in quads": (lambda w, s: (w[:, :250], s), "weight", "divisible by 4", "250"),
    "no rows": (lambda w, s: (w[:0], s[:, :0]), "weight", "out features", "0"),
    "no columns": (lambda w, s: (w[:, :0], s), "weight", "in features", "0"),
    "dtype of scales": (lambda w, s: (w, s.double()), "scales", "float32", "float64"),
    "dimensions of scales": (lambda w, s: (w, s[0]), "scales", "2 dimensions", r"\[65\]"),
    "shape of scales": (lambda w, s: (w, s[:3]), "scales", r"\[4, 65\]", r"\[3, 65\]"),
}


@pytest.mark.parametrize("case", PACK_CASES)
def test_pack(device, case):
    spoil, argument, expected, got = PACK_CASES[case]
    weight, scales = smt.random_codes(N, K, device=device), smt.random_scales(N, K, GROUP, device=device)
    weight, scales = spoil(weight, scales)
    matches(error(pack_24_weights, weight, scales, GROUP), "pack_24_weights", argument, expected, got)


def test_pack_without_scales(device):
    codes = smt.random_codes(N, K, device=device)
    matches(error(pack_24_weights, codes, None), "pack_24_weights", "scales", "a tensor", "None")


@pytest.mark.parametrize(
    ("group_size", "num_bits", "argument"), [(100, 4, "group_size"), (0, 4, "group_size"), (64, 5, "num_bits")]
)
def test_pack_numbers(device, group_size, num_bits, argument):
    codes, scales = smt.random_codes(N, K, device=device), smt.random_scales(N, K, GROUP, device=device)
    value = str(group_size if argument == "group_size" else num_bits)
    matches(error(pack_24_weights, codes, scales, group_size, num_bits), "pack_24_weights", argument, "", value)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("floats", [False, True])
def test_bad_scales(device, value, floats):
    codes, scales = smt.random_codes(N, K, device=device), smt.random_scales(N, K, GROUP, device=device)
    weight = smt.dequantized(codes, scales, GROUP) if floats else codes
    scales[2, 33] = value
    text = error(pack_24_weights, weight, scales, GROUP)
    matches(text, "pack_24_weights", "scales", "finite scales > 0", "group 2, output feature 33")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_not_24(device, dtype):
    """The first violation in row-major order is named, though a later one is there too."""
    weight = torch.zeros(N, K, dtype=dtype, device=device)
    weight[40, 100:103] = 1
    weight[64, 0:4] = 1
    text = error(pack_24_weights, weight, torch.ones(4, N, device=device), GROUP)
    matches(text, "pack_24_weights", "weight", "2:4", "row 40, column 100")


@pytest.mark.parametrize(("code", "num_bits"), [(8, 4), (-9, 4), (127, 4)])
def test_codes_out_of_range(device, code, num_bits):
    codes = torch.zeros(N, K, dtype=torch.int8, device=device)
    codes[64, 255] = code
    text = error(pack_24_weights, codes, torch.ones(1, N, device=device), -1, num_bits)
    matches(text, "pack_24_weights", "weight", r"-8\.\.7", "row 64, column 255")


@pytest.mark.parametrize(("value", "num_bits"), [(7.6, 4), (-8.6, 4), (1e30, 4), (127.6, 8), (-128.6, 8)])
def test_values_out_of_range(device, value, num_bits):
    weight = torch.zeros(N, K, device=device)
    weight[3, 17] = value * 0.5
    scales = torch.full((1, N), 0.5, device=device)
    text = error(pack_24_weights, weight, scales, -1, num_bits)
    matches(text, "pack_24_weights", "weight", "codes in", "row 3, column 17")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(device, value):
    weight = torch.zeros(N, K, device=device)
    weight[64, 1] = value
    text = error(pack_24_weights, weight, torch.ones(1, N, device=device), -1)
    matches(text, "pack_24_weights", "weight", "finite", "row 64, column 1")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
def test_unpack(device, num_bits):
    codes, scales = smt.random_codes(N, K, num_bits, device=device), smt.random_scales(N, K, device=device)
    packed = pack_24_weights(codes, scales, 128, num_bits)
    op = "unpack_24_weights"
    matches(error(unpack_24_weights, packed.long(), N, K, num_bits), op, "weight_packed", "int32", "int64")
    matches(error(unpack_24_weights, packed[0], N, K, num_bits), op, "weight_packed", "2 dimensions", r"\[")
    matches(error(unpack_24_weights, packed, 64, K, num_bits), op, "weight_packed", r"shape \[1, ", r"\[2, ")
    matches(error(unpack_24_weights, packed, N, 128, num_bits), op, "weight_packed", "K=128", r"\[2, ")
    matches(error(unpack_24_weights, packed, 0, K, num_bits), op, "size_n", "out features", "0")
    matches(error(unpack_24_weights, packed, N, -4, num_bits), op, "size_k", "in features", "-4")
    matches(error(unpack_24_weights, packed, N, 255, num_bits), op, "size_k", "divisible by 4", "255")
    matches(error(unpack_24_weights, packed, N, K, 6), op, "num_bits", "4 or 8", "6")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize(("row", "col"), [(0, 0), (37, 132), (64, 252)])
def test_a_corrupted_metadata_nibble(device, num_bits, row, col):
    codes, scales = smt.random_codes(N, K, num_bits), smt.random_scales(N, K)
    packed = pack_24_weights(codes, scales, 128, num_bits)
    slice_rows = _core.TILE_ROWS * _core.slice_words(num_bits) // _core.tile_words(num_bits)
    quad = col % _core.TILE_COLS // _core.QUAD
    word, shift = _core.meta_location(row % slice_rows, quad, num_bits)
    at = _core.slice_offset_words(row, col, num_bits) + word
    # Both indices 0: not rising, whatever the nibble was.
    packed[row // _core.TILE_ROWS, at] &= ~(0xF << shift) if shift < 28 else 0x0FFFFFFF
    text = error(unpack_24_weights, packed.to(device), N, K, num_bits)
    matches(text, "unpack_24_weights", "weight_packed", "rising", f"row {row}, column {col}")


def test_core_functions_name_their_argument():
    for call, argument in [
        (lambda: _core.packed_shape(0, 128, 4), "n"),
        (lambda: _core.packed_shape(64, 126, 4), "k"),
        (lambda: _core.packed_shape(64, 128, 5), "num_bits"),
        (lambda: _core.scales_shape(64, 128, 5), "group_size"),
        (lambda: _core.Problem(1, 64, 128, dtype="float8"), "dtype"),
    ]:
        with pytest.raises(ValueError, match=f"{argument}: expected .*, got "):
            call()
