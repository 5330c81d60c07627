"""Whole checkpoints of other formats: imported, exported, opened as they are, and refused when something is wrong."""

import json
import os
from pathlib import Path

import old_models as om
import pytest
import torch
from safetensors.torch import load_file

import sparse_marlin
from sparse_marlin import SparseMarlinLinear, legacy
from sparse_marlin.legacy import formats
from sparse_marlin.testing import assert_same_bits

transformers = pytest.importorskip("transformers")

EXACT = {
    "gptq marlin_24": om.gptq_marlin_24,
    "compressed-tensors marlin-24": om.compressed_marlin_24,
    "original": om.original_layers,
    "pack-quantized": om.pack_quantized,
    "gptq": om.gptq,
    "gptq_v2": lambda model: om.gptq(model, "gptq_v2"),
}
MARLIN_24 = ["gptq marlin_24", "compressed-tensors marlin-24"]
TOKENS = torch.tensor([[3, 17, 42, 9, 88, 5, 61]])


@pytest.fixture(scope="module")
def models() -> dict[tuple[int, int], om.OldModel]:
    """K = 256 (the plain order of two groups) and 384 (three groups)."""
    return {(bits, group): om.make_model(bits, group) for bits in (4, 8) for group in (128, -1)}


@pytest.fixture(scope="module")
def model(models) -> om.OldModel:
    return models[4, 128]


def dense_logits(model: om.OldModel, device: torch.device | str = "cpu") -> torch.Tensor:
    config = transformers.LlamaConfig.from_dict(dict(model.config))
    dense = transformers.LlamaForCausalLM(config).float().eval()
    dense.load_state_dict(model.dense_state())
    with torch.no_grad():
        return dense.to(device)(TOKENS.to(device)).logits


@torch.no_grad()
def logits(opened) -> torch.Tensor:
    return opened(TOKENS.to(opened.device)).logits.float()


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert error <= tolerance, error


def packed_layers(opened) -> dict[str, SparseMarlinLinear]:
    return dict(sparse_marlin.checkpoint.packed_layers(opened))


def assert_holds(opened, model: om.OldModel) -> None:
    """Codes, scales and biases of every layer, and that nothing else was touched."""
    layers = packed_layers(opened)
    assert layers.keys() == model.layers.keys()
    for name, layer in layers.items():
        assert_same_bits(layer.codes(), model.layers[name].codes, name)
        assert_same_bits(layer.scales, model.layers[name].scales.to(layer.scales.dtype), name)


# --- importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(4, 128), (4, -1), (8, 128), (8, -1)], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_import_keeps_every_number(name, key, models, tmp_path):
    model = models[key]
    if name == "original" and model.num_bits == 8:
        pytest.skip("the original project has 4 bits only")
    src = om.write(tmp_path / "src", model, EXACT[name], shards=3)
    report = legacy.import_checkpoint(src, tmp_path / "out")
    assert len(report.converted) == len(model.layers)
    assert report.num_bits == model.num_bits
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == model.plain.keys() | {
        f"{layer}.{role}" for layer in model.layers for role in ("weight_packed", "scales")
    }
    for layer, wanted in model.layers.items():
        codes = sparse_marlin.unpack_24_weights(
            written[f"{layer}.weight_packed"], *wanted.codes.shape, num_bits=model.num_bits
        )
        assert_same_bits(codes, wanted.codes, layer)
        assert_same_bits(written[f"{layer}.scales"], wanted.scales, layer)
    for other, wanted in model.plain.items():
        assert_same_bits(written[other], wanted, other)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == model.extra_files["tokenizer_config.json"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sparse_marlin"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


@pytest.mark.parametrize("writer", [om.bitmask, om.dense], ids=["bitmask", "dense"])
def test_dense_weights_are_quantized_on_the_way(writer, model, tmp_path):
    """The weights are codes times scales already, so the search for scales loses nothing to speak of."""
    src = om.write(tmp_path / "src", model, writer)
    report = legacy.import_checkpoint(src, tmp_path / "out", group_size=128, num_bits=4)
    assert len(report.converted) == len(model.layers)
    assert all(row.relative_error < 1e-3 for row in report.converted)
    opened = sparse_marlin.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(opened), dense_logits(model), 1e-3)


def test_ignore_and_targets_of_dense_models(model, tmp_path):
    src = om.write(tmp_path / "src", model, om.dense)
    ignore = ["lm_head", r"re:model\.layers\.0\..*", "down_proj"]
    report = legacy.import_checkpoint(src, tmp_path / "a", ignore=ignore)
    wanted = {name for name in model.layers if ".1." in name and "down_proj" not in name}
    assert {row.name for row in report.converted} == wanted
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert set(config["layers"]) == wanted
    assert "model.layers.0.mlp.up_proj" in config["ignore"]
    report = legacy.import_checkpoint(src, tmp_path / "b", targets=[r"re:.*mlp\.(up|gate)_proj"])
    assert {row.name for row in report.converted} == {n for n in model.layers if n.endswith(("up_proj", "gate_proj"))}


