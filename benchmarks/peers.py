"""Other people's multiplications that the benchmarks time beside ours: y = a W^T, W of random values in their format.

A peer is built for one weight, prepared for one number of tokens, compared with what it ought to compute, and then
timed like ours. What it cannot do it says by UnsupportedError; the benchmark goes on without it.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from peer_base import Peer, Weight
from peers_marlin import Marlin, SparseMarlin
from peers_torch import CuSparseLt, Fp8, TorchInt4, prune_24
from summary import PEERS
from timing import Recorder

from sparse_marlin import _core

LIBRARY_PEERS: dict[str, type[Marlin]] = {"sparse-marlin": SparseMarlin, "marlin": Marlin}
TORCH_PEERS = tuple(name for name in PEERS if name not in LIBRARY_PEERS)


@dataclass(frozen=True)
class Setting:
    dtype: str
    num_bits: int
    group_size: int
    compute_capability: int


def why_not(name: str, setting: Setting) -> str | None:
    """Why a peer has no kernel for what is measured, whatever the shape; None where it has."""
    if setting.compute_capability < 80:
        return "needs compute capability 8.0"
    if name == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    if name == "fp8" and setting.compute_capability < 89:
        return "fp8 needs compute capability 8.9"
    if name in ("torch-int4", "sparse-marlin", "marlin") and setting.num_bits != 4:
        return "4-bit weights only"
    if name == "torch-int4" and setting.dtype != "bfloat16":
        return "bfloat16 only"
    if name == "torch-int4" and setting.group_size not in (32, 64, 128, 256):
        return "groups of 32, 64, 128 or 256 only"
    if name in ("sparse-marlin", "marlin") and setting.dtype != "float16":
        return "float16 only"
    if name in ("sparse-marlin", "marlin") and setting.group_size not in (128, _core.CHANNELWISE):
        return "groups of 128 or whole rows only"
    return None


def load_library(name: str, path: Path) -> ctypes.CDLL:
    """Raises ValueError where it is not the library with that peer's kernel."""
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library[LIBRARY_PEERS[name].SYMBOL]
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"--{name}: expected a shared library with the {PEERS[name]} kernel, got {path}: {error}"
        ) from None
    return library


def build(name: str, weight: Weight, recorder: Recorder, search_s: float, library: ctypes.CDLL | None) -> Peer:
    if name == "cusparselt":
        return CuSparseLt(prune_24(weight.dense.clone()), recorder, search_s)
    if name == "torch-int4":
        return TorchInt4(weight)
    if name == "fp8":
        return Fp8(weight)
    assert library is not None
    return LIBRARY_PEERS[name](weight, library)
