"""Whole checkpoints: `import_checkpoint` brings any readable format into this library's, `export_checkpoint` writes the
old one. Tensor by tensor, a shard in memory at a time, into a folder that gets its name when all of it is verified."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._progress import progress_bar
from .._shards import DEFAULT_SHARD_BYTES, INDEX, ShardWriter, headers, new_folder, opened, read_tensor, shard_paths
from ..checkpoint import (
    CONFIG_FILE,
    CheckpointConfig,
    LayerSpec,
    check_tensors,
    read_config,
    verify_packed,
    verify_scales,
    write_config,
)
from ..quantize import CHANNELWISE
from ..replace import DEFAULT_IGNORE
from ..report import ConversionReport, LayerReport
from .formats import DENSE, GPTQ_CONFIG_FILE, MARLIN_24, SAVED, Source, SourceLayer, open_source
from .layouts import COMPRESSED_TENSORS, GPTQ, PackedLayer, export_marlin_24, import_marlin_24
from .sources import Options, Reading, read_layer, same_as_source

# What --format calls the two namings.
EXPORT_FORMATS = {"marlin-24": COMPRESSED_TENSORS, "gptq-marlin-24": GPTQ}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_REPLACED_FILES = (CONFIG_FILE, GPTQ_CONFIG_FILE, INDEX, "pytorch_model.bin.index.json")


def import_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ignore: str | Iterable[str] = DEFAULT_IGNORE,
    targets: str | Iterable[str] = (),
    group_size: int = 128,
    num_bits: int = 4,
    permuted_scales: bool | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Convert a checkpoint of another format to a folder that `from_pretrained` opens.

    Reads marlin-24 in its three namings, and 2:4 weights in compressed-tensors `pack-quantized`, `int-quantized` and
    `sparse-24-bitmask`, GPTQ, and dense checkpoints; the format is found from config and tensors. Only dense weights
    are quantized (`group_size`, `num_bits`), all else keeps its numbers. Every other tensor and file is copied as it
    is.

    Args:
        src: a folder, or a file of tensors (.safetensors, or torch.save's).
        out: the new folder; must not exist unless `overwrite`.
        ignore, targets: for dense checkpoints: what stays dense, and, if given, what alone is converted; class names,
            full names, last components of names, or `re:` patterns.
        permuted_scales: whether marlin-24 scales lie in the grouped order, where the rule of the published packers
            does not hold (True: a file cut down to one group).
        device: where the work is done, for instance "cuda".

    Raises:
        ValueError, RuntimeError: name the file and the tensor. Nothing is left under `out`.
    """
    ignore, targets = _strings(ignore), _strings(targets)
    options = Options(group_size, num_bits, permuted_scales, device)
    with open_source(Path(src), ignore=ignore, targets=targets) as source:
        if source.kind == SAVED:
            raise ValueError(
                f"{src}: expected another format, got a model that sparse_marlin saved; it needs no import"
            )
        with new_folder(out, overwrite=overwrite, name="import_checkpoint") as folder:
            writer = _Import(source, options, ShardWriter(folder, max_shard_bytes))
            writer.run(progress)
            config = CheckpointConfig(writer.specs, _dense_names(source, writer.specs))
            base = {k: v for k, v in source.config.items() if k not in ("quantization_config", "compression_config")}
            write_config(folder, {**base, "quantization_config": config.to_dict()})
            if source.path.is_dir():
                copy_other_files(source.path, folder)
            writer.verify(folder, config, progress)
        return writer.report(config)


