"""A low-rank correction whose second factor is packed: in the decode kernel and as more columns of the wgmma.sp
kernel's, every tile and split, graphs, chains, inputs written right before."""

import pytest
import torch
from test_gemm_cuda import assert_same_on_gpu, need_kernel
from test_low_rank import HALVES, OP, SPLITS, TILES, WIDE_TILES, Corrected
from test_low_rank_cuda import check_every_split, check_walk

from sparse_marlin import _core
from sparse_marlin import testing as smt
from sparse_marlin.quantize import QuantizedWeight

# (m, n, k, rank, group) for the decode kernel: as those of test_low_rank.py, N a multiple of 8.
CASES = [
    (1, 64, 128, 64, 128),
    (3, 200, 1088, 24, 32),
    (4, 576, 576, 16, 64),
    (8, 2312, 2048, 64, 128),
    (9, 72, 704, 8, 32),
    (16, 304, 4160, 128, 256),
    (16, 136, 64, 72, 128),
]
# For the wgmma.sp kernel: k of whole column tiles and not, one column tile of the correction and several, the last
# tokens a tile of their own.
WIDE_CASES = [
    (17, 200, 1088, 24, 32),
    (64, 576, 2048, 64, 128),
    (65, 136, 520, 72, 64),
    (300, 1032, 1096, 192, 256),
    (520, 264, 640, 64, 128),
]
WIDE_SPLITS = (-2, -1, 1, 2, 3, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_of_the_decode_kernel(cuda, tile, num_bits, dtype):
    need_kernel("decode")
    check_every_split(CASES, tile, SPLITS, num_bits, dtype, cuda, packed_up=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", WIDE_TILES)
def test_every_tile_of_the_wgmma_kernel(cuda, tile, num_bits, dtype):
    need_kernel("sm90")
    check_every_split(WIDE_CASES, tile, WIDE_SPLITS, num_bits, dtype, cuda, packed_up=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "rank"), [(3, 24), (9, 64)])
def test_blocks_that_walk_over_output_tiles(cuda, tile, m, rank):
    """A block asks for its rows of `up` again for every output tile."""
    need_kernel("decode")
    check_walk(Corrected(34008, 192, rank, 64, device=cuda, bias=True, packed_up=True), 34008, m, tile)


@pytest.mark.gpu
def test_every_number_of_tokens_and_every_rank(cuda):
    need_kernel("decode")
    a = smt.activations(130, 1088, dtype=torch.float16, device=cuda)
    for rank in (*range(8, 137, 8), 1, 17, 100, 192):
        layer = Corrected(520, 1088, rank, device=cuda, packed_up=True)
        for m in (*range(1, 20), 33, 64, 65, 130) if rank in (24, 64, 128) else (1, 5, 16, 40):
            plan = layer.plan(m)
            assert (plan.rank > 0) == (rank % 8 == 0)
            assert (plan.project_blocks > 0) == (m <= 16 and rank <= 128 and rank % 8 == 0)
            layer.check(layer(a[:m]), a[:m], f"{m} tokens, rank {rank}")


@pytest.mark.gpu
def test_the_kernels_add_exactly(cuda):
    """One-hot tokens and small whole numbers, so that every sum is exact and one wrong index shows."""
    need_kernel("decode")
    n, k, rank = 2312, 1152, 104
    layer = Corrected(n, k, rank, 128, device=cuda, packed_up=True)
    layer.codes = smt.coordinate_codes(n, k, 4).to(cuda)
    layer.scales = torch.ones(9, n, dtype=torch.float16, device=cuda)
    layer.packed = torch.ops.sparse_marlin.pack_24_weights(layer.codes, layer.scales, 128, 4)
    layer.down = (torch.arange(rank * k, device=cuda) % 7 - 3).view(rank, k).half()
    up = (torch.arange(n * rank, device=cuda) % 5 - 2).view(n, rank).to(torch.int8)
    scales = torch.ones(2, n, dtype=torch.float16, device=cuda)
    layer.pack_up(QuantizedWeight(spread_again(up), scales, 128, 4))
    assert torch.equal(layer.up, up.half())
    ran = set()
    for m in (13, 70):
        columns = torch.arange(m) * 89 % k
        a = smt.one_hot_activations(k, columns, torch.float16).to(cuda)
        wanted = layer.codes.float().t()[columns] + layer.down.float().t()[columns] @ layer.up.float().t()
        assert wanted.abs().max() <= 2048
        for tile in (*TILES, *WIDE_TILES):
            for splits in (-1, 1, 2, 3):
                if not layer.fits(m, tile, splits):
                    continue
                assert_same_on_gpu(layer.by(a, tile, splits), wanted.half(), f"tile {tile}, splits {splits}, m={m}")
                ran.add((_core.TILES[tile].kernel, splits))
    assert ran == {("decode", 1), ("decode", 2), ("decode", 3), *(("sm90", s) for s in (-1, 1, 2, 3))}


def spread_again(codes: torch.Tensor) -> torch.Tensor:
    """The columns of the format's description, written down once more: rank r of 64 in column r or 64 + r."""
    n, rank = codes.shape
    wide = codes.new_zeros(n, 128 * -(-rank // 64))
    for r in range(rank):
        wide[:, r // 64 * 128 + r % 64 + (0 if r % 4 < 2 else 64)] = codes[:, r]
    return wide


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16, 32, 300])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)])
def test_fifty_runs_of_real_layers(cuda, n, k, m):
    need_kernel("decode")
    layer = Corrected(n, k, 64, device=cuda, packed_up=True)
    a = smt.activations(m, k, dtype=torch.float16, device=cuda)
    assert layer.plan(m).rank == 64
    got = layer(a)
    layer.check(got, a, "operator")
    layer.check(layer.by(a, -1), a, "products")
    for run in range(50):
        assert_same_on_gpu(layer(a), got, f"run {run}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 48])
def test_a_graph_replayed_with_changing_inputs(cuda, m):
    need_kernel("decode")
    layers = [Corrected(4096, 4096, 64, device=cuda, packed_up=True, seed=seed) for seed in (0, 1)]
    inputs = [smt.activations(m, 4096, dtype=torch.float16, seed=seed, device=cuda) for seed in range(5)]

    def run(a: torch.Tensor) -> list[torch.Tensor]:
        first = layers[0](a)
        return [first, layers[1](first.mul(0.01)), layers[1](a)]

    wanted = [run(a) for a in inputs]
    static = inputs[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run(static)
    for replay in range(50):
        static.copy_(inputs[replay % 5])
        graph.replay()
        if replay % 7 == 0:
            graph.replay()
        for i, out in enumerate(outs):
            assert_same_on_gpu(out, wanted[replay % 5][i], f"replay {replay}, call {i}")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, 40])
