"""Commands that read and write models: import, export, compress, inspect."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .._extension import _core
from .common import (
    Device,
    DType,
    GroupSize,
    Json,
    NumBits,
    app,
    console,
    one_line_errors,
    print_json,
    say,
    torch_device,
    torch_dtype,
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
@one_line_errors
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
    from ..legacy import import_checkpoint
    from ..replace import DEFAULT_IGNORE

    report = import_checkpoint(
        src,
        out,
        ignore=DEFAULT_IGNORE if ignore is None else ignore,
        targets=targets or (),
        group_size=group_size,
        num_bits=num_bits,
        permuted_scales=None if scales is ScaleOrder.auto else scales is ScaleOrder.permuted,
        device=torch_device(device) or "cpu",
        max_shard_bytes=int(shard_gb * 1e9),
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        print_json({"source": src, "out": str(out), **report.to_dict()})
        return
    typer.echo(report.totals())
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"verified and written to {out}")


@app.command()
@one_line_errors
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
    from ..legacy import export_checkpoint

    layers = export_checkpoint(
        src,
        out,
        format=format.value,
        device=torch_device(device) or "cpu",
        max_shard_bytes=int(shard_gb * 1e9),
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        print_json({"source": src, "out": str(out), "format": format.value, "layers": layers})
    else:
        typer.echo(f"{len(layers)} layers written to {out} as {format.value}")


@app.command()
@one_line_errors
def compress(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model directory, .gguf file or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the compressed model.")],
    calibration: Annotated[str, typer.Option(help="Text file, or name of a dataset.")],
    quality: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, alps or joint (best).")] = "joint",
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    rank: Annotated[
        int,
        typer.Option(
            min=0, help="Rank of the low-rank correction of each layer, fast where it is a multiple of 8; 0: none."
        ),
    ] = 0,
    shared_correction: Annotated[
        bool, typer.Option("--shared-correction", help="One first factor for linears that read the same input.")
    ] = False,
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
    from ..compress.command import PROMPT, CompressOptions, render, run_compress

    result = run_compress(
        CompressOptions(
            source=source,
            out=out,
            calibration=calibration,
            quality=quality,
            group_size=group_size,
            num_bits=num_bits,
            rank=rank,
            shared_correction=shared_correction,
            ignore=tuple(ignore) if ignore else ("lm_head",),
            masks=masks,
            keep_pattern=keep_pattern,
            max_error=max_error,
            fallback=fallback,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            damping=damping,
            device=torch_device(device),
            dtype=torch_dtype(dtype),
            eval_text=eval_text,
            eval_seq_len=eval_seq_len,
            eval_tokens=eval_tokens,
            prompt=PROMPT if prompt is None else prompt,
            overwrite=overwrite,
            restart=restart,
        ),
        say=say,
        progress=True,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(render(result))


@app.command()
@one_line_errors
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
    from ..inspection import inspect_source, layers_to_json

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
    console().print(table)
    before, after = (sum(getattr(layer, key) for layer in layers) / 1e6 for key in ("bytes_before", "bytes_after"))
    count = sum(layer.convertible for layer in layers)
    typer.echo(f"{count} of {len(layers)} linear layers would be converted: {before:.1f} MB -> {after:.1f} MB")
