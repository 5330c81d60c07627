"""sparse_marlin_gemm_low_rank: the correction of a layer against float64, in the decode kernel and by two products;
what torch expects of the operator is in test_contract.py, too."""

from collections.abc import Callable

import pytest
import torch
from test_gemm import Layer, need_dtype
from test_gemm_cuda import assert_same_on_gpu, need_kernel, problem_of
from torch import nn
from torch.autograd import forward_ad

from sparse_marlin import SparseMarlinLinear, _core
from sparse_marlin import testing as smt
from sparse_marlin.info import planner_device

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
# and ragged; one share of it and several; two tiles of tokens where a tile has 8.
CASES = [
    (1, 64, 128, 64, 128),
    (3, 203, 1088, 24, 32),
    (4, 576, 576, 16, -1),
    (8, 2309, 2048, 64, 128),
    (9, 65, 704, 8, 32),
    (16, 300, 4160, 128, 128),
    (16, 130, 64, 72, -1),
]
TILES = [i for i, tile in enumerate(_core.TILES) if tile.kernel == "decode"]
SPLITS = (1, 2, 3, 5, 8)
H100 = _core.Device(90, 132, 227 << 10, 228 << 10, 50 << 20)


class Corrected(Layer):
    """A layer with a low-rank correction about as large as what quantization loses."""

    def __init__(self, n, k, rank, group_size=128, num_bits=4, dtype=torch.float16, device="cpu", bias=False, seed=0):
        super().__init__(n, k, group_size, num_bits, dtype, device, bias, seed)
        size = self.scales.float().mean().item() * 2
        self.up = (smt.activations(n, rank, seed=seed + 5, device=device) * size / rank**0.5).to(dtype)
        self.down = smt.activations(rank, k, seed=seed + 6, device=device).to(dtype)

    def plain(self, a):
        return super().__call__(a)

    def arguments(self):
        return self.packed, self.scales, self.down, self.up, self.group_size, self.num_bits, self.bias

    def __call__(self, a):
        return OP(a, *self.arguments())

    def by(self, a, tile: int, splits: int = 0, dependent: bool = True):
        """With the correction in the launch of a tile; tile -1: by two products."""
        return torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by(a, *self.arguments(), tile, splits, dependent)

    def plan(self, m: int, tile: int | None = None, splits: int = 0):
        device, rank = planner_device(torch.cuda.current_device()), self.up.shape[1]
        if tile is None:
            return _core.plan_low_rank(problem_of(self, m), device, rank)
        return _core.plan_low_rank_with_tile(problem_of(self, m), device, rank, tile, splits)

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


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("m", "n", "k", "rank", "group_size"), [*SHAPES, *OTHERS])
def test_against_float64(device, m, n, k, rank, group_size, dtype):
    need_dtype(device, dtype)
    layer = Corrected(n, k, rank, group_size, dtype=dtype, device=device, bias=m % 2 == 1)
    a = smt.activations(m, k, dtype=dtype, device=device)
    with smt.poisoned_allocations(device):
        got = layer(a)
    assert (got.dtype, got.device) == (dtype, a.device)
    layer.check(got, a)
    smt.assert_same_bits(layer(a), got, "second run")
    assert not torch.equal(got, layer.plain(a)), "the correction is too small to be seen"


def test_every_layout_of_the_arguments(device):
    dtype = half_of(device)
    layer = Corrected(72, 136, 16, 64, 8, dtype, device, bias=True)
    a = smt.activations(2, 3, 136, dtype=dtype, device=device)
    wanted = layer(a)
    assert wanted.shape == (2, 3, 72)
    layer.check(wanted, a)
    smt.assert_same_bits(layer(a[1, 2]), layer(a[1, 2:3])[0], "one dimension")
    wide = torch.stack((a, a), dim=-1)[..., 0]
    assert not wide.is_contiguous()
    smt.assert_same_bits(layer(wide), wanted, "strided a")
    layer.down, layer.up = layer.down.t().contiguous().t(), layer.up.t().contiguous().t()
    smt.assert_same_bits(layer(a), wanted, "factors in column order")
    buffer = torch.empty(layer.down.numel() + 1, dtype=dtype, device=device)
    buffer[1:] = layer.down.flatten()
    layer.down = buffer[1:].view(16, 136)
    smt.assert_same_bits(layer(a), wanted, "an unaligned factor")
    assert layer(a[:0]).shape == (0, 3, 72)


