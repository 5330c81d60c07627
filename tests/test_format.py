"""The packed format as users hold it: golden bytes, the bijections against the operator, tensor-parallel slices."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_marlin import _core, pack_24_weights, unpack_24_weights
from sparse_marlin import testing as smt

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).parent / "golden" / "golden.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
MANIFEST = json.loads(golden.MANIFEST.read_text())


def test_manifest_is_of_this_version():
    assert MANIFEST["format"] == _core.FORMAT_NAME
    assert MANIFEST["format_version"] == _core.FORMAT_VERSION
    assert MANIFEST["rule"] == golden.RULE
    assert [entry["num_bits"] for entry in MANIFEST["files"]] == list(_core.NUM_BITS)


@pytest.mark.parametrize("entry", MANIFEST["files"], ids=lambda entry: entry["file"])
def test_packing_gives_the_golden_bytes(device, entry):
    """Changing them requires a version bump: checkpoints hold these bytes."""
    committed = (golden.FOLDER / entry["file"]).read_bytes()
    assert hashlib.sha256(committed).hexdigest() == entry["sha256"]
    n, k, num_bits = entry["n"], entry["k"], entry["num_bits"]
    codes = golden.rule_codes(n, k, num_bits).to(device)
    packed = pack_24_weights(codes, torch.ones(1, n, device=device), -1, num_bits)
    assert packed.cpu().numpy().astype("<i4").tobytes() == committed
    smt.assert_same_bits(unpack_24_weights(packed, n, k, num_bits), codes, "codes")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
def test_every_code_lies_where_the_format_says(device, num_bits):
    n, k = _core.TILE_ROWS + 7, _core.TILE_COLS + 36
    codes = smt.random_codes(n, k, num_bits, device=device)
    packed = pack_24_weights(codes, torch.ones(1, n, device=device), -1, num_bits)
    words = packed.cpu().numpy().view(np.uint32)
    dense = np.zeros((n, k), dtype=np.int64)
    slice_rows = _core.TILE_ROWS * _core.slice_words(num_bits) // _core.tile_words(num_bits)
    for row in range(n):
        for col in range(0, k, _core.QUAD):
            start = _core.slice_offset_words(row, col, num_bits)
            quad = col % _core.TILE_COLS // _core.QUAD
            word, shift = _core.meta_location(row % slice_rows, quad, num_bits)
            nibble = int(words[row // _core.TILE_ROWS, start + word]) >> shift & 15
            positions = (nibble & 3, nibble >> 2)
            assert positions[0] < positions[1]
            for i, position in enumerate(positions):
                word, shift = _core.code_location(row % slice_rows, quad * _core.KEPT_PER_QUAD + i, num_bits)
                stored = int(words[row // _core.TILE_ROWS, start + word]) >> shift & (2**num_bits - 1)
                dense[row, col + position] = stored + _core.code_min(num_bits)
    np.testing.assert_array_equal(dense, codes.cpu().numpy())


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
def test_cutting_the_packed_tensor_cuts_the_matrix(num_bits):
    n, k = 3 * _core.TILE_ROWS, 4 * _core.TILE_COLS
    codes = smt.random_codes(n, k, num_bits)

    def pack(part: torch.Tensor) -> torch.Tensor:
        return pack_24_weights(part.contiguous(), torch.ones(1, part.shape[0]), -1, num_bits)

    whole = pack(codes)
    assert torch.equal(whole[1:], pack(codes[_core.TILE_ROWS :]))
    half = whole.shape[1] // 2
    assert torch.equal(whole[:, half:], pack(codes[:, k // 2 :]))


@pytest.mark.gpu
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.bfloat16])
def test_cuda_writes_the_bytes_of_the_cpu(cuda, dtype, num_bits):
    """Values that do not divide evenly, so that a different division or rounding would show."""
    n, k, group_size = 321, 1028, 64
    generator = torch.Generator().manual_seed(num_bits)
    scales = torch.rand(_core.num_groups(k, group_size), n, generator=generator) * 0.1 + 0.01
    mask = smt.random_codes(n, k, num_bits) != 0
    if dtype == torch.int8:
        weight = smt.random_codes(n, k, num_bits)
    else:
        per_column = scales.repeat_interleave(group_size, 0)[:k].T
        spread = torch.rand(n, k, generator=generator) * (2**num_bits - 1) + _core.code_min(num_bits)
        weight = (spread * per_column * 0.99 * mask).to(dtype)
    packed = pack_24_weights(weight, scales, group_size, num_bits)
    codes = unpack_24_weights(packed, n, k, num_bits)
    assert torch.equal(pack_24_weights(weight.to(cuda), scales.to(cuda), group_size, num_bits).cpu(), packed)
    assert torch.equal(unpack_24_weights(packed.to(cuda), n, k, num_bits).cpu(), codes)
