"""Saved models: safetensors files and a config.json whose `quantization_config` says how each layer is packed.

    {"quant_method": "sparse_marlin", "format": <name>, "format_version": <n>, "num_bits": 4, "group_size": 128,
     "layers": {"model.layers.0.mlp.up_proj": {"in_features": 576, "out_features": 1536},
                "model.layers.1.mlp.up_proj": {"in_features": 576, "out_features": 1536, "num_bits": 8, "rank": 16}},
     "ignore": ["lm_head"]}

`layers` names every packed layer, with what differs from the two common settings; `rank` is that of a low-rank
correction. `ignore` names the linears that stayed dense. The tensors are the buffers of `SparseMarlinLinear` under the
layer's name. A folder appears under its final name only when it is complete and has been read back.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._extension import _core
from ._progress import progress_bar
from ._shards import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    TensorInfo,
    check_index,
    headers,
    new_folder,
    opened,
    read_tensor,
    shard_paths,
)
from ._version import __version__
from .linear import SparseMarlinLinear
from .quantize import SCALE_DTYPES

QUANT_METHOD = "sparse_marlin"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is packed. `rank` > 0: with a low-rank correction of that rank."""

    in_features: int
    out_features: int
    num_bits: int = 4
    group_size: int = 128
    rank: int = 0

    @classmethod
    def of(cls, layer: SparseMarlinLinear) -> LayerSpec:
        return cls(layer.in_features, layer.out_features, layer.num_bits, layer.group_size, getattr(layer, "rank", 0))

    def make(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> SparseMarlinLinear:
        """An empty layer of this kind."""
        options = {"rank": self.rank} if self.rank else {}
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
    known = {"in_features", "out_features", "num_bits", "group_size", "rank"}
    unknown = sorted(set(entry) - known)
    if unknown:
        raise ValueError(f"{where}: expected the fields {sorted(known)}, got {unknown} too; update sparse_marlin")
    for key in sorted(known - {"rank"}):
        if not isinstance(entry.get(key), int):
            raise ValueError(f"{where}: {key}: expected a number, got {entry.get(key)!r}")
    spec = LayerSpec(**entry)
    if spec.num_bits not in _core.NUM_BITS:
        raise ValueError(f"{where}: num_bits: expected one of {sorted(_core.NUM_BITS)}, got {spec.num_bits}")
    if spec.group_size not in _core.GROUP_SIZES:
        raise ValueError(f"{where}: group_size: expected one of {sorted(_core.GROUP_SIZES)}, got {spec.group_size}")
    return spec


# --- models -----------------------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> CheckpointConfig:
    """The config of a model with `SparseMarlinLinear` layers; linears that stayed dense are its `ignore`."""
    layers, dense = {}, []
    for name, module in model.named_modules():
        if isinstance(module, SparseMarlinLinear):
            layers[name] = LayerSpec.of(module)
        elif isinstance(module, nn.Linear):
            dense.append(name)
    return CheckpointConfig(layers, tuple(dense))


def attach_config(model: nn.Module) -> None:
    """Lets a transformers model save itself: without the config in place its `save_pretrained` would write a folder
    that loads as random linears. Other modules are left alone."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from .hf import attach

        attach(model, describe(model))


def install_layers(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    *,
    dtype: torch.dtype | None = None,
    where: str = "load_checkpoint",
) -> None:
    """Put empty layers (meta device) in the places of the linears that `layers` names. All or nothing."""
    made: list[tuple[nn.Module, str, nn.Module]] = []
    for name, spec in layers.items():
        parent_name, _, attribute = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{where}: {name}: expected a linear layer of the model, got none of that name; "
                "the checkpoint belongs to another architecture"
            ) from None
        if not isinstance(old, (nn.Linear, SparseMarlinLinear)):
            raise ValueError(f"{where}: {name}: expected a linear layer, got {type(old).__name__}")
        got = (int(old.out_features), int(old.in_features))
        if got != (spec.out_features, spec.in_features):
            raise ValueError(
                f"{where}: {name}: expected [{got[0]}, {got[1]}] (out, in), as the model has it, "
                f"got [{spec.out_features}, {spec.in_features}] in the checkpoint"
            )
        layer = spec.make(old.bias is not None, "meta", dtype)
        layer.train(old.training)
        made.append((parent, attribute, layer))
    for parent, attribute, new in made:
        parent._modules[attribute] = new


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


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_config: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Path:
    """Save a model with `SparseMarlinLinear` layers as a folder that `from_pretrained` and `load_checkpoint` open.

    A transformers model is written by its own `save_pretrained` (with generation config; `tokenizer` adds its files),
    any other module as its state dict. The folder is written beside `out`, read back, every packed layer unpacked, and
    renamed at the end; a failure leaves nothing under `out`.

    Args:
        extra_config: more fields for config.json, for instance what produced the weights.

    Raises:
        ValueError: `out` exists and `overwrite` is not set, a model without packed layers, or a layer still on the meta
            device.
    """
    config = describe(model)
    if not config.layers:
        raise ValueError(
            "save_checkpoint: model: expected SparseMarlinLinear layers, got none; convert it first "
            "(replace_linears), or save it with its own method"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"save_checkpoint: {name}: expected a tensor with data, got one on the meta device")
    with new_folder(out, overwrite=overwrite) as folder:
        if hasattr(model, "save_pretrained"):
            attach_config(model)
            model.save_pretrained(folder, max_shard_size=max_shard_bytes)  # type: ignore[operator]
        else:
            writer = ShardWriter(folder, max_shard_bytes)
            for name, tensor in model.state_dict().items():
                writer.add(name, tensor.cpu())
            writer.close()
            write_config(folder, {"quantization_config": config.to_dict()})
        if extra_config:
            write_config(folder, {**read_config(folder), **extra_config})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        wanted = {f"{name}.weight_packed": model.get_submodule(name).weight_packed for name in config.layers}
        verify_folder(folder, config, wanted, progress=progress)
    return Path(out)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_folder(
    folder: Path,
    config: CheckpointConfig,
    wanted: Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
) -> None:
    """Read a written folder back: every packed layer there, in shape, unpacking without a metadata fault, its scales
    finite and > 0, and its bytes those of `wanted`, where given."""
    tensors = headers(shard_paths(folder))
    check_index(folder, tensors)
    check_tensors(config.layers, tensors, str(folder))
    with progress_bar("Verifying", len(config.layers), progress) as advance:
        for path in shard_paths(folder):
            with opened(path) as reader:
                for name, spec in config.layers.items():
                    packed, scales = f"{name}.weight_packed", f"{name}.scales"
                    if tensors[scales].path == path:
                        verify_scales(read_tensor(reader, tensors[scales]), tensors[scales].where)
                    if tensors[packed].path != path:
                        continue
                    read = read_tensor(reader, tensors[packed])
                    if wanted is not None and not torch.equal(read, wanted[packed].cpu()):
                        raise RuntimeError(f"{tensors[packed].where}: expected the bytes that were written, got others")
                    verify_packed(read, spec, tensors[packed].where)
                    advance()


def verify_packed(packed: torch.Tensor, spec: LayerSpec, where: str) -> None:
    """Unpack: checks the shape and every metadata nibble."""
    try:
        torch.ops.sparse_marlin.unpack_24_weights(packed, spec.out_features, spec.in_features, spec.num_bits)
    except RuntimeError as error:
        raise ValueError(f"{where}: {error}; the file is damaged") from error


def verify_scales(scales: torch.Tensor, where: str) -> None:
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"{where}: expected finite values > 0, got NaN, infinity, zero or less; the file is damaged")


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **options: Any,
) -> nn.Module:
    """Load a folder that `save_checkpoint` wrote.

    Args:
        model: the architecture, dense, with or without data (the meta device will do); its linears are replaced and its
            tensors filled, in place. None: built by transformers from config.json, see `from_pretrained`.
        device: where the tensors go; default: the CPU.
        dtype: for all floating-point tensors, scales included; default: as stored.
        options: for transformers, if it builds the model.

    Raises:
        ValueError: names the file and the tensor that is missing, damaged, or does not fit the model.
    """
    if model is None:
        return from_pretrained(path, device=device, dtype=dtype, **options)
    folder = Path(path).expanduser()
    config = CheckpointConfig.from_dict(read_config(folder).get("quantization_config") or {}, str(folder / CONFIG_FILE))
    tensors = headers(shard_paths(folder))
    check_index(folder, tensors)
    check_tensors(config.layers, tensors, str(folder))
    install_layers(model, config.layers, where=str(folder))
    places = tensor_places(model)
    served = {id(_tensor_at(*places[name])) for name in tensors if name in places}
    missing = sorted(name for name, place in places.items() if id(_tensor_at(*place)) not in served)
    unexpected = sorted(set(tensors) - set(places))
    if missing or unexpected:
        kind, name = ("no", missing[0]) if missing else ("an unexpected", unexpected[0])
        raise ValueError(
            f"{folder}: {name}: expected the tensors of the model, got {kind} tensor of that name "
            f"({len(missing)} missing, {len(unexpected)} unexpected)"
        )
    paths = shard_paths(folder)
    with progress_bar("Loading", len(paths), progress) as advance:
        for path_of_shard in paths:
            _load_shard(places, path_of_shard, tensors, config, device, dtype)
            advance()
    return model


# A tensor of a model: the module that owns it and its name there.
Place = tuple[nn.Module, str]


def tensor_places(model: nn.Module) -> dict[str, Place]:
    """Where every name of the model's state dict leads; tied tensors are one tensor at several places."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
        if name not in module._non_persistent_buffers_set and getattr(module, name) is not None
    }