class _Import:
    """The state of one import: what was written, with a checksum of each packed tensor."""

    def __init__(self, source: Source, options: Options, writer: ShardWriter) -> None:
        self.source, self.options, self.writer = source, options, writer
        self.specs: dict[str, LayerSpec] = {}
        self.rows: list[LayerReport] = []
        self.checksums: dict[str, int] = {}

    def run(self, progress: bool) -> None:
        """Convert and copy in the order of the files, so that each is read once from front to back."""
        source = self.source
        parts = {name: layer for layer in source.layers.values() for name in layer.tensors.values()}
        done: set[str] = set()
        with progress_bar("Importing", len(source.files.infos), progress) as advance:
            for name in source.files.infos:
                layer = parts.get(name)
                if layer is None:
                    self.writer.add(name, source.files.read(name))
                elif layer.name not in done:
                    done.add(layer.name)
                    self._convert(layer)
                advance()
        if not self.specs:
            raise ValueError(
                f"{source.path}: expected 2:4-sparse layers, got none in {len(source.layers)} linear layers; "
                "prune the model first (sparse-marlin compress)"
            )
        self.writer.close()

    def _convert(self, layer: SourceLayer) -> None:
        reading = read_layer(self.source, layer, self.options)
        infos = [self.source.files.infos[name] for name in layer.tensors.values()]
        before = sum(info.nbytes for info in infos)
        if reading.packed is None:
            for name in layer.tensors.values():
                self.writer.add(name, self.source.files.read(name))
            self._row(layer.name, (infos[0].shape[0], infos[0].shape[1]), reading, before, before)
            return
        packed = reading.packed
        tensors = {"weight_packed": packed.weight_packed.cpu(), "scales": packed.scales.cpu()}
        for role, tensor in tensors.items():
            self.writer.add(f"{layer.name}.{role}", tensor)
            self.checksums[f"{layer.name}.{role}"] = _checksum(tensor)
        self.specs[layer.name] = spec_of(packed)
        after = sum(tensor.nbytes for tensor in tensors.values())
        self._row(layer.name, (packed.size_n, packed.size_k), reading, before, after)

    def _row(self, name: str, shape: tuple[int, int], reading: Reading, before: int, after: int) -> None:
        converted = reading.packed is not None
        error = (reading.relative_error or 0.0) if converted else None
        self.rows.append(LayerReport(name, shape, converted, reading.reason, error, before, after))

    def verify(self, folder: Path, config: CheckpointConfig, progress: bool) -> None:
        """Read everything back: the bytes that were written; packed layers unpacked, marlin-24 ones to their old form
        and compared with the checkpoint."""
        paths = shard_paths(folder)
        tensors = headers(paths)
        check_tensors(config.layers, tensors, str(folder))
        written = set(tensors)
        plain = set(self.source.files.infos) - {
            name for layer in self.source.layers.values() for name in layer.tensors.values()
        }
        if lost := sorted(plain - written):
            raise RuntimeError(f"{folder}: {lost[0]}: expected the tensor in the files written, got none")
        with progress_bar("Verifying", len(tensors), progress) as advance:
            for path in paths:
                with opened(path) as reader:
                    for info in (info for info in tensors.values() if info.path == path):
                        self._verify(read_tensor(reader, info), info.name, info.where)
                        advance()

    def _verify(self, tensor: torch.Tensor, name: str, where: str) -> None:
        owner, _, role = name.rpartition(".")
        if name not in self.checksums:
            if not _same_bytes(tensor, self.source.files.read(name)):
                raise RuntimeError(f"{where}: expected the bytes of the checkpoint, got others; the disk is at fault")
            return
        if _checksum(tensor) != self.checksums[name]:
            raise RuntimeError(f"{where}: expected the bytes that were written, got others; the disk is at fault")
        if role == "scales":
            verify_scales(tensor, where)
            return
        layer, spec = self.source.layers[owner], self.specs[owner]
        if layer.kind != MARLIN_24:
            verify_packed(tensor, spec, where)
            return
        scales = torch.ones(
            (1, spec.out_features), dtype=torch.float16, device=self.options.device
        )  # not looked at: the scales of the file are checked by themselves
        packed = PackedLayer(
            tensor.to(self.options.device), scales, spec.out_features, spec.in_features, CHANNELWISE, spec.num_bits
        )
        if not same_as_source(self.source, layer, packed, self.options):
            raise RuntimeError(f"{where}: expected the codes of {layer.name}, got others; please report this")

    def report(self, config: CheckpointConfig) -> ConversionReport:
        num_bits, group_size = config.common
        notes = list(self.source.notes)
        if self.source.kind == DENSE and any(not row.converted for row in self.rows):
            notes.append("layers that are not 2:4 sparse stayed dense")
        return ConversionReport(self.rows, group_size, num_bits, f"imported from {self.source.format}", notes)