def test_nan_and_infinity_stay_with_their_token(device):
    layer = Corrected(72, 136, 16, 64, dtype=half_of(device), device=device)
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


def test_fake_and_compiled(device):
    dtype = half_of(device)
    layer = Corrected(70, 136, 8, 32, 8, dtype, device, bias=True)
    a = smt.activations(2, 3, 136, dtype=dtype, device=device)
    for leaf in (a, a.clone().requires_grad_()):
        results = torch.library.opcheck(OP.default, (leaf, *layer.arguments()))
        assert set(results.values()) == {"SUCCESS"}
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in (a, *layer.arguments())]
    out = OP(*meta)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 70), dtype, "meta")
    with torch.no_grad():
        compiled = torch.compile(lambda x: OP(x, *layer.arguments()) * 2, backend="aot_eager", fullgraph=True)
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
}


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


@pytest.mark.parametrize("rank", [8, 16, 24, 64, 128])
@pytest.mark.parametrize("m", [1, 4, 5, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (72, 64)])
def test_plans_with_a_correction(n, k, m, rank):
    problem = _core.Problem(m, n, k)
    plan = _core.plan_low_rank(problem, H100, rank)
    tile = _core.TILES[plan.tile]
    assert (plan.rank, tile.kernel) == (rank, "decode")
    assert plan.lead > 0
    assert plan.lead % plan.splits == 0
    assert (plan.grid - plan.lead) % plan.splits == 0
    multiply, most = plan.grid - plan.lead, _core.plan_with_tile(problem, H100, plan.tile, plan.splits).grid
    assert most - plan.lead <= multiply <= most  # some may leave room for those that project
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    assert plan.splits > 1 or -(-tiles // multiply) == -(-tiles // most)  # if that is not a turn more
    assert tile.blocks * (plan.smem_bytes + 1024) <= H100.smem_per_sm
    assert plan.workspace_bytes >= 256 + 8 * plan.lead + 4 * m * rank
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
        assert (plan.rank, plan.lead, plan.tile) == (0, 0, _core.plan(problem, device).tile)
    for m, rank in [(17, 64), (1, 136), (1, 20), (1, 0)]:
        with pytest.raises(ValueError, match=r"low-rank correction: expected .*, got"):
            _core.plan_low_rank_with_tile(_core.Problem(m, 4096, 4096), H100, rank, TILES[0])
    with pytest.raises(ValueError, match="adds no low-rank correction"):
        _core.plan_low_rank_with_tile(_core.Problem(1, 4096, 4096), H100, 64, 0)


def test_the_cases_cover_the_kernel():
    assert {m for m, *_ in CASES} == {1, 3, 4, 8, 9, 16}
    assert {8, 16, 24, 64, 72, 128} <= {rank for *_, rank, _ in CASES}
    assert {group for *_, group in CASES} == {-1, 32, 128}
    assert all(_core.plan_low_rank(_core.Problem(m, n, k), H100, rank).rank for m, n, k, rank, _ in CASES)
    assert not any(_core.plan_low_rank(_core.Problem(m, n, k), H100, rank).rank for m, n, k, rank, _ in OTHERS)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_with_every_split(cuda, tile, num_bits, dtype):
    need_kernel("decode")
    ran = 0
    for i, (m, n, k, rank, group_size) in enumerate(CASES):
        layer = Corrected(n, k, rank, group_size, num_bits, dtype, cuda, bias=i % 2 == 0)
        a = smt.activations(m, k, dtype=dtype, device=cuda)
        for splits in SPLITS:
            if not layer.fits(m, tile, splits):
                continue
            what = f"tile {tile}, splits {splits}, m={m} n={n} k={k} rank={rank} group={group_size}"
            with smt.poisoned_allocations(cuda, megabytes=1):
                got = layer.by(a, tile, splits)
            layer.check(got, a, what)
            for run in range(3):
                assert_same_on_gpu(layer.by(a, tile, splits, run % 2 == 0), got, f"run {run} of {what}")
            ran += 1
    assert ran > 0, f"tile {tile} fits no case"


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "rank"), [(3, 24), (9, 64)])
def test_blocks_that_walk_over_output_tiles(cuda, tile, m, rank):
    """A block asks for its rows of `up` again for every output tile; more blocks than the GPU holds at once."""
    need_kernel("decode")
    n = 34001
    layer = Corrected(n, 192, rank, 64, device=cuda, bias=True)
    plan = layer.plan(m, tile, 1)
    tiles = -(-n // _core.TILES[tile].block_n) * -(-m // _core.TILES[tile].block_m)
    assert tiles > plan.grid - plan.lead
    a = smt.activations(m, 192, dtype=torch.float16, device=cuda)
    with smt.poisoned_allocations(cuda, megabytes=1):
        got = layer.by(a, tile, 1)
    layer.check(got, a, f"tile {tile}")
    for run in range(10):
        assert_same_on_gpu(layer.by(a, tile, 1, run % 2 == 0), got, f"run {run}")


@pytest.mark.gpu
def test_the_kernel_for_every_number_of_tokens_and_every_rank(cuda):
    need_kernel("decode")
    a = smt.activations(17, 1088, dtype=torch.float16, device=cuda)
    for rank in (*range(8, 137, 8), 1, 17, 100):
        layer = Corrected(520, 1088, rank, device=cuda)
        for m in range(1, 18) if rank in (24, 64, 128) else (1, 5, 16):
            assert (layer.plan(m).rank > 0) == (m <= 16 and rank <= 128 and rank % 8 == 0)
            layer.check(layer(a[:m]), a[:m], f"{m} tokens, rank {rank}")


@pytest.mark.gpu
def test_the_kernel_adds_exactly(cuda):
    """One-hot tokens and small whole numbers, so that every sum is exact and one wrong index shows."""
    need_kernel("decode")
    m, n, k, rank = 13, 2311, 1152, 104
    layer = Corrected(n, k, rank, -1, device=cuda)
    layer.codes = smt.coordinate_codes(n, k, 4).to(cuda)
    layer.scales = torch.ones(1, n, dtype=torch.float16, device=cuda)
    layer.packed = torch.ops.sparse_marlin.pack_24_weights(layer.codes, layer.scales, -1, 4)
    layer.down = (torch.arange(rank * k, device=cuda) % 7 - 3).view(rank, k).half()
    layer.up = (torch.arange(n * rank, device=cuda) % 5 - 2).view(n, rank).half()
    columns = torch.arange(m) * 89 % k
    a = smt.one_hot_activations(k, columns, torch.float16).to(cuda)
    wanted = layer.codes.float().t()[columns] + layer.down.float().t()[columns] @ layer.up.float().t()
    assert wanted.abs().max() <= 2048
    for tile in TILES:
        for splits in SPLITS:
            if layer.fits(m, tile, splits):
                assert_same_on_gpu(layer.by(a, tile, splits), wanted.half(), f"tile {tile}, splits {splits}")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", OTHERS, ids=str)
def test_what_the_kernel_does_not_take(cuda, shape):
    m, n, k, rank, group_size = shape
    layer = Corrected(n, k, rank, group_size, device=cuda)
    a = smt.activations(m, k, dtype=torch.float16, device=cuda)
    with pytest.raises(RuntimeError, match=f"^{NAME}: a: .*"):
        layer.by(a, TILES[0])
    assert_same_on_gpu(layer(a), layer.by(a, -1), "products")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)])
