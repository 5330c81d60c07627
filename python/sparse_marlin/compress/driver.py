"""`compress`: settings and inputs checked, blocks compressed one after the other (`layerwise`), layers put in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .._progress import two_bars
from ..linear import SparseMarlinLinear
from ..quantize import SCALE_DTYPES, check_finite
from ..replace import DEFAULT_IGNORE, Replacement, Selection, install, select
from ..report import ConversionReport
from .blocks import Block, block_inputs, find_blocks
from .calibration import Calibration, calibration_tokens
from .layerwise import DEFAULT_DAMPING, FALLBACKS, BlockRun, Settings
from .masks import Masks, resolve_masks
from .solvers import DEFAULT_QUALITY, Solver, solver
from .state import Fingerprint, State

# Tokens of one forward, and sequences and their length where the caller does not say: what a GPU is filled with takes a
# CPU hours.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
_SEQUENCES = {"cpu": 128, "cuda": 256}
_SEQ_LEN = {"cpu": 256, "cuda": 2048}


def compress(
    model: nn.Module,
    calibration: Calibration,
    *,
    tokenizer: Any = None,
    quality: str | Solver = DEFAULT_QUALITY,
    group_size: int = 128,
    num_bits: int = 4,
    rank: int = 0,
    shared_correction: bool = False,
    ignore: str | Iterable[str] = DEFAULT_IGNORE,
    masks: Masks | None = None,
    max_error: float | None = None,
    fallback: str = "dense",
    num_sequences: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    damping: float = DEFAULT_DAMPING,
    scale_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Replace the linears of `model` in place by 2:4-sparse quantized ones that lose little on `calibration`.

    Args:
        calibration: a text file, a dataset's name, texts, or token ids: [S, L], or a list of [L].
        tokenizer: needed where `calibration` is text.
        quality: `magnitude`, `wanda`, `sparsegpt`, `alps` or `joint` (the default and the best), or a function from a
            `Problem` to a `Solution`.
        group_size: input features that share a scale: 32, 64, 128, 256, or -1 for a whole row.
        num_bits: 4 or 8.
        rank: of the low-rank correction that each layer adds, a multiple of 8 or better of 64; 0: none.
        shared_correction: linears that read the same input have one first factor of the correction, so that
            `merge_linears` can multiply them at once. It takes less of the error at the same rank (docs/ACCURACY.md).
        ignore: what stays dense, as in `replace_linears`.
        masks: fixed patterns: a mapping from names of linears to bool [N, K] (the linears that it does not name are
            free), or "nonzero" for a model whose weights are 2:4 already.
        max_error: a linear whose output error ||(W - W^) X|| / ||W X|| is larger is not converted. With `joint` W is
            what the layer aims at: the dense weight, moved so that it makes good what its inputs X lack.
        fallback: what such a linear becomes: "dense" leaves it as it is; "int4" rounds it to 4 bits without pruning,
            in a dense layer: no bytes are saved here, it shows what a dense INT4 kernel would give.
        num_sequences, seq_len: of the calibration; default 256 of 2048 tokens on a GPU, 128 of 256 on a CPU.
        seed: draws the sequences where there are more.
        damping: share of the mean diagonal of H that is added to it. The default was best on text of several kinds that
            was not calibrated on; the literature has 0.01 (docs/ACCURACY.md).
        scale_dtype: what scales and corrections are rounded to, for a model that will be saved in that dtype; default:
            the dtype of the weights.
        device: where the arithmetic runs, block by block; default: where the model is.
        state: folder for finished blocks; a call with the same inputs continues from them. It is left in place.
        progress: two bars and a line for each linear on stderr.

    Returns:
        The report; every linear of the model with its errors, or why it stayed dense.

    Raises:
        ValueError, TypeError: bad settings, a model without linears to convert or with compressed ones, too little
            calibration text, NaN or infinity in weights or activations (with the layer's name). The model is as it was.
    """
    settings = _settings(
        quality, group_size, num_bits, rank, shared_correction, max_error, fallback, scale_dtype, damping
    )
    selection = _select(model, ignore, settings)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    kind = "cpu" if place.type == "cpu" else "cuda"
    length = seq_len or min(_SEQ_LEN[kind], _longest(model))
    tokens = calibration_tokens(
        calibration, tokenizer, seq_len=length, num_sequences=num_sequences or _SEQUENCES[kind], seed=seed
    )
    _check_vocabulary(model, tokens)
    patterns = resolve_masks(masks, selection.chosen)
    for candidate in selection.chosen:
        check_finite(candidate.weight, candidate.name)
    blocks, made = find_blocks(model, selection.chosen)
    if not any(block.linears for block in blocks):
        name, reason = next(iter(made.items()))
        raise ValueError(f"compress: model: expected a linear to convert in its blocks, got {name}: {reason}")
    results: dict[str, Replacement | str] = dict(made)
    batches = list(tokens.split(max(1, _BATCH_TOKENS[kind] // tokens.shape[1])))
    run = BlockRun(settings, patterns, place, State(state))
    fingerprint = None
    if state is not None:
        fingerprint = Fingerprint({**_described(settings), "masks": sorted(patterns)})
        fingerprint.add([("tokens", tokens), *((f"mask {name}", mask) for name, mask in sorted(patterns.items()))])
        fingerprint.add(_outside(model, blocks))
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        hidden, calls = block_inputs(model, blocks, batches)
        hidden = run.store(hidden)
        dense = list(hidden)
        # Nothing needs the hidden states after the last block that is compressed.
        count = 1 + max(index for index, block in enumerate(blocks) if block.linears)
        with two_bars("Blocks", count, progress) as bars:
            for index, block in enumerate(blocks[:count]):
                mark = ""
                if fingerprint is not None:
                    mark = fingerprint.add((f"{block.name}.{name}", t) for name, t in block.module.state_dict().items())
                last = index == count - 1
                results.update(run.block(index, block, hidden, dense, calls[index], mark, bars, propagate=not last))
                calls[index] = []
                bars.outer()
    finally:
        for module in was_training:
            module.training = True
    for candidate in selection.chosen:
        new = results[candidate.name]
        if isinstance(new, Replacement):
            new.layer.train(candidate.module.training)
    return install(model, selection, results, method=settings.method)


def _settings(
    quality: str | Solver,
    group_size: int,
    num_bits: int,
    rank: int,
    shared_correction: bool,
    max_error: float | None,
    fallback: str,
    scale_dtype: torch.dtype | None,
    damping: float,
) -> Settings:
    if not 0 < damping < 10:
        raise ValueError(f"compress: damping: expected a share between 0 and 10, got {damping}")
    if scale_dtype is not None and scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"compress: scale_dtype: expected float32, float16 or bfloat16, got {scale_dtype}")
    if fallback not in FALLBACKS:
        raise ValueError(f"compress: fallback: expected one of {', '.join(FALLBACKS)}, got {fallback!r}")
    if rank < 0:
        raise ValueError(f"compress: rank: expected 0 (no correction) or more, got {rank}")
    if shared_correction and not rank:
        raise ValueError("compress: shared_correction: expected a rank > 0 of the correction to share, got rank=0")
    if max_error is not None and not max_error > 0:
        raise ValueError(f"compress: max_error: expected a number > 0, got {max_error}")
    name = quality if isinstance(quality, str) else getattr(quality, "__name__", type(quality).__name__)
    solve = solver(quality) if isinstance(quality, str) else quality
    return Settings(
        name, solve, group_size, num_bits, rank, shared_correction, max_error, fallback, scale_dtype, damping
    )


def _select(model: nn.Module, ignore: str | Iterable[str], settings: Settings) -> Selection:
    if isinstance(model, nn.Module):
        packed = [name for name, module in model.named_modules() if isinstance(module, SparseMarlinLinear)]
        if packed:
            raise ValueError(
                f"compress: model: expected a dense model, got one that is compressed already ({packed[0]}"
                f"{f' and {len(packed) - 1} more' if len(packed) > 1 else ''}); start from the dense checkpoint"
            )
    return select(model, ignore, group_size=settings.group_size, num_bits=settings.num_bits, caller="compress")


def _longest(model: nn.Module) -> int:
    """Tokens that the model has positions for."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return int(longest) if isinstance(longest, int) and longest > 0 else max(_SEQ_LEN.values())


def _check_vocabulary(model: nn.Module, tokens: torch.Tensor) -> None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int) and int(tokens.max()) >= size:
        raise ValueError(
            f"compress: calibration: expected token ids below {size} (the model's vocabulary), got {int(tokens.max())};"
            " is this the model's tokenizer?"
        )


def _outside(model: nn.Module, blocks: Sequence[Block]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that are in no block: embeddings, norms, the head."""
    if blocks[0].module is model:
        return
    prefixes = tuple(f"{block.name}." for block in blocks)
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefixes):
            yield name, tensor


def _described(settings: Settings) -> dict[str, Any]:
    """The settings that results follow from, as plain values."""
    return {
        "quality": settings.quality,
        "group_size": settings.group_size,
        "num_bits": settings.num_bits,
        "rank": settings.rank,
        "shared_correction": settings.shared_correction,
        "max_error": settings.max_error,
        "fallback": settings.fallback,
        "scale_dtype": str(settings.scale_dtype),
        "damping": settings.damping,
        "follow": settings.follow,
    }
