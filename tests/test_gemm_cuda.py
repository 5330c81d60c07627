"""What only a GPU can get wrong in one multiplication: every compiled tile and split, walks over many tiles,
repeatability, sizes. What it can get wrong between launches is in test_launch_cuda.py."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from test_gemm import Layer

from sparse_marlin import _core, pack_24_weights
from sparse_marlin import testing as smt
from sparse_marlin.info import planner_device

pytestmark = pytest.mark.gpu

HALVES = [torch.float16, torch.bfloat16]
# (m, n, k, group): one tile or less, odd everything (rows of the output that cannot be stored 16 bytes at a time,
# activations and scales that no asynchronous copy can read), several tiles with a ragged end, a split's worth of k.
SHAPES = [
    (1, 64, 128, 128),
    (9, 65, 132, 32),
    (11, 203, 1088, 64),
    (70, 203, 1028, 64),
    (130, 576, 576, -1),
    (300, 264, 2048, 256),
]
# Of which a tile takes those that it has the columns and the room for. In the kernels for Hopper every number is
# another cluster, with its own division of the sums; negative ones are stream-K, with so many blocks an SM.
SPLITS = {"sm80": (1, 2, 3), "sm90": (-2, -1, 1, 2, 3, 4, 5, 8), "decode": (1, 2, 3, 5, 8)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_of(layer: Layer, m: int) -> _core.Problem:
    n, k = layer.codes.shape
    return _core.Problem(
        m, n, k, layer.group_size, layer.num_bits, dtype_name(layer.scales.dtype), layer.bias is not None
    )


def run_tile(layer: Layer, a: torch.Tensor, tile: int, splits: int, dependent: bool = True) -> torch.Tensor:
    return torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
        a, layer.packed, layer.scales, layer.group_size, layer.num_bits, layer.bias, tile, splits, dependent
    )


def fits(layer: Layer, m: int, tile: int, splits: int) -> bool:
    try:
        _core.plan_with_tile(problem_of(layer, m), planner_device(torch.cuda.current_device()), tile, splits)
    except ValueError:
        return False
    return True


def plans(layer: Layer, m: int) -> Iterator[tuple[int, int]]:
    """(tile, splits) that can run here."""
    for i, tile in enumerate(_core.TILES):
        yield from ((i, splits) for splits in SPLITS[tile.kernel] if fits(layer, m, i, splits))


def has_kernel(kernel: str) -> bool:
    device = planner_device(torch.cuda.current_device())
    return kernel == "sm80" or (device.compute_capability == 90 and device.hopper_kernels)


def need_kernel(kernel: str) -> None:
    if not has_kernel(kernel):
        pytest.skip("no GPU of compute capability 9.0, or built without native code for it")


class Way(NamedTuple):
    """A tile by what it is, and a number of splits."""

    kernel: str
    block_m: int
    block_n: int
    share: int
    splits: int
    teams: int = 1

    @property
    def tile(self) -> int:
        wanted = (*self[:4], self.teams)
        return next(
            i for i, t in enumerate(_core.TILES) if (t.kernel, t.block_m, t.block_n, t.share, t.teams) == wanted
        )

    def __str__(self) -> str:
        return "-".join(map(str, self))


HOPPER_WAYS = [
    Way("sm90", 16, 256, 1, 8),
    Way("sm90", 32, 128, 1, 3),
    Way("sm90", 64, 256, 1, 4),
    Way("sm90", 64, 128, 2, 1),
    Way("sm90", 128, 128, 1, 5),
    Way("sm90", 128, 256, 2, 1),
    Way("sm90", 176, 256, 1, 1),
    Way("sm90", 96, 128, 1, 3),
    Way("sm90", 160, 256, 2, 1),
    Way("sm90", 64, 192, 1, 4),
    Way("sm90", 128, 192, 1, 3),
    Way("sm90", 176, 192, 2, 1),
    Way("sm90", 192, 192, 1, 2),
    Way("sm90", 96, 192, 1, -1),
    Way("sm90", 32, 128, 1, 3, teams=2),
    Way("sm90", 48, 128, 2, 1, teams=2),
    Way("sm90", 64, 128, 1, 1, teams=2),
    Way("sm90", 32, 128, 1, -2),
    Way("sm90", 64, 256, 1, -1),
    Way("sm90", 128, 256, 1, -1),
    Way("sm90", 176, 256, 1, -1),
    Way("decode", 8, 64, 1, 1),
    Way("decode", 8, 64, 1, 3),
    Way("decode", 16, 128, 1, 1),
    Way("decode", 16, 128, 1, 4),
]


def assert_same_on_gpu(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """assert_same_bits of 16-bit values, without bringing equal tensors to the CPU."""
    if not torch.equal(got.view(torch.int16), wanted.view(torch.int16)):
        smt.assert_same_bits(got, wanted, what)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", range(len(_core.TILES)))
def test_every_tile_with_every_split(cuda, tile, num_bits, dtype):
    need_kernel(_core.TILES[tile].kernel)
    ran = 0
    for i, (m, n, k, group) in enumerate(SHAPES):
        layer = Layer(n, k, group, num_bits, dtype, cuda, bias=i % 2 == 0)
        a = smt.activations(m, k, dtype=dtype, device=cuda)
        for splits in SPLITS[_core.TILES[tile].kernel]:
            if not fits(layer, m, tile, splits):
                continue
            with smt.poisoned_allocations(cuda):
                got = run_tile(layer, a, tile, splits)
            layer.check(got, a, f"tile {tile}, splits {splits}, m={m} n={n} k={k} group={group}")
            smt.assert_same_bits(run_tile(layer, a, tile, splits), got, f"second run of tile {tile}, splits {splits}")
            ran += 1
    assert ran > 0, f"tile {tile} fits no shape of the test: {_core.TILES[tile]}"


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("group_size", _core.GROUP_SIZES)
@pytest.mark.parametrize("k", [644, 704])
def test_every_tile_reads_the_weights_it_should(cuda, k, group_size, num_bits):
    """One-hot tokens, coordinate codes and power-of-two scales: exact, so every tile must give the same bits."""
    n, m = 150, 65
    codes = smt.coordinate_codes(n, k, num_bits)
    scales = smt.group_scales(n, k, group_size, torch.float16)
    layer = Layer(4, 4)
    layer.codes, layer.scales, layer.bias = codes.to(cuda), scales.to(cuda), None
    layer.group_size, layer.num_bits = group_size, num_bits
    layer.packed = pack_24_weights(layer.codes, layer.scales, group_size, num_bits)
    columns = torch.arange(m) * 11 % k
    a = smt.one_hot_activations(k, columns, torch.float16).to(cuda)
    wanted = smt.dequantized(codes, scales, group_size).t()[columns].contiguous()
    for tile, splits in plans(layer, m):
        smt.assert_same_bits(run_tile(layer, a, tile, splits), wanted, f"tile {tile}, splits {splits}")


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize(("n", "group_size"), [(9000, 128), (8997, 32), (9004, -1)])
@pytest.mark.parametrize("kernel", ["sm90", "decode"])
def test_blocks_that_walk_over_many_tiles(cuda, kernel, n, group_size, num_bits):
    """More output tiles than the GPU holds at once: what a block leaves behind, sums, stages, staged outputs, must not
    reach its next tile. One-hot tokens again, and a bias: products are exact, with one rounding at the end."""
    need_kernel("sm90")
    m, k = (2003, 260) if kernel == "sm90" else (301, 320)
    codes, scales = smt.coordinate_codes(n, k, num_bits), smt.group_scales(n, k, group_size, torch.float16)
    layer = Layer(4, 4)
    layer.codes, layer.scales = codes.to(cuda), scales.to(cuda)
    layer.bias = (torch.arange(n, device=cuda) % 61 - 30).to(torch.float16)
    layer.group_size, layer.num_bits = group_size, num_bits
    layer.packed = pack_24_weights(layer.codes, layer.scales, group_size, num_bits)
    columns = torch.arange(m) * 11 % k
    a = smt.one_hot_activations(k, columns, torch.float16).to(cuda)
    weight = smt.dequantized(layer.codes, layer.scales, group_size, torch.float32)
    wanted = (weight.t()[columns.to(cuda)] + layer.bias.float()).to(torch.float16)
    for tile, splits in plans(layer, m):
        if _core.TILES[tile].kernel == kernel:
            with smt.poisoned_allocations(cuda):
                got = run_tile(layer, a, tile, splits)
            assert_same_on_gpu(got, wanted, f"tile {tile}, splits {splits}")


def test_a_tile_that_does_not_exist_is_refused(cuda):
    layer = Layer(64, 128, device=cuda)
    a = smt.activations(1, 128, dtype=torch.float16, device=cuda)
    with pytest.raises(RuntimeError, match=r"sparse_marlin_gemm: a: .*tile"):
        run_tile(layer, a, len(_core.TILES), 1)


@pytest.mark.parametrize("m", [1, 16, 200])
def test_the_same_bits_fifty_times(cuda, m):
    layer = Layer(576, 2048, dtype=torch.bfloat16, device=cuda)
    a = smt.activations(m, 2048, dtype=torch.bfloat16, device=cuda)
    first = layer(a)
    for i in range(50):
        smt.assert_same_bits(layer(a), first, f"run {i}")


@pytest.mark.parametrize("way", HOPPER_WAYS, ids=str)
def test_the_same_bits_a_hundred_times(cuda, way):
    need_kernel(way.kernel)
    layer = Layer(1104, 2048, 64, dtype=torch.bfloat16, device=cuda, bias=True)
    m = 20 if way.kernel == "decode" and way.splits > 1 else 300  # it splits only what is all resident
    a = smt.activations(m, 2048, dtype=torch.bfloat16, device=cuda)
    with smt.poisoned_allocations(cuda):
        first = run_tile(layer, a, way.tile, way.splits)
    layer.check(first, a, str(way))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_tile(layer, a, way.tile, way.splits)
    for i in range(100):
        out.fill_(float("nan"))
        graph.replay()
        assert_same_on_gpu(out, first, f"replay {i}")


def test_a_large_batch(cuda):
    """65536 tokens: past 2^31 bytes of output, where 32-bit byte offsets would wrap."""
    layer = Layer(17408, 256, dtype=torch.float16, device=cuda)
    a = smt.activations(256, 256, dtype=torch.float16, device=cuda)
    wanted = layer(a)
    layer.check(wanted, a)
    got = layer(a.repeat(256, 1))
    assert got.numel() * got.element_size() > 2**31
    assert torch.equal(got.view(256, 256, -1)[0], got.view(256, 256, -1)[255])
    tail = got[-256:]
    layer.check(tail, a, "the last tokens")
