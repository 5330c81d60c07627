"""What format a checkpoint of another library is in, and which of its tensors make up which layer.

Everything here is read from config files and from the headers of the tensor files; `sources` reads the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._extension import _core
from .._shards import TensorFiles, TensorInfo, check_index, model_files
from ..checkpoint import CONFIG_FILE, QUANT_METHOD, LayerSpec, read_config
from ..quantize import CHANNELWISE, QUAD, SCALE_DTYPES
from .layouts import COMPRESSED_TENSORS, GPTQ, NAMES, ORIGINAL, import_marlin_24

GPTQ_CONFIG_FILE = "quantize_config.json"

# The formats, as messages and reports name them.
MARLIN_24 = "marlin-24"
PACK_QUANTIZED = "pack-quantized"
GPTQ_DENSE = "gptq"
BITMASK = "sparse-24-bitmask"
INT_QUANTIZED = "int-quantized"
DENSE = "dense"
SAVED = QUANT_METHOD

_LOOKUPS = ("embed", "wte", "wpe")  # matrices that are looked up, not multiplied
# Tensors that make up a layer of each format, by role; those in parentheses need not be there.
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    PACK_QUANTIZED: (("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")),
    GPTQ_DENSE: (("qweight", "qzeros", "scales"), ("g_idx",)),
    BITMASK: (("compressed", "bitmask", "shape"), ("weight_scale", "weight_zero_point")),
    INT_QUANTIZED: (("weight", "weight_scale"), ("weight_zero_point", "weight_g_idx")),
}
# Left over by some writers beside marlin-24 layers, and of no use to anyone.
_IDLE = ("workspace", "weight_shape")


@dataclass(frozen=True)
class Scheme:
    """What a config says about a layer; None where it says nothing."""

    num_bits: int | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class SourceLayer:
    """A layer of a checkpoint: its format, its tensors' names by role, and what the config says of it."""

    name: str
    kind: str
    tensors: dict[str, str]
    scheme: Scheme
    naming: str = GPTQ  # of marlin-24 layers; of GPTQ ones the checkpoint_format
    spec: LayerSpec | None = None  # where the headers tell


