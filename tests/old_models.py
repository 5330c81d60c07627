"""Small Llama models as other libraries saved them, for the tests of the importer. Weights are random 2:4 codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import old_packers
import torch
from safetensors.torch import save_file

from sparse_marlin.testing import random_codes, random_scales

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass
class Layer:
    codes: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # [G, N]
    bias: torch.Tensor | None = None

    def dense(self, group_size: int) -> torch.Tensor:
        width = self.codes.shape[1] if group_size == -1 else group_size
        return self.codes.float() * self.scales.float().t().repeat_interleave(width, 1)[:, : self.codes.shape[1]]


@dataclass
class OldModel:
    """Quantized layers by name, everything else as it is in the dense model."""

    config: dict[str, object]
    layers: dict[str, Layer]
    plain: dict[str, torch.Tensor]
    num_bits: int
    group_size: int
    extra_files: dict[str, str] = field(default_factory=lambda: {"tokenizer_config.json": '{"model_max_length": 64}\n'})

    def dense_state(self) -> dict[str, torch.Tensor]:
        state = {name: tensor.float() for name, tensor in self.plain.items()}
        for name, layer in self.layers.items():
            state[f"{name}.weight"] = layer.dense(self.group_size)
        return state


def make_model(
    num_bits: int = 4, group_size: int = 128, *, hidden: int = 256, seed: int = 0, dtype: torch.dtype = torch.float16
) -> OldModel:
    """Two layers, grouped-query attention, K = `hidden` and 384."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=True,
        max_position_embeddings=64,
        dtype=dtype,
    )
    dense = LlamaForCausalLM(config)
    torch.nn.init.normal_(dense.model.layers[0].self_attn.q_proj.bias)
    layers, plain = {}, {}
    for name, tensor in dense.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner.endswith(PROJECTIONS) and kind == "weight":
            size_n, size_k = tensor.shape
            codes = random_codes(size_n, size_k, num_bits, seed=len(layers))
            scales = random_scales(size_n, size_k, group_size, torch.float16, seed=len(layers))
            layers[owner] = Layer(codes, scales / (4 if num_bits == 4 else 64))
        else:
            plain[name] = tensor.to(dtype).contiguous()
    fields = json.loads(config.to_json_string(use_diff=False))
    return OldModel({**fields, "architectures": ["LlamaForCausalLM"]}, layers, plain, num_bits, group_size)


GPTQ_CONFIG = {
    "damp_percent": 0.1,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": False,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "quant_method": "gptq",
}


def gptq_marlin_24(model: OldModel) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = dict(model.plain)
    for name, layer in model.layers.items():
        packed, meta, scales = old_packers.marlin_24(layer.codes, layer.scales, model.num_bits)
        tensors |= {f"{name}.B_24": packed, f"{name}.B_meta": meta, f"{name}.s": scales}
    config = {"bits": model.num_bits, "group_size": model.group_size, **GPTQ_CONFIG, "checkpoint_format": "marlin_24"}
    return tensors, config


def compressed_marlin_24(model: OldModel) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = dict(model.plain)
    for name, layer in model.layers.items():
        # The packer's comparison with half of K: two groups are left in plain order.
        permuted = layer.scales.shape[0] > 2
        packed, meta, scales = old_packers.marlin_24(layer.codes, layer.scales, model.num_bits, permuted=permuted)
        tensors |= {f"{name}.weight_packed": packed, f"{name}.meta": meta, f"{name}.scale_packed": scales}
    return tensors, compressed_config(model, "marlin-24")


def compressed_config(model: OldModel, kind: str, **more: object) -> dict[str, object]:
    channel = model.group_size == -1
    weights = {
        "num_bits": model.num_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else model.group_size,
        "actorder": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": [], "ignore": []},
        **more,
    }


