"""sparse_marlin_gemm_low_rank: the correction of a layer against float64, in the decode kernel and by two products;
what torch expects of the operator is in test_contract.py, too."""

import contextlib

import pytest
import torch
from test_gemm import Layer, need_dtype
from test_gemm_cuda import problem_of
from torch import nn
from torch.autograd import forward_ad

from sparse_marlin import SparseMarlinLinear, _core, low_rank
from sparse_marlin import testing as smt
from sparse_marlin.info import planner_device
from sparse_marlin.low_rank import dequantize_up, quantize_up

OP = torch.ops.sparse_marlin.sparse_marlin_gemm_low_rank
NAME = "sparse_marlin_gemm_low_rank"
HALVES = [torch.float16, torch.bfloat16]
# (m, n, k, rank, group) for every device; the third and the rest of k are not for the kernel.
SHAPES = [
    (1, 64, 128, 64, 128),
    (2, 72, 136, 8, -1),
    (3, 2304, 520, 16, 64),
    (5, 203, 1096, 40, 64),
    (3, 72, 192, 1, 32),
]
# What the kernel leaves to the products: tokens, k, the rank.
OTHERS = [(17, 72, 128, 8, 128), (3, 72, 132, 8, 32), (4, 72, 136, 16, 64), (2, 72, 128, 136, 64), (5, 72, 128, 12, 64)]
# For the kernel: ranks of half a unit, one, several, more than a box of `up`; k less than what its warps take at once,
# and ragged; one share of it and several; so much that blocks that project come behind; two tiles of tokens where a
# tile has 8.
CASES = [
    (1, 64, 128, 64, 128),
    (3, 203, 1088, 24, 32),
    (4, 576, 576, 16, -1),
    (8, 2309, 2048, 64, 128),
    (9, 65, 704, 8, 32),
    (16, 300, 4160, 128, 128),
    (16, 130, 64, 72, -1),
    (9, 264, 8256, 72, 128),
]
TILES = [i for i, tile in enumerate(_core.TILES) if tile.kernel == "decode"]
SPLITS = (1, 2, 3, 5, 8)
WIDE_TILES = [i for i, tile in enumerate(_core.TILES) if tile.kernel == "sm90"]
H100 = _core.Device(90, 132, 227 << 10, 228 << 10, 50 << 20)


class Corrected(Layer):
    """A layer with a low-rank correction about as large as what quantization loses; `packed_up`: whose second factor is
    packed. `up` is then what it stands for."""

    def __init__(
        self, n, k, rank, group_size=128, num_bits=4, dtype=torch.float16, device="cpu", bias=False, seed=0,
        packed_up=False,
    ):  # fmt: skip
        super().__init__(n, k, group_size, num_bits, dtype, device, bias, seed)
        size = self.scales.float().mean().item() * 2
        self.up = (smt.activations(n, rank, seed=seed + 5, device=device) * size / rank**0.5).to(dtype)
        self.down = smt.activations(rank, k, seed=seed + 6, device=device).to(dtype)
        self.up_packed = self.up_scales = None
        if packed_up:
            self.pack_up(quantize_up(self.up, group_size, num_bits))

    def pack_up(self, up):
        self.up_scales = up.scales
        self.up_packed = torch.ops.sparse_marlin.pack_24_weights(up.codes, up.scales, self.group_size, self.num_bits)
        self.up = dequantize_up(self.up_packed, up.scales, self.up.shape[1], self.group_size, self.num_bits)

    def plain(self, a):
        return super().__call__(a)

    def arguments(self):
        up = self.up if self.up_packed is None else self.up_packed
        return self.packed, self.scales, self.down, up, self.group_size, self.num_bits, self.bias

    def __call__(self, a):
        return OP(a, *self.arguments(), up_scales=self.up_scales)

    def by(self, a, tile: int, splits: int = 0, dependent: bool = True):
        """With the correction in the launch of a tile; tile -1: by two products."""
        return torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by(
            a, *self.arguments(), tile, splits, dependent, self.up_scales
        )

    def plan(self, m: int, tile: int | None = None, splits: int = 0):
        device, rank = planner_device(torch.cuda.current_device()), self.up.shape[1]
        packed = self.up_packed is not None
        if tile is None:
            return _core.plan_low_rank(problem_of(self, m), device, rank, packed)
        return _core.plan_low_rank_with_tile(problem_of(self, m), device, rank, tile, splits, packed)

    def fits(self, m: int, tile: int, splits: int) -> bool:
        try:
            self.plan(m, tile, splits)
        except ValueError:
            return False
        return True

    def check(self, got, a, what="result"):
        flat, out = a.reshape(-1, a.shape[-1]), got.reshape(-1, got.shape[-1])
        correction = self.up, self.down
        smt.assert_accepted(out, flat, self.codes, self.scales, self.group_size, self.bias, what, correction)


