"""Fixed 2:4 patterns: from outside (fine-tuned or learnt ones), or those that the weights have already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..quantize import KEPT_PER_QUAD, QUAD
from ..replace import Candidate

NONZERO = "nonzero"
Masks = str | Mapping[str, torch.Tensor]


def resolve_masks(masks: Masks | None, chosen: Sequence[Candidate]) -> dict[str, torch.Tensor]:
    """Mask bool [N, K] by name of the linear. Names may end in ".weight".

    Raises:
        ValueError: a name without a linear, a wrong shape, a pattern that keeps more than two of four (with its place).
    """
    if masks is None:
        return {}
    if isinstance(masks, str):
        if masks != NONZERO:
            raise ValueError(f"compress: masks: expected a mapping or '{NONZERO}', got {masks!r}")
        return {c.name: _checked(c, c.weight != 0, "weight") for c in chosen}
    by_name = {candidate.name: candidate for candidate in chosen}
    found = {}
    for key, mask in masks.items():
        name = key.removesuffix(".weight")
        if name not in by_name:
            raise ValueError(f"compress: masks: expected names of linears that are converted, got '{key}'")
        if tuple(mask.shape) != by_name[name].shape:
            raise ValueError(
                f"{name}: mask: expected {list(by_name[name].shape)}, the shape of the weight, got {list(mask.shape)}"
            )
        found[name] = _checked(by_name[name], mask != 0, "mask")
    return found


def _checked(candidate: Candidate, mask: torch.Tensor, what: str) -> torch.Tensor:
    counts = mask.unflatten(1, (-1, QUAD)).sum(-1)
    bad = counts > KEPT_PER_QUAD
    if bool(bad.any()):
        row, quad = divmod(int(torch.argmax(bad.flatten().to(torch.int8))), counts.shape[1])
        raise ValueError(
            f"{candidate.name}: {what}: expected at most {KEPT_PER_QUAD} non-zero of every {QUAD}, "
            f"got {int(counts[row, quad])} at row {row}, columns {QUAD * quad} to {QUAD * quad + QUAD - 1}; "
            "leave masks out to have a pattern chosen"
        )
    return mask.cpu()
