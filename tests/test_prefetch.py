"""The hint that names the next weights: results stay what they are, bit for bit, and the layers learn their order."""

import copy
import io
import pickle

import pytest
import torch
from test_errors import error, matches
from test_gemm import Layer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, pack_24_weights
from sparse_marlin import testing as smt

OP = torch.ops.sparse_marlin.sparse_marlin_gemm_prefetch
NAME = "sparse_marlin_gemm_prefetch"


def arguments(layer, a, following):
    return a, layer.packed, layer.scales, following, layer.group_size, layer.num_bits, layer.bias


def following_weights(device):
    """What may come next: larger and smaller, 8 bits, slices along both dimensions, nothing at all."""
    small, large = Layer(65, 132, num_bits=8, device=device), Layer(640, 4096, device=device)
    yield from (small.packed, large.packed, large.packed[3:7], large.packed[:, 96:], large.packed[:0])
    yield torch.zeros(5, 3, dtype=torch.int32, device=device)


@pytest.mark.parametrize("m", [0, 1, 3, 8, 16, 17, 64, 200])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_result_is_that_of_the_multiplication(device, m, num_bits):
    layer = Layer(520, 1088, 64, num_bits, torch.bfloat16, device, bias=True)
    a = smt.activations(m, 1088, dtype=torch.bfloat16, device=device)
    wanted = layer(a)
    for following in following_weights(device):
        before = following.clone()
        with smt.poisoned_allocations(device, megabytes=1):
            got = OP(*arguments(layer, a, following))
        assert got.shape == (m, 520)
        smt.assert_same_bits(got, wanted, f"{m} tokens, next {list(following.shape)}")
        assert torch.equal(following, before)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("m", [1, 7, 16, 48])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (4096, 14336)])
