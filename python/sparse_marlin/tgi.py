"""text-generation-inference's interface: a weights loader for 2:4-sparse checkpoints, whole or sharded.

    loader = sparse_marlin.tgi.SparseMarlinWeightsLoader.from_pretrained(folder)
    weights = Weights(filenames, device, dtype, process_group, weights_loader=loader)   # that project's own class
    linear = weights.get_multi_weights_col(["q_proj", "k_proj", "v_proj"], dim=0).get_linear(bias)

It reads both marlin-24 formats (`B_24`, `B_meta`, `s`, and `weight_packed`, `meta`, `scale_packed`), this library's own
(`weight_packed`, `scales`) and, for layers that stayed dense, `weight`. Of each file only the tiles that cover this
rank's part are read. Scales are converted once, from the dtype they are stored in to that of the weights, so bfloat16
models work. What the loader gives has `get_linear(bias)`; which rank passes a bias is the caller's business (column
layers: the rank's part; row layers: rank 0 alone).

Nothing of text-generation-inference is imported. Of its `Weights` object the loader uses `_get_slice`,
`get_filename`, `process_group`, `device` and `dtype`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import CONFIG_FILE, QUANT_METHOD, CheckpointConfig, LayerSpec
from .legacy import NAMES
from .linear import SparseMarlinLinear
from .parallel import dense_linear
from .slicing import PackedLayer, concat_out, owned
from .stored import Marlin24Layer, Open, OwnLayer, StoredLayer


@dataclass(frozen=True)
class SparseMarlinWeight:
    """A packed weight, or this rank's part of one; the layer computes in `dtype`."""

    packed: PackedLayer
    dtype: torch.dtype

    def get_linear(self, bias: torch.Tensor | None) -> SparseMarlinLinear:
        """The layer with this bias [N]; nothing of it is trainable."""
        return self.packed.to_linear(bias, self.dtype).requires_grad_(False).eval()


@dataclass(frozen=True)
class DenseWeight:
    """A weight [N, K] that stayed dense, or this rank's part of one."""

    weight: torch.Tensor

    def get_linear(self, bias: torch.Tensor | None) -> nn.Linear:
        bias = None if bias is None else bias.to(self.weight.dtype)
        return dense_linear(self.weight, bias).eval()


Weight = SparseMarlinWeight | DenseWeight


