"""What the commands share: the application, options with their checks, errors in one line, output."""

from __future__ import annotations

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

from .._extension import _core
from .._version import __version__

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


def one_line_errors(command: Command) -> Command:
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


def is_first() -> bool:
    """Whether this process prints: alone, or rank 0 of those that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("RANK", "0") == "0"


def torch_device(value: str | None) -> torch.device | None:
    if value is None:
        return None
    device = torch.device(value)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected a device of this machine, got {value} ({torch.cuda.device_count()} GPUs found)"
        )
    return device


def torch_dtype(value: DType | None) -> torch.dtype | None:
    return None if value is None else getattr(torch, value.value)


def console() -> Console:
    """Tables need room: a pipe or a file gets 140 columns, a terminal its own width."""
    return Console(width=None if sys.stdout.isatty() else 140)


def say(message: str) -> None:
    if is_first():
        typer.echo(message, err=True)


def print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