def half_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@pytest.mark.parametrize("packed_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("m", "n", "k", "rank", "group_size"), [*SHAPES, *OTHERS])
def test_against_float64(device, m, n, k, rank, group_size, dtype, packed_up):
    need_dtype(device, dtype)
    group_size = 256 if packed_up and group_size == -1 else group_size
    layer = Corrected(n, k, rank, group_size, dtype=dtype, device=device, bias=m % 2 == 1, packed_up=packed_up)
    a = smt.activations(m, k, dtype=dtype, device=device)
    with smt.poisoned_allocations(device):
        got = layer(a)
    assert (got.dtype, got.device) == (dtype, a.device)
    layer.check(got, a)
    smt.assert_same_bits(layer(a), got, "second run")
    assert not torch.equal(got, layer.plain(a)), "the correction is too small to be seen"


@pytest.mark.parametrize("packed_up", [False, True])
def test_every_layout_of_the_arguments(device, packed_up):
    dtype = half_of(device)
    layer = Corrected(72, 136, 16, 64, 8, dtype, device, bias=True, packed_up=packed_up)
    a = smt.activations(2, 3, 136, dtype=dtype, device=device)
    wanted = layer(a)
    assert wanted.shape == (2, 3, 72)
    layer.check(wanted, a)
    smt.assert_same_bits(layer(a[1, 2]), layer(a[1, 2:3])[0], "one dimension")
    wide = torch.stack((a, a), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    smt.assert_same_bits(layer(wide), wanted, "strided a")
    layer.down, layer.up = layer.down.t().contiguous().t(), layer.up.t().contiguous().t()
    if packed_up:  # parts of larger tensors, as of a merged layer
        layer.up_packed = torch.cat((layer.up_packed,) * 2, dim=1)[:, : layer.up_packed.shape[1]]
        layer.up_scales = torch.cat((layer.up_scales,) * 2, dim=1)[:, :72]
    smt.assert_same_bits(layer(a), wanted, "factors in column order")
    buffer = torch.empty(layer.down.numel() + 1, dtype=dtype, device=device)
    buffer[1:] = layer.down.flatten()
    layer.down = buffer[1:].view(16, 136)
    smt.assert_same_bits(layer(a), wanted, "an unaligned factor")
    assert layer(a[:0]).shape == (0, 3, 72)


@pytest.mark.parametrize("packed_up", [False, True])
def test_nan_and_infinity_stay_with_their_token(device, packed_up):
    layer = Corrected(72, 136, 16, 64, dtype=half_of(device), device=device, packed_up=packed_up)
    a = smt.activations(4, 136, dtype=half_of(device), device=device)
    clean = layer(a)
    a[1, 7], a[2, 9] = torch.nan, torch.inf
    got = layer(a)
    smt.assert_same_bits(got[[0, 3]], clean[[0, 3]])
    assert got[1].isnan().all()
    assert not got[2].isfinite().any()


def test_the_layer_calls_the_operator(device):
    layer = Corrected(72, 136, 16, 64, dtype=half_of(device), device=device, bias=True)
    module = SparseMarlinLinear.from_codes(
        layer.codes, layer.scales, layer.bias, group_size=64, correction=(layer.up, layer.down)
    )
    a = smt.activations(5, 136, dtype=half_of(device), device=device)
    with torch.inference_mode():
        smt.assert_same_bits(module(a), layer(a))
    layer.check(module(a), a, "with gradients")


@pytest.mark.parametrize("packed_up", [False, True])
def test_fake_and_compiled(device, packed_up):
    dtype = half_of(device)
    layer = Corrected(70, 136, 8, 32, 8, dtype, device, bias=True, packed_up=packed_up)
    more = {"up_scales": layer.up_scales}
    a = smt.activations(2, 3, 136, dtype=dtype, device=device)
    for leaf in (a, a.clone().requires_grad_()):
        results = torch.library.opcheck(OP.default, (leaf, *layer.arguments()), more)
        assert set(results.values()) == {"SUCCESS"}
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in (a, *layer.arguments())]
    out = OP(*meta, up_scales=layer.up_scales.to("meta") if packed_up else None)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 70), dtype, "meta")
    with torch.no_grad():
        compiled = torch.compile(lambda x: OP(x, *layer.arguments(), **more) * 2, backend="aot_eager", fullgraph=True)
        smt.assert_same_bits(compiled(a), layer(a) * 2)


