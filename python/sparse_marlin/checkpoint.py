"""Saving and loading models with packed layers; `checkpoint_config` says what the files hold.

A folder appears under its final name only when it is complete and has been read back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from .checkpoint_config import (
    CONFIG_FILE,
    QUANT_METHOD,
    CheckpointConfig,
    LayerSpec,
    check_tensors,
    expected_tensors,
    is_saved_model,
    read_config,
    verify_packed,
    verify_scales,
    write_config,
)
from .linear import SparseMarlinLinear

__all__ = [
    "CONFIG_FILE",
    "QUANT_METHOD",
    "CheckpointConfig",
    "LayerSpec",
    "attach_config",
    "check_tensors",
    "describe",
    "expected_tensors",
    "from_pretrained",
    "install_layers",
    "is_saved_model",
    "load_checkpoint",
    "packed_layers",
    "read_config",
    "save_checkpoint",
    "verify_folder",
    "verify_packed",
    "verify_scales",
    "write_config",
]


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
    places = _places(model)
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
_Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[str, _Place]:
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
    places: Mapping[str, _Place],
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
