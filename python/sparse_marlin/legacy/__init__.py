"""Checkpoints of the formats that came before: import, export, and the names that other code calls."""

from .compat import gptq_marlin_24_gemm, marlin_24_gemm, marlin_24_quantize, marlin_24_workspace
from .convert import export_checkpoint, import_checkpoint
from .formats import open_source
from .layouts import (
    COMPRESSED_TENSORS,
    GPTQ,
    NAMES,
    ORIGINAL,
    PackedLayer,
    export_marlin_24,
    from_marlin_24,
    import_marlin_24,
    naming_of,
    permute_scales,
    scales_are_permuted,
    unpermute_scales,
)

__all__ = [
    "COMPRESSED_TENSORS",
    "GPTQ",
    "NAMES",
    "ORIGINAL",
    "PackedLayer",
    "export_checkpoint",
    "export_marlin_24",
    "from_marlin_24",
    "gptq_marlin_24_gemm",
    "import_checkpoint",
    "import_marlin_24",
    "marlin_24_gemm",
    "marlin_24_quantize",
    "marlin_24_workspace",
    "naming_of",
    "open_source",
    "permute_scales",
    "scales_are_permuted",
    "unpermute_scales",
]
