"""Opening saved models on the ranks of a tensor-parallel group, each reading only its part of the files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ._shards import TensorInfo, check_index, headers, opened, shard_paths
from .checkpoint import (
    CONFIG_FILE,
    CheckpointConfig,
    Place,
    check_tensors,
    install_layers,
    is_saved_model,
    read_config,
    tensor_places,
    verify_scales,
)
from .checkpoint import from_pretrained as load_whole
from .parallel import Group, ParallelReport, dense_linear, install_parts, rank_and_size, tensor_parallel, wrap_part
from .shard_plan import Cut, ShardPlan, make_plan
from .stored import Open, OwnLayer


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    group: Group = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[nn.Module, ParallelReport]:
    """Open a causal language model on every rank of a group, as this rank's part of it.

    Of a folder that `save_checkpoint` wrote, each rank reads only its part of the layers that are cut. Any other
    checkpoint that `sparse_marlin.from_pretrained` opens is loaded whole by every rank and cut then.

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
    if not options and is_saved_model(folder):
        loaded = _load_parts(folder, group, place, dtype)
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


def _load_parts(
    folder: Path, group: Group, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, ParallelReport] | None:
    """None where the model's names are not the files' names, which only transformers can translate."""
    rank, world_size = rank_and_size(group)
    config = CheckpointConfig.from_dict(read_config(folder).get("quantization_config") or {}, str(folder / CONFIG_FILE))
    paths = shard_paths(folder)
    tensors = headers(paths)
    check_index(folder, tensors)
    check_tensors(config.layers, tensors, str(folder))
    model = _empty_model(folder, dtype)
    if any(name not in dict(model.named_modules()) for name in config.layers):
        return None
    if any(spec.rank for spec in config.layers.values()):
        return None
    install_layers(model, config.layers, dtype=model.dtype, where=str(folder))
    places = tensor_places(model)
    if set(tensors) - set(places) or _missing(places, tensors):
        return None
    plan = make_plan(model, world_size)
    before = sum(tensor.numel() * tensor.element_size() for tensor in _unique(places))
    with _opened_all(paths) as readers:

        def open_tensor(name: str) -> Any:
            return readers[tensors[name].path].get_slice(name)

        made = {
            name: wrap_part(_part(model, name, cut, config, open_tensor, rank, device), cut, group)
            for name, cut in plan.cuts.items()
        }
        _fill(places, plan, tensors, open_tensor, device, model.dtype)
    report = install_parts(model, plan, made, rank, before)
    return model.to(device).eval(), report  # what is left to move is the buffers that no file has


def _part(
    model: nn.Module,
    name: str,
    cut: Cut,
    config: CheckpointConfig,
    open_tensor: Open,
    rank: int,
    device: torch.device,
) -> nn.Module:
    """This rank's part of a layer, straight from the files."""
    old: Any = model.get_submodule(name)
    start, stop = cut.ranges[rank]
    bias: torch.Tensor | None = None
    if old.bias is not None and (cut.column or rank == 0):
        stored = open_tensor(f"{name}.bias")
        bias = (stored[start:stop] if cut.column else stored[:]).to(device, old.bias.dtype)
    if name in config.layers:
        weight = OwnLayer(name, config.layers[name], open_tensor).part(cut.column, (start, stop), device)
        verify_scales(weight.scales, name)
        return weight.to_linear(bias, old.scales.dtype).requires_grad_(False).eval()
    stored = open_tensor(f"{name}.weight")
    weight = stored[start:stop] if cut.column else stored[:, start:stop]
    return dense_linear(weight.to(device, old.weight.dtype), bias).eval()


def _empty_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model of config.json with parameters on the meta device; buffers that no file has are computed."""
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(f"from_pretrained: {error.name} is needed: pip install 'sparse-marlin[demo]'") from None
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    wanted = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
    with init_empty_weights(include_buffers=False):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.tie_weights()
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.requires_grad_(False)


def _unique(places: Mapping[str, Place]) -> list[torch.Tensor]:
    return list({id(getattr(*place)): getattr(*place) for place in places.values()}.values())


def _missing(places: Mapping[str, Place], tensors: Mapping[str, TensorInfo]) -> list[str]:
    served = {id(getattr(*places[name])) for name in tensors if name in places}
    return [name for name, place in places.items() if id(getattr(*place)) not in served]


def _fill(
    places: Mapping[str, Place],
    plan: ShardPlan,
    tensors: Mapping[str, TensorInfo],
    open_tensor: Open,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Everything that is not cut, whole."""
    for name, info in tensors.items():
        owner, _, kind = name.rpartition(".")
        if owner in plan.cuts:
            continue
        old = getattr(*places[name])
        if tuple(old.shape) != info.shape:
            raise ValueError(f"{info.where}: expected {list(old.shape)}, got {list(info.shape)}")
        tensor = open_tensor(name)[:] if info.shape else torch.tensor(open_tensor(name)[...])
        if kind == "scales" and f"{owner}.weight_packed" in tensors:
            verify_scales(tensor, info.where)
        tensor = tensor.to(device, old.dtype if tensor.is_floating_point() else tensor.dtype)
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        for module, attribute in [place for place in places.values() if getattr(*place) is old]:
            setattr(module, attribute, new)  # a tied tensor stays tied


@contextlib.contextmanager
def _opened_all(paths: list[Path]) -> Iterator[dict[Path, Any]]:
    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(opened(path)) for path in paths}
