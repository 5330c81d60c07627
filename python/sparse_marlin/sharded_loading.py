"""Opening saved models on the ranks of a tensor-parallel group, each reading only its part of the files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ._shards import TensorFiles
from .checkpoint import Place, install_layers, tensor_places, verify_scales
from .checkpoint import from_pretrained as load_whole
from .legacy.formats import MARLIN_24, SAVED, Source, find_format, open_source
from .parallel import Group, ParallelReport, dense_linear, install_parts, rank_and_size, tensor_parallel, wrap_part
from .shard_plan import Cut, linear_sizes, make_plan
from .slicing import owned
from .stored import Marlin24Layer, Open, OwnLayer, StoredLayer

Loaded = tuple[nn.Module, ParallelReport]


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    group: Group = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Loaded:
    """Open a causal language model on every rank of a group, as this rank's part of it.

    Of a folder that `save_checkpoint` wrote, or a marlin-24 checkpoint, each rank reads only its part of what is cut.
    Any other that `sparse_marlin.from_pretrained` opens is loaded whole by every rank and cut then.

    Args:
        path: folder, or hub name.
        group: the ranks that share the model; default: all.
        device: where this rank's part goes; default: the current GPU of an NCCL group, else the CPU.
        dtype: of activations, scales and dense tensors; default: what config.json says.
        options: for `sparse_marlin.from_pretrained`; the model is then loaded whole.

    Returns:
        The model in evaluation mode, and what became of its layers.
    """
    place = torch.device(device) if device is not None else group_device(group)
    folder = Path(path).expanduser()
    if not options and folder.is_dir() and find_format(folder)[0] in (SAVED, MARLIN_24):
        with open_source(folder) as source:
            safetensors = all(info.path.suffix == ".safetensors" for info in source.files.infos.values())
            loaded = _load_parts(source, group, place, dtype) if safetensors else None
        if loaded is not None:
            return loaded
    model = load_whole(path, dtype=dtype, **options)
    report = tensor_parallel(model, group)
    return model.to(place).eval(), report


def group_device(group: Group = None) -> torch.device:
    """The current GPU for a group that talks over NCCL, else the CPU."""
    if rank_and_size(group)[1] > 1 and "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _load_parts(source: Source, group: Group, device: torch.device, dtype: torch.dtype | None) -> Loaded | None:
    """None where the model's names are not the files' names, which only transformers can translate."""
    rank, world_size = rank_and_size(group)
    infos, where = source.files.infos, str(source.path)
    layers = {name: layer.spec for name, layer in source.layers.items() if layer.spec is not None}
    model = _empty_model(source.path, dtype)
    known = {name for name, _ in model.named_modules()}
    if not layers or not known.issuperset(layers) or any(spec.rank for spec in layers.values()):
        return None
    install_layers(model, layers, dtype=model.dtype, where=where)
    packed = {name for layer in source.layers.values() for name in layer.tensors.values()}
    plain = [name for name in infos if name not in packed]
    places = tensor_places(model)
    served = {id(getattr(*places[name])) for name in plain if name in places}
    served.update(id(getattr(*places[f"{layer}.{key}"])) for layer in layers for key in ("weight_packed", "scales"))
    if not set(places).issuperset(plain) or any(id(getattr(*place)) not in served for place in places.values()):
        return None
    plan = make_plan(model, world_size)
    before = sum(tensor.nbytes for tensor in {id(getattr(*p)): getattr(*p) for p in places.values()}.values())
    made: dict[str, nn.Module] = {}
    for name in dict.fromkeys([*plan.cuts, *layers]):
        cut = plan.cuts.get(name)
        part = _part(model, name, cut, _stored(source, name), source.files.slices, rank, device)
        made[name] = part if cut is None else wrap_part(part, cut, group)
    _fill(places, [name for name in plain if name.rpartition(".")[0] not in made], source.files, device)
    report = install_parts(model, plan, made, rank, before)
    return model.to(device).eval(), report  # what is left to move is the buffers that no file has


def _stored(source: Source, name: str) -> StoredLayer | None:
    """The packed layer in the files; None for one that stayed dense."""
    layer = source.layers.get(name)
    if layer is None or layer.spec is None:
        return None
    if layer.kind == MARLIN_24:
        return Marlin24Layer.of(name, layer.naming, source.files.slices)
    return OwnLayer(name, layer.spec, source.files.slices)


def _part(
    model: nn.Module,
    name: str,
    cut: Cut | None,
    stored: StoredLayer | None,
    open_tensor: Open,
    rank: int,
    device: torch.device,
) -> nn.Module:
    """This rank's part of a layer, or without a cut the whole, straight from the files."""
    old: Any = model.get_submodule(name)
    column = cut is None or cut.column
    start, stop = cut.ranges[rank] if cut is not None else (0, linear_sizes(old)[0])
    bias: torch.Tensor | None = None
    if old.bias is not None and (column or rank == 0):
        read = open_tensor(f"{name}.bias")
        bias = (read[start:stop] if column else read[:]).to(device, old.bias.dtype)
    if stored is not None:
        part = owned(stored.part(column, (start, stop), device))
        verify_scales(part.scales, name)
        return part.to_linear(bias, old.scales.dtype).requires_grad_(False).eval()
    read = open_tensor(f"{name}.weight")
    weight = read[start:stop] if column else read[:, start:stop]
    return dense_linear(weight.to(device, old.weight.dtype), bias).eval()


def _empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of config.json with parameters on the meta device; buffers that no file has are computed."""
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(f"from_pretrained: {error.name} is needed: pip install 'sparse-marlin[demo]'") from None
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the files; what is read of them here is plain layers
    wanted = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    with init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.requires_grad_(False)


def _fill(places: Mapping[str, Place], names: Iterable[str], files: TensorFiles, device: torch.device) -> None:
    """Tensors that are not cut, whole."""
    for name in names:
        old = getattr(*places[name])
        info = files.infos[name]
        if tuple(old.shape) != info.shape:
            raise ValueError(f"{info.where}: expected {list(old.shape)}, got {list(info.shape)}")
        tensor = files.read(name).to(device, old.dtype)
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        for module, attribute in [place for place in places.values() if getattr(*place) is old]:
            setattr(module, attribute, new)  # a tied tensor stays tied