def test_gradients_are_those_of_the_dense_layer(device):
    dtype = half_of(device)
    layer = Corrected(70, 136, 8, 32, dtype=dtype, device=device, bias=True)
    a = smt.activations(2, 3, 136, dtype=dtype, device=device).requires_grad_()
    leaves = [a, *(t.requires_grad_() for t in (layer.bias, layer.down, layer.up))]
    upstream = smt.activations(2, 3, 70, dtype=dtype, seed=5, device=device)
    got = torch.autograd.grad(layer(a), leaves, upstream)
    weight = smt.dequantized(layer.codes, layer.scales, 32)
    low = nn.functional.linear(nn.functional.linear(a, layer.down), layer.up)
    wanted = torch.autograd.grad(nn.functional.linear(a, weight, layer.bias) + low, leaves, upstream)
    for name, x, y in zip(("a", "bias", "down", "up"), got, wanted, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"gradient of {name}: {text}")
    with torch.no_grad():
        assert not layer(a).requires_grad


def test_gradients_with_a_packed_factor(device):
    dtype = half_of(device)
    layer = Corrected(70, 136, 72, 32, dtype=dtype, device=device, bias=True, packed_up=True)
    a = smt.activations(2, 3, 136, dtype=dtype, device=device).requires_grad_()
    leaves = [a, layer.bias.requires_grad_(), layer.down.requires_grad_()]
    upstream = smt.activations(2, 3, 70, dtype=dtype, seed=5, device=device)
    got = torch.autograd.grad(layer(a), leaves, upstream)
    weight = smt.dequantized(layer.codes, layer.scales, 32)
    low = nn.functional.linear(nn.functional.linear(a, layer.down), layer.up)
    wanted = torch.autograd.grad(nn.functional.linear(a, weight, layer.bias) + low, leaves, upstream)
    for name, x, y in zip(("a", "bias", "down"), got, wanted, strict=True):
        error = (x - y).float().norm() / y.float().norm()  # the terms of the sums are in another order
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"gradient of {name}: {error}"


