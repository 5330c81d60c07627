"""A layer with a low-rank correction, dense or packed: what it computes, saves and refuses. The operator's own tests
are in test_low_rank.py."""

import copy
import pickle

import pytest
import torch

from sparse_marlin import SparseMarlinLinear
from sparse_marlin import testing as smt
from sparse_marlin.low_rank import quantize_up


def with_correction(device="cpu", dtype=torch.float32, rank=8, bias=True, packed=False):
    torch.manual_seed(0)
    codes, scales = smt.random_codes(72, 64), smt.random_scales(72, 64, 32)
    up, down = torch.randn(72, rank) * 0.02, torch.randn(rank, 64) * 0.1
    factors = (quantize_up(up, 32, 4) if packed else up), down
    offset = torch.randn(72) if bias else None
    layer = SparseMarlinLinear.from_codes(codes, scales, offset, group_size=32, correction=factors)
    return layer.to(device=device, dtype=dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_correction_is_added(device, bias, packed):
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    layer = with_correction(device, dtype, bias=bias, packed=packed)
    up, down = layer.correction()
    assert (tuple(up.shape), up.dtype, layer.correction_up.dtype) == ((72, 8), dtype, torch.int32 if packed else dtype)
    x = torch.randn(2, 3, 64, device=device, dtype=dtype)
    wide = [None if t is None else t.double() for t in (x, layer.dequantize(), layer.bias)]
    wanted = torch.nn.functional.linear(*wide) + (wide[0] @ down.double().t()) @ up.double().t()
    scale = float(wanted.abs().max()) * torch.finfo(dtype).eps
    assert float((layer(x).double() - wanted).abs().max()) <= 8 * scale
    assert layer(x[:0]).shape == (0, 3, 72)
    torch.testing.assert_close(layer.to_linear()(x), layer(x), atol=20 * scale, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_correction_travels_with_the_layer(tmp_path, packed):
    layer = with_correction(packed=packed)
    x = torch.randn(5, 64)
    fresh = SparseMarlinLinear(64, 72, group_size=32, rank=8, packed_correction=packed)
    assert float(fresh(x).detach().abs().max()) == 0
    fresh.load_state_dict(layer.state_dict())
    scripted = torch.jit.script(layer)
    scripted.save(str(tmp_path / "layer.pt"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    others = [fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.jit.load(tmp_path / "layer.pt")]
    for other in [*others, compiled]:
        assert torch.equal(other(x), layer(x))
    assert "rank=8" in repr(layer)
    assert layer.half().correction_down.dtype == torch.float16
    assert layer.correction_up.dtype == (torch.int32 if packed else torch.float16)
    assert ("packed_correction=True" in repr(layer)) == packed


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_passes_through_the_correction(packed):
    layer = with_correction(packed=packed)
    x = torch.randn(4, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(layer.to_linear()(x).square().sum(), x)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


def test_correction_of_another_rank_is_refused():
    state = with_correction(rank=8).state_dict()
    with pytest.raises(RuntimeError, match=r"correction_up: expected none, since rank=0, got \[72, 8\]; .* rank=8"):
        SparseMarlinLinear(64, 72, group_size=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"correction_up: expected a floating type \[72, 4\] for rank=4"):
        SparseMarlinLinear(64, 72, group_size=32, rank=4).load_state_dict(state)
    state["correction_down"][3, 5] = torch.nan
    with pytest.raises(RuntimeError, match="correction_down: expected finite values"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8).load_state_dict(
            {key: value for key, value in state.items() if not key.startswith("correction")}
        )
    with pytest.raises(ValueError, match=r"correction: expected \(\[72, rank\], \[rank, 64\]\), got \(\[8, 72\]"):
        SparseMarlinLinear.from_codes(
            smt.random_codes(72, 64),
            smt.random_scales(72, 64, 32),
            group_size=32,
            correction=(torch.ones(8, 72), torch.ones(64, 8)),
        )
    with pytest.raises(ValueError, match="rank: expected 0"):
        SparseMarlinLinear(64, 72, rank=-1)


def test_a_packed_correction_is_not_a_dense_one():
    state, dense = with_correction(packed=True).state_dict(), with_correction().state_dict()
    with pytest.raises(RuntimeError, match=r"correction_up: expected a floating type .*, got int32 \[2, 768\]"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"correction_up: expected int32 \[2, .* got float32"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8, packed_correction=True).load_state_dict(dense)
    only = {key: value for key, value in state.items() if key != "correction_up"}
    with pytest.raises(RuntimeError, match="correction_scales: expected none, since correction_up is dense"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8).load_state_dict(only, strict=False)
    state["correction_scales"][0, 3] = 0
    with pytest.raises(RuntimeError, match="correction_scales: expected values > 0"):
        SparseMarlinLinear(64, 72, group_size=32, rank=8, packed_correction=True).load_state_dict(state)
    for options in ({"rank": 0}, {"rank": 8, "group_size": -1}):
        with pytest.raises(ValueError, match="packed_correction: expected a rank > 0 and groups"):
            SparseMarlinLinear(64, 72, packed_correction=True, **options)
    codes, scales = smt.random_codes(72, 64), smt.random_scales(72, 64, 32)
    for up in (quantize_up(torch.ones(72, 8), 64, 4), quantize_up(torch.ones(64, 8), 32, 4)):
        with pytest.raises(ValueError, match=r"correction: expected codes \[72, 128\], \[8, 64\], .* got"):
            SparseMarlinLinear.from_codes(codes, scales, group_size=32, correction=(up, torch.ones(8, 64)))
