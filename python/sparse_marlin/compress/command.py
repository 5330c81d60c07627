"""What `sparse-marlin compress` does: a checkpoint in, a checked and measured checkpoint out. `run_compress` works,
`render` prints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .._extension import _core
from .._version import __version__
from ..checkpoint import from_pretrained, is_saved_model, save_checkpoint
from ..evaluate import PERPLEXITY_PROTOCOL, Continuation, Perplexity, generate_greedy, perplexity
from ..model import default_device, default_dtype, existing_path, load_model, quiet_transformers, stored_dtype
from ..quantize import check_finite
from ..replace import DEFAULT_IGNORE, module_bytes, select
from ..report import ConversionReport
from .calibration import calibration_texts
from .card import model_card
from .driver import compress
from .layerwise import DEFAULT_DAMPING
from .masks import NONZERO
from .solvers import DEFAULT_QUALITY, solver

HELD_OUT = 0.1  # share of the calibration text that is kept for the comparison when no other text is given
STATE_SUFFIX = ".unfinished"
PROMPT = "The most important thing about"


@dataclass(frozen=True)
class CompressOptions:
    """Arguments of the command; `None` is a default that depends on the model or the device."""

    source: str
    out: Path
    calibration: str
    quality: str = DEFAULT_QUALITY
    group_size: int = 128
    num_bits: int = 4
    rank: int = 0
    shared_correction: bool = False
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    masks: Path | None = None
    keep_pattern: bool = False
    max_error: float | None = None
    fallback: str = "dense"
    num_sequences: int | None = None
    seq_len: int | None = None
    seed: int = 0
    damping: float = DEFAULT_DAMPING
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    eval_text: Path | None = None
    eval_seq_len: int = 512
    eval_tokens: int | None = None  # None: 8192 on a CPU, 65536 on a GPU
    prompt: str = PROMPT
    overwrite: bool = False
    restart: bool = False


@dataclass
class CompressResult:
    """What was made and what it is worth."""

    options: CompressOptions
    report: ConversionReport
    text_name: str
    dense: Perplexity
    compressed: Perplexity
    continuation: Continuation
    bytes_before: int  # of the whole model, in the dtype that is saved
    bytes_after: int  # of the files written
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        return {
            "version": __version__,
            "options": {key: _plain(value) for key, value in options.items()},
            "text": self.text_name,
            "protocol": PERPLEXITY_PROTOCOL,
            "dense": dataclasses.asdict(self.dense),
            "compressed": dataclasses.asdict(self.compressed),
            "prompt": self.options.prompt,
            "continuation": self.continuation.text,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": self.seconds,
            "report": self.report.to_dict(),
        }


def run_compress(
    options: CompressOptions, *, say: Callable[[str], None] = lambda _: None, progress: bool = False
) -> CompressResult:
    """Load, check, compress, save, open what was saved, measure. A call that was interrupted continues when it is
    called again with the same arguments."""
    solver(options.quality)
    _check_out(options)
    device = options.device or default_device()
    texts = calibration_texts(options.calibration)
    text_name, held_out, texts = _held_out(options, texts)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.perf_counter() - clock
        clock = time.perf_counter()

    say("Loading the model")
    computing = default_dtype(device)
    # Loaded into host memory and lent to the device block by block: the device needs room for one block.
    loaded = load_model(options.source, device=torch.device("cpu"), dtype=computing)
    saved_dtype = options.dtype or _stored_dtype(options.source)
    if device.type != "cpu" and saved_dtype != computing:
        loaded.model.to(saved_dtype)
    _check_model(loaded.model, options, saved_dtype, say)
    before = _bytes_in(loaded.model, saved_dtype)
    _check_space(options.out, before)
    lap("load")
    tokens = options.eval_tokens or (8192 if device.type == "cpu" else 65536)

    def measure(model: nn.Module, description: str) -> Perplexity:
        return perplexity(
            model,
            loaded.tokenizer,
            held_out,
            seq_len=options.eval_seq_len,
            max_tokens=tokens,
            description=description,
            progress=progress,
        )

    dense = measure(loaded.model.to(device), "Perplexity, dense")
    loaded.model.to("cpu")
    lap("dense perplexity")
    state = _state_folder(options.out)
    if options.restart:
        shutil.rmtree(state, ignore_errors=True)
    if state.exists():
        say(f"Continuing from {state}")
    with _said(say):
        report = compress(
            loaded.model,
            texts,
            tokenizer=loaded.tokenizer,
            quality=options.quality,
            group_size=options.group_size,
            num_bits=options.num_bits,
            rank=options.rank,
            shared_correction=options.shared_correction,
            ignore=options.ignore,
            masks=_masks(options),
            max_error=options.max_error,
            fallback=options.fallback,
            num_sequences=options.num_sequences,
            seq_len=options.seq_len,
            seed=options.seed,
            damping=options.damping,
            device=device,
            scale_dtype=saved_dtype,
            state=state,
            progress=progress,
        )
    lap("compress")
    say("Saving")
    loaded.model.to(saved_dtype)
    with quiet_transformers(), _disk_errors(options.out):
        save_checkpoint(
            loaded.model,
            options.out,
            tokenizer=loaded.tokenizer,
            overwrite=options.overwrite,
            extra_config={"compression": _provenance(options, report)},
            progress=progress,
        )
    lap("save and verify")
    del loaded.model
    with quiet_transformers():
        reopened = from_pretrained(options.out, device=device, dtype=saved_dtype if device.type != "cpu" else computing)
    compressed = measure(reopened, "Perplexity, compressed")
    continuation = generate_greedy(reopened, loaded.tokenizer, options.prompt, max_new_tokens=32)
    lap("measure")
    after = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    result = CompressResult(
        options, report, text_name, dense, compressed, continuation, before, after, {**seconds, "total": 0.0}
    )
    result.seconds["total"] = sum(seconds.values())
    (options.out / "README.md").write_text(model_card(result.to_dict()), encoding="utf-8")
    shutil.rmtree(state, ignore_errors=True)
    return result


def render(result: CompressResult) -> str:
    """The closing lines of the command."""
    dense, small = result.dense, result.compressed
    worst = result.report.worst(3)
    lines = [
        result.report.totals(),
        "largest output errors: " + ", ".join(f"{layer.name} {layer.output_error:.4f}" for layer in worst),
        f"perplexity of {small.scored_tokens} tokens of {result.text_name} ({small.windows} windows of "
        f"{small.seq_len}): dense {dense.perplexity:.3f}, compressed {small.perplexity:.3f} "
        f"({small.perplexity - dense.perplexity:+.3f})",
        f"model files: {result.bytes_before / 1e6:.1f} MB -> {result.bytes_after / 1e6:.1f} MB",
        f"{result.options.prompt}{result.continuation.text}",
        f"{result.options.out}: saved and verified, {result.seconds['total']:.0f} s in all "
        f"({result.seconds['compress']:.0f} s to compress)",
    ]
    return "\n".join(lines)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """safetensors has an error class of its own for a disk that is full."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{out}: could not be written: {error}; free disk space and run again") from error


