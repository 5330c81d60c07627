"""A low-rank correction in the decode kernel's launch: every tile and split, walks, tokens and ranks, graphs, chains,
streams, inputs written right before. What holds on every device is in test_low_rank.py."""

from collections.abc import Callable

import pytest
import torch
from test_gemm_cuda import assert_same_on_gpu, need_kernel
from test_launch_cuda import check_chain
from test_low_rank import CASES, HALVES, NAME, OP, OTHERS, SPLITS, TILES, Corrected

from sparse_marlin import _core
from sparse_marlin import testing as smt


def check_every_split(cases, tile, splits, num_bits, dtype, cuda, packed_up=False) -> None:
    ran = 0
    for i, (m, n, k, rank, group_size) in enumerate(cases):
        layer = Corrected(n, k, rank, group_size, num_bits, dtype, cuda, bias=i % 2 == 0, packed_up=packed_up)
        a = smt.activations(m, k, dtype=dtype, device=cuda)
        for some in splits:
            if not layer.fits(m, tile, some):
                continue
            assert layer.plan(m, tile, some).tail == (-(-rank // 64) if packed_up else 0)
            what = f"tile {tile}, splits {some}, m={m} n={n} k={k} rank={rank} group={group_size}"
            check_repeated(layer, a, tile, some, 3, what)
            ran += 1
    assert ran > 0, f"tile {tile} fits no case"


def check_repeated(layer: Corrected, a: torch.Tensor, tile: int, splits: int, runs: int, what: str) -> None:
    with smt.poisoned_allocations(a.device, megabytes=1):
        got = layer.by(a, tile, splits)
    layer.check(got, a, what)
    for run in range(runs):
        assert_same_on_gpu(layer.by(a, tile, splits, run % 2 == 0), got, f"run {run} of {what}")


def check_walk(layer: Corrected, n: int, m: int, tile: int) -> None:
    """More output tiles than the GPU holds blocks at once."""
    plan = layer.plan(m, tile, 1)
    assert -(-n // _core.TILES[tile].block_n) * -(-m // _core.TILES[tile].block_m) > plan.grid - plan.project_blocks
    a = smt.activations(m, 192, dtype=torch.float16, device=layer.packed.device)
    check_repeated(layer, a, tile, 1, 10, f"tile {tile}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_with_every_split(cuda, tile, num_bits, dtype):
    need_kernel("decode")
    check_every_split(CASES, tile, SPLITS, num_bits, dtype, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("m", "rank"), [(3, 24), (9, 64)])
def test_blocks_that_walk_over_output_tiles(cuda, tile, m, rank):
    """A block asks for its rows of `up` again for every output tile."""
    need_kernel("decode")
    layer = Corrected(34001, 192, rank, 64, device=cuda, bias=True)
    if not layer.fits(m, tile, 1):
        assert m > 8, "only many tokens leave a tile no room"
        pytest.skip("no room beside the factors")
    check_walk(layer, 34001, m, tile)


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
    ways = [(tile, splits) for tile in TILES for splits in SPLITS if layer.fits(m, tile, splits)]
    assert ways
    for tile, splits in ways:
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
@pytest.mark.parametrize("k", [4096, 14336])
def test_a_graph_replayed_with_changing_inputs(cuda, k, m):
    """The same token and the same workspace every time: what a replay leaves must not be taken for the next one's."""
    need_kernel("decode")
    layer = Corrected(4096, k, 64, device=cuda)
    assert layer.plan(m).behind == (k == 14336)
    inputs = [smt.activations(m, k, dtype=torch.float16, seed=seed, device=cuda) for seed in range(5)]
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


SPIN_BYTES = 100 << 10  # of shared memory: an SM has room for one of them and one of ours
SPIN = """
__device__ long long now() {
  long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}
extern "C" __global__ void spin(int ms) {
  const long long end = now() + ms * 1000000LL;
  while (now() < end) {
  }
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
def test_blocks_that_project_and_find_no_place(cuda, m):
    """They come behind those that multiply, and another kernel leaves each SM one place: those that multiply do without
    them, with the same bits, and what comes too late is not there for the next replay."""
    need_kernel("decode")
    layer = Corrected(4096, 14336, 64, device=cuda)
    plan = layer.plan(m)
    sms = torch.cuda.get_device_properties(cuda).multi_processor_count
    assert plan.behind
    assert plan.grid > sms, "one place on each is not enough for all"
    inputs = [smt.activations(m, 14336, dtype=torch.float16, seed=seed, device=cuda) for seed in range(3)]
    wanted = [layer(a) for a in inputs]
    static = inputs[0].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [layer(static) for _ in range(3)]
    spin = torch.cuda._compile_kernel(SPIN, "spin")
    spin.set_shared_memory_config(SPIN_BYTES)
    beside, spun, done = torch.cuda.Stream(), torch.cuda.Event(), torch.cuda.Event()
    for replay in range(9):
        static.copy_(inputs[replay % 3])
        torch.cuda.synchronize()
        if replay % 3 != 1:
            spin((sms, 1, 1), (32, 1, 1), (500,), SPIN_BYTES, beside)
            spun.record(beside)
        graph.replay()
        done.record()
        done.synchronize()
        assert replay % 3 == 1 or not spun.query(), "it waited for the other kernel's end"
        for i, out in enumerate(outs):
            assert_same_on_gpu(out, wanted[replay % 3], f"replay {replay}, call {i}")


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

    check_chain(run, start)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
def test_two_streams_and_two_graphs_at_once(cuda, n, k, m):
    need_kernel("decode")
    layers = [Corrected(n, k, 64, device=cuda, seed=s) for s in (0, 1)]
    inputs = [smt.activations(m, k, dtype=torch.float16, seed=s, device=cuda) for s in (2, 3)]
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
