"""Saved models: written, verified, opened by this library and by transformers, refused when damaged."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, _core, checkpoint
from sparse_marlin.checkpoint import CheckpointConfig, LayerSpec
from sparse_marlin.testing import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent


def make_net(seed: int = 0) -> nn.Sequential:
    """Four packed kinds and a dense layer; K = 72 and N = 33 have padding."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(72, 33), nn.Linear(33, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 40))
    net[0] = SparseMarlinLinear.from_linear(net[0], group_size=32)
    net[2] = SparseMarlinLinear.from_linear(net[2], group_size=-1, num_bits=8)
    net[3] = SparseMarlinLinear.from_linear(net[3], group_size=64)
    return net


def skeleton() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(72, 33), nn.Linear(33, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 40))


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_same_bits(right[name], tensor, name)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- any module -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_round_trip_of_a_plain_module(max_shard_bytes, tmp_path, device):
    net = make_net().to(device)
    out = sparse_marlin.save_checkpoint(net, tmp_path / "net", max_shard_bytes=max_shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    loaded = sparse_marlin.load_checkpoint(out, skeleton(), device=device)
    assert_same_state(net, loaded)
    assert [type(m) for m in net] == [type(m) for m in loaded]
    x = torch.randn(5, 72, device=device)
    if device.type == "cpu":
        assert_same_bits(loaded(x), net(x))
    half = sparse_marlin.load_checkpoint(out, skeleton(), device=device, dtype=torch.bfloat16)
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16, torch.int32}
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_config_says_what_each_layer_is(tmp_path):
    sparse_marlin.save_checkpoint(make_net(), tmp_path / "net", extra_config={"made_with": "care"})
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["made_with"] == "care"
    found = config["quantization_config"]
    assert found["quant_method"] == "sparse_marlin"
    assert (found["format"], found["format_version"]) == (_core.FORMAT_NAME, _core.FORMAT_VERSION)
    assert found["ignore"] == ["1"]
    parsed = CheckpointConfig.from_dict(found)
    assert parsed.layers == {
        "0": LayerSpec(72, 33, 4, 32),
        "2": LayerSpec(64, 64, 8, -1),
        "3": LayerSpec(64, 40, 4, 64),
    }
    assert parsed.to_dict() == found


def test_ranks_are_kept_in_the_config():
    spec = LayerSpec(128, 64, 4, 128, rank=16)
    packed = dataclasses.replace(spec, packed_correction=True)
    written = CheckpointConfig({"a": packed, "b": spec})
    assert "packed_correction" not in written.to_dict()["layers"]["b"]
    assert CheckpointConfig.from_dict(written.to_dict()).layers == written.layers
    assert LayerSpec.of(packed.make(False, "cpu", torch.float16)) == packed
    for wrong, message in (
        ({"packed_correction": 1}, "packed_correction: expected true or false, got 1"),
        ({"rank": True}, "rank: expected a number, got True"),
        ({"rank": 0}, "packed_correction: expected a rank > 0 and groups, got rank 0, group_size 128"),
        ({"group_size": -1}, "packed_correction: expected a rank > 0 and groups, got rank 16, group_size -1"),
    ):
        config = written.to_dict()
        config["layers"]["a"] |= wrong
        with pytest.raises(ValueError, match=f"a: {message}"):
            CheckpointConfig.from_dict(config)
    config = CheckpointConfig({"a": spec, "b": LayerSpec(128, 64)})
    assert config.to_dict()["layers"]["a"]["rank"] == 16
    assert "rank" not in config.to_dict()["layers"]["b"]
    assert CheckpointConfig.from_dict(config.to_dict()).layers == config.layers


