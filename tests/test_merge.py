"""Layers that read the same input are multiplied at once: which ones, that results stay right, how to undo it."""

import copy
import threading

import pytest
import torch
from test_prefetch import PLAIN, called
from torch import nn

import sparse_marlin
from sparse_marlin import SparseMarlinLinear
from sparse_marlin import testing as smt
from sparse_marlin.low_rank import quantize_up
from sparse_marlin.merge import MergedPart, MergedWeight

HIDDEN, HEADS, INNER = 128, 64, 192


def make_layer(
    k, n, seed=0, *, bias=False, device="cpu", dtype=torch.float16, group_size=64, num_bits=4, rank=0, packed=False,
):  # fmt: skip
    """With a correction, layers of one input and rank have the same `correction_down`."""
    codes = smt.random_codes(n, k, num_bits, seed, device)
    scales = smt.random_scales(n, k, group_size, dtype, seed, device)
    b = smt.activations(1, n, dtype=dtype, seed=seed + 50, device=device)[0] if bias else None
    factors = None
    if rank:
        up = smt.activations(n, rank, dtype=dtype, seed=seed + 60, device=device) * 0.1
        up = quantize_up(up, group_size, num_bits) if packed else up
        factors = up, smt.activations(rank, k, dtype=dtype, seed=k, device=device) * 0.1
    return SparseMarlinLinear.from_codes(codes, scales, b, group_size=group_size, num_bits=num_bits, correction=factors)


class Block(nn.Module):
    """A transformer's layer without what lies between its linears. Its order of definition is another one."""

    def __init__(self, **settings):
        super().__init__()
        self.heads = HEADS
        self.v = make_layer(HIDDEN, 65, 2, **settings)  # the last one may have any number of outputs
        self.q = make_layer(HIDDEN, HEADS * 2, 0, **settings)
        self.k = make_layer(HIDDEN, HEADS, 1, **settings)
        self.o = make_layer(HEADS, HIDDEN, 3, **settings)
        self.gate = make_layer(HIDDEN, INNER, 4, **settings)
        self.up = make_layer(HIDDEN, INNER, 5, **settings)
        self.down = make_layer(INNER, HIDDEN, 6, **settings)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(torch.tanh(q[..., : self.heads] + q[..., self.heads :] + k + v[..., 1:]))
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


MERGED = [("q", "k", "v"), ("gate", "up")]


def merged(model, x):
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == MERGED
    return model


def inputs(device="cpu", dtype=torch.float16, tokens=3):
    return smt.activations(tokens, HIDDEN, dtype=dtype, seed=7, device=device)


SETTINGS = (
    {},
    {"bias": True},
    {"num_bits": 8},
    {"group_size": -1, "dtype": torch.bfloat16},
    {"rank": 16, "bias": True},
    {"rank": 72, "packed": True, "num_bits": 8},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (0,), (70,)])
def test_every_layer_gets_its_own_columns(device, settings, shape):
    model = Block(device=device, **settings)
    dtype = model.q.scales.dtype
    twins = {name: copy.deepcopy(layer) for name, layer in model.named_children()}
    merged(model, inputs(device, dtype))
    x = smt.activations(*shape, HIDDEN, dtype=dtype, seed=9, device=device)
    for names in MERGED:
        with torch.no_grad(), smt.poisoned_allocations(device, megabytes=1):
            got = {name: getattr(model, name)(x) for name in names}
        for name, out in got.items():
            twin = twins[name]
            assert out.shape == (*shape, twin.out_features)
            assert torch.equal(getattr(model, name).codes(), twin.codes())
            if twin.rank:
                torch.testing.assert_close(out, twin(x), rtol=5e-3, atol=5e-3)
            else:
                smt.assert_accepted(out, x, twin.codes(), twin.scales, twin.group_size, twin.bias, name)


def test_one_multiplication_for_a_group(device):
    model, x = Block(device=device), inputs(device)
    wanted, names = called(model, x)
    assert names == [PLAIN] * 7
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged(model, x)
    got, names = called(model, x)
    assert names == [PLAIN] * 4
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert list(model.state_dict()) == list(before)
    for key, value in model.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, before[key]), key
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == [], "merged already"
    sparse_marlin.unmerge_linears(model)
    assert all(type(layer) is SparseMarlinLinear for layer in model.children())
    assert not any(isinstance(module, MergedWeight) for module in model.modules())
    assert called(model, x)[1] == [PLAIN] * 7
    smt.assert_same_bits(model(x), wanted, "after it was undone")
    assert list(model.state_dict()) == list(before)