class SparseMarlinWeightsLoader:
    """Loads layers by prefix, as text-generation-inference's `WeightsLoader` does.

    `quantization_config` is that of config.json (or quantize_config.json). This library's own checkpoints need it, for
    the sizes of the layers; what the marlin-24 formats need is in their tensors.
    """

    def __init__(self, quantization_config: Mapping[str, Any] | None = None) -> None:
        config = dict(quantization_config or {})
        self.layers: Mapping[str, LayerSpec] = {}
        if config.get("quant_method") == QUANT_METHOD:
            self.layers = CheckpointConfig.from_dict(config).layers

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SparseMarlinWeightsLoader:
        """With the config of a checkpoint's folder."""
        for file in (CONFIG_FILE, "quantize_config.json"):
            path = Path(folder).expanduser() / file
            if not path.is_file():
                continue
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: expected JSON, got: {error}") from None
            config = found if file != CONFIG_FILE else found.get("quantization_config")
            if config:
                return cls(config)
        return cls()

    def get_weights(self, weights: Any, prefix: str) -> Weight:
        """The whole layer, on every rank."""
        stored = self._find(weights, prefix)
        return self._cut(weights, [stored], True, [(0, stored.size_n)])

    def get_weights_col(self, weights: Any, prefix: str) -> Weight:
        """This rank's share of the output features."""
        return self.get_multi_weights_col(weights, [prefix], 0)

    def get_multi_weights_col(self, weights: Any, prefixes: Sequence[str], dim: int) -> Weight:
        """This rank's share of the output features of each layer, one under the other (dim 0): q, k, v or gate, up."""
        if dim != 0:
            raise ValueError(f"get_multi_weights_col: dim: expected 0 (output features), got {dim}")
        stored = [self._find(weights, prefix) for prefix in prefixes]
        parts = [_share(each.name, "output features", each.size_n, weights) for each in stored]
        return self._cut(weights, stored, True, parts)

    def get_weights_col_packed(self, weights: Any, prefix: str, block_sizes: int | Sequence[int]) -> Weight:
        """This rank's share of every block of a layer that holds several: so many equal blocks, or blocks in these
        proportions (heads of q, k and v)."""
        stored = self._find(weights, prefix)
        parts = []
        for start, size in _blocks(stored.name, stored.size_n, block_sizes):
            first, last = _share(f"{stored.name}: block at {start}", "output features", size, weights)
            parts.append((start + first, start + last))
        return self._cut(weights, [stored] * len(parts), True, parts)

    def get_weights_row(self, weights: Any, prefix: str) -> Weight:
        """This rank's share of the input features. The caller sums the ranks' products."""
        stored = self._find(weights, prefix)
        return self._cut(weights, [stored], False, [_share(stored.name, "input features", stored.size_k, weights)])

    def _find(self, weights: Any, prefix: str) -> StoredLayer | _StoredDense:
        """How the layer is stored, by the names of its tensors."""
        open_tensor: Open = weights._get_slice
        for naming, keys in NAMES.items():
            if all(_has(weights, f"{prefix}.{key}") for key in keys):
                return Marlin24Layer.of(prefix, naming, open_tensor)
        if _has(weights, f"{prefix}.weight_packed") and _has(weights, f"{prefix}.scales"):
            # The name in the file: `Weights` knows prefixes and aliases.
            name = weights.get_filename(f"{prefix}.weight_packed")[1].removesuffix(".weight_packed")
            if name not in self.layers:
                raise ValueError(
                    f"{name}: expected the layer in the config's layers, got a quantization_config without it; "
                    "make the loader with SparseMarlinWeightsLoader.from_pretrained(folder)"
                )
            return OwnLayer(prefix, self.layers[name], open_tensor)
        if _has(weights, f"{prefix}.weight"):
            return _StoredDense(prefix, open_tensor)
        raise ValueError(
            f"{prefix}: expected tensors named {', or '.join(', '.join(keys) for keys in NAMES.values())}, or "
            "weight_packed, scales, or weight, got none of these; check the prefix"
        )

    def _cut(
        self,
        weights: Any,
        stored: Sequence[StoredLayer | _StoredDense],
        column: bool,
        parts: Sequence[tuple[int, int]],
    ) -> Weight:
        packed: list[PackedLayer] = []
        dense: list[torch.Tensor] = []
        for each, part in zip(stored, parts, strict=True):
            if isinstance(each, StoredLayer):
                packed.append(each.part(column, part, weights.device))
            else:
                dense.append(each.part(column, part))
        if packed and dense:
            raise ValueError(
                f"{', '.join(each.name for each in stored)}: expected all of them packed or all dense, got both; "
                "load them as layers of their own"
            )
        if packed:
            return SparseMarlinWeight(owned(concat_out(packed)), weights.dtype)
        return DenseWeight(torch.cat(dense).to(device=weights.device, dtype=weights.dtype))


class _StoredDense:
    """`{name}.weight` [N, K]."""

    def __init__(self, name: str, open_tensor: Open) -> None:
        self.name, self.open = name, open_tensor
        shape = list(open_tensor(f"{name}.weight").get_shape())
        if len(shape) != 2:
            raise ValueError(f"{name}.weight: expected [N, K], got {shape}")
        self.size_n, self.size_k = shape

    def part(self, column: bool, part: tuple[int, int]) -> torch.Tensor:
        stored = self.open(f"{self.name}.weight")
        return stored[part[0] : part[1]] if column else stored[:, part[0] : part[1]]


def _has(weights: Any, name: str) -> bool:
    try:
        weights.get_filename(name)
    except RuntimeError:  # what `Weights` says of a name it does not know
        return False
    return True


def _share(name: str, what: str, size: int, weights: Any) -> tuple[int, int]:
    """This rank's equal share, as that project's model code counts on it."""
    rank, world_size = weights.process_group.rank(), weights.process_group.size()
    if size % world_size:
        raise ValueError(
            f"{name}: {what}: expected a multiple of {world_size} (ranks), got {size}; use fewer ranks, or "
            "sparse_marlin.parallel, which shares out unevenly"
        )
    return rank * (size // world_size), (rank + 1) * (size // world_size)


def _blocks(name: str, size: int, block_sizes: int | Sequence[int]) -> list[tuple[int, int]]:
    """(start, size) of each block."""
    proportions = [1] * block_sizes if isinstance(block_sizes, int) else list(block_sizes)
    total = sum(proportions)
    if total < 1 or min(proportions) < 0 or size % total:
        raise ValueError(f"{name}: block_sizes: expected blocks that divide {size} output features, got {block_sizes}")
    blocks, start = [], 0
    for proportion in proportions:
        if proportion:
            blocks.append((start, size // total * proportion))
        start += size // total * proportion
    return blocks
