"""transformers' side of marlin-24 checkpoints: `from_pretrained` opens them as they are, converting each layer as it is
loaded, on the device it is loaded to.

Such files say `quant_method: gptq` or `compressed-tensors`, as thousands of others do that are none of our business.
So the config classes registered for these two are replaced by ones that look at the config first: marlin-24 goes to the
quantizer below, everything else to the class that was there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._shards import headers
from ..checkpoint import install_layers
from ..hf import SparseMarlinHfQuantizer, attach, finish_loading, resolve_names
from .formats import MARLIN_24, SAVED, detect, find_layers, is_compressed_tensors, is_gptq_marlin_24, open_source
from .layouts import COMPRESSED_TENSORS, GPTQ, NAMES, ORIGINAL, import_marlin_24, scales_are_permuted, unpermute_scales

# A name of our own for the original project's tensors, which come without a config.
ORIGINAL_METHOD = "marlin_24_original"
_METHOD = "sparse_marlin.marlin_24"


class Marlin24Config(QuantizationConfigMixin):
    """The `quantization_config` of a marlin-24 checkpoint, as it stands in the file."""

    quant_method: Any

    def __init__(self, **fields: Any) -> None:
        self.quant_method = _METHOD
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return dict(self.fields)


class Marlin24HfQuantizer(SparseMarlinHfQuantizer):
    """Opens marlin-24 checkpoints. The loaded model is one of this library's: `save_pretrained` writes our format."""

    def _process_model_before_weight_loading(
        self, model: Any, *, dtype: torch.dtype | None = None, checkpoint_files: Any = None, **_: Any
    ) -> Any:
        where = str(getattr(model.config, "_name_or_path", "") or "from_pretrained")
        paths = [Path(file) for file in checkpoint_files or ()]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            raise ValueError(
                f"{where}: expected .safetensors files, got {[path.name for path in paths] or 'none'}; "
                "convert the checkpoint with `sparse-marlin import`"
            )
        tensors, fields = headers(paths), self.quantization_config.fields
        if fields.get("quant_method") == ORIGINAL_METHOD:
            kind, self.naming, fields = MARLIN_24, ORIGINAL, {}
        else:
            kind, self.naming = detect(fields, tensors, f"{where}: quantization_config")
        layers = find_layers(kind, self.naming, fields, tensors, f"{where}: quantization_config")
        specs = {name: layer.spec for name, layer in layers.items() if layer.spec is not None}
        places = resolve_names(model, specs, where)
        # Where the layers are only half a checkpoint's, transformers would fill the others with random numbers.
        install_layers(
            model, {place: specs[name] for name, place in places.items()}, dtype=dtype or model.dtype, where=where
        )
        return model

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        operations = _operations()
        # A match is replaced where it first stands in the key (".s" is in ".self_attn"): hence the layer's own name.
        codes, meta, scales = (rf"(\.\w+)\.{key}$" for key in NAMES[self.naming])
        return [
            WeightConverter([codes, meta], [r"\1.weight_packed"], [operations["codes"](self.naming, codes, meta)]),
            WeightConverter([scales], [r"\1.scales"], [operations["scales"](self.naming)]),
        ]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        ours = tuple(_operations().values())
        conversions = getattr(model, "_weight_conversions", None) or []
        # What is saved is our format, so nothing of this may be undone when saving.
        model._weight_conversions = [
            entry for entry in conversions if not any(isinstance(op, ours) for op in getattr(entry, "operations", ()))
        ]
        finish_loading(model)
        attach(model, None)
        model.hf_quantizer = SparseMarlinHfQuantizer(model.config.quantization_config)
        model.quantization_method = model.config.quantization_config.quant_method
        return model