def test_real_layers_in_a_graph(cuda, n, k, m, rank):
    """Several megabytes are asked for, of weights that the next launch reads."""
    layers = [Layer(n, k, device=cuda, seed=i) for i in range(3)]
    a = smt.activations(m, k, dtype=torch.float16, device=cuda)
    factors = [smt.activations(*size, dtype=torch.float16, device=cuda) * 0.05 for size in ((rank, k), (n, rank))]

    def run(layer, following):
        if not rank:
            return layer(a) if following is None else OP(*arguments(layer, a, following))
        return torch.ops.sparse_marlin.sparse_marlin_gemm_low_rank(
            a, layer.packed, layer.scales, *factors, layer.group_size, layer.num_bits, layer.bias, following
        )

    wanted = [run(layer, None) for layer in layers]
    if not rank:
        layers[0].check(wanted[0], a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [run(layer, after.packed) for layer, after in zip(layers, layers[1:] + layers[:1], strict=True)]
    for replay in range(10):
        for out in got:
            out.fill_(torch.nan)
        graph.replay()
        for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
            smt.assert_same_bits(x, y, f"replay {replay}, layer {i}")


BAD = {
    "dtype": (lambda t: t.long(), "int32", "int64"),
    "dimensions": (lambda t: t[0], "2 dimensions", r"\["),
    "none": (lambda t: None, "a tensor", "None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_next_weight_is_refused(device, case):
    spoil, expected, got = BAD[case]
    layer = Layer(65, 128, device=device)
    a = smt.activations(2, 128, dtype=torch.float16, device=device)
    matches(error(OP, *arguments(layer, a, spoil(layer.packed))), NAME, "next_packed", expected, got)


def test_other_errors_bear_its_name(device):
    layer = Layer(65, 128, device=device)
    a = smt.activations(2, 128, dtype=torch.float16, device=device)
    text = error(OP, a, layer.packed, layer.scales.float(), layer.packed)
    matches(text, NAME, "scales", "float16", "float32")


@pytest.mark.gpu
def test_a_next_weight_on_another_device_is_refused(cuda):
    layer = Layer(65, 128, device=cuda)
    a = smt.activations(2, 128, dtype=torch.float16, device=cuda)
    matches(error(OP, *arguments(layer, a, layer.packed.cpu())), NAME, "next_packed", "cuda:0", "cpu")


def test_gradients_are_those_of_the_multiplication(device):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layer = Layer(70, 132, 32, 4, dtype, device, bias=True)
    layer.bias.requires_grad_()
    a = smt.activations(5, 132, dtype=dtype, device=device).requires_grad_()
    upstream = smt.activations(5, 70, dtype=dtype, seed=5, device=device)
    got = torch.autograd.grad(OP(*arguments(layer, a, layer.packed)), (a, layer.bias), upstream)
    wanted = torch.autograd.grad(layer(a), (a, layer.bias), upstream)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_autocast_casts_what_has_values(device):
    layer = Layer(64, 128, dtype=torch.bfloat16, device=device)
    a = smt.activations(3, 128, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = OP(*arguments(layer, a, layer.packed))
    smt.assert_same_bits(got, layer(a.bfloat16()), "autocast")


# --- layers -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Layers that are defined in another order than they run in, a dense one between them."""

    def __init__(self, device="cpu", dtype=torch.float16):
        super().__init__()
        self.down = self.layer(192, 128, device, dtype, 1)
        self.up = self.layer(128, 192, device, dtype, 0)
        self.head = self.layer(128, 64, device, dtype, 2)
        self.dense = nn.Linear(192, 192, device=device, dtype=dtype)

    @staticmethod
    def layer(k, n, device, dtype, seed):
        codes = smt.random_codes(n, k, 4, seed, device)
        scales = smt.random_scales(n, k, 64, dtype, seed, device)
        return SparseMarlinLinear.from_codes(codes, scales, group_size=64)

    def forward(self, x):
        return self.head(self.down(self.dense(self.up(x)).relu()))


class Called(TorchDispatchMode):
    """The names of our operators, in the order of their calls."""

    def __init__(self, arguments=None):
        super().__init__()
        self.names: list[str] = []
        self.arguments = arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_marlin":
            self.names.append(func._schema.name.removeprefix("sparse_marlin::"))
            if self.arguments is not None:
                self.arguments.append(args)
        return func(*args, **(kwargs or {}))


def called(model, x) -> tuple[torch.Tensor, list[str]]:
    with torch.no_grad(), Called() as calls:
        out = model(x)
    return out, calls.names


PLAIN, HINTED, CORRECTED = "sparse_marlin_gemm", NAME, "sparse_marlin_gemm_low_rank"


def test_layers_learn_who_comes_next(device):
    model = Block(device)
    x = smt.activations(2, 128, dtype=torch.float16, device=device)
    wanted, names = called(model, x)
    assert names == [PLAIN] * 3
    keys = list(model.state_dict())
    assert sparse_marlin.enable_prefetch(model, lambda: model(x)) == 2
    assert model.up._following == (model.down,)
    assert model.down._following == (model.head,)
    got, names = called(model, x)
    assert names == [HINTED, HINTED, PLAIN]
    smt.assert_same_bits(got, wanted, "with the hint")
    assert list(model.state_dict()) == keys
    assert len(list(model.modules())) == 5, "the follower must not become a submodule"
    sparse_marlin.disable_prefetch(model)
    assert called(model, x)[1] == [PLAIN] * 3


def test_moved_layers_keep_their_followers():
    model = Block()
    x = smt.activations(2, 128, dtype=torch.float16)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    model.to(torch.bfloat16)
    assert called(model, x.bfloat16())[1] == [HINTED, HINTED, PLAIN]
    model.head.to("meta")
    assert called(model.down, torch.zeros(1, 192, dtype=torch.bfloat16))[1] == [PLAIN], "a follower on another device"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_know_no_followers(how):
    model = Block()
    x = smt.activations(2, 128, dtype=torch.float16)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    for copied in (how(model), how(model.up)):
        assert all(m._following == () for m in copied.modules() if isinstance(m, SparseMarlinLinear))
    assert called(how(model), x)[1] == [PLAIN] * 3
    assert model.up._following == (model.down,), "the original keeps them"


def test_a_layer_pickled_before_there_were_followers():
    layer = Block().up
    state = layer.__getstate__()
    del state["_following"]
    old = SparseMarlinLinear.__new__(SparseMarlinLinear)
    old.__setstate__(state)
    x = smt.activations(2, 128, dtype=torch.float16)
    assert torch.equal(old(x), layer(x))


def test_a_layer_with_two_followers_has_none():
    model = Block()
    x = smt.activations(2, 128, dtype=torch.float16)

    def run():
        up = model.up(x)
        model.down(up)  # up, down
        model.down(up)  # down, down: its own follower, which is no use
        model.head(model.down(up))  # down, down, head
        model.up(x)  # head, up

    assert sparse_marlin.enable_prefetch(model, run) == 2
    assert (model.up._following, model.down._following, model.head._following) == ((model.down,), (), (model.up,))


@pytest.mark.parametrize("m", [1, 2, 16, 17])
@pytest.mark.parametrize("rank", [8, 5])
def test_a_layer_with_a_correction_gives_the_hint_too(device, m, rank):
    model = Block(device)
    up, x = model.up, smt.activations(m, 128, dtype=torch.float16, device=device)
    factors = (smt.activations(*size, dtype=torch.float16, device=device) for size in ((192, rank), (rank, 128)))
    model.up = SparseMarlinLinear.from_codes(up.codes(), up.scales, group_size=64, correction=tuple(factors))
    wanted, names = called(model, x)
    assert names == [CORRECTED, PLAIN, PLAIN]
    assert sparse_marlin.enable_prefetch(model, lambda: model(x)) == 2
    assert (model.up._following, model.down._following) == ((model.down,), (model.head,))
    given = []
    with torch.no_grad(), Called(given) as calls, smt.poisoned_allocations(device, megabytes=1):
        got = model(x)
    assert calls.names == [CORRECTED, HINTED, PLAIN]
    assert given[0][-1] is model.down.weight_packed
    smt.assert_same_bits(got, wanted, "with the hint")


@pytest.mark.parametrize("case", [case for case in BAD if case != "none"])
def test_a_correction_refuses_a_wrong_next_weight(device, case):
    spoil, expected, got = BAD[case]
    layer, x = Block(device).up, smt.activations(2, 128, dtype=torch.float16, device=device)
    down, up = (smt.activations(*size, dtype=torch.float16, device=device) for size in ((8, 128), (192, 8)))
    call = x, layer.weight_packed, layer.scales, down, up, 64, 4, None, spoil(layer.weight_packed)
    matches(error(torch.ops.sparse_marlin.sparse_marlin_gemm_low_rank, *call), CORRECTED, "next_packed", expected, got)


def test_nothing_changes_where_the_run_fails():
    model = Block()
    x = smt.activations(2, 128, dtype=torch.float16)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    with pytest.raises(ValueError, match=r"in_features"):
        sparse_marlin.enable_prefetch(model, lambda: model(x[:, :64]))
    with pytest.raises(ValueError, match=r"^enable_prefetch: run: expected .*, got one that ran none of 3; .*lambda"):
        sparse_marlin.enable_prefetch(model, lambda: None)
    with pytest.raises(TypeError, match=r"^enable_prefetch: model: expected torch\.nn\.Module, got list"):
        sparse_marlin.enable_prefetch([model], lambda: model(x))
    with pytest.raises(TypeError, match=r"^disable_prefetch: model: expected torch\.nn\.Module, got list"):
        sparse_marlin.disable_prefetch([model])
    assert called(model, x)[1] == [HINTED, HINTED, PLAIN]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_torchscript_leaves_the_hint_out(device):
    model = Block(device)
    x = smt.activations(2, 128, dtype=torch.float16, device=device)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert torch.equal(loaded(x), model(x))
    for layer in (loaded.up, loaded.down):
        assert f"sparse_marlin::{PLAIN}(" in str(layer.forward.graph)
        assert NAME not in str(layer.forward.graph)


def test_compiled_and_exported_models_keep_the_hint(device):
    model = Block(device).requires_grad_(False)
    x = smt.activations(2, 128, dtype=torch.float16, device=device)
    wanted = model(x)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    graphs = []

    def backend(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    smt.assert_same_bits(torch.compile(model, backend=backend, fullgraph=True)(x), wanted, "compiled")
    assert sum(NAME in str(node.target) for node in graphs[0].nodes) == 2
    exported = torch.export.export(model, (x,))
    assert sum(NAME in str(node.target) for node in exported.graph.nodes) == 2
    assert set(exported.state_dict) == set(model.state_dict()), "no second copy of a weight"
    smt.assert_same_bits(exported.module()(x), wanted, "exported")


def test_packing_a_weight_of_the_layer_behind_it(device):
    """The hint is read late: a weight that was replaced in place is multiplied as it is then."""
    model = Block(device)
    x = smt.activations(2, 128, dtype=torch.float16, device=device)
    sparse_marlin.enable_prefetch(model, lambda: model(x))
    codes = smt.random_codes(128, 192, 4, 7, device)
    model.down.weight_packed.copy_(pack_24_weights(codes, model.down.scales, 64))
    y = model.up(x)
    out = model.down(y)
    smt.assert_accepted(out, y, codes, model.down.scales, 64, None, "the new weight")