def test_dense_layers_that_are_not_sparse_stay_dense(model, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def fill(tensors, _):
        tensors[name] = torch.ones_like(tensors[name])

    src = om.write(tmp_path / "src", model, om.dense, change=fill)
    report = legacy.import_checkpoint(src, tmp_path / "out")
    assert [row.name for row in report.skipped] == [name.removesuffix(".weight")]
    assert "not 2:4" in (report.skipped[0].reason or "")
    opened = sparse_marlin.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(opened.model.layers[0].mlp.up_proj, torch.nn.Linear)

    def fill_all(tensors, _):
        for key in tensors:
            if key.endswith("proj.weight"):
                tensors[key] = torch.ones_like(tensors[key])

    src = om.write(tmp_path / "src2", model, om.dense, change=fill_all)
    with pytest.raises(ValueError, match="expected 2:4-sparse layers, got none in 14 linear layers"):
        legacy.import_checkpoint(src, tmp_path / "out2")


def test_a_state_dict_file_of_the_original_project(model, tmp_path):
    tensors, _ = om.original_layers(model)
    torch.save(tensors, tmp_path / "layers.pt")
    legacy.import_checkpoint(tmp_path / "layers.pt", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer, wanted in model.layers.items():
        got = sparse_marlin.unpack_24_weights(written[f"{layer}.weight_packed"], *wanted.codes.shape)
        assert_same_bits(got, wanted.codes, layer)


def test_shards_are_cut_and_indexed(model, tmp_path):
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24, shards=4)
    legacy.import_checkpoint(src, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 100_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert_holds(sparse_marlin.from_pretrained(tmp_path / "out", dtype=torch.float32), model)


def test_permuted_scales_can_be_said(tmp_path):
    """K = 128 of a model that was cut: one group, in the grouped order."""
    model = om.make_model(4, 128, hidden=128)

    def permute(tensors, _):
        for key in tensors:
            if key.endswith(".s") and tensors[key].shape[0] == 1:
                tensors[key] = legacy.permute_scales(tensors[key])

    src = om.write(tmp_path / "src", model, om.gptq_marlin_24, change=permute)
    legacy.import_checkpoint(src, tmp_path / "out", permuted_scales=True)
    assert_holds(sparse_marlin.from_pretrained(tmp_path / "out", dtype=torch.float32), model)


# --- exporting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(4, 128), (8, -1)], ids=str)
@pytest.mark.parametrize(
    ("kind", "writer"), [("gptq-marlin-24", om.gptq_marlin_24), ("marlin-24", om.compressed_marlin_24)]
)
def test_export_writes_what_the_packer_wrote(kind, writer, key, models, tmp_path):
    model = models[key]
    src = om.write(tmp_path / "src", model, writer)
    legacy.import_checkpoint(src, tmp_path / "ours")
    names = legacy.export_checkpoint(tmp_path / "ours", tmp_path / "old", format=kind)
    assert set(names) == set(model.layers)
    wanted, got = load_file(src / "model.safetensors"), load_file(tmp_path / "old" / "model.safetensors")
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert_same_bits(got[name], tensor, name)
    old = json.loads((src / "config.json").read_text())["quantization_config"]
    new = json.loads((tmp_path / "old" / "config.json").read_text())["quantization_config"]
    for field in ("quant_method", "format", "checkpoint_format", "bits", "group_size", "ignore", "config_groups"):
        assert new.get(field) == old.get(field), field
    assert (tmp_path / "old" / "quantize_config.json").exists() == (kind == "gptq-marlin-24")
    assert_holds(sparse_marlin.from_pretrained(tmp_path / "old", dtype=torch.float32), model)


def test_export_of_mixed_layers(tmp_path):
    """compressed-tensors' config has groups, GPTQ's has one of everything."""
    net = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 5))
    sparse_marlin.replace_linears(net, num_bits=4, ignore=["1", "2"])
    net[1] = SparseMarlinLinear.from_linear(net[1], group_size=-1, num_bits=8)
    sparse_marlin.save_checkpoint(net, tmp_path / "ours")
    legacy.export_checkpoint(tmp_path / "ours", tmp_path / "old", format="marlin-24")
    legacy.import_checkpoint(tmp_path / "old", tmp_path / "again")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert a.keys() == b.keys()
    assert_same_bits(a["0.weight_packed"], b["0.weight_packed"])
    assert_same_bits(a["1.weight_packed"], b["1.weight_packed"])
    with pytest.raises(ValueError, match="expected one num_bits and group_size for all layers"):
        legacy.export_checkpoint(tmp_path / "ours", tmp_path / "gptq", format="gptq-marlin-24")
    with pytest.raises(ValueError, match="expected a model that sparse_marlin saved, got marlin-24"):
        legacy.export_checkpoint(tmp_path / "old", tmp_path / "older")
    net[0] = SparseMarlinLinear.from_linear(torch.nn.Linear(128, 60), group_size=-1)
    sparse_marlin.save_checkpoint(net, tmp_path / "odd")
    with pytest.raises(ValueError, match=r"model.safetensors: 0.weight_packed: .*size_n: expected a multiple of 64"):
        legacy.export_checkpoint(tmp_path / "odd", tmp_path / "older")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "odd", "old", "ours"]