def config_for_transformers(folder: Path) -> dict[str, Any] | None:
    """Whether transformers opens a folder as it is: an empty dictionary; with the `quantization_config` given here,
    because the files say it elsewhere or not at all; or not: None, for formats that have to be imported."""
    with open_source(folder) as source:
        if source.kind == SAVED:
            return {}
        safetensors = all(info.path.suffix == ".safetensors" for info in source.files.infos.values())
        if source.kind != MARLIN_24 or not safetensors:
            return None
        if isinstance(source.config.get("quantization_config"), Mapping):
            return {}
        if source.quantization:
            return source.quantization
        return {
            GPTQ: {"quant_method": "gptq", "checkpoint_format": "marlin_24"},
            COMPRESSED_TENSORS: {"quant_method": "compressed-tensors", "format": MARLIN_24},
            ORIGINAL: {"quant_method": ORIGINAL_METHOD},
        }[source.naming]


_made: dict[str, Any] = {}


def _operations() -> dict[str, Any]:
    """Conversion operations exist in transformers 5 only, so their classes are made when they are needed."""
    if _made:
        return _made
    try:
        from transformers.core_model_loading import ConversionOps
    except ImportError:
        raise ImportError(
            "from_pretrained: expected transformers 5 or newer to open marlin-24 checkpoints as they are; "
            "update it, or convert the checkpoint with `sparse-marlin import`"
        ) from None

    class ImportCodes(ConversionOps):
        def __init__(self, naming: str, codes: str, meta: str) -> None:
            self.naming, self.codes, self.meta = naming, codes, meta

        def convert(self, input_dict: Any, *_: Any, full_layer_name: str = "", **__: Any) -> dict[str, Any]:
            codes, meta = _one(input_dict[self.codes]), _one(input_dict[self.meta])
            size_n = meta.shape[0] if self.naming == ORIGINAL else meta.shape[1] // 2
            scales = torch.ones((1, size_n), dtype=torch.float16, device=codes.device)  # they come by themselves
            name = full_layer_name.removesuffix(".weight_packed")
            return {
                ".weight_packed": import_marlin_24(codes, meta, scales, naming=self.naming, name=name).weight_packed
            }

        @property
        def reverse_op(self) -> Any:
            raise NotImplementedError("use sparse_marlin.legacy.export_checkpoint")

    class ImportScales(ConversionOps):
        def __init__(self, naming: str) -> None:
            self.naming = naming

        def convert(
            self, input_dict: Any, *_: Any, full_layer_name: str = "", model: Any = None, **__: Any
        ) -> dict[str, Any]:
            scales = _one(next(iter(input_dict.values())))
            layer = model.get_submodule(full_layer_name.removesuffix(".scales"))
            if scales_are_permuted(layer.in_features, scales.shape[0], self.naming):
                scales = unpermute_scales(scales)
            return {".scales": scales.contiguous()}

        @property
        def reverse_op(self) -> Any:
            raise NotImplementedError("use sparse_marlin.legacy.export_checkpoint")

    _made.update(codes=ImportCodes, scales=ImportScales)
    return _made


def _one(tensors: Any) -> torch.Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def _looking_at(base: Any, is_ours: Callable[[Mapping[str, Any]], bool]) -> Any:
    """A config class that stands in for `base` in transformers' table and makes `base` for all configs but ours."""

    class Dispatching(base):
        sparse_marlin_dispatch = True

        @classmethod
        def from_dict(cls, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            if is_ours(config_dict):
                return Marlin24Config.from_dict(config_dict)
            return base.from_dict(config_dict, *args, **kwargs)

    Dispatching.__name__ = Dispatching.__qualname__ = base.__name__
    return Dispatching


def _is_compressed_marlin_24(fields: Mapping[str, Any]) -> bool:
    return is_compressed_tensors(fields) and fields.get("format") == MARLIN_24


def register(auto: Any) -> None:
    """`auto` is `transformers.quantizers.auto`. Any number of times."""
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    for method, is_ours in (("gptq", is_gptq_marlin_24), ("compressed-tensors", _is_compressed_marlin_24)):
        base = configs.get(method)
        if base is not None and not getattr(base, "sparse_marlin_dispatch", False):
            configs[method] = _looking_at(base, is_ours)
    for method in ("gptq_marlin_24", "marlin_24", MARLIN_24, ORIGINAL_METHOD, _METHOD):
        configs.setdefault(method, Marlin24Config)
        quantizers.setdefault(method, Marlin24HfQuantizer)
