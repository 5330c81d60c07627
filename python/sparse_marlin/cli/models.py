"""Commands that run models: demo, generate, eval; bench and info about this machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from ..demo import device_name
from .common import (
    Device,
    DType,
    Dtype,
    GroupSize,
    Json,
    NumBits,
    SeqLen,
    Source,
    Sparse,
    TextFile,
    app,
    console,
    is_first,
    one_line_errors,
    print_json,
    say,
    torch_device,
    torch_dtype,
)


@app.command()
@one_line_errors
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
    from ..demo import DEMO_PROMPT, DemoOptions, render_demo, run_demo

    options = DemoOptions(
        source=model,
        group_size=group_size,
        num_bits=num_bits,
        text=text,
        prompt=DEMO_PROMPT if prompt is None else prompt,
        seq_len=seq_len,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        device=torch_device(device),
        dtype=torch_dtype(dtype),
    )
    say("Loading the model")
    result = run_demo(options, progress=True)
    if as_json:
        print_json(result.to_dict())
    else:
        render_demo(result, console(), show_all=show_all)


@app.command()
@one_line_errors
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
    from ..evaluate import generate_greedy
    from ..parallel import torchrun_group

    with torchrun_group(torch_device(device)) as place:
        loaded, report = _load_part(path, sparse, group_size, num_bits, place, dtype)
        made = generate_greedy(
            loaded.model, loaded.tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, progress=is_first()
        )
    if not is_first():
        return
    if as_json:
        print_json({**_about(loaded, report), "prompt": prompt, **dataclasses.asdict(made)})
        return
    typer.echo(made.text if chat else prompt + made.text)
    if made.decode_tokens_per_second:
        say(f"{len(made.tokens)} tokens, {made.decode_tokens_per_second:.1f} tokens/s")


@app.command("eval")
@one_line_errors
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
    from ..evaluate import PERPLEXITY_PROTOCOL, perplexity
    from ..model import read_text

    text_name, content = read_text(text)
    loaded, report = _load(path, sparse, group_size, num_bits, device, dtype)
    found = perplexity(loaded.model, loaded.tokenizer, content, seq_len=seq_len, max_tokens=max_tokens, progress=True)
    if as_json:
        about = {**_about(loaded, report), "text": text_name, "protocol": PERPLEXITY_PROTOCOL}
        print_json({**about, **dataclasses.asdict(found)})
        return
    typer.echo(
        f"perplexity {found.perplexity:.4f} of {found.scored_tokens} tokens of {text_name} "
        f"({found.windows} windows of {seq_len}, {found.tokens_per_second:.0f} tokens/s)"
    )


@app.command()
@one_line_errors
def bench(
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", metavar="K,N", help="In and out features; may be repeated.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="May be repeated.")] = None,
    group_size: GroupSize = 128,
    num_bits: NumBits = 4,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Time the multiplication on this machine, beside torch's own linear."""
    from ..bench import DEFAULT_SHAPES, DEFAULT_TOKENS, run_bench
    from ..model import default_device, default_dtype

    where = torch_device(device) or default_device()
    found = run_bench(
        [_shape(text) for text in shapes] if shapes else DEFAULT_SHAPES,
        tokens or DEFAULT_TOKENS,
        group_size=group_size,
        num_bits=num_bits,
        device=where,
        dtype=torch_dtype(dtype) or default_dtype(where),
        progress=True,
    )
    if as_json:
        print_json({"device": device_name(where), "measured": [each.to_dict() for each in found]})
        return
    table = Table(title=f"{device_name(where)}, {num_bits} bits, group size {group_size}", header_style="bold")
    for column in ("K", "N", "tokens", "torch us", "sparse us", "x", "MB", "sparse MB"):
        table.add_column(column, justify="right")
    for each in found:
        table.add_row(
            str(each.in_features), str(each.out_features), str(each.tokens), f"{each.dense_us:.1f}",
            f"{each.sparse_us:.1f}", f"{each.speedup:.2f}", f"{each.dense_bytes / 1e6:.1f}",
            f"{each.sparse_bytes / 1e6:.1f}",
        )  # fmt: skip
    console().print(table)


def _shape(text: str) -> tuple[int, int]:
    try:
        k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--shape: expected two numbers such as 4096,14336, got {text}") from None
    return k, n


@app.command()
@one_line_errors
def info(as_json: Json = False) -> None:
    """Versions, compiled architectures, and what this machine can run, with the reason where it cannot."""
    from .. import info as collect

    found = collect()
    if as_json:
        print_json(found.as_dict())
    else:
        typer.echo(str(found))


def _load(
    path: str, sparse: bool, group_size: int, num_bits: int, device: str | None, dtype: DType | None
) -> tuple[Any, Any]:
    from ..checkpoint import packed_layers
    from ..model import load_model
    from ..replace import replace_linears

    say("Loading the model")
    loaded = load_model(path, device=torch_device(device), dtype=torch_dtype(dtype))
    packed = sum(1 for _ in packed_layers(loaded.model))
    if packed:
        if not sparse:
            raise ValueError(f"--dense: expected a dense model, got {path} with {packed} packed layers")
        say(f"{packed} layers are packed already")
        return loaded, None
    report = None
    if sparse:
        report = replace_linears(loaded.model, group_size=group_size, num_bits=num_bits, progress=is_first())
    if report is not None:
        say(report.totals())
    return loaded, report


def _load_part(
    path: str, sparse: bool, group_size: int, num_bits: int, device: torch.device | None, dtype: DType | None
) -> tuple[Any, Any]:
    """`_load`, and under torchrun this rank's part of the model."""
    from ..model import LoadedModel, is_packed, load_tokenizer
    from ..parallel import rank_and_size, tensor_parallel

    if rank_and_size()[1] == 1:
        return _load(path, sparse, group_size, num_bits, None if device is None else str(device), dtype)
    if sparse and is_packed(path):
        from ..sharded_loading import from_pretrained

        say("Loading the model")
        model, parts = from_pretrained(path, device=device, dtype=torch_dtype(dtype))
        some: torch.Tensor = next(model.parameters())
        loaded, report = LoadedModel(path, model, load_tokenizer(path), some.dtype, some.device), None
    else:
        loaded, report = _load(path, sparse, group_size, num_bits, str(device), dtype)
        parts = tensor_parallel(loaded.model)
    say(str(parts))
    return loaded, report


def _about(loaded: Any, report: Any) -> dict[str, Any]:
    from ..checkpoint import packed_layers

    return {
        "model": loaded.name,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "sparse": report is not None or any(True for _ in packed_layers(loaded.model)),
        "conversion": None
        if report is None
        else {key: value for key, value in report.to_dict().items() if key != "layers"},
    }