# --- opened as they are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [(4, 128), (8, -1)], ids=str)
@pytest.mark.parametrize("name", MARLIN_24)
def test_transformers_opens_both_formats(name, key, models, tmp_path, device):
    model = models[key]
    src = om.write(tmp_path / "src", model, EXACT[name], shards=2)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    opened = transformers.AutoModelForCausalLM.from_pretrained(src, dtype=dtype, device_map={"": device})
    assert opened.device.type == device.type
    assert_holds(opened, model)
    assert_close(logits(opened), dense_logits(model, device), 1e-5 if dtype == torch.float32 else 2e-2)
    opened.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert again.config.quantization_config.quant_method == "sparse_marlin"
    assert_holds(again, model)


@pytest.mark.parametrize("name", MARLIN_24)
def test_bfloat16_models_with_float16_scales(name, tmp_path):
    model = om.make_model(4, 128, dtype=torch.bfloat16)
    src = om.write(tmp_path / "src", model, EXACT[name])
    opened = transformers.AutoModelForCausalLM.from_pretrained(src)  # the config's dtype
    assert {layer.scales.dtype for layer in packed_layers(opened).values()} == {torch.bfloat16}
    assert_holds(opened, model)
    assert_close(logits(opened), dense_logits(model), 5e-2)
    legacy.import_checkpoint(src, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.scales"].dtype == torch.float16
    assert_same_bits(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(opened))


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("compressed-tensors marlin-24", {"config_key": "compression_config"}),
        ("gptq marlin_24", {"config_key": None, "config_file": "quantize_config.json"}),
        ("gptq marlin_24", {"config_key": None}),
        ("compressed-tensors marlin-24", {"config_key": None}),
        ("original", {}),
        ("pack-quantized", {}),
    ],
)
def test_from_pretrained_finds_the_format(name, where, model, tmp_path):
    """Configs in the places where older files have them, or nowhere."""
    src = om.write(tmp_path / "src", model, EXACT[name], **where)
    before = sorted(os.listdir(src))
    opened = sparse_marlin.from_pretrained(src, dtype=torch.float32)
    assert_holds(opened, model)
    assert_close(logits(opened), dense_logits(model), 1e-5)
    assert sorted(os.listdir(src)) == before


@pytest.mark.parametrize("method", ["gptq_marlin_24", "marlin_24"])
def test_other_spellings_of_the_method(method, model, tmp_path):
    def rename(_, config):
        config["quant_method"] = method

    src = om.write(tmp_path / "src", model, om.gptq_marlin_24, change=rename)
    assert_holds(transformers.AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32), model)


def test_other_gptq_and_compressed_tensors_configs_are_left_alone(monkeypatch):
    from transformers.quantizers.auto import AutoQuantizationConfig

    gptq = AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4})
    assert type(gptq) is transformers.GPTQConfig
    ours = AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin_24"})
    assert type(ours).__name__ == "Marlin24Config"
    other = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    seen = []
    monkeypatch.setattr(transformers.CompressedTensorsConfig, "from_dict", lambda config, **_: seen.append(config))
    AutoQuantizationConfig.from_dict(other)
    assert seen == [other]
    ours = AutoQuantizationConfig.from_dict({**other, "format": "marlin-24"})
    assert type(ours).__name__ == "Marlin24Config"
    assert len(seen) == 1


def test_base_models_open_too(model, tmp_path):
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24)
    base = transformers.AutoModel.from_pretrained(src, dtype=torch.float32)
    assert {f"model.{name}" for name in packed_layers(base)} == set(model.layers)


@pytest.mark.parametrize(
    ("entry", "layer", "wanted"),
    [
        ("Linear", "model.layers.0.mlp.up_proj", True),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("proj", "model.layers.0.mlp.up_proj", False),
        (r"re:.*mlp.*", "model.layers.0.mlp.up_proj", True),
        (r"re:mlp", "model.layers.0.mlp.up_proj", False),
        (r"re:model\.layers\.\d+\.mlp\.(gate|up)_proj$", "model.layers.11.mlp.up_proj", True),
    ],
)
def test_ignore_entries(entry, layer, wanted):
    assert formats.matches(entry, layer) is wanted


def test_links_of_a_hub_cache_are_followed(model, tmp_path):
    """Snapshots of hub caches hold links to blobs."""
    blobs = om.write(tmp_path / "blobs", model, om.gptq_marlin_24)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    legacy.import_checkpoint(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert Path(tmp_path / "out" / "tokenizer_config.json").is_file()
