"""What a checkpoint holds, without running it: linear layers that would be converted or not, and packed layers with
their settings.

A state dict is read tensor by tensor (safetensors and mapped .pt files stay on disk). Packed layers carry no settings
of their own, so the number of bits is found by unpacking, which checks every metadata nibble, and the group size from
the shapes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ._extension import _core
from .model import existing_path, load_model, meta_model
from .quantize import CHANNELWISE, QUAD, SCALE_DTYPES, is_24_sparse
from .replace import DEFAULT_IGNORE, survey

_LOOKUPS = ("embed", "wte", "wpe")  # matrices that are looked up, not multiplied


@dataclass(frozen=True)
class InspectedLayer:
    """One linear layer of a checkpoint."""

    name: str
    state: str  # "dense", "packed" or "unreadable"
    shape: tuple[int, int]  # (out_features, in_features); in_features of a packed layer is an upper bound
    is_24: bool | None  # None: not looked at
    convertible: bool
    reason: str | None
    bytes_before: int
    bytes_after: int
    num_bits: int | None = None
    group_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}


def inspect_source(source: str, *, group_size: int = 128, num_bits: int = 4) -> list[InspectedLayer]:
    """The linear layers of a state dict file, a model directory, a .gguf file or a hub name."""
    path = existing_path(source)
    if path is not None and path.is_file() and path.suffix != ".gguf":
        return _from_tensors(_open_state_dict(path), group_size, num_bits)
    if path is not None and path.is_dir() and not (path / "config.json").exists():
        shards = _shards(path)
        if shards:
            return _from_tensors(_merged(shards), group_size, num_bits)
    if path is not None and (path.is_file() or not (path / "config.json").exists()):
        return _from_model(load_model(source, device=torch.device("cpu")).model, {}, group_size, num_bits)
    tensors = _merged(_shards(path)) if path is not None else {}
    if any(name.endswith(".weight_packed") for name in tensors):
        return _from_tensors(tensors, group_size, num_bits)
    return _from_model(meta_model(source), tensors, group_size, num_bits)


def packed_bytes(shape: tuple[int, int], group_size: int, num_bits: int, element_size: int) -> int:
    """Bytes of a packed layer without its bias: codes with their padding, and scales."""
    rows, words = _core.packed_shape(shape[0], shape[1], num_bits)
    groups, columns = _core.scales_shape(shape[0], shape[1], group_size)
    return rows * words * 4 + groups * columns * element_size


# A state dict as names with a function that reads one tensor.
_Tensors = dict[str, Callable[[], torch.Tensor]]


def _open_state_dict(path: Path) -> _Tensors:
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            opened = safe_open(str(path), framework="pt")
            return {name: lambda name=name: opened.get_tensor(name) for name in opened.keys()}  # type: ignore[misc] # noqa: SIM118
        # Files from before torch 1.6 are no archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # three libraries, no common base: every one of them means an unreadable file
        kind = "safetensors" if path.suffix == ".safetensors" else "torch.save"
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: expected a state dict written by {kind}, got: {first}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a state dict (names to tensors), got {type(loaded).__name__}")
    return {name: lambda value=value: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}  # type: ignore[misc]


def _shards(folder: Path) -> list[Path]:
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def _merged(shards: Iterable[Path]) -> _Tensors:
    tensors: _Tensors = {}
    for shard in shards:
        tensors.update(_open_state_dict(shard))
    return tensors


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
