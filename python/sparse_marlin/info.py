"""What this installation is made of and what this machine can run, with the reason where it cannot."""

import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ._extension import _core
from ._version import __version__


@dataclass(frozen=True)
class GpuInfo:
    index: int
    name: str
    compute_capability: str
    runs: bool
    reason: str  # why not; empty where it runs
    code: str  # the compiled code it uses, e.g. "sm_90a" or "compute_80 (PTX)"


@dataclass(frozen=True)
class Info:
    version: str
    format: str
    python: str
    torch: str
    torch_cuda: str | None
    built_cuda: str | None  # None: a build without CUDA
    architectures: tuple[str, ...]
    cpu_isa: str
    cpu_threads: int
    gpus: tuple[GpuInfo, ...] = field(default_factory=tuple)
    gpu_note: str = ""  # why no GPU is listed

    def as_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        built = f"CUDA {self.built_cuda}, {', '.join(self.architectures)}" if self.built_cuda else "CPU only"
        lines = [
            f"sparse_marlin  {self.version} ({built})",
            f"format         {self.format}",
            f"torch          {self.torch} (CUDA {self.torch_cuda or 'none'})",
            f"python         {self.python}",
            f"CPU            {self.cpu_isa}, {self.cpu_threads} threads",
        ]
        for gpu in self.gpus:
            verdict = f"runs {gpu.code}" if gpu.runs else f"cannot run: {gpu.reason}"
            lines.append(f"GPU {gpu.index}          {gpu.name}, compute capability {gpu.compute_capability}: {verdict}")
        if not self.gpus:
            lines.append(f"GPU            none: {self.gpu_note}")
        return "\n".join(lines)


def planner_device(index: int = 0) -> _core.Device:
    """CUDA device `index` as the planner sees it."""
    found: Any = torch.cuda.get_device_properties(index)  # its type stub lacks members, which ones varies with torch
    return _core.Device(
        compute_capability=10 * found.major + found.minor,
        num_sms=found.multi_processor_count,
        smem_per_block=found.shared_memory_per_block_optin,
        smem_per_sm=found.shared_memory_per_multiprocessor,
        l2_bytes=found.L2_cache_size,
        # kHz and bits; two transfers a clock
        dram_gb_per_s=2e-6 * getattr(found, "memory_clock_rate", 0) * getattr(found, "memory_bus_width", 0) / 8,
        hopper_kernels="sm_90a" in _core.BUILT_ARCHITECTURES.split(","),
    )


def compiled_code_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> str:
    """Which of the compiled architectures a GPU loads: native code first, then PTX; "" where there is none.

    Native code runs on the same major version from its own minor upward; an "a" variant on exactly its own; PTX on all
    later ones.
    """
    number = 10 * capability[0] + capability[1]
    exact = f"sm_{number}a"
    if exact in architectures:
        return exact
    plain = [name.split("_") for name in architectures if name.split("_")[1].isdigit()]
    native = [int(n) for kind, n in plain if kind == "sm" and int(n) // 10 == capability[0] and int(n) <= number]
    if native:
        return f"sm_{max(native)}"
    ptx = [int(n) for kind, n in plain if kind == "compute" and int(n) <= number]
    return f"compute_{max(ptx)} (PTX)" if ptx else ""


def _gpu(index: int, architectures: tuple[str, ...]) -> GpuInfo:
    found = torch.cuda.get_device_properties(index)
    reason = _core.why_unsupported(_core.Problem(m=1, n=1, k=_core.COL_MULTIPLE), planner_device(index))
    code = compiled_code_for((found.major, found.minor), architectures)
    if not reason and not architectures:
        reason = "this build has no CUDA code; rebuild where nvcc and a CUDA build of torch are installed"
    elif not reason and not code:
        reason = f"no code for it was compiled; rebuild with TORCH_CUDA_ARCH_LIST={found.major}.{found.minor}"
    return GpuInfo(index, found.name, f"{found.major}.{found.minor}", not reason, reason, code)


def info() -> Info:
    """Versions, the architectures compiled in, the CPU's instruction set, and every GPU: can it run, and why not.

    `print(sparse_marlin.info())` is the text to attach to a bug report.
    """
    architectures = tuple(name for name in _core.BUILT_ARCHITECTURES.split(",") if name)
    note = ""
    if torch.version.cuda is None:
        note = "the installed torch has no CUDA"
    elif not torch.cuda.is_available():
        note = "torch finds no usable CUDA device or driver"
    return Info(
        version=__version__,
        format=f"{_core.FORMAT_NAME} version {_core.FORMAT_VERSION}",
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        built_cuda=_core.BUILT_CUDA_VERSION or None,
        architectures=architectures,
        cpu_isa=torch.ops.sparse_marlin._cpu_isa(),
        cpu_threads=torch.get_num_threads(),
        gpus=tuple(_gpu(i, architectures) for i in range(torch.cuda.device_count())) if not note else (),
        gpu_note=note,
    )