@dataclass
class Source:
    """An opened checkpoint. `plain` are the tensors that belong to no layer that is converted."""

    path: Path
    kind: str
    naming: str
    config: dict[str, Any]  # config.json, or empty
    quantization: dict[str, Any]
    files: TensorFiles
    layers: dict[str, SourceLayer]
    notes: list[str] = field(default_factory=list)

    @property
    def format(self) -> str:
        """For people: "marlin-24 (gptq)"."""
        return f"{self.kind} ({self.naming})" if self.kind == MARLIN_24 else self.kind

    def close(self) -> None:
        self.files.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: str | Path, *, ignore: Iterable[str] = (), targets: Iterable[str] = ()) -> Source:
    """Open a folder or a tensor file, find its format and its layers.

    Args:
        ignore, targets: class names, full names, last components or `re:` patterns, for dense checkpoints, whose layers
            no config names: what stays dense, and, if given, what alone is converted.

    Raises:
        ValueError: an unknown format or version, files or tensors missing, tensors that do not fit one another or the
            config. The message names file and tensor.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"{path}: expected a folder or a file of tensors, got nothing at that path")
    files = model_files(path)
    if not files:
        raise ValueError(f"{path}: expected .safetensors files (or a torch.save state dict), got none")
    folder, config, quantization, where = _configs(path)
    tensors = TensorFiles(files)
    try:
        if folder is not None:
            check_index(folder, tensors.infos)
        kind, naming = detect(quantization, tensors.infos, where)
        layers = find_layers(kind, naming, quantization, tensors.infos, where, ignore=ignore, targets=targets)
    except BaseException:
        tensors.close()
        raise
    return Source(path, kind, naming, config, quantization, tensors, layers)


def find_format(path: str | Path) -> tuple[str, str]:
    """Format and naming of a folder or file on this machine, from its config and the names in its .safetensors files;
    DENSE where nothing speaks for another."""
    path = Path(path).expanduser()
    _, _, quantization, where = _configs(path)
    with TensorFiles(
        [file for file in model_files(path) if file.suffix == ".safetensors" or path.is_file()]
    ) as tensors:
        return detect(quantization, tensors.infos, where)


def _configs(path: Path) -> tuple[Path | None, dict[str, Any], dict[str, Any], str]:
    """The folder, config.json, what it says about quantization, and where that stands."""
    folder = path if path.is_dir() else None
    config = read_config(folder) if folder is not None and (folder / CONFIG_FILE).exists() else {}
    return folder, config, *_quantization(folder, config)


def _quantization(folder: Path | None, config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What config.json (under today's name, an older one, or inside a text model's part) or quantize_config.json says,
    and where it stands."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = holder.get(key)
            if isinstance(found, Mapping):
                return dict(found), f"{folder / CONFIG_FILE if folder else CONFIG_FILE}: {key}"
    if folder is not None and (folder / GPTQ_CONFIG_FILE).exists():
        path = folder / GPTQ_CONFIG_FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got: {error}") from error
        return {"quant_method": "gptq", **found}, str(path)
    return {}, f"{folder / CONFIG_FILE}: quantization_config" if folder else "the file"


def detect(quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> tuple[str, str]:
    """Format and, for marlin-24, the naming."""
    method = str(quantization.get("quant_method", "")).lower()
    if method == QUANT_METHOD:
        return SAVED, ""
    if is_gptq_marlin_24(quantization):
        return MARLIN_24, GPTQ
    if is_compressed_tensors(quantization):
        kind = str(quantization.get("format", DENSE))
        sparsity = quantization.get("sparsity_config") or {}
        if kind == MARLIN_24:
            return MARLIN_24, COMPRESSED_TENSORS
        if sparsity.get("format") == BITMASK:
            return BITMASK, ""
        if kind in (PACK_QUANTIZED, INT_QUANTIZED, DENSE):
            return kind, ""
        raise ValueError(
            f"{where}: format: expected {MARLIN_24}, {PACK_QUANTIZED}, {INT_QUANTIZED}, {DENSE} or sparsity "
            f"{BITMASK}, got {kind!r}; decompress it with compressed-tensors first"
        )
    if method == "gptq":
        return GPTQ_DENSE, ""
    if method:
        raise ValueError(
            f"{where}: quant_method: expected gptq, compressed-tensors or {QUANT_METHOD}, got {method!r}; "
            "dequantize the model with its own library first"
        )
    owners = _by_owner(tensors)
    for naming, keys in NAMES.items():
        if any(all(key in roles for key in keys) for roles in owners.values()):
            return MARLIN_24, naming
    return DENSE, ""


def is_gptq_marlin_24(quantization: Mapping[str, Any]) -> bool:
    """A GPTQ config of a marlin-24 checkpoint. No file carries the last two names, but users do."""
    method = str(quantization.get("quant_method", "")).lower()
    return method in ("gptq_marlin_24", "marlin_24", MARLIN_24) or (
        method in ("gptq", "") and quantization.get("checkpoint_format") == "marlin_24"
    )


def is_compressed_tensors(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "compressed-tensors" or bool(quantization.get("config_groups"))


def find_layers(
    kind: str,
    naming: str,
    quantization: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    where: str,
    *,
    ignore: Iterable[str] = (),
    targets: Iterable[str] = (),
) -> dict[str, SourceLayer]:
    """The layers that the importer converts, in the order of the files."""
    if kind == SAVED:
        return {}
    schemes = Schemes(quantization, where)
    owners = _by_owner(tensors)
    if kind == MARLIN_24:
        layers = _marlin_24_layers(naming, owners, tensors, schemes)
    elif kind == DENSE:
        layers = _dense_layers(owners, tensors, tuple(ignore), tuple(targets))
    else:
        version = str(quantization.get("checkpoint_format", ""))
        layers = _role_layers(kind, version, owners, tensors, schemes)
    if not layers:
        roles = " ".join(NAMES[naming]) if kind == MARLIN_24 else " ".join(_ROLES.get(kind, (("weight",), ()))[0])
        raise ValueError(f"{where}: expected layers with the tensors {roles} ({kind}), got none in the files")
    return layers


def _by_owner(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """Layer names to {last component: full name}."""
    owners: dict[str, dict[str, str]] = {}
    for name in tensors:
        owner, _, role = name.rpartition(".")
        owners.setdefault(owner, {})[role] = name
    return owners


def _marlin_24_layers(
    naming: str, owners: Mapping[str, dict[str, str]], tensors: Mapping[str, TensorInfo], schemes: Schemes
) -> dict[str, SourceLayer]:
    layers = {}
    keys = NAMES[naming]
    telling = {GPTQ: keys[:2], COMPRESSED_TENSORS: (keys[0], keys[2]), ORIGINAL: keys[:2]}[naming]
    for owner, roles in owners.items():
        if not any(key in roles for key in telling):
            continue
        present = _complete(owner, roles, keys, tensors)
        scheme = schemes.of(owner, tensors[roles[keys[0]]])
        where = f"{tensors[roles[keys[0]]].path.name}: {owner}"
        shapes = [_empty(tensors[present[key]]) for key in keys]
        found = import_marlin_24(*shapes, naming=naming, group_size=scheme.group_size, name=where)
        if scheme.num_bits not in (None, found.num_bits):
            raise ValueError(
                f"{where}: {keys[0]}: expected {scheme.num_bits}-bit codes, as the config says, "
                f"got the shape of {found.num_bits}-bit ones"
            )
        spec = LayerSpec(found.size_k, found.size_n, found.num_bits, found.group_size)
        idle = {role: roles[role] for role in _IDLE if role in roles}
        layers[owner] = SourceLayer(owner, MARLIN_24, {**present, **idle}, scheme, naming, spec)
    return layers


def _role_layers(
    kind: str, version: str, owners: Mapping[str, dict[str, str]], tensors: Mapping[str, TensorInfo], schemes: Schemes
) -> dict[str, SourceLayer]:
    needed, optional = _ROLES[kind]
    telling = needed[1] if kind == INT_QUANTIZED else needed[0]
    layers = {}
    for owner, roles in owners.items():
        if telling not in roles:
            continue
        present = _complete(owner, roles, needed, tensors)
        present.update({role: roles[role] for role in optional if role in roles})
        layers[owner] = SourceLayer(owner, kind, present, schemes.of(owner, tensors[roles[telling]]), version)
    return layers


def _dense_layers(
    owners: Mapping[str, dict[str, str]],
    tensors: Mapping[str, TensorInfo],
    ignore: tuple[str, ...],
    targets: tuple[str, ...],
) -> dict[str, SourceLayer]:
    layers = {}
    for owner, roles in owners.items():
        info = tensors.get(roles.get("weight", ""))
        if info is None or len(info.shape) != 2 or any(word in owner.lower() for word in _LOOKUPS):
            continue
        if any(matches(entry, owner) for entry in ignore) or info.dtype not in SCALE_DTYPES or info.shape[1] % QUAD:
            continue
        if targets and not any(matches(entry, owner) for entry in targets):
            continue
        layers[owner] = SourceLayer(owner, DENSE, {"weight": info.name}, Scheme())
    return layers


def _complete(
    owner: str, roles: Mapping[str, str], needed: Iterable[str], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    missing = [role for role in needed if role not in roles]
    if missing:
        beside = tensors[next(iter(roles.values()))]
        raise ValueError(
            f"{beside.where}: expected {', '.join(f'{owner}.{role}' for role in missing)} beside it, got none; "
            "a shard is missing, or the checkpoint is incomplete"
        )
    return {role: roles[role] for role in needed}


def _empty(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=info.dtype or torch.uint8, device="meta")


# --- what configs say -------------------------------------------------------------------------------------------------


class Schemes:
    """Bits and group size of each layer as a GPTQ or compressed-tensors config states them."""

    def __init__(self, quantization: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.groups: list[tuple[tuple[str, ...], Scheme]] = []
        self.ignore: tuple[str, ...] = tuple(quantization.get("ignore") or ())
        if groups := quantization.get("config_groups"):
            if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
                raise ValueError(f"{where}: config_groups: expected an object of groups, got {groups!r}")
            for name, group in groups.items():
                self.groups.append((tuple(group.get("targets") or ()), self._weights(name, group.get("weights") or {})))
        elif "bits" in quantization:
            self.groups.append((("Linear",), self._gptq(quantization)))

    def of(self, layer: str, info: TensorInfo) -> Scheme:
        """The scheme of a layer that is stored quantized."""
        if not self.groups:
            return Scheme()
        for entry in self.ignore:
            if matches(entry, layer):
                raise ValueError(
                    f"{info.where}: expected a dense layer, because {self.where}.ignore names it ('{entry}'), "
                    "got a quantized one; mend the config"
                )
        for targets, scheme in self.groups:
            if any(matches(entry, layer) for entry in targets):
                return scheme
        raise ValueError(
            f"{info.where}: expected a layer that {self.where} targets "
            f"({', '.join(entry for targets, _ in self.groups for entry in targets)}), got one that no group names"
        )

    def _weights(self, group: str, weights: Mapping[str, Any]) -> Scheme:
        where = f"{self.where}: {group}"
        if weights.get("type", "int") != "int":
            raise ValueError(f"{where}: type: expected int weights, got {weights.get('type')}")
        if weights.get("symmetric") is False:
            raise ValueError(f"{where}: symmetric: expected symmetric weights (no zero points), got asymmetric ones")
        num_bits = self._bits(where, weights.get("num_bits"))
        strategy = weights.get("strategy")
        group_size = weights.get("group_size")
        if strategy == "group" or (strategy is None and group_size not in (None, CHANNELWISE)):
            if group_size not in _core.GROUP_SIZES:
                raise ValueError(f"{where}: group_size: expected one of {sorted(_core.GROUP_SIZES)}, got {group_size}")
            return Scheme(num_bits, int(group_size))
        if strategy in (None, "channel", "tensor"):
            return Scheme(num_bits, CHANNELWISE)
        raise ValueError(f"{where}: strategy: expected group, channel or tensor, got {strategy!r}")

    def _gptq(self, quantization: Mapping[str, Any]) -> Scheme:
        num_bits = self._bits(self.where, quantization.get("bits"))
        group_size = quantization.get("group_size", CHANNELWISE)
        if group_size not in _core.GROUP_SIZES:
            raise ValueError(f"{self.where}: group_size: expected one of {sorted(_core.GROUP_SIZES)}, got {group_size}")
        return Scheme(num_bits, int(group_size))

    def _bits(self, where: str, value: Any) -> int:
        if value not in _core.NUM_BITS:
            raise ValueError(f"{where}: bits: expected one of {sorted(_core.NUM_BITS)}, got {value!r}")
        return int(value)


def matches(entry: str, layer: str) -> bool:
    """Whether an `ignore` or `targets` entry names a layer: a `re:` pattern its full name starts with, its full name,
    its last component, or the class of linear layers (every layer here is one)."""
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], layer) is not None
        except re.error as error:
            raise ValueError(f"ignore: expected a regular expression after 're:', got '{entry}' ({error})") from None
    return entry in ("Linear", layer, layer.rpartition(".")[2])
