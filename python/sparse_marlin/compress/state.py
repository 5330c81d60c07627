"""Finished blocks on disk, so that an interrupted compression continues where it was.

One safetensors file for each block, written under another name, flushed to the disk and renamed, so that a file that is
there is whole. Its metadata holds a fingerprint of everything that the block's result follows from: the settings, the
calibration tokens, and the weights of the model up to and including this block. A file whose fingerprint is another is
not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .._version import __version__
from ..checkpoint_config import LayerSpec
from ..linear import SparseMarlinLinear
from ..replace import Candidate, Replacement

_DENSE = "weight"  # the tensor of a linear that stays dense with other values


class Fingerprint:
    """A running hash of settings and tensors."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._hash = hashlib.sha256(json.dumps({"version": __version__, **settings}, sort_keys=True).encode())

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        """Add named tensors; the hash of everything so far."""
        for name, tensor in tensors:
            self._hash.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().flatten()
            if plain.numel():
                self._hash.update(plain.view(torch.uint8).numpy().data)
        return self._hash.hexdigest()


class State:
    """The folder of finished blocks. `folder` None: nothing is kept."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, index: int, fingerprint: str, linears: Iterable[Candidate]) -> dict[str, Replacement | str] | None:
        """What became of the block's linears, or None if it is not finished, or was finished from other inputs."""
        if self.folder is None:
            return None
        path = self._path(index)
        try:
            with safe_open(str(path), framework="pt") as reader:
                metadata = reader.metadata() or {}
                if metadata.get("fingerprint") != fingerprint:
                    return None
                entries = json.loads(metadata["linears"])
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            return {c.name: _read(c, entries[c.name], tensors) for c in linears}
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # not there, or not readable: the block is done again

    def save(self, index: int, fingerprint: str, made: Mapping[str, Replacement | str]) -> None:
        """Keep a finished block. OSError (a full disk) names the file, and leaves none that is not whole."""
        if self.folder is None:
            return
        entries: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, new in made.items():
            entries[name] = _write(name, new, tensors)
        path = self._path(index)
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, str(partial), {"fingerprint": fingerprint, "linears": json.dumps(entries)})
            with partial.open("rb+") as written:
                os.fsync(written.fileno())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise OSError(f"{path}: could not be written: {error}; free disk space and run again") from error

    def remove(self) -> None:
        """The finished model is saved: the state has served."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:05d}.safetensors"


def _write(name: str, new: Replacement | str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    if isinstance(new, str):
        return {"reason": new}
    entry: dict[str, Any] = {
        "reason": new.reason,
        "relative_error": new.relative_error,
        "output_error": new.output_error,
    }
    if isinstance(new.layer, SparseMarlinLinear):
        layer = new.layer
        entry["packed"] = dataclasses.asdict(LayerSpec.of(layer))
        kept = {key: tensor for key, tensor in layer.state_dict().items() if key != "bias"}
    else:
        assert isinstance(new.layer, nn.Linear)
        kept = {_DENSE: new.layer.weight.detach()}
    tensors.update({f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in kept.items()})
    return entry


def _read(candidate: Candidate, entry: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Replacement | str:
    if "relative_error" not in entry:
        return str(entry["reason"])
    linear = candidate.module
    assert isinstance(linear, nn.Linear)
    prefix = f"{candidate.name}."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layer: nn.Module
    if _DENSE in own:
        layer = dense_twin(linear, own[_DENSE])
    else:
        made = LayerSpec(**entry["packed"]).make(False, None, own["scales"].dtype)
        made.load_state_dict(own)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        layer = made.to(linear.weight.device).train(linear.training)
    return Replacement(layer, entry["relative_error"], entry["output_error"], entry["reason"])


def dense_twin(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    """A linear like `linear` with another weight [N, K]."""
    twin = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    like = linear.weight
    twin.weight = nn.Parameter(weight.to(device=like.device, dtype=like.dtype), requires_grad=like.requires_grad)
    if linear.bias is not None:
        twin.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    return twin.train(linear.training)
