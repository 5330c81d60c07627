"""What only a GPU can get wrong between launches: streams, graphs, dependent launches, inputs written right before,
devices."""

from collections.abc import Callable

import pytest
import torch
from test_gemm import Layer
from test_gemm_cuda import HOPPER_WAYS, Way, assert_same_on_gpu, fits, has_kernel, need_kernel, run_tile

from sparse_marlin import pack_24_weights
from sparse_marlin import testing as smt

pytestmark = pytest.mark.gpu


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
        (Way("sm90", 32, 128, 1, 3, teams=2), Way("sm90", 64, 128, 1, 1, teams=2)),
        (Way("sm90", 128, 192, 1, 3), Way("sm90", 192, 192, 1, -1)),
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


def check_chain(run: Callable[..., torch.Tensor], start: Callable[[int], torch.Tensor]) -> None:
    """run(input, dependent, after_each), a chain of launches, gives the bits of one kernel at a time, with dependent
    launch and without, in a graph and without; start(seed) is an input."""
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
            assert wanted.std() > 1e-3, "all but zero, which would hide faults"
            torch.cuda._sleep(10_000_000)  # so that calls queue up and follow each other without a gap
            assert_same_on_gpu(run(static, True), wanted, "eager, dependent")
        for (graph, out), name in zip(graphs, ("dependent", "not dependent"), strict=True):
            graph.replay()
            assert_same_on_gpu(out, wanted, f"graph, {name}, replay {replay}")


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
    "teams": [
        Way("sm90", 32, 128, 1, 2, teams=2),
        Way("sm90", 64, 128, 1, 1, teams=2),
        Way("decode", 8, 64, 1, 1),
        Way("sm90", 48, 128, 2, 1, teams=2),
    ],
    "three consumers": [
        Way("sm90", 64, 192, 1, 3),
        Way("sm90", 128, 192, 1, -1),
        Way("sm90", 192, 192, 2, 1),
        Way("sm90", 96, 192, 1, 1),
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

    check_chain(run, lambda seed: smt.activations(m, widths[0], dtype=torch.float16, seed=seed, device=cuda))


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
