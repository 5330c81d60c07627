"""The demo: one model, dense and with its linears replaced, side by side. `run_demo` measures, `render_demo` prints."""

from __future__ import annotations

import dataclasses
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ._version import __version__
from .evaluate import PERPLEXITY_PROTOCOL, Continuation, Perplexity, generate_greedy, perplexity
from .model import LoadedModel, load_model, read_text
from .replace import module_bytes, replace_linears
from .report import ConversionReport

# 576 input features (SmolLM2-135M) are nine groups of 64; at 128 the fifth group would be half empty and the error
# larger.
DEMO_GROUP_SIZE = 64
DEMO_PROMPT = "The capital of France is"
_MB = 1e6


@dataclass(frozen=True)
class DemoOptions:
    """What to measure. The defaults fit in a few minutes of two CPU cores."""

    source: str | None = None
    group_size: int = DEMO_GROUP_SIZE
    num_bits: int = 4
    text: Path | None = None
    prompt: str = DEMO_PROMPT
    seq_len: int = 512
    max_tokens: int | None = None  # None: 4096 on a CPU, 32768 on a GPU
    max_new_tokens: int = 48
    device: torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Side:
    """The measurements of one of the two models."""

    perplexity: Perplexity
    continuation: Continuation
    linear_bytes: int  # of the converted layers
    model_bytes: int


@dataclass(frozen=True)
class DemoResult:
    model: str
    device: str
    dtype: str
    text_name: str
    prompt: str
    dense: Side
    sparse: Side
    report: ConversionReport
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        def side(which: Side) -> dict[str, Any]:
            return {
                **dataclasses.asdict(which.perplexity),
                "eval_tokens_per_second": which.perplexity.tokens_per_second,
                "decode_tokens_per_second": which.continuation.decode_tokens_per_second,
                "continuation": which.continuation.text,
                "linear_bytes": which.linear_bytes,
                "model_bytes": which.model_bytes,
            }

        return {
            "version": __version__,
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "text": self.text_name,
            "protocol": PERPLEXITY_PROTOCOL,
            "prompt": self.prompt,
            "dense": side(self.dense),
            "sparse": side(self.sparse),
            "report": self.report.to_dict(),
            "seconds": self.seconds,
        }


