"""Loads the two extensions, or says with versions why they do not load."""

from pathlib import Path

import torch

from ._version import __version__

_FOLDER = Path(__file__).parent
_REMEDY = "build it with `make dev`, or `pip install --no-build-isolation .` in the environment of this torch"


def _versions() -> str:
    return f"sparse_marlin {__version__}, torch {torch.__version__}"


def load() -> str:
    """Register the operators with torch; returns the library's path."""
    found = sorted(_FOLDER.glob("_C*.so"))
    if not found:
        raise ImportError(
            f"sparse_marlin: _C: expected the compiled operators in {_FOLDER}, got none ({_versions()}); {_REMEDY}"
        )
    path = str(found[0])
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"sparse_marlin: _C: expected {path} to load, got: {error} "
            f"({_versions()}; torch >= 2.10 is needed); {_REMEDY}"
        ) from error
    return path


LIBRARY = load()

try:
    from . import _core
except ImportError as error:
    raise ImportError(
        f"sparse_marlin: _core: expected the compiled core for this Python in {_FOLDER}, got: {error} "
        f"({_versions()}); {_REMEDY}"
    ) from error

__all__ = ["LIBRARY", "_core"]
