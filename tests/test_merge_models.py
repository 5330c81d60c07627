"""Models whose linears are merged are copied, moved, saved, loaded, compiled, exported and scripted as others are."""

import copy
import pickle

import compress_models
import pytest
import torch
from distributed_helpers import run_processes, tiny_llama
from test_merge import Block, inputs, merged
from test_prefetch import HINTED, PLAIN, called

import sparse_marlin
from sparse_marlin import testing as smt
from sparse_marlin.merge import MergedPart
from sparse_marlin.parallel import tensor_parallel


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_merged_for_themselves(how):
    x = inputs()
    model = merged(Block(bias=True), x)
    model.q(x)  # a product is kept, which a copy must not take along
    other = how(model)
    assert other.q.merged is other.k.merged
    assert other.q.merged is not model.q.merged
    assert other.q.merged._kept.product is None
    assert called(other, x)[1] == [PLAIN] * 4
    smt.assert_same_bits(other(x), model(x), "the copy")
    lone = how(model.k)
    smt.assert_same_bits(lone(x), model.k(x), "a copy of one layer")


def test_moved_and_cast():
    model = merged(Block(bias=True), inputs())
    model.to(torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    assert {t.dtype for layer in model.children() for t in (layer.scales, layer.bias)} == {torch.bfloat16}
    out, names = called(model, x)
    assert (out.dtype, names) == (torch.bfloat16, [PLAIN] * 4)
    model.to("meta")
    assert model.k.weight_packed.is_meta
    assert called(model, x.to("meta"))[0].shape == x.shape


def test_state_dicts_of_both_kinds(tmp_path):
    x = inputs()
    plain = Block(bias=True)
    model = merged(copy.deepcopy(plain), x)
    with torch.no_grad():
        for layer in model.children():
            layer.scales.mul_(2)
    state = model.state_dict()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), model(x), rtol=2e-2, atol=2e-2)
    fresh = merged(Block(bias=True), x)
    fresh.load_state_dict(plain.state_dict())
    smt.assert_same_bits(fresh(x), model(x), "loaded")
    del state["k.scales"]
    state["k.other"] = state["q.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"k\.scales"(.|\n)*Unexpected key\(s\).*"k\.other"'):
        fresh.load_state_dict(state)
    state = model.state_dict()
    state["k.scales"] = state["k.scales"] * torch.nan
    with pytest.raises(RuntimeError, match="k: scales: expected finite"):
        fresh.load_state_dict(state)
    sparse_marlin.save_checkpoint(model, tmp_path / "saved")
    loaded = sparse_marlin.load_checkpoint(tmp_path / "saved", Block(bias=True)).state_dict()
    assert list(loaded) == list(plain.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in plain.state_dict().items())


def test_a_transformers_model(tmp_path):
    pytest.importorskip("transformers")
    model = compress_models.llama(intermediate_size=128, num_key_value_heads=4)
    sparse_marlin.replace_linears(model, group_size=32)
    tokens = torch.arange(1, 10)[None]
    with torch.no_grad():
        wanted = model(tokens).logits
    groups = sparse_marlin.merge_linears(model, lambda: model(tokens))
    layers = len(model.model.layers)
    assert [len(group) for group in groups] == [3, 2] * layers
    assert groups[-1] == tuple(f"model.layers.{layers - 1}.mlp.{name}_proj" for name in ("gate", "up"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, wanted, rtol=1e-4, atol=1e-5)


def test_layers_of_a_merged_model_in_use(device):
    model = merged(Block(bias=True, device=device), inputs(device))
    twin = Block(bias=True, device=device)
    for name in ("q", "k", "v", "gate", "up"):
        layer, other = getattr(model, name), getattr(twin, name)
        assert isinstance(layer, MergedPart)
        assert torch.equal(layer.dequantize(), other.dequantize())
        assert torch.equal(layer.to_linear().bias, other.bias)
        assert "part" in repr(layer)
    assert not any(torch.isnan(value.float()).any() for value in model.state_dict().values())


def test_hints_name_merged_weights(device):
    x = inputs(device)
    model = merged(Block(device=device), x)
    wanted = called(model, x)[0]
    assert sparse_marlin.enable_prefetch(model, lambda: model(x)) == 3
    assert model.q.merged._following == (model.o,)
    assert model.o._following == (model.gate.merged,)
    got, names = called(model, x)
    assert names == [HINTED] * 3 + [PLAIN]
    smt.assert_same_bits(got, wanted, "with the hint")
    assert copy.deepcopy(model).q.merged._following == ()
    sparse_marlin.unmerge_linears(model)
    assert model.o._following == (), "it would keep the merged weight"


def test_compiled_and_exported(device):
    x = inputs(device)
    model = merged(Block(bias=True, device=device).requires_grad_(False), x)
    wanted = model(x)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        smt.assert_same_bits(compiled(x), wanted, "compiled")
    assert len(graphs) == 1
    assert sum(PLAIN in str(node.target) for node in graphs[0].nodes) == 4
    for strict in (False, True):
        exported = torch.export.export(model, (x,), strict=strict)
        assert sum(PLAIN in str(node.target) for node in exported.graph.nodes) == 4
        smt.assert_same_bits(exported.module()(x), wanted, f"exported, strict={strict}")


def test_torchscript_takes_them_apart(device):
    x = inputs(device)
    model = merged(Block(bias=True, device=device), x)
    wanted = model(x)
    scripted = torch.jit.script(copy.deepcopy(model))
    assert str(scripted.k.forward.graph).count(f"sparse_marlin::{PLAIN}(") == 1
    torch.testing.assert_close(scripted(x), wanted, rtol=2e-2, atol=2e-2)


IDS = torch.arange(1, 19).view(2, 9)


@torch.no_grad()
def cut_and_merged():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"^tensor_parallel: model: .*, got merged ones; call unmerge_linears"):
        tensor_parallel(merge_all(copy.deepcopy(model)))
    tensor_parallel(model)
    return sparse_marlin.merge_linears(model, lambda: model(IDS)), model(IDS).logits


def merge_all(model):
    assert sparse_marlin.merge_linears(model, lambda: model(IDS))
    return model


@pytest.mark.timeout(300)
@torch.no_grad()
def test_parts_of_a_model_that_processes_share_out():
    wanted = tiny_llama()(IDS).logits
    for groups, logits in run_processes(2, cut_and_merged):
        assert [len(group) for group in groups] == [3, 2] * 2
        assert groups[0][0] == "model.layers.0.self_attn.q_proj.linear"
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_merged_layer_takes_no_other_tensor():
    model = merged(Block(bias=True), inputs())
    for name in ("weight_packed", "scales", "bias"):
        with pytest.raises(AttributeError, match=rf"{name}: expected no other tensor .*copy_.*unmerge_linears"):
            setattr(model.k, name, getattr(model.k, name).clone())
    model.k.eval()
    assert not model.k.training


@pytest.mark.parametrize("packed", [False, True])
def test_layers_with_one_correction(device, packed):
    x = inputs(device)
    plain = Block(device=device, rank=8, packed=packed)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = merged(copy.deepcopy(plain), x)
    assert called(model, x)[1] == ["sparse_marlin_gemm_low_rank"] * 4
    torch.testing.assert_close(model(x), plain(x), rtol=2e-2, atol=2e-2)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict(before)
    wrong = {**before, "k.correction_down": before["k.correction_down"] * 2}
    with pytest.raises(RuntimeError, match=r"k: correction_down: expected the one .* share, got another; call unmerge"):
        model.load_state_dict(wrong)
    sparse_marlin.unmerge_linears(model)
    model.load_state_dict(wrong)
    plain.load_state_dict(wrong)
    smt.assert_same_bits(model(x), plain(x), "taken apart")
    assert sparse_marlin.merge_linears(model, lambda: model(x)) == [("gate", "up")], "k has another correction now"
