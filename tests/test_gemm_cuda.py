"""What only a GPU can get wrong: every compiled tile and split, streams, graphs, dependent launches, devices,
repeatability."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from test_gemm import Layer

from sparse_marlin import _core, pack_24_weights
from sparse_marlin import testing as smt
from sparse_marlin.info import planner_device

pytestmark = pytest.mark.gpu

HALVES = [torch.float16, torch.bfloat16]
# (m, n, k, group): one tile or less, odd everything (rows of the output that no tensor copy can store, activations and
# scales that no asynchronous copy can read), several tiles with a ragged end, a split's worth of k.
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

    @property
    def tile(self) -> int:
        wanted = tuple(self[:4])
        return next(i for i, t in enumerate(_core.TILES) if (t.kernel, t.block_m, t.block_n, t.share) == wanted)

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


def test_the_current_stream_is_used(cuda):
    """The input is written late on a side stream; work on any other stream would read it too early."""
    layer = Layer(192, 1024, device=cuda)
    a = smt.activations(33, 1024, dtype=torch.float16, device=cuda)
    wanted = layer(a)
    late = torch.zeros_like(a)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(a)
        got = layer(late)
        copy = got.clone()
    stream.synchronize()
    smt.assert_same_bits(copy, wanted)


@pytest.mark.parametrize("m", [1, 40])
def test_two_streams_at_once(cuda, m):
    """Many calls in flight on two streams, each with its own workspace."""
    layers = [Layer(256, 4096, dtype=torch.float16, device=cuda, seed=s) for s in (0, 1)]
    inputs = [smt.activations(m, 4096, dtype=torch.float16, seed=s, device=cuda) for s in (2, 3)]
    wanted = [layer(a) for layer, a in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(layers[i](inputs[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        for run, out in enumerate(got[i]):
            smt.assert_same_bits(out, wanted[i], f"stream {i}, run {run}")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Way("sm90", 16, 256, 1, 8), Way("sm90", 64, 256, 1, 4)),
        (Way("sm90", 128, 256, 2, 1), Way("sm90", 32, 128, 1, 3)),
        (Way("sm90", 176, 256, 1, 1), Way("sm80", 64, 128, 1, 3)),
        (Way("sm90", 64, 128, 1, -2), Way("sm90", 128, 128, 1, -1)),
        (Way("sm90", 176, 256, 1, -1), Way("sm90", 176, 256, 1, -1)),
        (Way("decode", 8, 64, 1, 1), Way("sm90", 32, 128, 1, 1)),
        (Way("decode", 8, 128, 1, 1), Way("decode", 16, 64, 1, 1)),
        (Way("decode", 16, 128, 1, 3), Way("sm90", 32, 128, 1, 4)),
    ],
    ids=str,
)
def test_two_streams_at_once_with_clusters(cuda, first, second):
    """Clusters of two kernels side by side on the GPU, and dependent launches on both streams."""
    need_kernel("sm90")
    ways = (first, second)
    layers = [Layer(1000, 2048, 64, dtype=torch.float16, device=cuda, seed=s) for s in (0, 1)]
    inputs = [smt.activations(130, 2048, dtype=torch.float16, seed=s, device=cuda) for s in (2, 3)]
    wanted = [run_tile(layer, a, way.tile, way.splits) for layer, a, way in zip(layers, inputs, ways, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(run_tile(layers[i], inputs[i], ways[i].tile, ways[i].splits))
    torch.cuda.synchronize()
    for i in (0, 1):
        layers[i].check(wanted[i], inputs[i], f"alone, stream {i}")
        for run, out in enumerate(got[i]):
            assert_same_on_gpu(out, wanted[i], f"stream {i}, run {run}")


# Every product is the next one's input. Neighbours of all kinds, with and without splits: those of the portable kernel
# add a kernel that sums the workspace.
CHAINS = {
    "stream-K": [
        Way("sm90", 16, 256, 1, -1),
        Way("sm90", 64, 128, 1, -2),
        Way("sm90", 128, 256, 1, -1),
        Way("sm90", 176, 256, 1, -1),
    ],
    "hopper": [
        Way("sm90", 16, 256, 1, 4),
        Way("sm90", 64, 128, 1, 3),
        Way("sm90", 32, 256, 1, 1),
        Way("sm90", 176, 256, 2, 1),
    ],
    "both": [
        Way("sm90", 64, 256, 1, 4),
        Way("sm80", 64, 128, 1, 3),
        Way("sm90", 128, 256, 2, 1),
        Way("sm80", 16, 128, 1, 1),
    ],
    "decode": [
        Way("decode", 8, 64, 1, 1),
        Way("sm90", 32, 128, 1, 3),
        Way("decode", 16, 128, 1, 4),
        Way("sm80", 8, 64, 1, 4),
    ],
    "decode only": [
        Way("decode", 8, 128, 1, 1),
        Way("decode", 16, 64, 1, 1),
        Way("decode", 8, 64, 1, 2),
        Way("decode", 16, 128, 1, 5),
    ],
    "portable": [
        Way("sm80", 8, 64, 1, 4),
        Way("sm80", 32, 128, 1, 1),
        Way("sm80", 16, 256, 1, 2),
        Way("sm80", 64, 64, 1, 3),
    ],
}
# Features between the layers. The second list makes every kernel read aligned copies of its inputs, made right before;
# it is not for the decode kernel, which takes multiples of 64 only.
WIDTHS = [(1024, 1536, 512, 768), (1028, 1540, 516, 772)]


@pytest.mark.parametrize("m", [1, 150])
@pytest.mark.parametrize("widths", WIDTHS, ids=["multiples of 8", "others"])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_of_dependent_launches(cuda, chain, widths, m):
    """A kernel that starts before its predecessor has finished must not notice: the same bits as one kernel at a time,
    in a graph and without. Outputs and workspaces are memory that a call or two before has just let go of."""
    ways = CHAINS[chain]
    for way in ways:
        need_kernel(way.kernel)
        if way.kernel == "decode" and widths[0] % 64 != 0:
            pytest.skip("the decode kernel takes multiples of 64 in features")
    layers = [
        Layer(widths[(i + 1) % 4], widths[i], (128, 32, -1, 64)[i], (4, 8)[i % 2], device=cuda, bias=i % 2 == 0, seed=i)
        for i in range(4)
    ]

    def run(x: torch.Tensor, dependent: bool, after_each: Callable[[], None] = lambda: None) -> torch.Tensor:
        for _ in range(3):
            for layer, way in zip(layers, ways, strict=True):
                splits = way.splits if fits(layer, m, way.tile, way.splits) else 1
                x = run_tile(layer, x, way.tile, splits, dependent)
                after_each()
            x = x.mul(1 / 1024)  # back to the size it had, by a kernel that knows nothing of dependent launches
        return x

    static = smt.activations(m, widths[0], dtype=torch.float16, device=cuda)
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
            static.copy_(smt.activations(m, widths[0], dtype=torch.float16, seed=replay, device=cuda))
            wanted = run(static, False, torch.cuda.synchronize)
            assert wanted.isfinite().all()
            assert wanted.std() > 1e-3, "all but zero, which would hide faults"
            torch.cuda._sleep(10_000_000)  # so that calls queue up and follow each other without a gap
            assert_same_on_gpu(run(static, True), wanted, "eager, dependent")
        for (graph, out), name in zip(graphs, ("dependent", "not dependent"), strict=True):
            graph.replay()
            assert_same_on_gpu(out, wanted, f"graph, {name}, replay {replay}")


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("last", ["packed", "scales", "bias", "a"])
def test_inputs_written_right_before(cuda, last, captured):
    """Weights are read before the kernel before has finished, where that kernel lets it: never one that wrote them. All
    inputs change between two calls, `last` by the very kernel before, or by the one before another multiplication."""
    m, n, k = 16, 2048, 2048
    ways = [
        way for way in [*HOPPER_WAYS, Way("sm80", 16, 128, 1, 1), Way("sm80", 8, 64, 1, 4)] if has_kernel(way.kernel)
    ]
    names = [name for name in ("packed", "scales", "bias", "a") if name != last] + [last]
    contents = []
    for seed in (0, 1):
        layer = Layer(n, k, 64, device=cuda, bias=True, seed=seed)
        a = smt.activations(m, k, dtype=torch.float16, seed=seed, device=cuda)
        contents.append({"packed": layer.packed, "scales": layer.scales, "bias": layer.bias, "a": a})
    now = {name: tensor.clone() for name, tensor in contents[0].items()}
    other = Layer(256, 256, device=cuda)
    other_a = smt.activations(1, 256, dtype=torch.float16, device=cuda)

    def multiply(inputs: dict[str, torch.Tensor], way: Way, dependent: bool = True) -> torch.Tensor:
        return torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
            inputs["a"], inputs["packed"], inputs["scales"], 64, 4, inputs["bias"], way.tile, way.splits, dependent
        )

    def calls(way: Way, count: int) -> list[torch.Tensor]:
        got = []
        for i in range(count):
            for name in names:
                if i // 2 % 2 == 0:
                    now[name].copy_(contents[i % 2][name])
                else:  # by a kernel, where copy_ may be the copy engine's
                    torch.mul(contents[i % 2][name], 1, out=now[name])
            if i // 4 % 2 == 1:
                run_tile(other, other_a, way.tile, 1)
            got.append(multiply(now, way))
        return got

    for way in ways:
        wanted = []
        for inputs in contents:
            torch.cuda.synchronize()
            wanted.append(multiply(inputs, way, dependent=False))
        assert not torch.equal(*wanted)
        torch.cuda._sleep(20_000_000)  # so that calls queue up and follow each other without a gap
        got = calls(way, 24 if captured else 200)
        if captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = calls(way, 24)
        for replay in range(8 if captured else 1):
            if captured:
                graph.replay()
            for i, out in enumerate(got):
                assert_same_on_gpu(out, wanted[i % 2], f"{way}, replay {replay}, call {i}")


@pytest.mark.parametrize("m", [1, 17, 300])
def test_graph_replay(cuda, m):
    layer = Layer(576, 2048, dtype=torch.float16, device=cuda, bias=True)
    static = smt.activations(m, 2048, dtype=torch.float16, device=cuda)
    layer(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(static)
    for replay in range(100):
        if replay % 25 == 0:
            static.copy_(smt.activations(m, 2048, dtype=torch.float16, seed=replay, device=cuda))
            wanted = layer(static)
        graph.replay()
        smt.assert_same_bits(out, wanted, f"replay {replay}")


def test_packing_on_a_side_stream(cuda):
    codes, scales = smt.random_codes(256, 1024), smt.random_scales(256, 1024)
    wanted = pack_24_weights(codes, scales)
    late = torch.zeros_like(codes, device=cuda)
    ready = codes.to(cuda)
    device_scales = scales.to(cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(ready)
        packed = pack_24_weights(late, device_scales)
        smt.assert_same_bits(packed, wanted, "packed")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device_than_the_current_one():
    other = torch.device("cuda", 1)
    layer = Layer(200, 1024, dtype=torch.float16, device=other, bias=True)
    a = smt.activations(20, 1024, dtype=torch.float16, device=other)
    assert torch.cuda.current_device() == 0
    got = layer(a)
    assert got.device == other
    assert torch.cuda.current_device() == 0
    layer.check(got, a)
    first = Layer(200, 1024, dtype=torch.float16, device=torch.device("cuda", 0), bias=True)
    smt.assert_same_bits(first(a.to("cuda:0")), got, "the other device")


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
