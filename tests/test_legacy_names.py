"""Code written against the removed operators: their names, their argument orders, this library's limits."""

import gc
from types import SimpleNamespace

import old_packers
import pytest
import torch

from sparse_marlin import legacy
from sparse_marlin.legacy import compat
from sparse_marlin.testing import activations, assert_accepted, assert_same_bits, random_codes, random_scales

UINT4B8 = SimpleNamespace(size_bits=4, bias=8)
UINT8B128 = SimpleNamespace(size_bits=8, bias=128)


def old_layer(n: int, k: int, num_bits: int, group_size: int, device):
    codes = random_codes(n, k, num_bits)
    scales = random_scales(n, k, group_size, torch.float16)
    return codes, scales, [t.to(device) for t in old_packers.marlin_24(codes, scales, num_bits)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_bits", "kind"), [(4, UINT4B8), (8, UINT8B128), (4, 4), (8, "uint8b128")])
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 128, -1), (192, 256, 128), (320, 384, 128)])
def test_gemm(n, k, group_size, num_bits, kind, dtype, device):
    """N of 64 and 192 and 320, M of 1 and 17: their kernels took N % 128, and N % 256 above 16 tokens."""
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("float32 runs on the CPU only")
    codes, scales, (packed, meta, stored) = old_layer(n, k, num_bits, group_size, device)
    for m in (1, 17):
        a = activations(m, k, dtype=dtype, device=device)
        workspace = torch.zeros(n // 128 * 64, dtype=torch.int32, device=device)
        out = legacy.gptq_marlin_24_gemm(a, packed, meta, stored, workspace, kind, m, n, k)
        assert_accepted(out, a, codes, scales.to(dtype), group_size)
        bits = num_bits if isinstance(num_bits, int) else 4
        assert_same_bits(legacy.marlin_24_gemm(a, packed, meta, stored, workspace, bits, m, n, k), out)


def test_leading_dimensions_and_an_id_of_the_type(device):
    codes, scales, (packed, meta, stored) = old_layer(64, 128, 4, -1, device)
    a = activations(2, 3, 128, dtype=torch.float16, device=device)
    out = legacy.gptq_marlin_24_gemm(a, packed, meta, stored, None, 1125899907892224, 6, 64, 128)
    assert out.shape == (2, 3, 64)
    assert_accepted(out.flatten(0, 1), a.flatten(0, 1), codes, scales, -1)
    assert legacy.gptq_marlin_24_gemm(a[:0], packed, meta, stored, None, 4, 0, 64, 128).shape == (0, 3, 64)


def test_two_groups_are_read_as_permuted():
    """What the kernels did: more than one row of scales means the grouped order, whoever wrote them."""
    codes, scales, (packed, meta, stored) = old_layer(64, 256, 4, 128, "cpu")
    a = activations(4, 256)
    assert_accepted(
        legacy.gptq_marlin_24_gemm(a, packed, meta, stored, None, 4, 4, 64, 256), a, codes, scales.float(), 128
    )


def test_packed_form_follows_the_tensors_and_dies_with_them():
    before = len(compat._packed)
    _use_and_change_a_layer(before)
    gc.collect()
    assert len(compat._packed) == before


def _use_and_change_a_layer(before: int) -> None:
    _, scales, (packed, meta, stored) = old_layer(64, 128, 4, -1, "cpu")
    a = activations(3, 128)

    def call() -> torch.Tensor:
        return legacy.gptq_marlin_24_gemm(a, packed, meta, stored, None, 4, 3, 64, 128)

    first = call()
    assert len(compat._packed) == before + 1
    kept = compat._packed[packed][1].weight_packed
    assert_same_bits(call(), first)
    assert compat._packed[packed][1].weight_packed is kept
    stored.mul_(2)
    assert_same_bits(call(), first * 2)
    other = random_codes(64, 128, 4, seed=9)
    new_packed, new_meta, _ = old_packers.marlin_24(other, scales, 4)
    packed.copy_(new_packed)
    meta.copy_(new_meta)
    assert_accepted(call(), a, other, (scales * 2).float(), -1)
    with torch.inference_mode():
        frozen = [t.clone() for t in (packed, meta, stored)]
        assert_same_bits(legacy.gptq_marlin_24_gemm(a, *frozen, None, 4, 3, 64, 128), call())


def test_compiles_whole(device):
    _, _, (packed, meta, stored) = old_layer(64, 128, 4, -1, device)
    a = activations(5, 128, dtype=torch.float16, device=device)

    def step(x):
        return legacy.gptq_marlin_24_gemm(x, packed, meta, stored, None, 4, 5, 64, 128).relu()

    assert_same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(a), step(a))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [128, -1, 384])
