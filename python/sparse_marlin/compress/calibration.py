"""Calibration sequences: token ids [S, L] from text, token tensors or a dataset, checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluate import encode
from ..model import existing_path, read_text

# What `compress` takes: a text file, a dataset name, texts, token ids [L] or [S, L], or a list of these.
Calibration = str | Path | torch.Tensor | Sequence[str] | Sequence[torch.Tensor]

DEFAULT_SEQUENCES = 256
WARN_BELOW = 128  # sequences; published results use 128 to 512


def calibration_tokens(
    calibration: Calibration,
    tokenizer: Any = None,
    *,
    seq_len: int,
    num_sequences: int = DEFAULT_SEQUENCES,
    seed: int = 0,
) -> torch.Tensor:
    """Token ids int64 [S, seq_len], S <= num_sequences.

    Texts are tokenized without special tokens, joined, and cut into windows of `seq_len`; where there are more than
    `num_sequences`, that many are drawn with `seed`. A tensor [S, L], or a list of tensors of one length, is taken as
    it is.

    Raises:
        ValueError: less than one sequence, or a file that cannot be read.

    Warns:
        UserWarning: fewer than 128 sequences.
    """
    if seq_len < 1 or num_sequences < 1:
        name, value = ("seq_len", seq_len) if seq_len < 1 else ("num_sequences", num_sequences)
        raise ValueError(f"compress: {name}: expected at least 1, got {value}")
    windows = _whole_sequences(calibration)
    if windows is None:
        windows = _cut(_stream(calibration, tokenizer), seq_len)
    if windows.shape[0] > num_sequences:
        order = torch.randperm(windows.shape[0], generator=torch.Generator().manual_seed(seed))
        windows = windows[order[:num_sequences].sort().values]
    if windows.shape[0] < WARN_BELOW:
        warnings.warn(
            f"compress: calibration: expected at least {WARN_BELOW} sequences for a good result, got "
            f"{windows.shape[0]} of {windows.shape[1]} tokens; give more text, or a shorter seq_len",
            UserWarning,
            stacklevel=3,
        )
    return windows.long().contiguous()


def _whole_sequences(calibration: Calibration) -> torch.Tensor | None:
    """Token tensors that are sequences already."""
    if isinstance(calibration, torch.Tensor) and calibration.dim() == 2:
        tokens = calibration
    elif (
        isinstance(calibration, Sequence)
        and not isinstance(calibration, str)
        and len(calibration) > 0
        and all(isinstance(item, torch.Tensor) for item in calibration)
    ):
        items = [item.reshape(-1) for item in calibration]  # type: ignore[union-attr]
        if len({len(item) for item in items}) > 1 or len(items) == 1:
            return None
        tokens = torch.stack(items)
    else:
        return None
    _check_ids(tokens)
    if tokens.numel() == 0:
        raise _too_short(0, tokens.shape[1])
    return tokens.cpu()


def _stream(calibration: Calibration, tokenizer: Any) -> torch.Tensor:
    """All of the calibration data as one run of token ids."""
    if isinstance(calibration, torch.Tensor):
        _check_ids(calibration)
        return calibration.reshape(-1).cpu()
    if isinstance(calibration, Path):
        texts: Iterable[Any] = [read_text(calibration)[1]]
    elif isinstance(calibration, str):
        # A text is hardly ever a single word or the name of a file.
        named = "\n" not in calibration and (" " not in calibration.strip() or os.path.exists(calibration))
        texts = calibration_texts(calibration) if named else [calibration]
    elif isinstance(calibration, Sequence):
        texts = calibration
    else:
        raise TypeError(
            "compress: calibration: expected a file, a text, token ids or a list of these, "
            f"got {type(calibration).__name__}"
        )
    parts = []
    for text in texts:
        if isinstance(text, torch.Tensor):
            _check_ids(text)
            parts.append(text.reshape(-1).cpu())
        elif isinstance(text, str):
            if tokenizer is None:
                raise ValueError("compress: tokenizer: expected one, since calibration is text, got None")
            parts.append(encode(tokenizer, text))
        else:
            raise TypeError(f"compress: calibration: expected texts or token ids, got {type(text).__name__}")
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def calibration_texts(name: str) -> list[str]:
    """The text of a file, or the texts of a dataset: a folder, a hub name, or "owner/name:configuration"."""
    path = existing_path(name)
    if path is not None and path.is_file():
        return [read_text(path)[1]]
    return _dataset_texts(name if path is None else str(path))


def _dataset_texts(name: str) -> list[str]:
    """The first text column of a dataset's training split: "owner/name" or "owner/name:configuration"."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name}: calibration: expected a text file, got no file of that name; for a dataset's name install "
            "'datasets'"
        ) from None
    path, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, configuration or None, split="train")
    except Exception as error:  # datasets raises many kinds; all mean the same to the user
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: calibration: expected a text file or a dataset's name, got: {why}") from error
    column = next((key for key in ("text", *loaded.column_names) if key in loaded.column_names), None)
    first = loaded[0][column] if column and len(loaded) else None
    if not isinstance(first, str):
        raise ValueError(f"{name}: calibration: expected a dataset with a column of text, got {loaded.column_names}")
    return [text for text in loaded[column] if text.strip()]


def _cut(stream: torch.Tensor, seq_len: int) -> torch.Tensor:
    count = stream.numel() // seq_len
    if count < 1:
        raise _too_short(stream.numel(), seq_len)
    return stream[: count * seq_len].view(count, seq_len)


def _too_short(tokens: int, seq_len: int) -> ValueError:
    return ValueError(
        f"compress: calibration: expected at least one sequence of {seq_len} tokens, got {tokens} tokens in all; "
        "give more text, or a shorter seq_len"
    )


def _check_ids(tokens: torch.Tensor) -> None:
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.is_complex():
        raise TypeError(f"compress: calibration: expected integer token ids, got {tokens.dtype}")
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"compress: calibration: expected token ids from 0, got {int(tokens.min())}")