def export_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "marlin-24",
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> list[str]:
    """Write a saved model in the old format, as its packers did: "marlin-24" (compressed-tensors' names and config) or
    "gptq-marlin-24". Returns the names of the layers. Every layer is imported again and compared before the folder
    gets its name.

    Raises:
        ValueError: `src` is no saved model, or a layer does not fit the old format (`export_marlin_24`).
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f"export_checkpoint: format: expected one of {sorted(EXPORT_FORMATS)}, got {format!r}")
    naming = EXPORT_FORMATS[format]
    path = Path(src).expanduser()
    with open_source(path) as source:
        if source.kind != SAVED:
            raise ValueError(f"{path}: expected a model that sparse_marlin saved, got {source.format}; import it first")
        config = CheckpointConfig.from_dict(source.quantization, str(path / CONFIG_FILE))
        check_tensors(config.layers, source.files.infos, str(path))
        quantization = old_config(config, naming)
        with new_folder(out, overwrite=overwrite, name="export_checkpoint") as folder:
            writer = ShardWriter(folder, max_shard_bytes)
            with progress_bar("Exporting", len(source.files.infos), progress) as advance:
                for name in source.files.infos:
                    owner, _, role = name.rpartition(".")
                    if owner not in config.layers or role == "bias":
                        writer.add(name, source.files.read(name))
                    elif role == "weight_packed":
                        tensors = _exported(source, owner, config.layers[owner], naming, device)
                        for old_role, tensor in tensors.items():
                            writer.add(f"{owner}.{old_role}", tensor)
                    advance()
            writer.close()
            write_config(folder, {**read_config(path), "quantization_config": quantization})
            copy_other_files(path, folder)
            if naming == GPTQ:
                (folder / GPTQ_CONFIG_FILE).write_text(json.dumps(quantization, indent=2) + "\n", encoding="utf-8")
            with open_source(folder) as written:  # its config, its headers and the shapes of its layers
                if set(written.layers) != set(config.layers):
                    raise RuntimeError(f"{folder}: expected the layers that were exported, got others")
    return list(config.layers)


def _exported(
    source: Source, name: str, spec: LayerSpec, naming: str, device: torch.device | str
) -> dict[str, torch.Tensor]:
    where = source.files.infos[f"{name}.weight_packed"].where
    if spec.rank:
        raise ValueError(f"{where}: expected a layer without a low-rank correction, got one of rank {spec.rank}")
    packed = source.files.read(f"{name}.weight_packed").to(device)
    scales = source.files.read(f"{name}.scales").to(device)
    layer = PackedLayer(packed, scales, spec.out_features, spec.in_features, spec.group_size, spec.num_bits)
    tensors = export_marlin_24(layer, naming=naming, name=where)
    again = import_marlin_24(*tensors.values(), naming=naming, group_size=spec.group_size, name=where)
    if not torch.equal(again.weight_packed, packed) or not torch.equal(again.scales, scales.to(again.scales.dtype)):
        raise RuntimeError(f"{where}: expected to import what was exported, got other bytes; the file is damaged")
    return {role: tensor.cpu() for role, tensor in tensors.items()}


def old_config(config: CheckpointConfig, naming: str) -> dict[str, Any]:
    """The `quantization_config` that the old packers wrote for such layers."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, spec in config.layers.items():
        kinds.setdefault((spec.num_bits, spec.group_size), []).append(name)
    if naming == GPTQ:
        if len(kinds) != 1:
            raise ValueError(
                "export_checkpoint: format: expected one num_bits and group_size for all layers, as gptq-marlin-24 has "
                f"it, got {sorted(kinds)}; use marlin-24"
            )
        num_bits, group_size = next(iter(kinds))
        return {
            "bits": num_bits,
            "group_size": group_size,
            "damp_percent": 0.1,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": False,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
            "checkpoint_format": "marlin_24",
        }
    groups = {}
    for number, ((num_bits, group_size), names) in enumerate(kinds.items()):
        channel = group_size == CHANNELWISE
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": {
                "num_bits": num_bits,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if channel else "group",
                "group_size": None if channel else group_size,
                "actorder": None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "marlin-24",
        "quantization_status": "compressed",
        "ignore": list(config.ignore),
        "config_groups": groups,
        "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": [], "ignore": []},
    }


def copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, licence, remote code: all that is neither weights nor replaced. Hidden files and
    folders (caches, version control) stay behind."""
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in _REPLACED_FILES or path.suffix in _WEIGHT_FILES:
            continue
        if path.is_file():
            shutil.copy2(path, folder / path.name)  # follows links: hub caches are made of them


def spec_of(packed: PackedLayer) -> LayerSpec:
    return LayerSpec(packed.size_k, packed.size_n, packed.num_bits, packed.group_size)


def _dense_names(source: Source, specs: Mapping[str, LayerSpec]) -> tuple[str, ...]:
    """Matrices that stayed dense, for the config's `ignore`."""
    names = (name.rpartition(".") for name, info in source.files.infos.items() if len(info.shape) == 2)
    return tuple(
        owner
        for owner, _, role in names
        if role == "weight"
        and owner not in specs
        and not any(word in owner.lower() for word in ("embed", "wte", "wpe"))
    )


def _strings(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bytes_of(tensor)) if tensor.numel() else 0


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )
