"""FP16/BF16 activations times INT4/INT8 weights with 2:4 sparsity, on CUDA and on the CPU.

`import sparse_marlin` registers the operators under `torch.ops.sparse_marlin`; `__all__` is the public API.
"""

# The operators are loaded first: the modules below use them.
from . import _extension, _hf_hook, legacy, parallel, sharded_loading, tgi  # noqa: F401
from ._version import __version__
from .checkpoint import from_pretrained, load_checkpoint, save_checkpoint
from .compress import compress
from .info import info
from .linear import SparseMarlinLinear
from .merge import merge_linears, unmerge_linears
from .ops import pack_24_weights, sparse_marlin_gemm, unpack_24_weights
from .prefetch import disable_prefetch, enable_prefetch
from .replace import replace_linears
from .report import ConversionReport

_hf_hook.install()

__all__ = [
    "ConversionReport",
    "SparseMarlinLinear",
    "__version__",
    "compress",
    "disable_prefetch",
    "enable_prefetch",
    "from_pretrained",
    "info",
    "legacy",
    "load_checkpoint",
    "merge_linears",
    "pack_24_weights",
    "parallel",
    "replace_linears",
    "save_checkpoint",
    "sharded_loading",
    "sparse_marlin_gemm",
    "tgi",
    "unmerge_linears",
    "unpack_24_weights",
]