@pytest.mark.parametrize("last", ["a", "down", "up_packed", "up_scales"])
def test_inputs_written_right_before(cuda, last, m):
    """The factors and the activations are read before the multiplication has finished: not before they are written."""
    need_kernel("decode")
    n, k, rank = 4096, 4096, 64
    names = [name for name in ("a", "down", "up_packed", "up_scales") if name != last] + [last]
    layers = [Corrected(n, k, rank, device=cuda, seed=seed, packed_up=True) for seed in (0, 1)]
    contents, wanted = [], []
    for seed, layer in enumerate(layers):
        layer.packed, layer.scales = layers[0].packed, layers[0].scales
        a = smt.activations(m, k, dtype=torch.float16, seed=seed, device=cuda)
        contents.append({"a": a, **{name: getattr(layer, name) for name in names if name != "a"}})
        wanted.append(layer(a))
    assert not torch.equal(*wanted)
    now = {name: tensor.clone() for name, tensor in contents[0].items()}
    torch.cuda._sleep(20_000_000)
    got = []
    for i in range(100):
        for name in names:
            torch.mul(contents[i % 2][name], 1, out=now[name])
        got.append(
            OP(now["a"], layers[0].packed, layers[0].scales, now["down"], now["up_packed"], up_scales=now["up_scales"])
        )
    for i, out in enumerate(got):
        assert_same_on_gpu(out, wanted[i % 2], f"call {i}")