def test_tied_tensors_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 32)
            self.inner = nn.Linear(32, 32)
            self.head = nn.Linear(32, 20, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    sparse_marlin.replace_linears(model, group_size=-1, ignore="head")
    sparse_marlin.save_checkpoint(model, tmp_path / "a")
    loaded = sparse_marlin.load_checkpoint(tmp_path / "a", Tied())
    assert loaded.head.weight is loaded.embed.weight
    assert_same_state(model, loaded)


def test_saving_refuses(tmp_path):
    with pytest.raises(ValueError, match="model: expected SparseMarlinLinear layers, got none"):
        sparse_marlin.save_checkpoint(nn.Linear(8, 8), tmp_path / "a")
    with pytest.raises(ValueError, match=r"0\.\w+: expected a tensor with data, got one on the meta device"):
        sparse_marlin.save_checkpoint(make_net().to("meta"), tmp_path / "a")
    net = make_net()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("x")
    with pytest.raises(ValueError, match="there: expected a name that does not exist yet"):
        sparse_marlin.save_checkpoint(net, tmp_path / "there")
    assert (tmp_path / "there" / "precious").read_text() == "x"
    sparse_marlin.save_checkpoint(net, tmp_path / "there", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file: expected a folder to overwrite, got a file"):
        sparse_marlin.save_checkpoint(net, tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_a_failed_save_keeps_what_was_there(tmp_path, monkeypatch):
    sparse_marlin.save_checkpoint(make_net(0), tmp_path / "net")
    before = (tmp_path / "net" / "model.safetensors").read_bytes()
    net = make_net(1)
    true_save = sparse_marlin._shards.save_file

    def save(tensors, path, metadata=None):
        spoiled = tensors["0.weight_packed"].clone()
        spoiled[0, 0] ^= 1
        true_save({**tensors, "0.weight_packed": spoiled}, path, metadata=metadata)

    monkeypatch.setattr(sparse_marlin._shards, "save_file", save)
    with pytest.raises(RuntimeError, match=r"0.weight_packed: expected the bytes that were written"):
        sparse_marlin.save_checkpoint(net, tmp_path / "net", overwrite=True)
    assert (tmp_path / "net" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


DAMAGE = {
    "a missing tensor": (lambda t: t.pop("2.scales"), r"2.scales: expected the tensor in the checkpoint's files"),
    "another dtype": (
        lambda t: t.update({"2.weight_packed": t["2.weight_packed"].long()}),
        r"model.safetensors: 2.weight_packed: expected int32 .*, got int64",
    ),
    "another shape": (
        lambda t: t.update({"0.scales": t["0.scales"][:1].clone()}),
        r"model.safetensors: 0.scales: expected .* \[3, 33\], got float32 \[1, 33\]",
    ),
    "a scale that is none": (
        lambda t: t["3.scales"].fill_(float("nan")),
        r"model.safetensors: 3.scales: expected finite values > 0",
    ),
    "corrupt metadata": (
        lambda t: t["0.weight_packed"][:, -1].fill_(0),
        r"model.safetensors: 0.weight_packed: .*corrupted metadata",
    ),
    "an unexpected tensor": (
        lambda t: t.update({"4.weight": torch.zeros(3)}),
        r"4.weight: expected the tensors of the model, got an unexpected tensor",
    ),
    "a missing dense tensor": (
        lambda t: t.pop("1.weight"),
        r"1.weight: expected the tensors of the model, got no tensor",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_named(damage, tmp_path):
    change, message = DAMAGE[damage]
    out = sparse_marlin.save_checkpoint(make_net(), tmp_path / "net")
    change_tensors(out, change)
    with pytest.raises(ValueError, match=message):
        sparse_marlin.load_checkpoint(out, skeleton())


def test_damaged_configs_are_named(tmp_path):
    out = sparse_marlin.save_checkpoint(make_net(), tmp_path / "net")
    good = (out / "config.json").read_text()
    layer = {"in_features": 72, "out_features": 33, "group_size": 32}
    for fields, message in (
        ({"quant_method": "gptq"}, "quant_method: expected 'sparse_marlin', got 'gptq'"),
        ({"format_version": 99}, "format_version: expected .* version 1, got .* version 99"),
        ({"format": "other"}, "format_version: expected .* version 1, got other version 1"),
        ({"layers": ["0"]}, "layers: expected an object"),
        (
            {"layers": {"0": {**layer, "codebook": 1}}},
            r"config.json: 0: expected the fields .*, got \['codebook'\] too",
        ),
        ({"layers": {"0": {**layer, "group_size": 48}}}, "0: group_size: expected one of"),
        ({"layers": {"0": {**layer, "num_bits": 5}}}, "0: num_bits: expected one of"),
        ({"layers": {"0": {"in_features": 72}}}, "0: out_features: expected a number, got None"),
        ({"layers": {"0": {**layer, "in_features": 76}}}, r"0: expected \[33, 72\] .*, got \[33, 76\]"),
        ({"layers": {"0.0": {**layer}}}, "0.0.weight_packed: expected the tensor"),
    ):
        (out / "config.json").write_text(good)
        change_config(out, **fields)
        with pytest.raises(ValueError, match=message):
            sparse_marlin.load_checkpoint(out, skeleton())
    (out / "config.json").write_text("not json")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        sparse_marlin.load_checkpoint(out, skeleton())
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: expected a readable file"):
        sparse_marlin.load_checkpoint(out, skeleton())


def test_is_saved_model(tmp_path):
    assert not checkpoint.is_saved_model(tmp_path)
    out = sparse_marlin.save_checkpoint(make_net(), tmp_path / "net")
    assert checkpoint.is_saved_model(out)
    change_config(out, quant_method="gptq")
    assert not checkpoint.is_saved_model(out)


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sparse_marlin.replace_linears(model, group_size=32)
    mixed = model.model.layers[1].mlp
    mixed.up_proj = SparseMarlinLinear.from_linear(mixed.up_proj.to_linear(), group_size=-1, num_bits=8)
    return model


TOKENS = torch.tensor([[1, 7, 33, 12, 45]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS.to(model.device)).logits


def test_transformers_opens_and_saves(llama, tmp_path):
    import transformers

    wanted = logits(llama)
    out = sparse_marlin.save_checkpoint(llama, tmp_path / "a", max_shard_bytes=20_000)
    assert (out / "generation_config.json").exists()
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert_same_bits(logits(opened), wanted)
    assert opened.model.layers[1].mlp.up_proj.num_bits == 8
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    opened.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert_same_bits(logits(again), wanted)
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        assert_same_bits(llama.state_dict()[name], tensor, name)
    base = transformers.AutoModel.from_pretrained(out)
    assert base.layers[0].mlp.down_proj.group_size == 32
    assert_same_bits(logits(sparse_marlin.from_pretrained(out)), wanted)
    loaded = sparse_marlin.load_checkpoint(out, transformers.LlamaForCausalLM(llama.config).eval())
    assert_same_bits(logits(loaded), wanted)


def test_save_pretrained_after_replace_linears(tmp_path):
    """No call of ours in between: the config has to be in place."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sparse_marlin.replace_linears(model, group_size=64)
    model.save_pretrained(tmp_path / "a")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = torch.tensor([[1, 2, 3]])
    assert_same_bits(opened(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_reaches_scales_and_biases(llama, dtype, tmp_path, device):
    import transformers

    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("float32 runs on the CPU only")
    out = sparse_marlin.save_checkpoint(llama, tmp_path / "a")
    opened = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=dtype, device_map={"": device})
    layer = opened.model.layers[0].self_attn.q_proj
    assert layer.scales.dtype == layer.bias.dtype == dtype
    assert layer.weight_packed.dtype == torch.int32
    assert_same_bits(layer.weight_packed, llama.model.layers[0].self_attn.q_proj.weight_packed)
    got = logits(opened)
    assert got.dtype == dtype
    assert torch.allclose(got.float().cpu(), logits(llama), atol=0.05, rtol=0.1)


def test_generation_is_the_same_after_loading(llama, tmp_path):
    import transformers

    out = sparse_marlin.save_checkpoint(llama, tmp_path / "a")
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert opened.generate(TOKENS, **options).tolist() == llama.generate(TOKENS, **options).tolist()


def test_transformers_gets_clear_errors(llama, tmp_path):
    import transformers

    key = "model.layers.0.mlp.up_proj"

    def fails(message: str, change=None, **fields: object) -> None:
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        sparse_marlin.save_checkpoint(llama, folder)
        if change is not None:
            change_tensors(folder, change)
        if fields:
            change_config(folder, **fields)
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(folder)

    fails("format_version: expected .*, got .* version 7", format_version=7)
    fails(f"{key}.scales: expected the tensor", lambda t: t.pop(f"{key}.scales"))
    fails(
        f"{key}.weight_packed: expected int32",
        lambda t: t.update({f"{key}.weight_packed": t[f"{key}.weight_packed"][:1].clone()}),
    )
    fails(f"{key}: scales: expected finite", lambda t: t[f"{key}.scales"].fill_(float("inf")))
    fails(f"{key}: .*corrupted metadata", lambda t: t[f"{key}.weight_packed"][:, -1].fill_(0))
    other = dict(CheckpointConfig({f"{key}.inner": LayerSpec(72, 96, 4, 32)}).to_dict())
    fails("expected a layer of LlamaForCausalLM, got no module of that name", layers=other["layers"])


def test_a_dense_model_cannot_be_quantized_by_loading(tmp_path):
    import transformers

    from sparse_marlin.hf import SparseMarlinConfig, register

    register()  # whatever tests before this one did to the modules that transformers imports late

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    asked = SparseMarlinConfig.of(CheckpointConfig({"model.layers.0.mlp.up_proj": LayerSpec(64, 64)}))
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=asked)


def test_hook_neither_imports_transformers_nor_minds_the_order():
    """In a fresh interpreter, both orders, twice; the module's loader is put back."""
    code = """
import sys, {first}
{check}
import sparse_marlin, transformers
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["sparse_marlin"].__name__ == "SparseMarlinHfQuantizer"
assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__name__ == "SourceFileLoader"
sparse_marlin._hf_hook.install()
sparse_marlin._hf_hook.install()
from sparse_marlin import hf
hf.register()
assert not any(isinstance(f, sparse_marlin._hf_hook._Finder) for f in sys.meta_path)
print("registered")
"""
    for first, check in (("sparse_marlin", "assert 'transformers' not in sys.modules"), ("transformers", "")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(first=first, check=check)],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
            check=False,
        )
        assert done.stdout == "registered\n", done.stderr
