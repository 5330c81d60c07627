"""The command line, `sparse-marlin COMMAND`, also as `python -m sparse_marlin`.

Results go to stdout (with --json nothing else does), progress and errors to stderr. A failure is one line and exit
status 1, a wrong call is exit status 2.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from ._extension import _core
from ._version import __version__

app = typer.Typer(
    name="sparse-marlin",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = TypeVar("Command", bound=Callable[..., Any])


class DType(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _check_group_size(value: int) -> int:
    if value not in _core.GROUP_SIZES:
        raise typer.BadParameter(f"expected one of {sorted(_core.GROUP_SIZES)}, got {value}")
    return value


def _check_num_bits(value: int) -> int:
    if value not in _core.NUM_BITS:
        raise typer.BadParameter(f"expected one of {sorted(_core.NUM_BITS)}, got {value}")
    return value


def _check_device(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        device = torch.device(value)
    except RuntimeError:
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, got {value}") from None
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, got {value}")
    return value


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparse-marlin {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """2:4-sparse INT4/INT8 linear layers for PyTorch, on CUDA and on the CPU."""


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
GroupSize = Annotated[
    int,
    typer.Option(
        "--group-size", callback=_check_group_size, help="Input features that share a scale; -1: a whole row."
    ),
]
NumBits = Annotated[int, typer.Option("--num-bits", callback=_check_num_bits, help="Bits of a code: 4 or 8.")]
Device = Annotated[
    str | None, typer.Option("--device", callback=_check_device, help="cpu, cuda or cuda:N; default: a GPU if usable.")
]
Dtype = Annotated[DType | None, typer.Option("--dtype", help="Default: bfloat16 on a GPU, float32 on a CPU.")]
Sparse = Annotated[
    bool, typer.Option("--sparse/--dense", help="Replace the linears after loading, or leave the model as it is.")
]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="UTF-8 text file; default: Python's documentation topics.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens of a perplexity window.")]
Source = Annotated[str, typer.Argument(metavar="PATH", help="Model directory, .gguf file or hub name.")]


def _one_line_errors(command: Command) -> Command:
    """Turn an expected failure into one line on stderr and exit status 1. SPARSE_MARLIN_TRACEBACK=1 shows where it came
    from."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            if os.environ.get("SPARSE_MARLIN_TRACEBACK"):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            typer.echo(f"sparse-marlin: error: {lines[0] if lines else type(error).__name__}", err=True)
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


