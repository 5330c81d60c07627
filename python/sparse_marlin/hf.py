"""transformers' side of saved models: the quantization config and the quantizer, registered by `register`.

Importing this module imports transformers; `_hf_hook` does so only where transformers is in use anyway. The quantizer
puts empty `SparseMarlinLinear` layers in place before the weights are loaded; tensor names equal buffer names, so
transformers loads, places and saves them as it does any buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ._shards import TensorInfo, headers
from .checkpoint import QUANT_METHOD, CheckpointConfig, LayerSpec, check_tensors, install_layers, verify_packed
from .linear import SparseMarlinLinear
from .quantize import SCALE_DTYPES


class SparseMarlinConfig(QuantizationConfigMixin):
    """`quantization_config` of a model saved in this library's format (see `sparse_marlin.checkpoint`)."""

    quant_method: Any

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.checkpoint = CheckpointConfig.from_dict({"quant_method": QUANT_METHOD, **fields})

    @classmethod
    def of(cls, config: CheckpointConfig) -> SparseMarlinConfig:
        return cls(**config.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return self.checkpoint.to_dict()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class SparseMarlinHfQuantizer(HfQuantizer):
    """Opens saved models; converting a dense one is `replace_linears` or `compress`, not a loading option."""

    requires_calibration = True
    quantization_config: Any

    def update_dtype(self, dtype: Any) -> Any:
        if dtype is not None and dtype not in SCALE_DTYPES:
            raise ValueError(f"from_pretrained: dtype: expected float16, bfloat16 or float32, got {dtype}")
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, *, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Any:
        where = str(getattr(model.config, "_name_or_path", "") or "from_pretrained")
        config = self.quantization_config.checkpoint
        places = resolve_names(model, config.layers, where)
        tensors = _headers(checkpoint_files)
        if tensors is not None:
            check_tensors({name: config.layers[name] for name in places}, tensors, where)
        layers = {place: config.layers[name] for name, place in places.items()}
        install_layers(model, layers, dtype=dtype or model.dtype, where=where)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        finish_loading(model)
        attach(model, None)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # gradients reach the activations (adapters) and the biases

    @property
    def is_compileable(self) -> bool:
        return True


def finish_loading(model: nn.Module) -> None:
    """One dtype for the scales and bias of each layer: the model's. Then every layer is judged as a state dict would
    be, because transformers fills tensors that it did not find without a word."""
    dtype = getattr(model, "dtype", None)
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseMarlinLinear):
            continue
        if layer.weight_packed.is_meta:  # offloaded
            continue
        if dtype in SCALE_DTYPES:
            layer.to(dtype)
        problem = layer._loading_problem(layer.state_dict(), "", {})
        if problem:
            raise ValueError(f"{name}: {problem}")
        verify_packed(layer.weight_packed, LayerSpec.of(layer), name)


def attach(model: Any, config: CheckpointConfig | None) -> None:
    """Set the model's `quantization_config` to `config`, or to what its layers are now."""
    from .checkpoint import describe

    model.config.quantization_config = SparseMarlinConfig.of(config or describe(model))


def resolve_names(model: Any, names: Iterable[str], where: str) -> dict[str, str]:
    """Layer names of a checkpoint as the model has them: as they are, or renamed as transformers renames keys (a base
    model without its head, a model whose layers moved). A name that leads nowhere is an error; layers of a head that
    this model does not have are left out when a base model is opened."""
    known = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, str] = {}
    for name in names:
        place = name if name in known else _renamed(model, name, known, prefix)
        if place is not None:
            found[name] = place
        elif not _is_headless(model, prefix):
            raise ValueError(
                f"{where}: {name}: expected a layer of {type(model).__name__}, got no module of that name; "
                "the checkpoint belongs to another architecture"
            )
    return found


def _renamed(model: Any, name: str, known: set[str], prefix: str) -> str | None:
    candidates = [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        state = model.state_dict()
        renamed, _ = rename_source_key(f"{name}.weight", renamings, [], prefix, state)
        candidates.insert(0, renamed.removesuffix(".weight"))
    except ImportError:  # transformers 4 renames nothing
        pass
    return next((candidate for candidate in candidates if candidate in known), None)


def _is_headless(model: Any, prefix: str) -> bool:
    return bool(prefix) and not hasattr(model, prefix)


def _headers(files: Any) -> Mapping[str, TensorInfo] | None:
    """Headers of the files that transformers is about to read; None where they are not safetensors."""
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return None
    return headers(paths)


def register() -> None:
    """Make transformers open this library's models. Any number of times."""
    import transformers.quantizers.auto as auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, SparseMarlinConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, SparseMarlinHfQuantizer)
    from .legacy.hf import register as register_legacy

    register_legacy(auto)


__all__ = ["LayerSpec", "SparseMarlinConfig", "SparseMarlinHfQuantizer", "attach", "register"]
