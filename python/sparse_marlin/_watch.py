"""A model that is run once to see which of its layers run, in which order, on what."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def check_module(caller: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected torch.nn.Module, got {type(model).__name__}")


def watch(
    caller: str, layers: Sequence[nn.Module], note: Callable[[Any, tuple[Any, ...]], None], run: Callable[[], object]
) -> None:
    """Calls `run` without gradients, and `note(layer, positional arguments)` before each of `layers` that it runs.

    Raises:
        ValueError: none of them ran.
        Whatever `run` raises. The layers are as they were in any case.
    """
    ran = False

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal ran
        ran = True
        note(layer, args)

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ValueError(
            f"{caller}: run: expected a call of the model that runs its SparseMarlinLinear layers, got one that "
            f"ran none of {len(layers)}; give a function such as lambda: model(tokens)"
        )
