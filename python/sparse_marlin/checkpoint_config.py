"""The format of saved models: a config.json whose `quantization_config` says how each layer is packed.

    {"quant_method": "sparse_marlin", "format": <name>, "format_version": <n>, "num_bits": 4, "group_size": 128,
     "layers": {"model.layers.0.mlp.up_proj": {"in_features": 576, "out_features": 1536},
                "model.layers.1.mlp.up_proj": {"in_features": 576, "out_features": 1536, "num_bits": 8, "rank": 16}},
     "ignore": ["lm_head"]}

`layers` names every packed layer, with what differs from the two common settings; `rank` is that of a low-rank
correction, and `"packed_correction": true` says that its `correction_up` is packed. `ignore` names the linears that
stayed dense. The tensors are the buffers of `SparseMarlinLinear` under the layer's name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ._extension import _core
from ._shards import TensorInfo
from ._version import __version__
from .linear import SparseMarlinLinear
from .quantize import SCALE_DTYPES

QUANT_METHOD = "sparse_marlin"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is packed. `rank` > 0: with a low-rank correction of that rank, which may be packed."""

    in_features: int
    out_features: int
    num_bits: int = 4
    group_size: int = 128
    rank: int = 0
    packed_correction: bool = False

    @classmethod
    def of(cls, layer: SparseMarlinLinear) -> LayerSpec:
        return cls(
            layer.in_features, layer.out_features, layer.num_bits, layer.group_size, getattr(layer, "rank", 0),
            getattr(layer, "packed_correction", False),
        )  # fmt: skip

    def make(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> SparseMarlinLinear:
        """An empty layer of this kind."""
        options: dict[str, Any] = {"rank": self.rank} if self.rank else {}
        if self.packed_correction:
            options["packed_correction"] = True
        return SparseMarlinLinear(
            self.in_features,
            self.out_features,
            bias,
            group_size=self.group_size,
            num_bits=self.num_bits,
            device=device,
            dtype=dtype,
            **options,
        )


@dataclass
class CheckpointConfig:
    """The `quantization_config` of a saved model."""

    layers: dict[str, LayerSpec]
    ignore: tuple[str, ...] = ()
    format_version: int = field(default_factory=lambda: _core.FORMAT_VERSION)

    @property
    def common(self) -> tuple[int, int]:
        """The most frequent (num_bits, group_size)."""
        settings = Counter((spec.num_bits, spec.group_size) for spec in self.layers.values())
        return settings.most_common(1)[0][0] if settings else (4, 128)

    def to_dict(self) -> dict[str, Any]:
        num_bits, group_size = self.common
        layers: dict[str, dict[str, int]] = {}
        for name, spec in self.layers.items():
            entry = {"in_features": spec.in_features, "out_features": spec.out_features}
            if spec.num_bits != num_bits:
                entry["num_bits"] = spec.num_bits
            if spec.group_size != group_size:
                entry["group_size"] = spec.group_size
            if spec.rank:
                entry["rank"] = spec.rank
            if spec.packed_correction:
                entry["packed_correction"] = True
            layers[name] = entry
        return {
            "quant_method": QUANT_METHOD,
            "format": _core.FORMAT_NAME,
            "format_version": self.format_version,
            "producer": f"sparse_marlin {__version__}",
            "num_bits": num_bits,
            "group_size": group_size,
            "ignore": list(self.ignore),
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "quantization_config") -> CheckpointConfig:
        """The config of a saved model, every field checked; `where` opens the messages."""
        if config.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"{where}: quant_method: expected '{QUANT_METHOD}', got {config.get('quant_method')!r}")
        version = config.get("format_version")
        if config.get("format") != _core.FORMAT_NAME or version != _core.FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version: expected {_core.FORMAT_NAME} version {_core.FORMAT_VERSION}, "
                f"got {config.get('format')} version {version}; use the sparse_marlin that wrote it "
                f"({config.get('producer', 'unknown')}), or save the model again"
            )
        layers = config.get("layers")
        if not isinstance(layers, Mapping) or not all(isinstance(entry, Mapping) for entry in layers.values()):
            raise ValueError(f"{where}: layers: expected an object of layer names, got {type(layers).__name__}")
        common = {"num_bits": config.get("num_bits"), "group_size": config.get("group_size")}
        specs = {name: _spec(f"{where}: {name}", {**common, **entry}) for name, entry in layers.items()}
        return cls(specs, tuple(config.get("ignore") or ()), version)


def _spec(where: str, entry: Mapping[str, Any]) -> LayerSpec:
    optional: dict[str, type] = {"rank": int, "packed_correction": bool}
    required = {"in_features", "out_features", "num_bits", "group_size"}
    known = required | optional.keys()
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{where}: expected the fields {sorted(known)}, got {unknown} too; update sparse_marlin")
    for key in sorted(required):
        if not isinstance(entry.get(key), int):
            raise ValueError(f"{where}: {key}: expected a number, got {entry.get(key)!r}")
    for key, kind in optional.items():
        if key in entry and type(entry[key]) is not kind:
            wanted = "true or false" if kind is bool else "a number"
            raise ValueError(f"{where}: {key}: expected {wanted}, got {entry[key]!r}")
    spec = LayerSpec(**entry)
    if spec.num_bits not in _core.NUM_BITS:
        raise ValueError(f"{where}: num_bits: expected one of {sorted(_core.NUM_BITS)}, got {spec.num_bits}")
    if spec.group_size not in _core.GROUP_SIZES:
        raise ValueError(f"{where}: group_size: expected one of {sorted(_core.GROUP_SIZES)}, got {spec.group_size}")
    if spec.packed_correction and (not spec.rank or spec.group_size == _core.CHANNELWISE):
        raise ValueError(
            f"{where}: packed_correction: expected a rank > 0 and groups, got rank {spec.rank}, "
            f"group_size {spec.group_size}"
        )
    return spec


def expected_tensors(name: str, spec: LayerSpec) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """Names, allowed dtypes and shapes of a layer's tensors, without the bias."""
    layer = spec.make(False, "meta", torch.float32)
    return {
        f"{name}.{key}": (SCALE_DTYPES if tensor.is_floating_point() else (tensor.dtype,), tuple(tensor.shape))
        for key, tensor in layer.state_dict().items()
    }


def check_tensors(layers: Mapping[str, LayerSpec], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Loaders of other libraries check no shape of a quantized layer and fill what is missing with random values, so
    this is said from the files' headers before anything is loaded."""
    for name, spec in layers.items():
        for key, (dtypes, shape) in expected_tensors(name, spec).items():
            info = tensors.get(key)
            if info is None:
                raise ValueError(f"{where}: {key}: expected the tensor in the checkpoint's files, got none")
            if info.dtype not in dtypes or info.shape != shape:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(f"{info.where}: expected {kinds} {list(shape)}, got {info.describe()}")


def is_saved_model(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a model that this module saved."""
    config = Path(path) / CONFIG_FILE
    if not config.is_file():
        return False
    quantization = read_config(Path(path)).get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_packed(packed: torch.Tensor, spec: LayerSpec, where: str) -> None:
    """Unpack: checks the shape and every metadata nibble."""
    try:
        torch.ops.sparse_marlin.unpack_24_weights(packed, spec.out_features, spec.in_features, spec.num_bits)
    except RuntimeError as error:
        raise ValueError(f"{where}: {error}; the file is damaged") from error


def verify_scales(scales: torch.Tensor, where: str) -> None:
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"{where}: expected finite values > 0, got NaN, infinity, zero or less; the file is damaged")
