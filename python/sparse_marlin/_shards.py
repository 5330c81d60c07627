"""safetensors files of a model: which tensor is in which file, reading one at a time, writing in shards, and a folder
that appears under its final name only when it is whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5_000_000_000  # what transformers cuts at

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file, known from the file's header."""

    name: str
    path: Path
    dtype: torch.dtype | None  # None: a dtype this module has no name for
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype is not None else 1)

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{self.path.name}: {self.name}"

    def describe(self) -> str:
        dtype = "an unknown dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)}"


@contextlib.contextmanager
def opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    """The file as safetensors opens it; a damaged or missing file is one clear error that names it."""
    try:
        file = safe_open(str(path), framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a state dict written by safetensors, got: {_first_line(error)}; the file is damaged"
        ) from error
    with file as reader:
        yield reader


def read_tensor(reader: Any, info: TensorInfo) -> torch.Tensor:
    try:
        return reader.get_tensor(info.name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{info.where}: expected a readable tensor, got: {_first_line(error)}") from error


def headers(paths: list[Path]) -> dict[str, TensorInfo]:
    """Every tensor of these files by name, without reading data. A name in two files is an error."""
    found: dict[str, TensorInfo] = {}
    for path in paths:
        with opened(path) as reader:
            for name in reader.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = reader.get_slice(name)
                info = TensorInfo(name, path, _DTYPES.get(str(part.get_dtype())), tuple(part.get_shape()))
                if name in found:
                    raise ValueError(f"{info.where}: expected once, got it in {found[name].path.name} too")
                found[name] = info
    return found


class TensorFiles:
    """Tensors of .safetensors and torch.save files by name, read one at a time; files stay open until `close`."""

    def __init__(self, paths: list[Path]) -> None:
        self._stack = contextlib.ExitStack()
        self._readers: dict[Path, Any] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        self.infos = headers([path for path in paths if path.suffix == ".safetensors"])
        for path in (path for path in paths if path.suffix != ".safetensors"):
            for name, tensor in load_state_dict(path).items():
                self._loaded[name] = tensor
                self.infos[name] = TensorInfo(name, path, tensor.dtype, tuple(tensor.shape))

    def read(self, name: str) -> torch.Tensor:
        if name in self._loaded:
            return self._loaded[name]
        info = self.infos[name]
        if info.path not in self._readers:
            self._readers[info.path] = self._stack.enter_context(opened(info.path))
        return read_tensor(self._readers[info.path], info)

    def close(self) -> None:
        self._stack.close()
        self._readers, self._loaded = {}, {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote, mapped where the file can be."""
    try:
        # Files from before torch 1.6 are no archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zipfile and torch have no common base: all mean an unreadable file
        raise ValueError(f"{path}: expected a state dict written by torch.save, got: {_first_line(error)}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a state dict (names to tensors), got {type(loaded).__name__}")
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def model_files(path: Path) -> list[Path]:
    """The files that hold the tensors of a file or folder: safetensors where there are any, else torch.save files."""
    if path.is_file():
        return [path]
    found = shard_paths(path)
    for pattern in ("pytorch_model*.bin", "*.pt", "*.pth"):
        found = found or sorted(path.glob(pattern))
    return found


def shard_paths(folder: Path) -> list[Path]:
    """The model's .safetensors files: those of the index where there is one (a missing one is an error), else the one
    of the usual name, else all that lie there."""
    index = folder / INDEX
    if not index.exists():
        return [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map, got: {_first_line(error)}") from error
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder}: expected the files of {INDEX}, got none named {', '.join(missing)}")
    return [folder / name for name in names]


def check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor that the index promises is there; an index without a file's tensor would be half a model."""
    index = folder / INDEX
    if not index.exists():
        return
    promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name, file in promised.items():
        if name not in tensors:
            raise ValueError(f"{folder / file}: {name}: expected the tensor that {INDEX} promises, got none")


@dataclass
class ShardWriter:
    """Writes tensors to `model-00001-of-0000N.safetensors` files and their index, holding at most one shard in memory.

    Each file is read back by `verify`, if given, right after it is written.
    """

    folder: Path
    max_bytes: int = DEFAULT_SHARD_BYTES
    total_bytes: int = 0
    _held: dict[str, torch.Tensor] = field(default_factory=dict)
    _held_bytes: int = 0
    _files: list[tuple[Path, list[str]]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        nbytes = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + nbytes > self.max_bytes:
            self.flush()
        # A copy where the memory is shared or strided: safetensors stores whole, contiguous tensors of their own.
        shared = tensor.untyped_storage().nbytes() != nbytes or not tensor.is_contiguous()
        self._held[name] = tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.detach()
        self._held_bytes += nbytes
        self.total_bytes += nbytes

    def flush(self) -> None:
        """Write what is held; a shard may be smaller than the limit."""
        if not self._held:
            return
        path = self.folder / f".shard-{len(self._files) + 1:05d}.safetensors"
        pointers = set()
        for name, tensor in self._held.items():  # tied tensors of one storage: each gets its own copy
            if tensor.numel() and tensor.data_ptr() in pointers:
                self._held[name] = tensor.clone()
            pointers.add(tensor.data_ptr())
        save_file(self._held, str(path), metadata={"format": "pt"})
        self._files.append((path, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def close(self) -> list[Path]:
        """Final names and, for more than one file, the index. Returns the files."""
        self.flush()
        count = len(self._files)
        final = [
            self.folder / (SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors")
            for i in range(1, count + 1)
        ]
        for (path, _), target in zip(self._files, final, strict=True):
            os.replace(path, target)
        if count > 1:
            weight_map = {
                name: target.name for (_, names), target in zip(self._files, final, strict=True) for name in names
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return final


@contextlib.contextmanager
def new_folder(
    out: str | os.PathLike[str], *, overwrite: bool = False, name: str = "save_checkpoint"
) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to `out` when the block ends without an error and deleted otherwise.

    A folder that is there already is refused, or with `overwrite` replaced at the very end.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and not overwrite:
        raise ValueError(
            f"{name}: {target}: expected a name that does not exist yet, got one that does; "
            "choose another, or overwrite it (overwrite=True, --overwrite)"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name}: {target}: expected a folder to overwrite, got a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    os.chmod(made, 0o777 & ~_umask())  # mkdtemp's folders are private
    try:
        yield made
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            try:
                os.replace(made, target)
            except OSError:
                os.replace(old / target.name, target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