@contextlib.contextmanager
def _said(say: Callable[[str], None]) -> Iterator[None]:
    """Warnings as lines of the command, not as Python shows them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", "compress:")
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        yield


def _check_out(options: CompressOptions) -> None:
    out = options.out
    if out.exists() and not options.overwrite:
        raise ValueError(f"{out}: expected a path where nothing is yet, got an existing one; pass --overwrite")
    source = existing_path(options.source)
    if source is not None and out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"{out}: expected another path than that of the model, got the same")
    if source is not None and source.is_dir() and is_saved_model(source):
        raise ValueError(
            f"{options.source}: expected a dense model, got one that is compressed already; "
            "start from the dense checkpoint"
        )


def _check_space(out: Path, needed: int) -> None:
    """Before hours of work: room for the result and the state, which together are smaller than the dense model."""
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(f"{out}: expected {needed / 1e6:.0f} MB of free disk space, got {free / 1e6:.0f} MB")


def _check_model(model: nn.Module, options: CompressOptions, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Every shape and every value before the first block; what stays dense is listed with its reason."""
    selection = select(
        model, options.ignore, group_size=options.group_size, num_bits=options.num_bits, caller="compress"
    )
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        matrix = parameter.detach().reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
        check_finite(matrix, name.removesuffix(".weight"))
        if matrix.numel() and float(matrix.abs().max()) > limit:
            raise ValueError(
                f"{name}: expected values that fit {dtype}, got {float(matrix.abs().max()):g}; pass --dtype"
            )
    say(f"{len(selection.chosen)} of {len(selection.candidates)} linear layers will be compressed")
    for candidate in selection.candidates:
        if candidate.reason is not None:
            say(f"stays dense: {candidate.name} ({candidate.shape[0]} x {candidate.shape[1]}): {candidate.reason}")


def _held_out(options: CompressOptions, texts: list[str]) -> tuple[str, str, list[str]]:
    """Name and content of the text to compare on, and what is left to calibrate on."""
    if options.eval_text is not None:
        from ..model import read_text

        name, content = read_text(options.eval_text)
        return name, content, texts
    joined = "\n\n".join(texts)
    cut = int(len(joined) * (1 - HELD_OUT))
    return f"the last {HELD_OUT:.0%} of {Path(options.calibration).name}", joined[cut:], [joined[:cut]]


def _masks(options: CompressOptions) -> Mapping[str, torch.Tensor] | str | None:
    if options.keep_pattern:
        return NONZERO
    if options.masks is None:
        return None
    from safetensors.torch import load_file

    try:
        return load_file(str(options.masks))
    except Exception as error:  # safetensors has an error class of its own beside OSError
        raise ValueError(f"{options.masks}: masks: expected a .safetensors file of masks, got: {error}") from error


def _state_folder(out: Path) -> Path:
    return out.with_name(out.name + STATE_SUFFIX)


def _stored_dtype(source: str) -> torch.dtype:
    """float16 where the source is float16, else bfloat16: a compressed model in float32 would be mostly embeddings, and
    GPU kernels take 16-bit activations."""
    return torch.float16 if stored_dtype(source) == torch.float16 else torch.bfloat16


def _bytes_in(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the dense model if its floating-point tensors were `dtype`."""
    own = next(model.parameters()).dtype
    return module_bytes(model) * torch.finfo(dtype).bits // torch.finfo(own).bits


def _provenance(options: CompressOptions, report: ConversionReport) -> dict[str, Any]:
    return {
        "producer": f"sparse_marlin {__version__}",
        "format": f"{_core.FORMAT_NAME} version {_core.FORMAT_VERSION}",
        "quality": options.quality,
        "rank": options.rank,
        "shared_correction": options.shared_correction,
        "calibration": Path(options.calibration).name,
        "seed": options.seed,
        "mean_output_error": report.mean_output_error,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return os.fspath(value) if isinstance(value, Path) else str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value