def run_demo(options: DemoOptions, *, progress: bool = False) -> DemoResult:
    """Load the model, measure it dense, replace its linears in place, measure it again."""
    clock = _Stopwatch()
    text_name, text = read_text(options.text)
    loaded = load_model(options.source, device=options.device, dtype=options.dtype)
    clock.lap("load")
    dense_bytes = module_bytes(loaded.model)
    dense = _measure(loaded, text, options, "dense", progress)
    clock.lap("dense")
    report = replace_linears(loaded.model, group_size=options.group_size, num_bits=options.num_bits, progress=progress)
    clock.lap("convert")
    sparse = _measure(loaded, text, options, "sparse", progress)
    clock.lap("sparse")
    return DemoResult(
        model=loaded.name,
        device=device_name(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        text_name=text_name,
        prompt=options.prompt,
        dense=Side(*dense, linear_bytes=report.bytes_before, model_bytes=dense_bytes),
        sparse=Side(*sparse, linear_bytes=report.bytes_after, model_bytes=module_bytes(loaded.model)),
        report=report,
        seconds=clock.laps,
    )


def render_demo(result: DemoResult, console: Console, *, show_all: bool = False) -> None:
    """The side-by-side table, both continuations and the error table (by kind of layer, or every layer)."""
    dense, sparse = result.dense, result.sparse
    console.print(_comparison(result))
    measured = dense.perplexity
    console.print(
        f"perplexity of {measured.scored_tokens} tokens of {result.text_name}: {measured.windows} windows of "
        f"{measured.seq_len} tokens, each scored alone",
        style="dim",
        highlight=False,
    )
    panels = [
        Panel(Text(result.prompt, style="bold") + Text(side.continuation.text), title=name, title_align="left")
        for name, side in (("dense continues", dense), ("sparse continues", sparse))
    ]
    console.print(Group(*panels))
    render_report(result.report, console, show_all=show_all)
    console.print(_verdict(result), highlight=False)


def _comparison(result: DemoResult) -> Table:
    dense, sparse = result.dense, result.sparse
    title = f"{result.model} on {result.device}, {result.dtype}"
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column(f"sparse ({result.report.num_bits}-bit, group {result.report.group_size})", justify="right")
    table.add_column("sparse / dense", justify="right")

    def add(label: str, before: float | None, after: float | None, digits: int = 1) -> None:
        if before is None or after is None:  # fewer than two tokens have no speed
            table.add_row(label, "-", "-", "-")
        else:
            table.add_row(label, f"{before:,.{digits}f}", f"{after:,.{digits}f}", f"{after / before:.3g}x")

    add("perplexity", dense.perplexity.perplexity, sparse.perplexity.perplexity, 2)
    speeds = [side.continuation.decode_tokens_per_second for side in (dense, sparse)]
    add("generation, tokens/s", speeds[0], speeds[1])
    add("evaluation, tokens/s", dense.perplexity.tokens_per_second, sparse.perplexity.tokens_per_second)
    add("converted linears, MB", dense.linear_bytes / _MB, sparse.linear_bytes / _MB)
    add("whole model, MB", dense.model_bytes / _MB, sparse.model_bytes / _MB)
    return table


def render_report(report: ConversionReport, console: Console, *, show_all: bool = False, worst: int = 5) -> None:
    """Every layer, or a row for each kind of layer and the worst layers by name."""
    table = Table(title="Relative error of the weights, ||W - W^|| / ||W||", title_justify="left", header_style="bold")
    for column in ("layer", "N x K", "layers", "mean error", "max error", "MB before", "MB after"):
        table.add_column(column, justify="left" if column in ("layer", "N x K") else "right")
    if show_all:
        for layer in report:
            error = f"{layer.relative_error:.4f}" if layer.relative_error is not None else "-"
            name = layer.name if layer.converted else f"{layer.name} [dim](dense: {layer.reason})[/dim]"
            table.add_row(name, _shape(layer.shape), "1", error, error, *_mb(layer.bytes_before, layer.bytes_after))
    else:
        for kind in report.by_kind():
            errors = (f"{kind.mean_error:.4f}", f"{kind.max_error:.4f}")
            table.add_row(
                kind.kind, _shape(kind.shape), str(kind.count), *errors, *_mb(kind.bytes_before, kind.bytes_after)
            )
        for layer in report.worst(worst):
            error = f"{layer.relative_error:.4f}"
            name = f"worst: {layer.name}"
            table.add_row(
                name, _shape(layer.shape), "1", error, error, *_mb(layer.bytes_before, layer.bytes_after), style="dim"
            )
    console.print(table)
    console.print(report.totals(), highlight=False)
    if not show_all:
        for reason, count in report.reasons().items():
            console.print(
                f"left dense: {count} layer{'s' if count > 1 else ''}, {reason}", highlight=False, style="dim"
            )
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, style="yellow")


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the processor with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def _measure(
    loaded: LoadedModel, text: str, options: DemoOptions, name: str, progress: bool
) -> tuple[Perplexity, Continuation]:
    on_gpu = loaded.device.type == "cuda"
    max_tokens = options.max_tokens or (32768 if on_gpu else 4096)
    if on_gpu:  # the first calls load kernels and fill the allocator
        perplexity(loaded.model, loaded.tokenizer, text, seq_len=options.seq_len, max_tokens=options.seq_len)
    generate_greedy(loaded.model, loaded.tokenizer, options.prompt, max_new_tokens=2, stop_at_end=False)
    scored = perplexity(
        loaded.model,
        loaded.tokenizer,
        text,
        seq_len=options.seq_len,
        max_tokens=max_tokens,
        description=f"Perplexity, {name}",
        progress=progress,
    )
    continued = generate_greedy(
        loaded.model,
        loaded.tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        stop_at_end=False,
        description=f"Generating, {name}",
        progress=progress,
    )
    return scored, continued


def _verdict(result: DemoResult) -> str:
    dense, sparse = result.dense.perplexity.perplexity, result.sparse.perplexity.perplexity
    text = f"Perplexity went from {dense:,.1f} to {sparse:,.1f}. "
    if sparse > 1.5 * dense:
        text += (
            "Half of the weights were dropped by magnitude alone, without calibration or training, and a small model "
            "cannot take that: read the sparse text as a check that the kernels run, not as the quality that 2:4 "
            "models can reach. "
        )
    return (
        text
        + f"Total {sum(result.seconds.values()):.0f} s ("
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())
        + ")."
    )


class _Stopwatch:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _shape(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "various"


def _mb(before: int, after: int) -> tuple[str, str]:
    return f"{before / _MB:.2f}", f"{after / _MB:.2f}"