def _tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    return getattr(module, name)


def _load_shard(
    places: Mapping[str, Place],
    path: Path,
    tensors: Mapping[str, TensorInfo],
    config: CheckpointConfig,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    with opened(path) as reader:
        for info in (info for info in tensors.values() if info.path == path):
            tensor = read_tensor(reader, info)
            owner, _, kind = info.name.rpartition(".")
            if owner in config.layers and kind == "scales":
                verify_scales(tensor, info.where)
            if owner in config.layers and kind == "weight_packed":
                verify_packed(tensor, config.layers[owner], info.where)
            if tensor.is_floating_point() and dtype is not None:
                tensor = tensor.to(dtype)
            old = _tensor_at(*places[info.name])
            if tuple(old.shape) != tuple(tensor.shape):
                raise ValueError(f"{info.where}: expected {list(old.shape)}, got {list(tensor.shape)}")
            tensor = tensor.to(device or "cpu")
            new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            for module, attribute in [place for place in places.values() if _tensor_at(*place) is old]:
                setattr(module, attribute, new)  # a tied tensor stays tied


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    import_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Open a causal language model with packed layers, whatever format it is in.

    What this library saved, and marlin-24 checkpoints in safetensors files, are opened by transformers as they are.
    Other formats that `sparse_marlin.legacy.import_checkpoint` reads are converted to a temporary folder first; to open
    such a model twice, import it.

    Args:
        path: folder, or hub name.
        device: where to put the model; default: the CPU (`device_map` in `options` works too).
        dtype: of activations, scales and dense tensors; default: what config.json says.
        model_class: a transformers class with `from_pretrained`; default: `AutoModelForCausalLM`.
        import_options: for `import_checkpoint` (`group_size`, `num_bits`, `ignore`, ...).
        options: handed to transformers' `from_pretrained`.

    Returns:
        The transformers model, in evaluation mode.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError("from_pretrained: transformers is needed: pip install 'sparse-marlin[demo]'") from None
    from . import hf
    from .legacy.hf import config_for_transformers

    hf.register()
    opener = (model_class or transformers.AutoModelForCausalLM).from_pretrained
    if dtype is not None:
        options["dtype"] = dtype
    folder = Path(path).expanduser()
    with tempfile.TemporaryDirectory(prefix="sparse-marlin-") as scratch:
        source: str | Path = str(path)
        if folder.exists():
            source = folder
            found = config_for_transformers(folder)
            if found is None:  # transformers cannot read it as it is
                from .legacy import import_checkpoint

                source = Path(scratch) / "model"
                import_checkpoint(folder, source, **(import_options or {}))
            elif found:
                config = transformers.AutoConfig.from_pretrained(folder)
                config.quantization_config = found
                options["config"] = config
        model: Any = opener(source, **options)
    if device is not None:
        model = model.to(device)
    return model.eval()


def packed_layers(model: nn.Module) -> Iterable[tuple[str, SparseMarlinLinear]]:
    """The packed layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseMarlinLinear))