@pytest.mark.parametrize("rank", [1, 6, 64, 70, 128])
def test_a_packed_factor_holds_each_rank_once(rank):
    up = torch.randn(70, rank)
    wide = low_rank.spread(up)
    assert wide.shape == (70, low_rank.tail_columns(rank)) == (70, 128 * -(-rank // 64))
    assert (wide != 0).sum() == up.numel()
    assert ((wide.view(70, -1, 4) != 0).sum(2) <= 2).all()
    assert torch.equal(low_rank.gather(wide, rank), up)
    t = torch.randn(2, 3, rank)
    torch.testing.assert_close(low_rank.twice(t) @ wide.t(), t @ up.t())
    quantized = quantize_up(up, 64, 8)
    error = (low_rank.gather(quantized.dequantize(), rank) - up).norm() / up.norm()
    assert error < 0.02, error


def test_forward_mode_gradient(device):
    layer = Corrected(72, 136, 8, 32, dtype=half_of(device), device=device)
    a = smt.activations(3, 136, dtype=half_of(device), device=device)
    tangent = smt.activations(3, 136, dtype=a.dtype, seed=3, device=device)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(a, tangent))).tangent
    layer.check(got, tangent, "tangent")


def test_autocast_casts_the_factors(device):
    layer = Corrected(72, 136, 8, 32, dtype=torch.bfloat16, device=device, bias=True)
    a = smt.activations(3, 136, device=device)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        got = OP(a, layer.packed, layer.scales.float(), layer.down.float(), layer.up.float(), 32, 4, layer.bias.float())
    smt.assert_same_bits(got, layer(a.bfloat16()))


