"""Single layers of the old formats: the operators against packers written from the published rule, and every trap."""

import itertools

import old_packers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, _core, legacy
from sparse_marlin.testing import assert_same_bits, random_codes, random_scales

ops = torch.ops.sparse_marlin
SHAPES = [(64, 32), (64, 128), (128, 96), (192, 256), (256, 416), (64, 1056)]


def ones(n: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.ones((1, n), device=device)


def packed_24(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    return sparse_marlin.pack_24_weights(codes, ones(codes.shape[0], codes.device), -1, num_bits)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_import_gives_the_bytes_of_the_packer_and_export_undoes_it(n, k, num_bits, device):
    codes = random_codes(n, k, num_bits, seed=n + k)
    codes_old, meta_old, _ = old_packers.marlin_24(codes, ones(n), num_bits)
    packed = ops.import_marlin_24(codes_old.to(device), meta_old.to(device), num_bits)
    assert_same_bits(packed, packed_24(codes, num_bits), "import")
    back = ops.export_marlin_24(packed, n, k, num_bits)
    assert_same_bits(back[0], codes_old, "codes")
    assert_same_bits(back[1], meta_old, "meta")


@pytest.mark.parametrize("num_bits", [4, 8])
def test_every_quad_of_few_values(num_bits, device):
    """All quads of at most two non-zero values out of three, in every position: 1 + 4 * 3 + 6 * 9 of them."""
    low, high = _core.code_min(num_bits), _core.code_max(num_bits)
    quads = [q for q in itertools.product((0, low, high, 1), repeat=4) if sum(v != 0 for v in q) <= 2]
    n, k = 64, 4 * 96
    flat = [quads[(row * 7 + i) % len(quads)] for row in range(n) for i in range(k // 4)]
    codes = torch.tensor(flat, dtype=torch.int8).reshape(n, k)
    assert {tuple(q) for q in codes.reshape(-1, 4).tolist()} == set(quads)
    old = old_packers.marlin_24(codes, ones(n), num_bits)
    packed = ops.import_marlin_24(old[0].to(device), old[1].to(device), num_bits)
    assert_same_bits(ops.unpack_24_weights(packed, n, k, num_bits), codes)
    assert_same_bits(packed, packed_24(codes, num_bits))
    for got, wanted in zip(ops.export_marlin_24(packed, n, k, num_bits), old[:2], strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_other_choices_of_kept_positions_import_to_the_same_bytes(num_bits, device):
    """A packer may keep any position beside a lone value; what the bytes stand for decides."""
    codes = random_codes(64, 128, num_bits, seed=3)
    wanted = packed_24(codes, num_bits)
    kept = {m: p for m, p in old_packers.KEPT.items() if bin(m).count("1") == 2}
    for lone in ({0: (0, 1), 1: (0, 3), 2: (0, 1), 4: (1, 2), 8: (0, 3)}, {0: (1, 3), 1: (0, 1), 2: (1, 3), 4: (0, 2)}):
        choice = {**old_packers.KEPT, **lone, **kept}
        packed, meta, _ = old_packers.marlin_24(codes, ones(64), num_bits, kept=choice)
        assert_same_bits(ops.import_marlin_24(packed.to(device), meta.to(device), num_bits), wanted)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 1 << 30), st.sampled_from([-1, 128])
)
def test_layers_round_trip(runs, steps, num_bits, seed, group_size):
    n, k = 64 * runs, 32 * steps * (1 if group_size == -1 else 4)
    codes = random_codes(n, k, num_bits, seed=seed)
    scales = random_scales(n, k, group_size, torch.float16, seed=seed)
    layer = SparseMarlinLinear.from_codes(codes, scales, group_size=group_size, num_bits=num_bits)
    for naming in legacy.NAMES:
        if naming == legacy.ORIGINAL and num_bits == 8:
            continue
        tensors = legacy.export_marlin_24(layer, naming=naming)
        back = legacy.from_marlin_24(tensors)
        assert_same_bits(back.weight_packed, layer.weight_packed, naming)
        assert_same_bits(back.scales, layer.scales, naming)
        for key, tensor in legacy.export_marlin_24(back, naming=naming).items():
            assert_same_bits(tensor, tensors[key], f"{naming} {key}")


def test_strided_and_misaligned_tensors(device):
    codes = random_codes(128, 256, 4)
    packed, meta, _ = (t.to(device) for t in old_packers.marlin_24(codes, ones(128), 4))
    odd = torch.zeros(packed.numel() + 1, dtype=torch.int32, device=device)[1:].view_as(packed).copy_(packed)
    wide = torch.zeros((meta.shape[0], meta.shape[1] * 2), dtype=torch.int16, device=device)
    wide[:, : meta.shape[1]] = meta
    got = ops.import_marlin_24(odd, wide[:, : meta.shape[1]], 4)
    assert_same_bits(got, packed_24(codes, 4))


def test_slices_of_the_packed_tensor_export(device):
    """A slice along either dimension is used in place: tensor-parallel parts export without repacking."""
    codes = random_codes(192, 384, 4)
    packed = packed_24(codes, 4).to(device)
    words = _core.tile_words(4)
    got = ops.export_marlin_24(packed[1:, words : 2 * words], 128, 128, 4)
    wanted = old_packers.marlin_24(codes[64:, 128:256].contiguous(), ones(128), 4)
    assert_same_bits(got[0], wanted[0])
    assert_same_bits(got[1], wanted[1])


@pytest.mark.parametrize("num_bits", [4, 8])
def test_metadata_that_is_not_rising_is_found(num_bits, device):
    """The first quad in row-major order is named, wherever in the file its bits are."""
    codes = random_codes(128, 128, num_bits)
    packed, meta, _ = old_packers.marlin_24(codes, ones(128), num_bits)
    spoiled = meta.clone()
    spoiled[2, 37] = 0
    spoiled[1, 5] = 0
    rows = [(n, block) for n in range(128) for block in range(8) if _was_spoiled(n, block, meta, spoiled)]
    row, block = min(rows)
    message = f"import_marlin_24: meta: .* at row {row}, column {16 * block}"
    with pytest.raises(RuntimeError, match=message):
        ops.import_marlin_24(packed.to(device), spoiled.to(device), num_bits)
    broken = packed_24(codes, num_bits).clone()
    broken[1, _core.tile_words(num_bits) - 1] = 0
    with pytest.raises(RuntimeError, match=r"export_marlin_24: weight_packed: .* at row 1\d\d, column"):
        ops.export_marlin_24(broken.to(device), 128, 128, num_bits)


def _was_spoiled(n: int, block: int, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether the metadata value of (n, block) differs, by the published place of it."""
    probe = torch.zeros((128, 32), dtype=torch.int64).numpy()
    probe[n, 4 * block] = 1
    at = old_packers.pack_meta(probe).flatten().nonzero().item()
    return bool(before.flatten()[at] != after.flatten()[at])


def test_operator_errors():
    codes = random_codes(64, 128, 4)
    packed, meta, _ = old_packers.marlin_24(codes, ones(64), 4)
    for bad in (
        lambda: ops.import_marlin_24(packed.short(), meta, 4),
        lambda: ops.import_marlin_24(packed, meta.int(), 4),
        lambda: ops.import_marlin_24(packed[0], meta, 4),
        lambda: ops.import_marlin_24(packed, meta[:2], 4),
        lambda: ops.import_marlin_24(packed, meta[:, :64], 4),
        lambda: ops.import_marlin_24(packed[:, :64], meta[:, :64], 4),
        lambda: ops.import_marlin_24(packed, meta, 8),
        lambda: ops.import_marlin_24(packed, meta, 3),
        lambda: ops.import_marlin_24(packed[:0], meta[:0], 4),
    ):
        with pytest.raises(RuntimeError, match=r"^import_marlin_24: (packed|meta|num_bits): expected .*, got "):
            bad()
    ours = packed_24(codes, 4)
    for bad in (
        lambda: ops.export_marlin_24(ours.long(), 64, 128, 4),
        lambda: ops.export_marlin_24(ours, 63, 128, 4),
        lambda: ops.export_marlin_24(ours, 64, 124, 4),
        lambda: ops.export_marlin_24(ours, 128, 128, 4),
        lambda: ops.export_marlin_24(ours, 64, 128, 8),
    ):
        with pytest.raises(RuntimeError, match=r"^export_marlin_24: (weight_packed|size_n|size_k): expected .*, got "):
            bad()


def test_operators_have_fakes(device):
    codes = random_codes(64, 96, 8)
    packed, meta, _ = old_packers.marlin_24(codes, ones(64), 8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.import_marlin_24.default, (packed.to(device), meta.to(device), 8), test_utils=tests)
    ours = packed_24(codes, 8).to(device)
    torch.library.opcheck(ops.export_marlin_24.default, (ours, 64, 96, 8), test_utils=tests)


# --- scales and namings -----------------------------------------------------------------------------------------------


def test_scales_order():
    scales = torch.arange(32.0).reshape(2, 16)
    assert legacy.permute_scales(scales)[0, :8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert_same_bits(legacy.permute_scales(scales), old_packers.permute_scales(scales))
    assert_same_bits(legacy.unpermute_scales(legacy.permute_scales(scales)), scales)
    with pytest.raises(ValueError, match="unpermute_scales: scales: expected"):
        legacy.unpermute_scales(scales[:, :12])


@pytest.mark.parametrize("k", [128, 256, 384, 512])
def test_compressed_tensors_leaves_two_groups_in_plain_order(k):
    """Its packer compares 128 with K / 2: at K = 256 nothing is permuted, though there are two groups."""
    codes, scales = random_codes(64, k, 4), random_scales(64, k, 128, torch.float16)
    packed, meta, stored = old_packers.marlin_24(codes, scales, 4, permuted=k > 256)
    layer = legacy.from_marlin_24({"weight_packed": packed, "meta": meta, "scale_packed": stored})
    assert_same_bits(layer.scales, scales)
    gptq = old_packers.marlin_24(codes, scales, 4)[2]
    layer = legacy.from_marlin_24({"B_24": packed, "B_meta": meta, "s": gptq})
    assert_same_bits(layer.scales, scales)


def test_a_grouped_file_cut_down_to_one_group():
    """The scales of the file are permuted; that the slice has one group only does not unpermute them."""
    codes, scales = random_codes(64, 512, 4), random_scales(64, 512, 128, torch.float16)
    packed, meta, stored = old_packers.marlin_24(codes, scales, 4)
    part = slice(8, 12)  # steps of 32 columns: the third group
    cut = {"B_24": packed[part], "B_meta": meta[part], "s": stored[2:3]}
    layer = legacy.from_marlin_24(cut, permuted=True, group_size=128)
    assert_same_bits(layer.scales, scales[2:3].contiguous())
    assert_same_bits(layer.codes(), codes[:, 256:384].contiguous())
    assert layer.group_size == 128
    assert not torch.equal(legacy.from_marlin_24(cut).scales, scales[2:3])


def test_the_original_layer_and_its_oversized_buffer():
    """N = 256 and K = 4096 make the oversized B look like 8-bit codes of another shape."""
    for n, k in ((256, 4096), (128, 4096), (192, 128)):
        codes, scales = random_codes(n, k, 4), random_scales(n, k, 128, torch.float16)
        packed, meta, stored = old_packers.marlin_24(codes, scales, 4)
        meta = meta.view(n, k // 16)
        junk = torch.full_like(packed, -1)
        for b in (packed, torch.cat([packed, junk])):
            layer = legacy.from_marlin_24({"B": b, "meta": meta, "s": stored})
            assert_same_bits(layer.codes(), codes)
            assert_same_bits(layer.scales, scales)
        with pytest.raises(ValueError, match="meta: expected int16"):
            legacy.from_marlin_24({"B": torch.cat([packed, junk, junk]), "meta": meta, "s": stored})


def test_dtype_of_scales_and_bias(device):
    """float16 scales of a bfloat16 model: rounded once, here, and the layer computes in bfloat16."""
    codes, scales = random_codes(64, 256, 4), random_scales(64, 256, 128, torch.float16)
    packed, meta, stored = (t.to(device) for t in old_packers.marlin_24(codes, scales, 4))
    bias = torch.randn(64, device=device).half()
    tensors = {"B_24": packed, "B_meta": meta, "s": stored, "bias": bias}
    layer = legacy.from_marlin_24(tensors, dtype=torch.bfloat16)
    assert_same_bits(layer.scales, scales.to(torch.bfloat16))
    assert_same_bits(layer.bias, bias.to(torch.bfloat16))
    x = torch.randn(3, 256, device=device, dtype=torch.bfloat16)
    sparse_marlin.testing.assert_accepted(layer(x), x, codes, layer.scales, 128, layer.bias)


def test_layer_errors():
    codes, scales = random_codes(64, 256, 4), random_scales(64, 256, 128, torch.float16)
    packed, meta, stored = old_packers.marlin_24(codes, scales, 4)
    good = {"B_24": packed, "B_meta": meta, "s": stored}
    spoiled = stored.clone()
    spoiled[1, 3] = float("nan")
    for change, message in (
        ({"B_24": packed.long()}, "packed: expected int32"),
        ({"B_meta": meta.int()}, "meta: expected int16"),
        ({"B_meta": meta[:4]}, "meta: expected int16"),
        ({"s": stored.int()}, "scales: expected a floating type"),
        ({"s": stored[:, :32]}, "scales: expected a floating type"),
        ({"s": stored.repeat(3, 1)}, "scales: expected 1 group or whole groups"),
        ({"s": spoiled}, "scales: expected finite values > 0"),
        ({"bias": torch.zeros(65)}, "bias: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            legacy.from_marlin_24({**good, **change})
    with pytest.raises(ValueError, match=r"layer 7: scales: expected 4 groups for group_size 64"):
        legacy.from_marlin_24(good, group_size=64, name="layer 7")
    with pytest.raises(ValueError, match="tensors: expected B_24 B_meta s, or"):
        legacy.from_marlin_24({"B_24": packed, "s": stored})


def test_what_the_old_format_cannot_hold():
    def layer(n: int, k: int, group_size: int, scale: float = 0.01) -> SparseMarlinLinear:
        made = SparseMarlinLinear(k, n, False, group_size=group_size)
        made.scales.fill_(scale)
        return made

    for made, message in (
        (layer(60, 128, -1), "size_n: expected a multiple of 64"),
        (layer(64, 100, -1), "size_k: expected a multiple of 32"),
        (layer(64, 256, 64), "group_size: expected one of"),
        (layer(64, 160, 128), "in_features: expected a multiple of 128"),
        (layer(64, 128, -1, 1e6), "scales: expected values that float16 holds"),
        (layer(64, 128, -1, 1e-9), "scales: expected values that float16 holds"),
    ):
        with pytest.raises(ValueError, match=message):
            legacy.export_marlin_24(made)
