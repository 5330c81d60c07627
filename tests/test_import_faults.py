"""Checkpoints that are damaged, incomplete or contradict their config: a clear error each, and nothing left behind."""

import old_models as om
import pytest
import torch

import sparse_marlin
from sparse_marlin import legacy

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> om.OldModel:
    return om.make_model()


WRITERS = {
    "gptq marlin_24": om.gptq_marlin_24,
    "compressed-tensors marlin-24": om.compressed_marlin_24,
    "pack-quantized": om.pack_quantized,
    "gptq": om.gptq,
}
Q = "model.layers.1.self_attn.q_proj"


def spoil(key: str, value: object):
    def change(tensors, _):
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value(tensors[key]) if callable(value) else value

    return change


def set_config(**fields: object):
    return lambda _, config: config.update(fields)


def zero_metadata(tensor: torch.Tensor) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled[0, 0] = 0
    return spoiled


FAULTS = {
    "a tensor is missing": ("gptq marlin_24", spoil(f"{Q}.s", None), rf"expected {Q}.s beside it, got none"),
    "a scale is infinite": (
        "gptq marlin_24",
        spoil(f"{Q}.s", lambda t: t.clone().fill_(float("inf"))),
        rf"model.safetensors: {Q}: scales: expected finite values > 0",
    ),
    "codes are of another dtype": (
        "gptq marlin_24",
        spoil(f"{Q}.B_24", lambda t: t.long()),
        rf"model.safetensors: {Q}: packed: expected int32 .*, got int64",
    ),
    "metadata is of another layer": (
        "compressed-tensors marlin-24",
        spoil(f"{Q}.meta", lambda t: t[:, :192].contiguous()),
        rf"model.safetensors: {Q}: meta: expected int16",
    ),
    "a bit of the metadata flipped": (
        "compressed-tensors marlin-24",
        spoil(f"{Q}.meta", zero_metadata),
        rf"model.safetensors: {Q}: import_marlin_24: meta: .* at row 0, column 0",
    ),
    "the config has other bits": ("gptq marlin_24", set_config(bits=8), r"mlp.down_proj: B_24: expected 8-bit codes"),
    "the config has unknown bits": ("gptq marlin_24", set_config(bits=3), "bits: expected one of"),
    "the config has other groups": (
        "gptq marlin_24",
        set_config(group_size=64),
        "scales: expected 6 groups for group_size 64",
    ),
    "the config ignores a packed layer": (
        "compressed-tensors marlin-24",
        set_config(ignore=[r"re:.*layers\.1\.self_attn.*"]),
        r"expected a dense layer, because .*ignore names it",
    ),
    "no group targets the layer": (
        "compressed-tensors marlin-24",
        lambda _, config: config["config_groups"]["group_0"].update(targets=[r"re:.*mlp.*"]),
        "expected a layer that .* targets",
    ),
    "a pattern is no pattern": (
        "compressed-tensors marlin-24",
        set_config(ignore=["re:("]),
        "ignore: expected a regular expression",
    ),
    "asymmetric weights": (
        "pack-quantized",
        lambda _, config: config["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "symmetric: expected symmetric weights",
    ),
    "float weights": (
        "pack-quantized",
        lambda _, config: config["config_groups"]["group_0"]["weights"].update(type="float"),
        "type: expected int weights, got float",
    ),
    "an unknown format": ("pack-quantized", set_config(format="nvfp4-pack-quantized"), "format: expected marlin-24"),
    "an unknown method": ("pack-quantized", set_config(quant_method="awq", config_groups=None), "quant_method"),
    "codes that are not 2:4": (
        "pack-quantized",
        spoil(f"{Q}.weight_packed", torch.zeros_like),
        rf"{Q}: pack_24_weights: weight: expected 2:4 sparsity",
    ),
    "zero points off the middle": (
        "gptq",
        spoil(f"{Q}.qzeros", torch.zeros_like),
        rf"{Q}: qzeros: expected zero points in the middle",
    ),
    "groups in order of activations": (
        "gptq",
        spoil(f"{Q}.g_idx", lambda t: t.flip(0)),
        rf"{Q}: g_idx: expected consecutive groups",
    ),
    "no layers at all": (
        "compressed-tensors marlin-24",
        lambda tensors, _: [tensors.pop(k) for k in list(tensors) if k.endswith(("weight_packed", "meta", "_packed"))],
        "expected layers with the tensors weight_packed meta scale_packed",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_leave_nothing(fault, model, tmp_path):
    name, change, message = FAULTS[fault]
    src = om.write(tmp_path / "src", model, WRITERS[name], change=change)
    with pytest.raises((ValueError, RuntimeError), match=message):
        legacy.import_checkpoint(src, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("fault", ["a tensor is missing", "metadata is of another layer", "the config has other bits"])
def test_transformers_gets_the_same_errors(fault, model, tmp_path):
    name, change, message = FAULTS[fault]
    src = om.write(tmp_path / "src", model, WRITERS[name], change=change)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(src)


def test_damaged_files(model, tmp_path):
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24, shards=2)
    shard = src / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()

    def fails(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            legacy.import_checkpoint(src, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["src"]

    shard.write_bytes(whole[: len(whole) // 2])
    fails(r"model-00002-of-00002.safetensors: expected a state dict written by safetensors, got: ")
    shard.write_bytes(whole[:100])
    fails(r"model-00002-of-00002.safetensors: expected a state dict written by safetensors, got: ")
    shard.write_bytes(bytes([whole[0] ^ 0xFF]) + whole[1:])
    fails(r"model-00002-of-00002.safetensors: expected a state dict written by safetensors, got: ")
    shard.unlink()
    fails(r"expected the files of model.safetensors.index.json, got none named model-00002-of-00002.safetensors")
    shard.write_bytes((src / "model-00001-of-00002.safetensors").read_bytes())
    fails(r"model-00002-of-00002.safetensors: .*: expected once, got it in model-00001-of-00002.safetensors too")
    shard.write_bytes(whole)
    (src / "model.safetensors.index.json").write_text("{")
    fails(r"model.safetensors.index.json: expected JSON with a weight_map")
    (src / "model.safetensors.index.json").unlink()
    (src / "config.json").write_text("[]")
    fails(r"config.json: expected a JSON object")


def test_sources_that_are_none(model, tmp_path):
    for src, message in (
        (tmp_path / "nowhere", "expected a folder or a file of tensors, got nothing"),
        (tmp_path, "expected .safetensors files .*, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            legacy.import_checkpoint(src, tmp_path / "out")
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24)
    legacy.import_checkpoint(src, tmp_path / "out")
    with pytest.raises(ValueError, match="a model that sparse_marlin saved; it needs no import"):
        legacy.import_checkpoint(tmp_path / "out", tmp_path / "out2")
    with pytest.raises(ValueError, match="out: expected a name that does not exist yet"):
        legacy.import_checkpoint(src, tmp_path / "out")
    legacy.import_checkpoint(src, tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match="format: expected one of"):
        legacy.export_checkpoint(tmp_path / "out", tmp_path / "old", format="marlin")


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparse_marlin._shards, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        legacy.import_checkpoint(src, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_verification_notices_a_flipped_bit(model, tmp_path, monkeypatch):
    """What is read back after writing is not what was written: one bit, in each kind of tensor."""
    src = om.write(tmp_path / "src", model, om.gptq_marlin_24)
    true_save = sparse_marlin._shards.save_file
    for name in (f"{Q}.weight_packed", f"{Q}.scales", "model.norm.weight"):

        def save(tensors, path, metadata=None, name=name):
            spoiled = tensors[name].clone()
            spoiled.view(torch.uint8).view(-1)[7] ^= 4
            true_save({**tensors, name: spoiled}, path, metadata=metadata)

        monkeypatch.setattr(sparse_marlin._shards, "save_file", save)
        with pytest.raises(RuntimeError, match=rf"{name}: expected the bytes"):
            legacy.import_checkpoint(src, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