def test_weights_are_in_memory_once():
    model, x = Block(bias=True), inputs()
    size = sum(tensor.nbytes for tensor in [*model.buffers(), *model.parameters()])
    merged(model, x)
    assert sum(tensor.nbytes for tensor in [*model.buffers(), *model.parameters()]) == size
    whole = model.q.merged.weight_packed
    for name in MERGED[0]:
        part = getattr(model, name).weight_packed
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert part.is_contiguous()


# --- which layers -----------------------------------------------------------------------------------------------------


class Three(nn.Module):
    """q, k, v with what the test makes of them."""

    def __init__(self, second, between=lambda x: x):
        super().__init__()
        self.q, self.k, self.v = make_layer(HIDDEN, 64, 0), second, make_layer(HIDDEN, 64, 2)
        self.between = between

    def forward(self, x):
        q = self.q(x)
        x = self.between(x)
        return q, self.k(x), self.v(x)


UNFIT = {
    "group size": (lambda: make_layer(HIDDEN, 64, 1, group_size=32), []),
    "bits": (lambda: make_layer(HIDDEN, 64, 1, num_bits=8), []),
    "bias": (lambda: make_layer(HIDDEN, 64, 1, bias=True), []),
    "correction": (lambda: make_layer(HIDDEN, 64, 1, rank=8), []),
    "packed correction": (lambda: make_layer(HIDDEN, 64, 1, rank=8, packed=True), []),
    "rows": (lambda: make_layer(HIDDEN, 65, 1), [("q", "k")]),
    "fits": (lambda: make_layer(HIDDEN, 64, 1), [("q", "k", "v")]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_layers_that_do_not_fit_stay_alone(case):
    second, expected = UNFIT[case]
    model, x = Three(second()), inputs()
    wanted = model(x)
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == expected
    for got, want in zip(model(x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_dtypes_that_differ_stay_alone():
    model = nn.ModuleList([make_layer(HIDDEN, 64, i, dtype=d) for i, d in enumerate((torch.half, torch.bfloat16))])
    x = {torch.half: inputs(), torch.bfloat16: inputs().bfloat16()}
    assert sparse_marlin.merge_linears(model, lambda: [layer(x[layer.scales.dtype]) for layer in model]) == []


@pytest.mark.parametrize("between", [torch.clone, lambda x: x.add_(1)], ids=["another tensor", "changed in place"])
def test_another_input_is_another_group(between):
    model = Three(make_layer(HIDDEN, 64, 1), between)
    assert sparse_marlin.merge_linears(model, lambda: model(inputs())) == [("k", "v")]


def test_layers_that_do_not_always_run_together_stay_alone():
    model, x = Block(), inputs()

    def run():
        model(x)
        model.up(x)

    assert sparse_marlin.merge_linears(model, run) == [("q", "k", "v")]
    layer = make_layer(HIDDEN, 64)
    assert sparse_marlin.merge_linears(layer, lambda: layer(layer(x).repeat(1, 2))) == []
    assert sparse_marlin.merge_linears(layer, lambda: (layer(x), layer(x))) == [], "one layer, twice"


def test_layers_given_their_input_by_name_stay_alone():
    model, x = Block(), inputs()
    assert sparse_marlin.merge_linears(model, lambda: [layer(x=x) for layer in (model.q, model.k)]) == []


def test_a_layer_that_others_have_wrapped_stays_alone():
    model, x = Three(make_layer(HIDDEN, 64, 1)), inputs()
    inner = model.q.forward
    model.q.forward = lambda x: inner(x)
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == [("k", "v")]


def test_a_layer_in_two_places():
    model, x = Three(make_layer(HIDDEN, 64, 1)), inputs()
    model.also = model.k
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == [("q", "k", "v")]
    assert model.also is model.k
    torch.testing.assert_close(model.also(x), model(x)[1])


# --- what must not be taken from a product kept -----------------------------------------------------------------------


def alone(layer, x):
    return layer._alone()(x)


def test_layers_in_any_order(device):
    model, x = merged(Block(device=device), inputs(device)), inputs(device)
    other = inputs(device) * 2
    calls = [("k", x), ("q", x), ("v", x), ("k", x), ("q", other), ("k", x), ("v", x), ("q", x), ("q", x), ("k", x)]
    with torch.no_grad():
        for name, given in calls:
            layer = getattr(model, name)
            torch.testing.assert_close(layer(given), alone(layer, given), rtol=2e-3, atol=2e-3)
        model.v(x)
    assert model.q.merged._kept.product is None, "nothing is kept after the last layer"


CHANGES = {
    "input": lambda model, x: x.add_(1),
    "weight": lambda model, x: model.k.weight_packed.copy_(make_layer(HIDDEN, HEADS, 30, bias=True).weight_packed),
    "scales": lambda model, x: model.k.scales.mul_(2),
    "bias": lambda model, x: model.k.bias.add_(1),
    "state_dict": lambda model, x: model.load_state_dict(Block(bias=True).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_in_place_between_two_layers_are_seen(device, change):
    x = inputs(device)
    model = merged(Block(bias=True, device=device), x)
    model.k.scales.mul_(1.5)  # so that the state_dict of a new one is another
    with torch.no_grad():
        before = model.k(x)
        model.q(x)
        CHANGES[change](model, x)
        got = model.k(x)
        torch.testing.assert_close(got, alone(model.k, x), rtol=2e-3, atol=2e-3)
    assert not torch.equal(got, before)


def test_gradients_asked_for_after_a_product_without(device):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    x = inputs(device, dtype)
    model = Block(bias=True, dtype=dtype, device=device).requires_grad_()
    twin = copy.deepcopy(merged(model, x))
    sparse_marlin.unmerge_linears(twin)
    x.requires_grad_()
    with torch.no_grad():
        model.q(x)
    assert model.k(x).requires_grad
    upstream = inputs(device, dtype) + 1
    got = torch.autograd.grad(model(x), x, upstream)
    wanted = torch.autograd.grad(twin(x), x, upstream)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    model(x).sum().backward()
    twin(x).sum().backward()
    bias = torch.cat([getattr(twin, name).bias.grad for name in MERGED[0]])
    torch.testing.assert_close(model.q.merged.bias.grad, bias, rtol=2e-2, atol=2e-2)


def test_autocast_between_two_layers(device):
    x = smt.activations(3, HIDDEN, dtype=torch.float32, device=device)
    model = Block(dtype=torch.bfloat16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.no_grad():
        merged(model, x)
        q, k = model.q(x), model.k(x)
        assert (q.dtype, k.dtype) == (torch.bfloat16, torch.bfloat16)
        torch.testing.assert_close(k, alone(model.k, x), rtol=2e-2, atol=2e-2)


def test_a_failure_leaves_nothing_behind():
    x = inputs()
    model = merged(Block(), x)
    with torch.no_grad():
        model.q(x)
        with pytest.raises(ValueError, match=r"x: expected \[..., 128\] \(in_features\), got \[3, 64\]"):
            model.k(x[:, :64])
        with pytest.raises(RuntimeError, match="dtype"):
            model.k(x.double())
        assert model.q.merged._kept.product is None
        torch.testing.assert_close(model.k(x), alone(model.k, x))


def test_threads_that_share_a_model():
    model = merged(Block(), inputs())
    xs = [inputs() * (i + 1) for i in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in xs]
    wrong = []

    def work(i):
        with torch.no_grad():
            wrong.extend(i for _ in range(25) if not torch.allclose(model(xs[i]), wanted[i], rtol=1e-2, atol=1e-2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_another_stream_computes_for_itself(cuda):
    x = inputs(cuda)
    model = merged(Block(device=cuda), x)
    with torch.no_grad():
        model.q(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _, names = called(model.k, x)
    assert names == [PLAIN]
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_in_a_graph(cuda):
    x = inputs(cuda)
    model = merged(Block(device=cuda), x)
    with torch.no_grad():
        wanted = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for _ in range(5):
            out.fill_(torch.nan)
            graph.replay()
            smt.assert_same_bits(out, wanted, "replayed")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_nothing_changes_where_the_run_fails():
    x = inputs()
    model = Block()
    wanted, names = called(model, x)
    with pytest.raises(ValueError, match=r"in_features"):
        sparse_marlin.merge_linears(model, lambda: model(x[:, :64]))
    with pytest.raises(ValueError, match=r"^merge_linears: run: expected .*, got one that ran none of 7; .*lambda"):
        sparse_marlin.merge_linears(model, lambda: None)
    with pytest.raises(TypeError, match=r"^merge_linears: model: expected torch\.nn\.Module, got list"):
        sparse_marlin.merge_linears([model], lambda: model(x))
    with pytest.raises(TypeError, match=r"^unmerge_linears: model: expected torch\.nn\.Module, got list"):
        sparse_marlin.unmerge_linears([model])

    def run():  # what a model does that takes outputs to be in one piece
        model.q(x)
        return model.k(x).view(-1)

    with pytest.raises(RuntimeError, match="view"):
        sparse_marlin.merge_linears(model, run)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(isinstance(m, MergedPart | MergedWeight) for m in model.modules())
    out, after = called(model, x)
    assert after == names
    smt.assert_same_bits(out, wanted, "as before")
