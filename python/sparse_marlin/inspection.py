"""What a checkpoint holds, without running it: linear layers that would be converted or not, and packed layers with
their settings.

A state dict is read tensor by tensor (safetensors and mapped .pt files stay on disk). Packed layers carry no settings
of their own, so the number of bits is found by unpacking, which checks every metadata nibble, and the group size from
the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ._extension import _core
from ._shards import TensorFiles, model_files, shard_paths
from .checkpoint import CONFIG_FILE, CheckpointConfig, check_tensors, expected_tensors, read_config
from .model import existing_path, load_model, meta_model
from .quantize import CHANNELWISE, QUAD, SCALE_DTYPES, is_24_sparse
from .replace import DEFAULT_IGNORE, survey

_LOOKUPS = ("embed", "wte", "wpe")  # matrices that are looked up, not multiplied


@dataclass(frozen=True)
class InspectedLayer:
    """One linear layer of a checkpoint."""

    name: str
    state: str  # "dense", "packed", "unreadable", or the name of a format that `sparse-marlin import` reads
    shape: tuple[int, int]  # (out_features, in_features); in_features of a packed layer may be an upper bound
    is_24: bool | None  # None: not looked at
    convertible: bool
    reason: str | None
    bytes_before: int
    bytes_after: int
    num_bits: int | None = None
    group_size: int | None = None
    exact: bool = True  # False: in_features is an upper bound, what the padding hides

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


def inspect_source(source: str, *, group_size: int = 128, num_bits: int = 4) -> list[InspectedLayer]:
    """The linear layers of a state dict file, a model directory, a .gguf file or a hub name."""
    path = existing_path(source)
    if path is not None and path.suffix != ".gguf":
        from .legacy.formats import DENSE, SAVED, find_format

        kind, _ = find_format(path)
        if kind == SAVED:
            return _from_saved(path, group_size, num_bits)
        if kind != DENSE:
            return _from_other_format(path, group_size, num_bits)
    if path is not None and path.is_file() and path.suffix != ".gguf":
        with TensorFiles([path]) as files:
            return _from_tensors(_readers(files), group_size, num_bits)
    has_config = path is not None and (path / "config.json").exists()
    files_of_folder = model_files(path) if path is not None and path.is_dir() else []
    if path is not None and path.is_dir() and not has_config and files_of_folder:
        with TensorFiles(files_of_folder) as files:
            return _from_tensors(_readers(files), group_size, num_bits)
    if path is not None and not has_config:
        return _from_model(load_model(source, device=torch.device("cpu")).model, {}, group_size, num_bits)
    with TensorFiles(files_of_folder) as files:
        if any(name.endswith(".weight_packed") for name in files.infos):
            return _from_tensors(_readers(files), group_size, num_bits)
        return _from_model(meta_model(source), _readers(files), group_size, num_bits)


def _from_saved(folder: Path, group_size: int, num_bits: int) -> list[InspectedLayer]:
    """A model that this library saved: its config says what the tensors must be, and both are held together."""
    config = CheckpointConfig.from_dict(read_config(folder)["quantization_config"], str(folder / CONFIG_FILE))
    with TensorFiles(shard_paths(folder)) as files:
        check_tensors(config.layers, files.infos, str(folder))
        layers = []
        for name, spec in config.layers.items():
            nbytes = sum(files.infos[key].nbytes for key in expected_tensors(name, spec))
            shape = (spec.out_features, spec.in_features)
            layers.append(
                InspectedLayer(
                    name, "packed", shape, True, False, "already packed", nbytes, nbytes, spec.num_bits, spec.group_size
                )
            )
        return [*layers, *_dense_of(files, set(config.layers), group_size, num_bits)]


def _from_other_format(path: Path, group_size: int, num_bits: int) -> list[InspectedLayer]:
    """A checkpoint that the importer reads. Only marlin-24 is 2:4 for certain without a look at the codes."""
    from .legacy.formats import open_source

    with open_source(path) as source:
        layers, infos = [], source.files.infos
        for name, layer in source.layers.items():
            before, spec = sum(infos[tensor].nbytes for tensor in layer.tensors.values()), layer.spec
            after, shape = before, (0, 0)
            if spec is not None:
                shape = (spec.out_features, spec.in_features)
                after = packed_bytes(shape, spec.group_size, spec.num_bits, 2)
            reason = None if spec is not None else "if its zeros are 2:4"
            bits = spec.num_bits if spec is not None else layer.scheme.num_bits
            group = spec.group_size if spec is not None else layer.scheme.group_size
            known = True if spec is not None else None
            layers.append(
                InspectedLayer(name, source.format, shape, known, spec is not None, reason, before, after, bits, group)
            )
        return [*layers, *_dense_of(source.files, set(source.layers), group_size, num_bits)]


def _dense_of(files: TensorFiles, others: set[str], group_size: int, num_bits: int) -> list[InspectedLayer]:
    """The dense linears beside packed ones, which stay as they are."""
    readers = {name: read for name, read in _readers(files).items() if name.rpartition(".")[0] not in others}
    found = _inspected(readers, group_size, num_bits)
    return [replace(layer, convertible=False, reason=layer.reason or "the checkpoint left it dense") for layer in found]


def packed_bytes(shape: tuple[int, int], group_size: int, num_bits: int, element_size: int) -> int:
    """Bytes of a packed layer without its bias: codes with their padding, and scales."""
    rows, words = _core.packed_shape(shape[0], shape[1], num_bits)
    groups, columns = _core.scales_shape(shape[0], shape[1], group_size)
    return rows * words * 4 + groups * columns * element_size


# A state dict as names with a function that reads one tensor.
_Tensors = dict[str, Callable[[], torch.Tensor]]


def _readers(files: TensorFiles) -> _Tensors:
    return {name: lambda name=name: files.read(name) for name in files.infos}  # type: ignore[misc]


def _from_tensors(tensors: _Tensors, group_size: int, num_bits: int) -> list[InspectedLayer]:
    layers = list(_inspected(tensors, group_size, num_bits))
    if not layers:
        raise ValueError(
            f"expected linear layers (2-D '.weight' or '.weight_packed'), got none in {len(tensors)} tensors"
        )
    return layers


def _inspected(tensors: _Tensors, group_size: int, num_bits: int) -> Iterator[InspectedLayer]:
    for key, read in tensors.items():
        owner, _, kind = key.rpartition(".")
        if kind == "weight_packed" and f"{owner}.scales".lstrip(".") in tensors:
            yield _packed_layer(owner or key, read(), tensors[f"{owner}.scales".lstrip(".")]())
        elif kind == "weight" and not any(word in owner.lower() for word in _LOOKUPS):
            weight = read()
            if weight.dim() == 2:
                yield _dense_layer(owner or key, weight, _reason(owner, weight), group_size, num_bits)


def _reason(owner: str, weight: torch.Tensor) -> str | None:
    if owner.rpartition(".")[2] in DEFAULT_IGNORE:
        return f"ignored by '{owner.rpartition('.')[2]}'"
    if weight.dtype not in SCALE_DTYPES:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    if weight.shape[1] % QUAD:
        return f"in_features {weight.shape[1]} is not divisible by {QUAD}"
    return None


def _dense_layer(
    name: str, weight: torch.Tensor, reason: str | None, group_size: int, num_bits: int, *, look: bool = True
) -> InspectedLayer:
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    before = weight.numel() * weight.element_size()
    return InspectedLayer(
        name=name,
        state="dense",
        shape=shape,
        is_24=is_24_sparse(weight) if look and not weight.is_meta and weight.dtype in SCALE_DTYPES else None,
        convertible=reason is None,
        reason=reason,
        bytes_before=before,
        bytes_after=packed_bytes(shape, group_size, num_bits, weight.element_size()) if reason is None else before,
    )


def _packed_layer(name: str, packed: torch.Tensor, scales: torch.Tensor) -> InspectedLayer:
    """A SparseMarlinLinear's buffers: the bits that unpack cleanly, and the group sizes that fit the number of
    groups."""
    groups, size_n = (int(scales.shape[0]), int(scales.shape[1])) if scales.dim() == 2 else (0, 0)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in (packed, scales))
    for num_bits in _core.NUM_BITS:
        words = _core.tile_words(num_bits)
        if packed.dim() != 2 or packed.dtype != torch.int32 or packed.shape[1] % words:
            continue
        size_k = packed.shape[1] // words * _core.TILE_COLS
        if tuple(packed.shape) != tuple(_core.packed_shape(size_n, size_k, num_bits)):
            continue
        try:
            torch.ops.sparse_marlin.unpack_24_weights(packed.contiguous(), size_n, size_k, num_bits)
        except RuntimeError:
            continue
        fitting = _fitting_group_sizes(groups, size_k)
        return InspectedLayer(
            name=name,
            state="packed",
            shape=(size_n, size_k),
            is_24=True,
            convertible=False,
            reason="already packed",
            bytes_before=nbytes,
            bytes_after=nbytes,
            num_bits=num_bits,
            group_size=fitting[0] if fitting else None,
            exact=False,
        )
    return InspectedLayer(
        name=name,
        state="unreadable",
        shape=(size_n, 0),
        is_24=None,
        convertible=False,
        reason=f"not {_core.FORMAT_NAME} version {_core.FORMAT_VERSION}, or damaged",
        bytes_before=nbytes,
        bytes_after=nbytes,
    )


def _fitting_group_sizes(groups: int, padded_k: int) -> list[int]:
    """Group sizes for which some K that pads to `padded_k` has this many groups; channelwise first when there is
    one."""
    lengths = range(padded_k - _core.TILE_COLS + QUAD, padded_k + 1, QUAD)
    sizes = sorted(_core.GROUP_SIZES, key=lambda size: (size != CHANNELWISE, -size))
    return [size for size in sizes if any(_core.num_groups(k, size) == groups for k in lengths)]


def _from_model(model: torch.nn.Module, tensors: _Tensors, group_size: int, num_bits: int) -> list[InspectedLayer]:
    layers = []
    for candidate in survey(model, allow_meta=True):
        weight = getattr(candidate.module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        stored = tensors.get(f"{candidate.name}.weight")
        if stored is not None and (loaded := stored()).shape == weight.shape:
            weight = loaded
        layers.append(_dense_layer(candidate.name, weight, candidate.reason, group_size, num_bits))
    if not layers:
        raise ValueError("expected linear layers, got a model without any")
    return layers


def layers_to_json(source: str, layers: list[InspectedLayer]) -> str:
    """The inspection as JSON."""
    return json.dumps(
        {
            "source": source,
            "format": f"{_core.FORMAT_NAME} version {_core.FORMAT_VERSION}",
            "num_layers": len(layers),
            "num_convertible": sum(layer.convertible for layer in layers),
            "bytes_before": sum(layer.bytes_before for layer in layers),
            "bytes_after": sum(layer.bytes_after for layer in layers),
            "layers": [layer.to_dict() for layer in layers],
        },
        indent=2,
    )
