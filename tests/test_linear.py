"""SparseMarlinLinear: made from a linear or from codes, moved, saved, loaded, copied, scripted, compiled."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sparse_marlin import SparseMarlinLinear, _core
from sparse_marlin.quantize import prune_24_magnitude, quantize_weight_only
from sparse_marlin.testing import assert_accepted

GROUP_SIZES = sorted(_core.GROUP_SIZES)


def make_linear(size_k=128, size_n=48, bias=True, device="cpu", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(size_k, size_n, bias=bias).to(device=device, dtype=dtype)


def activation_dtypes(device):
    return [torch.float16, torch.bfloat16] + ([torch.float32] if torch.device(device).type == "cpu" else [])


def float_dtype(device):
    """The most precise type the GEMM takes on this device."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def assert_close_to_reference(layer, x, out):
    assert_accepted(out, x, layer.codes(), layer.scales, layer.group_size, layer.bias)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_multiplies_by_its_dequantized_weight(device, group_size, num_bits, bias):
    for dtype in activation_dtypes(device):
        linear = make_linear(260, 72, bias, device, dtype)
        layer = SparseMarlinLinear.from_linear(linear, group_size=group_size, num_bits=num_bits)
        assert layer.scales.dtype == dtype
        assert (layer.bias is not None) == bias
        found = quantize_weight_only(linear.weight, group_size=group_size, num_bits=num_bits)
        assert torch.equal(layer.codes(), found.codes)
        assert torch.equal(layer.dequantize(), found.dequantize())
        assert not bool(layer.dequantize()[~prune_24_magnitude(linear.weight)].any())
        x = torch.randn(2, 5, 260, device=device).to(dtype)
        out = layer(x)
        assert out.shape == (2, 5, 72)
        assert out.dtype == dtype
        assert_close_to_reference(layer, x, out)


def test_from_codes_keeps_codes_and_scales(device):
    dtype = float_dtype(device)
    codes = torch.zeros(20, 64, dtype=torch.int8, device=device)
    codes[:, 1::4], codes[:, 2::4] = 7, -8
    scales = torch.rand(2, 20, device=device).add(0.1).to(dtype)
    layer = SparseMarlinLinear.from_codes(codes, scales, torch.arange(20.0, device=device), group_size=32)
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.scales, scales)
    assert layer.bias.dtype == dtype
    expected = codes.to(dtype) * scales.t().repeat_interleave(32, dim=1)
    assert torch.equal(layer.dequantize(), expected)


def test_scales_are_not_shared_with_the_caller():
    codes, scales = torch.zeros(4, 8, dtype=torch.int8), torch.ones(1, 4)
    layer = SparseMarlinLinear.from_codes(codes, scales, group_size=-1)
    scales.zero_()
    assert bool((layer.scales == 1).all())


def test_a_fresh_layer_is_valid_and_gives_its_bias(device):
    layer = SparseMarlinLinear(132, 40, device=device, dtype=float_dtype(device))
    assert not bool(layer.codes().any())
    assert bool((layer.scales == 1).all())
    out = layer(torch.randn(3, 132, device=device, dtype=float_dtype(device)))
    assert torch.equal(out, torch.zeros_like(out))


def test_default_dtype_is_torchs():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert SparseMarlinLinear(16, 8).scales.dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_meta_device_then_to_empty(device):
    layer = SparseMarlinLinear(260, 72, device="meta", dtype=float_dtype(device))
    assert layer.weight_packed.is_meta
    assert tuple(layer.weight_packed.shape) == _core.packed_shape(72, 260, 4)
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert not bool(layer.codes().any())


def test_meta_layer_takes_a_state_dict_by_assignment():
    source = SparseMarlinLinear.from_linear(make_linear())
    target = SparseMarlinLinear(128, 48, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 128)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_state_dict_round_trip(device, num_bits):
    dtype = float_dtype(device)
    source = SparseMarlinLinear.from_linear(make_linear(device=device, dtype=dtype), group_size=64, num_bits=num_bits)
    assert set(source.state_dict()) == {"weight_packed", "scales", "bias"}
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target = SparseMarlinLinear(128, 48, group_size=64, num_bits=num_bits, device=device, dtype=dtype)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 128, device=device, dtype=dtype)
    assert torch.equal(target(x), source(x))


def test_safetensors_round_trip(tmp_path):
    from safetensors.torch import load_model, save_model

    source = nn.Sequential(SparseMarlinLinear.from_linear(make_linear()))
    save_model(source, str(tmp_path / "model.safetensors"))
    target = nn.Sequential(SparseMarlinLinear(128, 48))
    load_model(target, str(tmp_path / "model.safetensors"))
    x = torch.randn(3, 128)
    assert torch.equal(target(x), source(x))