def test_a_hundred_runs_of_real_layers(cuda, n, k, m):
    need_kernel("decode")
    layer = Corrected(n, k, 64, device=cuda)
    a = smt.activations(m, k, dtype=torch.float16, device=cuda)
    assert layer.plan(m).rank == 64
    got = layer(a)
    layer.check(got, a, "operator")
    layer.check(layer.by(a, -1), a, "products")
    for run in range(100):
        assert_same_on_gpu(layer(a), got, f"run {run}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_a_graph_replayed_with_changing_inputs(cuda, m):
    """The same token and the same workspace every time: what a replay leaves must not be taken for the next one's."""
    need_kernel("decode")
    layer = Corrected(4096, 4096, 64, device=cuda)
    inputs = [smt.activations(m, 4096, dtype=torch.float16, seed=seed, device=cuda) for seed in range(5)]
    wanted = [layer(a) for a in inputs]
    assert not torch.equal(wanted[0], wanted[1])
    static = inputs[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [layer(static) for _ in range(3)]
    for replay in range(50):
        static.copy_(inputs[replay % 5])
        graph.replay()
        if replay % 7 == 0:
            graph.replay()
        for i, out in enumerate(outs):
            assert_same_on_gpu(out, wanted[replay % 5], f"replay {replay}, call {i}")


def chain_of(device: torch.device) -> list[Corrected]:
    """Layers of which each one's output is the next one's input: many features and few, every kernel before."""
    widths = (1024, 6144, 512, 18432, 1024)
    sizes = zip(widths[:-1], widths[1:], (64, 16, 128, 32), strict=True)
    return [
        Corrected(n, k, rank, (128, 32, -1, 64)[i], (4, 8)[i % 2], device=device, bias=i % 2 == 0, seed=i)
        for i, (k, n, rank) in enumerate(sizes)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16])
def test_a_chain_of_dependent_launches(cuda, m):
    """Both kernels start before their predecessors have finished and must not notice: the same bits as one at a time.
    Outputs are memory that a call or two before has just let go of."""
    need_kernel("decode")
    layers = chain_of(cuda)

    def run(x: torch.Tensor, dependent: bool, after_each: Callable[[], None] = lambda: None) -> torch.Tensor:
        for _ in range(3):
            for layer in layers:
                x = layer.by(x, layer.plan(m).tile, 0, dependent)
                after_each()
            x = x.mul(0.1) / x.float().std().clamp_min(1e-3).half()  # back to the size it had
        return x

    def start(seed: int) -> torch.Tensor:
        return smt.activations(m, 1024, dtype=torch.float16, seed=seed, device=cuda).mul(0.1)

    static = start(0)
    run(static, True)
    torch.cuda.synchronize()
    graphs = []
    for dependent in (True, False):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(static, dependent)
        graphs.append((graph, out))
    for replay in range(20):
        if replay % 5 == 0:
            static.copy_(start(replay))
            wanted = run(static, False, torch.cuda.synchronize)
            assert wanted.isfinite().all()
            torch.cuda._sleep(10_000_000)  # so that calls queue up and follow each other without a gap
            assert_same_on_gpu(run(static, True), wanted, "eager, dependent")
        for (graph, out), name in zip(graphs, ("dependent", "not dependent"), strict=True):
            graph.replay()
            assert_same_on_gpu(out, wanted, f"graph, {name}, replay {replay}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_two_streams_and_two_graphs_at_once(cuda, m):
    need_kernel("decode")
    layers = [Corrected(6144, 4096, 64, device=cuda, seed=s) for s in (0, 1)]
    inputs = [smt.activations(m, 4096, dtype=torch.float16, seed=s, device=cuda) for s in (2, 3)]
    wanted = [layer.by(a, layer.plan(m).tile, 0, False) for layer, a in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    graphs, outs = [], []
    for layer, a in zip(layers, inputs, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append([layer(a) for _ in range(10)])
        graphs.append(graph)
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                graphs[i].replay()
                got[i] += [layers[i](inputs[i]), *(out.clone() for out in outs[i])]
    torch.cuda.synchronize()
    for i in (0, 1):
        layers[i].check(wanted[i], inputs[i], f"alone, stream {i}")
        for run, out in enumerate(got[i]):
            assert_same_on_gpu(out, wanted[i], f"stream {i}, run {run}")


@pytest.mark.gpu
@pytest.mark.parametrize("last", ["a", "down", "up", "packed"])
def test_inputs_written_right_before(cuda, last):
    """The factors and the activations are read before the multiplication has finished: not before they are written."""
    need_kernel("decode")
    m, n, k, rank = 16, 4096, 4096, 64
    names = [name for name in ("a", "down", "up", "packed") if name != last] + [last]
    layers = [Corrected(n, k, rank, device=cuda, seed=seed) for seed in (0, 1)]
    contents, wanted = [], []
    for seed, layer in enumerate(layers):
        layer.scales = layers[0].scales
        a = smt.activations(m, k, dtype=torch.float16, seed=seed, device=cuda)
        contents.append({"a": a, "down": layer.down, "up": layer.up, "packed": layer.packed})
        wanted.append(layer.by(a, layer.plan(m).tile, 0, False))
    assert not torch.equal(*wanted)
    now = {name: tensor.clone() for name, tensor in contents[0].items()}
    torch.cuda._sleep(20_000_000)
    got = []
    for i in range(100):
        for name in names:
            torch.mul(contents[i % 2][name], 1, out=now[name])
        got.append(OP(now["a"], now["packed"], layers[0].scales, now["down"], now["up"], 128, 4, None))
    for i, out in enumerate(got):
        assert_same_on_gpu(out, wanted[i % 2], f"call {i}")
