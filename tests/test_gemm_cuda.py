"""What only a GPU can get wrong: every compiled tile and split, streams, graphs, devices, repeatability."""

import pytest
import torch
from test_gemm import Layer

from sparse_marlin import _core, pack_24_weights
from sparse_marlin import testing as smt
from sparse_marlin.info import planner_device

pytestmark = pytest.mark.gpu

HALVES = [torch.float16, torch.bfloat16]
# (m, n, k, group): one tile or less, odd everything, several tiles with a ragged end, a split's worth of k.
SHAPES = [(1, 64, 128, 128), (9, 65, 132, 32), (70, 200, 1028, 64), (130, 576, 576, -1), (300, 264, 2048, 256)]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_of(layer: Layer, m: int) -> _core.Problem:
    n, k = layer.codes.shape
    return _core.Problem(
        m, n, k, layer.group_size, layer.num_bits, dtype_name(layer.scales.dtype), layer.bias is not None
    )


def run_tile(layer: Layer, a: torch.Tensor, tile: int, splits: int) -> torch.Tensor:
    return torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
        a, layer.packed, layer.scales, layer.group_size, layer.num_bits, layer.bias, tile, splits
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("tile", range(len(_core.TILES)))
def test_every_tile_with_every_split(cuda, tile, num_bits, dtype):
    device = planner_device(torch.cuda.current_device())
    ran = 0
    for i, (m, n, k, group) in enumerate(SHAPES):
        layer = Layer(n, k, group, num_bits, dtype, cuda, bias=i % 2 == 0)
        a = smt.activations(m, k, dtype=dtype, device=cuda)
        for splits in (1, 2, 3):
            try:
                _core.plan_with_tile(problem_of(layer, m), device, tile, splits)
            except ValueError:
                continue
            with smt.poisoned_allocations(cuda):
                got = run_tile(layer, a, tile, splits)
            layer.check(got, a, f"tile {tile}, splits {splits}, m={m} n={n} k={k} group={group}")
            smt.assert_same_bits(run_tile(layer, a, tile, splits), got, f"second run of tile {tile}, splits {splits}")
            ran += 1
    assert ran > 0, f"tile {tile} fits no shape of the test: {_core.TILES[tile]}"


@pytest.mark.parametrize("num_bits", _core.NUM_BITS)
@pytest.mark.parametrize("group_size", _core.GROUP_SIZES)
def test_every_tile_reads_the_weights_it_should(cuda, group_size, num_bits):
    """One-hot tokens, coordinate codes and power-of-two scales: exact, so every tile must give the same bits."""
    n, k, m = 150, 644, 65
    device = planner_device(torch.cuda.current_device())
    codes = smt.coordinate_codes(n, k, num_bits)
    scales = smt.group_scales(n, k, group_size, torch.float16)
    layer = Layer(4, 4)
    layer.codes, layer.scales, layer.bias = codes.to(cuda), scales.to(cuda), None
    layer.group_size, layer.num_bits = group_size, num_bits
    layer.packed = pack_24_weights(layer.codes, layer.scales, group_size, num_bits)
    columns = torch.arange(m) * 11 % k
    a = smt.one_hot_activations(k, columns, torch.float16).to(cuda)
    wanted = smt.dequantized(codes, scales, group_size).t()[columns].contiguous()
    for tile in range(len(_core.TILES)):
        for splits in (1, 2, 3):
            try:
                _core.plan_with_tile(problem_of(layer, m), device, tile, splits)
            except ValueError:
                continue
            smt.assert_same_bits(run_tile(layer, a, tile, splits), wanted, f"tile {tile}, splits {splits}")


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