def change(state, **replaced):
    return {**state, **replaced}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda s: change(s, weight_packed=s["weight_packed"][:, :-4]),
            r"weight_packed: expected int32 \[1, 768\] for .*got int32",
        ),
        (lambda s: change(s, weight_packed=s["weight_packed"].float()), r"weight_packed: expected int32 .*got float32"),
        (
            lambda s: change(s, scales=s["scales"].repeat(2, 1)),
            r"scales: expected .*\[1, 48\] for .*group_size=128.*got float32 \[2, 48\]",
        ),
        (lambda s: change(s, scales=s["scales"].int()), r"scales: expected a floating type .*got int32"),
        (lambda s: change(s, scales=s["scales"] * float("nan")), "scales: expected finite values > 0"),
        (lambda s: change(s, scales=s["scales"] * 0), "scales: expected finite values > 0"),
        (
            lambda s: {"weight": torch.ones(48, 128)},
            "weight_packed: expected packed codes, got a dense 'weight'.*from_linear",
        ),
    ],
)
def test_loading_a_state_dict_that_does_not_fit_names_the_layer(broken, message):
    model = nn.ModuleDict({"proj": SparseMarlinLinear.from_linear(make_linear(bias=False))})
    before = copy.deepcopy(model.state_dict())
    state = {f"proj.{key}": value for key, value in broken(dict(model["proj"].state_dict())).items()}
    with pytest.raises(RuntimeError, match=rf"(?s)proj: {message}"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_loading_another_format_version_is_refused():
    layer = SparseMarlinLinear.from_linear(make_linear())
    state = layer.state_dict()
    state._metadata[""]["version"] = _core.FORMAT_VERSION + 1
    with pytest.raises(RuntimeError, match=f"expected packed format version {_core.FORMAT_VERSION}, got version"):
        layer.load_state_dict(state)


def test_missing_keys_are_reported():
    layer = SparseMarlinLinear.from_linear(make_linear())
    state = layer.state_dict()
    del state["scales"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        layer.load_state_dict(state)


def test_to_dtype_moves_scales_and_bias_but_not_codes():
    layer = SparseMarlinLinear.from_linear(make_linear())
    codes = layer.weight_packed.clone()
    moves = {torch.bfloat16: layer.bfloat16, torch.float16: layer.half, torch.float32: lambda: layer.to(torch.float32)}
    for dtype, move in moves.items():
        assert move() is layer
        assert layer.scales.dtype == dtype
        assert layer.bias.dtype == dtype
        assert layer.weight_packed.dtype == torch.int32
        assert torch.equal(layer.weight_packed, codes)
        assert layer(torch.randn(2, 128).to(dtype)).dtype == dtype


@pytest.mark.gpu
def test_to_device_and_back(device):
    if torch.device(device).type != "cuda":
        pytest.skip("needs a GPU")
    layer = SparseMarlinLinear.from_linear(make_linear(dtype=torch.float16))
    x = torch.randn(5, 128, dtype=torch.float16)
    there = copy.deepcopy(layer).to(device)
    assert there.weight_packed.device.type == "cuda"
    out = there(x.to(device)).cpu()
    assert_close_to_reference(layer, x, out)
    assert torch.equal(there.cpu().weight_packed, layer.weight_packed)


def test_deepcopy_and_pickle_are_independent_and_equal():
    layer = SparseMarlinLinear.from_linear(make_linear()).eval()
    x = torch.randn(4, 128)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    layer.scales.fill_(5)
    for other in copies:
        assert not other.training
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_torchscript_saves_and_loads(device, tmp_path, bias):
    dtype = float_dtype(device)
    layer = SparseMarlinLinear.from_linear(make_linear(bias=bias, device=device, dtype=dtype))
    scripted = torch.jit.script(layer)
    x = torch.randn(2, 3, 128, device=device, dtype=dtype)
    assert torch.equal(scripted(x), layer(x))
    scripted.save(str(tmp_path / "layer.pt"))
    assert torch.equal(torch.jit.load(str(tmp_path / "layer.pt"))(x), layer(x))


def test_torch_compile_with_a_dynamic_batch(device):
    dtype = float_dtype(device)
    model = nn.Sequential(SparseMarlinLinear.from_linear(make_linear(device=device, dtype=dtype)), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (1, 3, 7):
        x = torch.randn(size, 128, device=device, dtype=dtype)
        assert torch.equal(compiled(x), model(x))


def test_gradient_reaches_input_and_bias(device):
    dtype = float_dtype(device)
    layer = SparseMarlinLinear.from_linear(make_linear(device=device, dtype=dtype))
    x = torch.randn(6, 128, device=device, dtype=dtype, requires_grad=True)
    layer(x).float().sum().backward()
    expected = layer.dequantize().float().sum(0).expand(6, -1)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert torch.allclose(x.grad.float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.allclose(layer.bias.grad.float(), torch.full((48,), 6.0, device=device))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_frozen_bias_and_training_flag_are_kept():
    linear = make_linear().eval()
    linear.bias.requires_grad_(False)
    layer = SparseMarlinLinear.from_linear(linear)
    assert not layer.training
    assert not layer.bias.requires_grad
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias


def test_to_linear_is_the_dense_twin():
    layer = SparseMarlinLinear.from_linear(make_linear())
    twin = layer.to_linear()
    assert torch.equal(twin.weight, layer.dequantize())
    x = torch.randn(4, 128)
    assert torch.allclose(twin(x), layer(x), atol=1e-5)


def test_repr_says_what_it_is():
    layer = SparseMarlinLinear(64, 32, bias=False, group_size=64, num_bits=8)
    assert repr(layer) == ("SparseMarlinLinear(in_features=64, out_features=32, bias=False, group_size=64, num_bits=8)")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"in_features": 30},
            ValueError,
            "in_features: expected a positive multiple of 4 .*got 30; leave this layer dense",
        ),
        ({"in_features": 0}, ValueError, "in_features: expected a positive multiple of 4"),
        ({"out_features": 0}, ValueError, "out_features: expected at least 1, got 0"),
        ({"group_size": 48}, ValueError, r"group_size: expected one of \[-1, 32, 64, 128, 256\].*got 48"),
        ({"num_bits": 3}, ValueError, r"num_bits: expected one of \[4, 8\], got 3"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected torch.float32, .*got torch.float64"),
    ],
)
def test_wrong_settings(arguments, error, message):
    with pytest.raises(error, match=f"^SparseMarlinLinear: {message}"):
        SparseMarlinLinear(**{"in_features": 64, "out_features": 32, **arguments})


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Conv1d(4, 4, 1), TypeError, "linear: expected torch.nn.Linear, got Conv1d"),
        (
            nn.Linear(64, 32).double(),
            TypeError,
            "linear.weight: expected float32, float16 or bfloat16, got torch.float64",
        ),
        (
            nn.Linear(64, 32, device="meta"),
            ValueError,
            "linear.weight: expected a tensor with data, got one on the meta",
        ),
        (nn.Linear(62, 32), ValueError, "in_features: expected a positive multiple of 4"),
    ],
)
def test_from_linear_refuses(linear, error, message):
    with pytest.raises(error, match=message):
        SparseMarlinLinear.from_linear(linear)


