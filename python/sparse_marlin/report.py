"""ConversionReport: what a conversion did to every linear layer of a model, as a table, a dictionary or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_MB = 1e6
_TEXT_COLUMNS = 3


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: converted, or left dense for `reason`."""

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    converted: bool
    reason: str | None  # None where converted
    relative_error: float | None  # ||W - W^||_F / ||W||_F of a converted layer
    bytes_before: int
    bytes_after: int
    # ||(W - W^) X||_F / ||W X||_F on the calibration tokens, low-rank correction included; None without calibration
    output_error: float | None = None

    @property
    def kind(self) -> str:
        """Last component of the name: layers of one kind play the same role in every block."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class KindSummary:
    """All converted layers of one kind, or all that stayed dense for one reason."""

    kind: str
    shape: tuple[int, int] | None  # None where the shapes differ
    count: int
    mean_error: float | None
    max_error: float | None
    bytes_before: int
    bytes_after: int


@dataclass
class ConversionReport:
    """Every linear of a model in the order of its modules. `str()` is an aligned table, `summary()` the same by
    kind."""

    layers: list[LayerReport]
    group_size: int
    num_bits: int
    method: str
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def converted(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.converted]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.converted]

    @property
    def bytes_before(self) -> int:
        """Bytes of the converted layers, before."""
        return sum(layer.bytes_before for layer in self.converted)

    @property
    def bytes_after(self) -> int:
        """Bytes of the converted layers, after: codes with their padding, scales and biases."""
        return sum(layer.bytes_after for layer in self.converted)

    @property
    def mean_error(self) -> float:
        errors = [layer.relative_error for layer in self.converted if layer.relative_error is not None]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def mean_output_error(self) -> float | None:
        """Mean error of the outputs of the converted layers; None without calibration."""
        errors = [layer.output_error for layer in self.converted if layer.output_error is not None]
        return sum(errors) / len(errors) if errors else None

    def worst(self, count: int) -> list[LayerReport]:
        """The converted layers with the largest error, largest first: of the outputs where calibration measured it,
        else of the weights."""
        return sorted(self.converted, key=lambda layer: -(layer.output_error or layer.relative_error or 0.0))[:count]

    def by_kind(self) -> list[KindSummary]:
        """Converted layers grouped by the last component of their name, in the order of first appearance."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.converted:
            kinds.setdefault(layer.kind, []).append(layer)
        rows = []
        for kind, layers in kinds.items():
            errors = [layer.relative_error or 0.0 for layer in layers]
            shapes = {layer.shape for layer in layers}
            rows.append(
                KindSummary(
                    kind=kind,
                    shape=shapes.pop() if len(shapes) == 1 else None,
                    count=len(layers),
                    mean_error=sum(errors) / len(errors),
                    max_error=max(errors),
                    bytes_before=sum(layer.bytes_before for layer in layers),
                    bytes_after=sum(layer.bytes_after for layer in layers),
                )
            )
        return rows

    def reasons(self) -> dict[str, int]:
        """Why layers stayed dense, with the number of layers, most frequent first."""
        return dict(Counter(layer.reason or "" for layer in self.skipped).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, the same keys in every version."""
        return {
            "method": self.method,
            "group_size": self.group_size,
            "num_bits": self.num_bits,
            "num_converted": len(self.converted),
            "num_dense": len(self.skipped),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "mean_relative_error": self.mean_error,
            "mean_output_error": self.mean_output_error,
            "notes": list(self.notes),
            "layers": [{**dataclasses.asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def totals(self) -> str:
        """One sentence: how many layers, how many bytes, the mean error."""
        ratio = self.bytes_before / self.bytes_after if self.bytes_after else 0.0
        return (
            f"{len(self.converted)} of {len(self.layers)} linear layers converted ({self.method}, {self.num_bits}-bit, "
            f"group size {self.group_size}): {self.bytes_before / _MB:.1f} MB -> {self.bytes_after / _MB:.1f} MB "
            f"({ratio:.2f}x smaller), mean relative error {self.mean_error:.4f}"
            + ("" if self.mean_output_error is None else f", of the outputs {self.mean_output_error:.4f}")
        )

    def __str__(self) -> str:
        header = ("layer", "N x K", "state", "rel. error", "output error", "MB before", "MB after")
        rows = [header, *(_row(layer) for layer in self.layers)]
        if self.mean_output_error is None:
            rows = [(*row[:4], *row[5:]) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [_aligned(row, widths) for row in rows]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([*lines, "", self.totals(), *(f"note: {note}" for note in self.notes)])


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]} x {layer.shape[1]}",
        "converted" if layer.converted else f"dense: {layer.reason}",
        "" if layer.relative_error is None else f"{layer.relative_error:.4f}",
        "" if layer.output_error is None else f"{layer.output_error:.4f}",
        f"{layer.bytes_before / _MB:.3f}",
        f"{layer.bytes_after / _MB:.3f}",
    )


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Text columns (the first three) to the left, numbers to the right."""
    cells = [
        cell.rjust(width) if column >= _TEXT_COLUMNS else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