@app.command()
@_one_line_errors
def demo(
    model: Annotated[
        str | None, typer.Argument(help="Model directory, .gguf file or hub name; default: SmolLM2-135M.")
    ] = None,
    group_size: GroupSize = 64,
    num_bits: NumBits = 4,
    text: TextFile = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    seq_len: SeqLen = 512,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text; default 4096 on a CPU, 32768 on a GPU.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 48,
    device: Device = None,
    dtype: Dtype = None,
    show_all: Annotated[bool, typer.Option("--all", help="List every layer in the error table.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a model dense and sparse, side by side: perplexity, text, speed, megabytes, error of every layer."""
    from .demo import DEMO_PROMPT, DemoOptions, render_demo, run_demo

    options = DemoOptions(
        source=model,
        group_size=group_size,
        num_bits=num_bits,
        text=text,
        prompt=DEMO_PROMPT if prompt is None else prompt,
        seq_len=seq_len,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        device=_device(device),
        dtype=_dtype(dtype),
    )
    _say("Loading the model")
    result = run_demo(options, progress=True)
    if as_json:
        _print_json(result.to_dict())
    else:
        render_demo(result, _console(), show_all=show_all)


@app.command()
@_one_line_errors
def generate(
    path: Source,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    sparse: Sparse = True,
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt greedily with the sparse (or dense) model; under torchrun with a part of it on every rank."""
    from .evaluate import generate_greedy
    from .parallel import torchrun_group

    with torchrun_group(_device(device)) as place:
        loaded, report = _load_part(path, sparse, group_size, num_bits, place, dtype)
        made = generate_greedy(
            loaded.model, loaded.tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, progress=_is_first()
        )
    if not _is_first():
        return
    if as_json:
        _print_json({**_about(loaded, report), "prompt": prompt, **dataclasses.asdict(made)})
        return
    typer.echo(made.text if chat else prompt + made.text)
    if made.decode_tokens_per_second:
        _say(f"{len(made.tokens)} tokens, {made.decode_tokens_per_second:.1f} tokens/s")


@app.command("eval")
@_one_line_errors
def evaluate(
    path: Source,
    text: TextFile = None,
    seq_len: SeqLen = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 16384,
    sparse: Sparse = True,
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a text under the sparse (or dense) model."""
    from .evaluate import PERPLEXITY_PROTOCOL, perplexity
    from .model import read_text

    text_name, content = read_text(text)
    loaded, report = _load(path, sparse, group_size, num_bits, device, dtype)
    found = perplexity(loaded.model, loaded.tokenizer, content, seq_len=seq_len, max_tokens=max_tokens, progress=True)
    if as_json:
        about = {**_about(loaded, report), "text": text_name, "protocol": PERPLEXITY_PROTOCOL}
        _print_json({**about, **dataclasses.asdict(found)})
        return
    typer.echo(
        f"perplexity {found.perplexity:.4f} of {found.scored_tokens} tokens of {text_name} "
        f"({found.windows} windows of {seq_len}, {found.tokens_per_second:.0f} tokens/s)"
    )


Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
ShardGigabytes = Annotated[float, typer.Option("--shard-gb", min=0.001, help="Largest size of a file, in gigabytes.")]


class OldFormat(str, Enum):
    marlin_24 = "marlin-24"
    gptq_marlin_24 = "gptq-marlin-24"


class ScaleOrder(str, Enum):
    auto = "auto"
    permuted = "permuted"
    plain = "plain"


@app.command("import")
@_one_line_errors
def import_(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder, .safetensors or .pt file of another format.")],
    out: Out,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="Of a dense model: what stays dense (name or re:PATTERN); default: lm_head."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--targets", help="Of a dense model: what alone is converted.")
    ] = None,
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    scales: Annotated[
        ScaleOrder, typer.Option("--scales", help="Order of marlin-24 scales, where the packers' rule does not hold.")
    ] = ScaleOrder.auto,
    shard_gb: ShardGigabytes = 5.0,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to this library's format: marlin-24 (all namings), 2:4 weights in compressed-tensors, GPTQ
    or dense files.

    --group-size and --num-bits are for dense weights; all others keep their own.
    """
    from .legacy import import_checkpoint
    from .replace import DEFAULT_IGNORE

    report = import_checkpoint(
        src,
        out,
        ignore=DEFAULT_IGNORE if ignore is None else ignore,
        targets=targets or (),
        group_size=group_size,
        num_bits=num_bits,
        permuted_scales=None if scales is ScaleOrder.auto else scales is ScaleOrder.permuted,
        device=_device(device) or "cpu",
        max_shard_bytes=int(shard_gb * 1e9),
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        _print_json({"source": src, "out": str(out), **report.to_dict()})
        return
    typer.echo(report.totals())
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"verified and written to {out}")


@app.command()
@_one_line_errors
def export(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Folder that sparse_marlin saved.")],
    out: Out,
    format: Annotated[OldFormat, typer.Option("--format", help="compressed-tensors' or GPTQ's naming and config.")],
    shard_gb: ShardGigabytes = 5.0,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write a saved model in the old format, byte for byte as its packers did."""
    from .legacy import export_checkpoint

    layers = export_checkpoint(
        src,
        out,
        format=format.value,
        device=_device(device) or "cpu",
        max_shard_bytes=int(shard_gb * 1e9),
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        _print_json({"source": src, "out": str(out), "format": format.value, "layers": layers})
    else:
        typer.echo(f"{len(layers)} layers written to {out} as {format.value}")


@app.command()
@_one_line_errors
def compress(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model directory, .gguf file or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the compressed model.")],
    calibration: Annotated[str, typer.Option(help="Text file, or name of a dataset.")],
    quality: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, alps or joint (best).")] = "joint",
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the low-rank correction of each layer; 0: none.")] = 0,
    ignore: Annotated[
        list[str] | None, typer.Option(help="What stays dense; may be repeated [default: lm_head].")
    ] = None,
    masks: Annotated[Path | None, typer.Option(help="A .safetensors file of fixed 2:4 masks.")] = None,
    keep_pattern: Annotated[bool, typer.Option("--keep-pattern", help="Keep the 2:4 pattern of the weights.")] = False,
    max_error: Annotated[float | None, typer.Option(help="Output error over which a layer is not compressed.")] = None,
    fallback: Annotated[str, typer.Option(help="What such a layer becomes: dense or int4 (rounded, dense).")] = "dense",
    num_sequences: Annotated[int | None, typer.Option(min=1, help="Default: 256, on a CPU 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Of calibration. Default: 2048, on a CPU 256.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the calibration sequences.")] = 0,
    damping: Annotated[float, typer.Option(help="Share of the Hessian's mean diagonal added to it.")] = 0.1,
    eval_text: Annotated[Path | None, typer.Option(help="Default: the last tenth of the calibration text.")] = None,
    eval_seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a perplexity window.")] = 512,
    eval_tokens: Annotated[int | None, typer.Option(min=2, help="Default: 65536, on a CPU 8192.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue at the end.")] = None,
    device: Device = None,
    dtype: Annotated[DType | None, typer.Option("--dtype", help="What is saved; default: as SRC, or bfloat16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Do not continue an interrupted run.")] = False,
    as_json: Json = False,
) -> None:
    """Compress a model to 2:4-sparse codes, calibrated on text, and say what it lost.

    Interrupted runs continue when called again; finished layers are kept in OUT.unfinished until then."""
    from .compress.command import PROMPT, CompressOptions, render, run_compress

    result = run_compress(
        CompressOptions(
            source=source,
            out=out,
            calibration=calibration,
            quality=quality,
            group_size=group_size,
            num_bits=num_bits,
            rank=rank,
            ignore=tuple(ignore) if ignore else ("lm_head",),
            masks=masks,
            keep_pattern=keep_pattern,
            max_error=max_error,
            fallback=fallback,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            damping=damping,
            device=_device(device),
            dtype=_dtype(dtype),
            eval_text=eval_text,
            eval_seq_len=eval_seq_len,
            eval_tokens=eval_tokens,
            prompt=PROMPT if prompt is None else prompt,
            overwrite=overwrite,
            restart=restart,
        ),
        say=_say,
        progress=True,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        typer.echo(render(result))


@app.command()
@_one_line_errors
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A .safetensors or .pt state dict, a .gguf file, a model directory or a hub name."
        ),
    ],
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    as_json: Json = False,
) -> None:
    """List the linear layers of a checkpoint: shape, 2:4 or not, what a conversion would do and save."""
    from .inspection import inspect_source, layers_to_json

    layers = inspect_source(path, group_size=group_size, num_bits=num_bits)
    if as_json:
        typer.echo(layers_to_json(path, layers))
        return
    table = Table(header_style="bold")
    for column, justify in (("layer", "left"), ("N x K", "left"), ("2:4", "left"), ("state", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("MB before", justify="right")
    table.add_column("MB after", justify="right")
    for layer in layers:
        state = "would be converted" if layer.convertible else f"stays {layer.state}: {layer.reason}"
        if layer.state not in ("dense", "packed", "unreadable"):
            state = f"{layer.state}: `sparse-marlin import` reads it" + (f"; {layer.reason}" if layer.reason else "")
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        if layer.state == "packed":
            state = f"packed: {layer.num_bits}-bit, group size {layer.group_size}, format {_core.FORMAT_VERSION}"
            shape = (
                f"{layer.shape[0]} x {layer.shape[1]}" if layer.exact else f"{layer.shape[0]} x up to {layer.shape[1]}"
            )
        known = "?" if layer.is_24 is None else "yes" if layer.is_24 else "no"
        table.add_row(
            layer.name, shape, known, state, f"{layer.bytes_before / 1e6:.3f}", f"{layer.bytes_after / 1e6:.3f}"
        )
    _console().print(table)
    before, after = (sum(getattr(layer, key) for layer in layers) / 1e6 for key in ("bytes_before", "bytes_after"))
    count = sum(layer.convertible for layer in layers)
    typer.echo(f"{count} of {len(layers)} linear layers would be converted: {before:.1f} MB -> {after:.1f} MB")


@app.command()
@_one_line_errors
def info(as_json: Json = False) -> None:
    """Versions, compiled architectures, and what this machine can run, with the reason where it cannot."""
    from . import info as collect

    found = collect()
    if as_json:
        _print_json(found.as_dict())
    else:
        typer.echo(str(found))


def main() -> None:
    """Entry point of `sparse-marlin` and `python -m sparse_marlin`."""
    try:
        app(prog_name="sparse-marlin")
    except KeyboardInterrupt:
        sys.exit(130)


def _load(
    path: str, sparse: bool, group_size: int, num_bits: int, device: str | None, dtype: DType | None
) -> tuple[Any, Any]:
    from .checkpoint import packed_layers
    from .model import load_model
    from .replace import replace_linears

    _say("Loading the model")
    loaded = load_model(path, device=_device(device), dtype=_dtype(dtype))
    packed = sum(1 for _ in packed_layers(loaded.model))
    if packed:
        if not sparse:
            raise ValueError(f"--dense: expected a dense model, got {path} with {packed} packed layers")
        _say(f"{packed} layers are packed already")
        return loaded, None
    report = None
    if sparse:
        report = replace_linears(loaded.model, group_size=group_size, num_bits=num_bits, progress=_is_first())
    if report is not None:
        _say(report.totals())
    return loaded, report


def _load_part(
    path: str, sparse: bool, group_size: int, num_bits: int, device: torch.device | None, dtype: DType | None
) -> tuple[Any, Any]:
    """`_load`, and under torchrun this rank's part of the model."""
    from .model import LoadedModel, is_packed, load_tokenizer
    from .parallel import rank_and_size, tensor_parallel

    if rank_and_size()[1] == 1:
        return _load(path, sparse, group_size, num_bits, None if device is None else str(device), dtype)
    if sparse and is_packed(path):
        from .sharded_loading import from_pretrained

        _say("Loading the model")
        model, parts = from_pretrained(path, device=device, dtype=_dtype(dtype))
        some: torch.Tensor = next(model.parameters())
        loaded, report = LoadedModel(path, model, load_tokenizer(path), some.dtype, some.device), None
    else:
        loaded, report = _load(path, sparse, group_size, num_bits, str(device), dtype)
        parts = tensor_parallel(loaded.model)
    _say(str(parts))
    return loaded, report


def _is_first() -> bool:
    """Whether this process prints: alone, or rank 0 of those that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("RANK", "0") == "0"


def _about(loaded: Any, report: Any) -> dict[str, Any]:
    from .checkpoint import packed_layers

    return {
        "model": loaded.name,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "sparse": report is not None or any(True for _ in packed_layers(loaded.model)),
        "conversion": None
        if report is None
        else {key: value for key, value in report.to_dict().items() if key != "layers"},
    }


def _device(value: str | None) -> torch.device | None:
    if value is None:
        return None
    device = torch.device(value)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected a device of this machine, got {value} ({torch.cuda.device_count()} GPUs found)"
        )
    return device


def _dtype(value: DType | None) -> torch.dtype | None:
    return None if value is None else getattr(torch, value.value)


def _console() -> Console:
    """Tables need room: a pipe or a file gets 140 columns, a terminal its own width."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _say(message: str) -> None:
    if _is_first():
        typer.echo(message, err=True)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