def original_layers(model: OldModel) -> tuple[dict[str, torch.Tensor], None]:
    """4 bits only; `B` allocated twice too large, its second half never written."""
    tensors = dict(model.plain)
    for name, layer in model.layers.items():
        size_n, size_k = layer.codes.shape
        packed, meta, scales = old_packers.marlin_24(layer.codes, layer.scales, 4)
        never_written = torch.full_like(packed, 0x5EADBEEF)
        tensors |= {
            f"{name}.B": torch.cat([packed, never_written]),
            f"{name}.meta": meta.view(size_n, size_k // 16),
            f"{name}.s": scales,
        }
    return tensors, None


def _words(unsigned: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[R, C] values, each run of 32 / bits in one int32, the first lowest."""
    fields = unsigned.to(torch.int64).unflatten(1, (-1, 32 // num_bits))
    words = (fields << torch.arange(0, 32, num_bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def pack_quantized(model: OldModel) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = dict(model.plain)
    for name, layer in model.layers.items():
        unsigned = layer.codes.int() + (1 << model.num_bits - 1)
        tensors |= {
            f"{name}.weight_packed": _words(unsigned, model.num_bits),
            f"{name}.weight_scale": layer.scales.t().contiguous(),
            f"{name}.weight_shape": torch.tensor(layer.codes.shape),
        }
    return tensors, compressed_config(model, "pack-quantized")


def gptq(model: OldModel, version: str = "gptq") -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = dict(model.plain)
    zero = 1 << model.num_bits - 1
    for name, layer in model.layers.items():
        size_n, size_k = layer.codes.shape
        groups = layer.scales.shape[0]
        stored = torch.full((groups, size_n), zero - (version == "gptq"))
        tensors |= {
            f"{name}.qweight": _words(layer.codes.int() + zero, model.num_bits).t().contiguous(),
            f"{name}.qzeros": _words(stored, model.num_bits),
            f"{name}.scales": layer.scales,
            f"{name}.g_idx": (torch.arange(size_k) // (size_k // groups)).int(),
        }
    config = {"bits": model.num_bits, "group_size": model.group_size, **GPTQ_CONFIG, "checkpoint_format": version}
    return tensors, config


def bitmask(model: OldModel) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Float weights: the two largest of every four and a bit for each position, low bit first."""
    tensors = dict(model.plain)
    for name, layer in model.layers.items():
        weight = layer.dense(model.group_size).to(torch.float16)
        order = weight.abs().unflatten(1, (-1, 4)).argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(weight.unflatten(1, (-1, 4)), dtype=torch.bool).scatter(-1, order[..., :2], True)
        kept = kept.flatten(1)
        bits = (kept.unflatten(1, (-1, 8)).int() << torch.arange(8)).sum(-1).to(torch.uint8)
        tensors |= {
            f"{name}.compressed": weight[kept].view(weight.shape[0], -1),
            f"{name}.bitmask": bits,
            f"{name}.shape": torch.tensor(weight.shape).reshape(-1, 1),
        }
    config = compressed_config(model, "dense")
    config["config_groups"] = {}
    config["sparsity_config"] = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "ignore": ["lm_head"]}
    return tensors, config


def dense(model: OldModel) -> tuple[dict[str, torch.Tensor], None]:
    state = dict(model.plain)
    for name, layer in model.layers.items():
        state[f"{name}.weight"] = layer.dense(model.group_size).to(torch.float16)
    return state, None


Writer = Callable[[OldModel], tuple[dict[str, torch.Tensor], "dict[str, object] | None"]]


def write(
    folder: Path,
    model: OldModel,
    writer: Writer,
    *,
    shards: int = 1,
    config_key: str | None = "quantization_config",
    config_file: str | None = None,
    change: Callable[[dict[str, torch.Tensor], dict[str, object]], None] | None = None,
) -> Path:
    """The model as `writer` makes it, in a folder; `change` may spoil tensors and config before they are written.
    Shards take tensors in turn, so that a layer's tensors are in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, quantization = writer(model)
    tensors = dict(sorted(tensors.items()))
    if change is not None:
        change(tensors, quantization if quantization is not None else {})
    config = dict(model.config)
    if quantization is not None and config_key is not None:
        config[config_key] = quantization
    if quantization is not None and config_file is not None:
        (folder / config_file).write_text(json.dumps(quantization))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in model.extra_files.items():
        (folder / name).write_text(text)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for j, (name, tensor) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