@pytest.mark.parametrize(
    ("codes", "scales", "bias", "error", "message"),
    [
        (torch.zeros(8, 64), torch.ones(1, 8), None, TypeError, r"codes: expected int8 \[N, K\], got torch.float32"),
        (
            torch.zeros(8, 64, dtype=torch.int8),
            torch.ones(2, 8),
            None,
            ValueError,
            r"scales: expected \[1, 8\] .*got \[2, 8\]",
        ),
        (
            torch.zeros(8, 64, dtype=torch.int8),
            torch.ones(1, 8),
            torch.ones(7),
            ValueError,
            r"bias: expected \[8\], got \[7\]",
        ),
        (torch.ones(8, 64, dtype=torch.int8), torch.ones(1, 8), None, RuntimeError, "weight: .*row 0"),
        (torch.zeros(8, 64, dtype=torch.int8), torch.zeros(1, 8), None, RuntimeError, "scales: "),
    ],
)
def test_from_codes_refuses(codes, scales, bias, error, message):
    with pytest.raises(error, match=message):
        SparseMarlinLinear.from_codes(codes, scales, bias)


def test_a_wrong_number_of_features_is_an_error():
    """64 and 128 features pad to the same packed tensor: only the layer can tell them apart."""
    layer = SparseMarlinLinear.from_linear(make_linear())
    with pytest.raises(
        ValueError, match=r"^SparseMarlinLinear: x: expected \[..., 128\] \(in_features\), got \[2, 64\]"
    ):
        layer(torch.randn(2, 64))
    with pytest.raises(torch.jit.Error, match=r"x: expected \[..., 128\] \(in_features\), got \[2, 64\]"):
        torch.jit.script(layer)(torch.randn(2, 64))


def test_a_wrong_dtype_is_the_operators_error():
    layer = SparseMarlinLinear.from_linear(make_linear())
    with pytest.raises(RuntimeError, match=r"sparse_marlin_gemm: .*expected.*got"):
        layer(torch.randn(2, 128, dtype=torch.float16))