@pytest.mark.parametrize("kind", [UINT4B8, 8])
def test_quantize(kind, group_size, dtype, device):
    torch.manual_seed(0)
    w = torch.randn(384, 192, dtype=torch.float32).to(dtype).to(device)
    ref, packed, meta, scales = legacy.marlin_24_quantize(w, kind, group_size)
    assert ref.shape == w.shape
    assert ref.dtype == dtype
    assert scales.dtype == torch.float16
    assert scales.shape == (3 if group_size == 128 else 1, 192)
    assert bool((ref.t().reshape(192, -1, 4).count_nonzero(-1) <= 2).all())
    layer = legacy.from_marlin_24({"B_24": packed, "B_meta": meta, "s": scales}, dtype=torch.float32)
    assert_same_bits(layer.dequantize().to(dtype).t().contiguous(), ref)
    bits = 8 if kind == 8 else 4
    kept = ref != 0
    error = ((ref - w)[kept].float().square().mean() / w[kept].float().square().mean()).sqrt()
    assert error < (0.01 if bits == 8 else 0.12)
    a = activations(7, 384, dtype=torch.float32 if device.type == "cpu" else torch.float16, device=device)
    out = legacy.gptq_marlin_24_gemm(a, packed, meta, scales, None, kind, 7, 192, 384)
    codes = layer.codes()
    assert_accepted(out, a, codes, layer.scales.to(a.dtype), layer.group_size)


def test_errors():
    _, _, (packed, meta, stored) = old_layer(64, 128, 4, -1, "cpu")
    a = activations(3, 128)
    call = legacy.gptq_marlin_24_gemm
    for arguments, message in (
        ((a, packed, meta, stored, None, 4, 4, 64, 128), "size_m: expected 3, the size of a, got 4"),
        ((a, packed, meta, stored, None, 4, 3, 128, 128), "size_n: expected 64, the size of b_scales, got 128"),
        ((a, packed, meta, stored, None, 4, 3, 64, 256), "size_k: expected 128, the size of a, got 256"),
        ((a[:, :96], packed, meta, stored, None, 4, 3, 64, 96), "size_k: expected 128, the size of b_q_weight, got 96"),
        ((a, packed, meta, stored, None, 8, 3, 64, 128), "b_q_type: expected 4 bits, .*, got 8"),
        ((a, packed, meta, stored, None, 5, 3, 64, 128), "b_q_type: expected 4 or 8 bits, got 5"),
        ((a, packed, meta, stored, None, "uint3b4", 3, 64, 128), "b_q_type: expected 4 or 8 bits"),
        ((a, packed.long(), meta, stored, None, 4, 3, 64, 128), "packed: expected int32"),
        ((a, packed, meta.int(), stored, None, 4, 3, 64, 128), "meta: expected int16"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(RuntimeError, match="a: expected dtype"):
        call(a.double(), packed, meta, stored, None, 4, 3, 64, 128)
    with pytest.raises(ValueError, match="group_size: expected -1, 128 or K = 128, got 64"):
        legacy.marlin_24_quantize(torch.randn(128, 64), 4, 64)
    with pytest.raises(ValueError, match=r"size_n: expected a multiple of 64"):
        legacy.marlin_24_quantize(torch.randn(128, 60), 4, -1)