@torch.jit.script
def scripted(
    a: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    return torch.ops.sparse_marlin.sparse_marlin_gemm_low_rank(a, weight, scales, down, up, 32, 4, None)


def test_torchscript(device):
    layer = Corrected(72, 136, 8, 32, dtype=half_of(device), device=device)
    a = smt.activations(3, 136, dtype=half_of(device), device=device)
    smt.assert_same_bits(scripted(a, layer.packed, layer.scales, layer.down, layer.up), layer(a))


BAD = {
    "dtype of down": ("down", lambda t: t.double(), "down: expected dtype float(16|32).*, got float64; convert"),
    "dtype of up": ("up", lambda t: t.double(), "up: expected dtype float(16|32).*, got float64; convert"),
    "K of down": ("down", lambda t: t[:, :128], r"down: expected shape \[16, 136\] .*, got \[16, 128\]"),
    "dimensions of down": ("down", lambda t: t[0], r"down: expected 2 dimensions \[rank, K\], got shape \[136\]"),
    "rank 0": ("down", lambda t: t[:0], "down: expected a rank .* of at least 1, got 0"),
    "rank of up": ("up", lambda t: t[:, :8], r"up: expected shape \[72, 16\] .*, got \[72, 8\]"),
    "N of up": ("up", lambda t: t[:64], r"up: expected shape \[72, 16\] .*, got \[64, 16\]"),
    "scales of a dense up": ("up_scales", lambda _: torch.ones(1, 72), r"up_scales: expected None, .*, got \[1, 72\]"),
}
BAD_PACKED = {
    "dtype of down": ("down", lambda t: t.double(), "down: expected dtype float(16|32).*, got float64; convert"),
    "scales of up": ("up_scales", lambda _: None, "up_scales: expected the scales of a packed up, got None"),
    "dtype of the scales": ("up_scales", lambda t: t.double(), "up_scales: expected dtype float.*, got float64"),
    "groups of the scales": ("up_scales", lambda t: t[:1], r"up_scales: expected shape \[2, 72\] .*, got \[1, 72\]"),
    "another rank": ("down", lambda t: t.repeat(5, 1), r"up: expected shape .* since the rank is 80, got"),
    "rows of up": ("up_packed", lambda t: t[:1], r"up: expected shape \[2, .*, got \[1, "),
    "whole rows": (
        "group_size",
        lambda _: -1,
        r"up: expected a floating type \[N, rank\] for group_size -1, got int32",
    ),
}


@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed_factors(device, case):
    name, spoil, message = BAD_PACKED[case]
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = Corrected(72, 136, 16, 64, dtype=dtype, device=device, packed_up=True)
    a = smt.activations(3, 136, dtype=dtype, device=device)
    setattr(layer, name, spoil(getattr(layer, name)))
    if case == "whole rows":
        layer.scales = layer.scales[:1]
    with pytest.raises(RuntimeError, match=f"^{NAME}: {message}"):
        layer(a)


@pytest.mark.parametrize("case", BAD)
def test_bad_factors(device, case):
    name, spoil, message = BAD[case]
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = Corrected(72, 136, 16, 64, dtype=dtype, device=device)
    a = smt.activations(3, 136, dtype=dtype, device=device)
    setattr(layer, name, spoil(getattr(layer, name)))
    with pytest.raises(RuntimeError, match=f"^{NAME}: {message}"):
        layer(a)


def test_errors_of_the_multiplication_bear_the_name_of_the_operator(device):
    layer = Corrected(72, 136, 16, 64, dtype=half_of(device), device=device)
    with pytest.raises(RuntimeError, match=f"^{NAME}: a: expected a last dimension"):
        layer(smt.activations(3, 264, dtype=half_of(device), device=device))
    with pytest.raises(RuntimeError, match=f"^{NAME}: down: expected .*, got "):
        layer(smt.activations(3, 132, dtype=half_of(device), device=device))
    layer.up = layer.up[:, :8]
    a = smt.activations(3, 136, dtype=half_of(device), device=device).requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{NAME}: up: expected \[72, 16\], got \[72, 8\]"):
        layer(a)


# --- the planner ------------------------------------------------------------------------------------------------------


def fastest_with_correction(problem: _core.Problem, rank: int) -> float:
    predicted = []
    for tile in TILES:
        with contextlib.suppress(ValueError):  # no room
            predicted.append(_core.plan_low_rank_with_tile(problem, H100, rank, tile, 1).predicted_us)
    return min(predicted)


@pytest.mark.parametrize("rank", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("m", [1, 4, 5, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (72, 64)])
def test_plans_with_a_correction(n, k, m, rank):
    problem = _core.Problem(m, n, k)
    plan = _core.plan_low_rank(problem, H100, rank)
    tile = _core.TILES[plan.tile]
    if plan.rank == 0:  # two products behind another kernel are no slower than the best tile
        assert (m, rank) == (16, 128)
        assert plan.predicted_us + 12 <= fastest_with_correction(problem, rank)
        return
    assert (plan.rank, tile.kernel) == (rank, "decode")
    project = rank // 8 * -(-m // tile.block_m) * plan.shares  # a tile's tokens x 8 ranks x a share of k each
    assert plan.shares in (1, 2, 4, 8)
    assert plan.project_blocks == -(-project // plan.splits) * plan.splits
    assert (plan.grid - plan.project_blocks) % plan.splits == 0
    multiply, most = plan.grid - plan.project_blocks, _core.plan_with_tile(problem, H100, plan.tile, plan.splits).grid
    assert most - plan.project_blocks <= multiply <= most  # some may leave room for those that project
    assert plan.behind == (k >= 8192 and multiply <= 132 and plan.grid <= 132 * tile.blocks)
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    assert plan.splits > 1 or -(-tiles // multiply) == -(-tiles // most)  # if that is not a turn more
    assert tile.blocks * (plan.smem_bytes + 1024) <= H100.smem_per_sm
    assert plan.workspace_bytes >= 256 + 4 * m * rank  # packets: 4 bytes a value of t
    assert plan.predicted_us < _core.plan(problem, H100).predicted_us + 12


def test_problems_without_a_kernel_for_the_correction():
    a100 = _core.Device(80, 108, 163 << 10, 164 << 10, 40 << 20)
    for m, k, rank, device in [
        (17, 4096, 64, H100),
        (1, 4096, 136, H100),
        (1, 4096, 20, H100),
        (1, 4100, 64, H100),
        (1, 4096, 64, a100),
    ]:
        problem = _core.Problem(m, 4096, k)
        plan = _core.plan_low_rank(problem, device, rank)
        assert (plan.rank, plan.project_blocks, plan.tile) == (0, 0, _core.plan(problem, device).tile)
    for m, rank in [(17, 64), (1, 136), (1, 20), (1, 0)]:
        with pytest.raises(ValueError, match=r"low-rank correction: expected .*, got"):
            _core.plan_low_rank_with_tile(_core.Problem(m, 4096, 4096), H100, rank, TILES[0])
    with pytest.raises(ValueError, match="expected a tile of another kernel, since this one adds none"):
        _core.plan_low_rank_with_tile(_core.Problem(1, 4096, 4096), H100, 64, 0)
    with pytest.raises(ValueError, match="expected a packed second factor"):
        _core.plan_low_rank_with_tile(_core.Problem(32, 4096, 4096), H100, 64, WIDE_TILES[0])


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("n", "k"), [(106496, 16384), (1 << 20, 4096), (262144, 8192)])
def test_blocks_that_take_the_first_product_can_be_counted(n, k, m):
    """The kernel keeps two flags above 4096 in their counter (csrc/device/project_decode.cuh)."""
    blocks = []
    for tile in TILES:
        for splits in (1, 2, 4, 8):
            try:
                plan = _core.plan_low_rank_with_tile(_core.Problem(m, n, k), H100, 64, tile, splits)
            except ValueError:  # more blocks than places
                continue
            blocks.append((plan.grid - plan.project_blocks) // splits)
    assert max(blocks) == 2 * H100.num_sms


@pytest.mark.parametrize("m", [1, 16, 17, 64, 200, 1024, 8192])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336), (520, 1096)])
def test_plans_with_a_packed_factor(n, k, m):
    for rank in (8, 64, 72, 128, 192):
        problem = _core.Problem(m, n, k)
        plan = _core.plan_low_rank(problem, H100, rank, True)
        decodes = m <= 16 and rank <= 128 and k % 64 == 0
        assert (plan.rank, plan.tail, plan.project_blocks > 0) == (rank, -(-rank // 64), decodes)
        assert _core.TILES[plan.tile].kernel == ("decode" if decodes else "sm90")
        if decodes:  # room for more stages, as it is smaller
            dense = _core.plan_low_rank_with_tile(problem, H100, rank, plan.tile, plan.splits)
            assert plan.smem_bytes < dense.smem_bytes or plan.num_stages >= dense.num_stages


def test_problems_without_a_kernel_for_a_packed_factor():
    a100 = _core.Device(80, 108, 163 << 10, 164 << 10, 40 << 20)
    for m, n, k, rank, device in [
        (17, 4096, 4096, 1032, H100),
        (17, 4096, 4096, 20, H100),
        (17, 4096, 4100, 64, H100),
        (1, 4097, 4096, 64, H100),
        (17, 4096, 4096, 64, a100),
    ]:
        problem = _core.Problem(m, n, k)
        plan = _core.plan_low_rank(problem, device, rank, True)
        assert (plan.rank, plan.tail, plan.tile) == (0, 0, _core.plan(problem, device).tile)
        with pytest.raises(ValueError, match=r"expected|needs"):
            _core.plan_low_rank_with_tile(problem, device, rank, WIDE_TILES[0], packed=True)
    with pytest.raises(ValueError, match="expected a group size above 0"):
        _core.plan_low_rank_with_tile(_core.Problem(32, 4096, 4096, -1), H100, 64, WIDE_TILES[0], packed=True)


def test_the_cases_cover_the_kernel():
    assert {m for m, *_ in CASES} == {1, 3, 4, 8, 9, 16}
    assert {8, 16, 24, 64, 72, 128} <= {rank for *_, rank, _ in CASES}
    assert {group for *_, group in CASES} == {-1, 32, 128}
    assert all(_core.plan_low_rank(_core.Problem(m, n, k), H100, rank).rank for m, n, k, rank, _ in CASES)
    assert not any(_core.plan_low_rank(_core.Problem(m, n, k), H100, rank).rank for m, n, k, rank, _ in OTHERS)
