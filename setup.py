"""Builds the two extensions: _C (operators, LibTorch stable ABI) and _core (pybind11: planner, explain, format).

Environment: TORCH_CUDA_ARCH_LIST (architectures, e.g. "8.0;9.0a;12.0+PTX"), SPARSE_MARLIN_CPU_ONLY=1 (no CUDA code),
MAX_JOBS (parallel compilers).
Needs no GPU and no network. Everything else about the package is in pyproject.toml.
"""

import os
import re
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
# The stable ABI of torch 2.10, spelled as torch/csrc/stable/version.h wants it (one byte each for major and minor).
TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
MIN_ARCH = 80
# Native code for 8.0 (8.6 and 8.9 run it) and 9.0a (wgmma exists there only), PTX for every later GPU.
DEFAULT_ARCHS = "8.0+PTX;9.0a"
HOST_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
if os.environ.get("SPARSE_MARLIN_LINE_INFO", "0") not in ("", "0"):
    NVCC_FLAGS.append("-lineinfo")  # the machine code is the same; its tables are two thirds of the library


def say(text: str) -> None:
    print(f"sparse_marlin build: {text}", file=sys.stderr, flush=True)


def sources(*patterns: str) -> list[str]:
    # Relative paths: setuptools puts absolute ones outside the build folder.
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


def why_cpu_only() -> str | None:
    if os.environ.get("SPARSE_MARLIN_CPU_ONLY", "0") not in ("", "0"):
        return "SPARSE_MARLIN_CPU_ONLY is set"
    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "no nvcc found (CUDA_HOME names the toolkit's folder)"
    return None


def architectures(arch_list: str) -> list[tuple[str, bool]]:
    """The entries of a TORCH_CUDA_ARCH_LIST as (number with suffix, PTX too), e.g. ("90a", False)."""
    archs: list[tuple[str, bool]] = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got {entry!r}")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) < MIN_ARCH:
            say(f"leaving out {entry}: sparse tensor cores begin with compute capability 8.0")
        else:
            archs.append((major + minor + suffix, bool(ptx)))
    if not archs:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected at least one of 8.0 and up, got {arch_list!r}")
    return list(dict.fromkeys(archs))


def gencode(arch: str, ptx: bool) -> str:
    code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
    return f"-gencode=arch=compute_{arch},code={code}"


def operators(archs: list[tuple[str, bool]]) -> Extension:
    cuda = bool(archs)
    files = sources("pack/*.cpp", "legacy/*.cpp", "cpu/*.cpp", "plan/*.cpp", "torch/*.cpp")
    unused = "csrc/torch/ops_no_cuda.cpp" if cuda else "csrc/torch/ops_cuda.cpp"
    files.remove(unused)
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TARGET_VERSION)]
    libraries = ["torch", "torch_cpu", "c10"]
    if cuda:
        files += sources("launch/*.cpp", "pack/*.cu", "legacy/*.cu", "launch/*.cu", "instantiations/*.cu")
        macros.append(("USE_CUDA", None))  # declares the stream functions of torch's C shim
        if any(arch == "90a" for arch, _ in archs):
            macros.append(("SPARSE_MARLIN_SM90A", None))  # the Hopper kernels are more than empty shells
        # The static runtime, so that the library needs libtorch and the driver and nothing else of CUDA.
        libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    device = "cuda" if cuda else "cpu"
    # As system headers: their warnings are not ours.
    system = [flag for path in include_paths(device) for flag in ("-isystem", path)]
    return Extension(
        "sparse_marlin._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        library_dirs=library_paths(device),
        libraries=libraries,
        define_macros=macros,
        # Explicit -gencode flags: torch adds its own only where it finds none.
        extra_compile_args={"cxx": HOST_FLAGS + system, "nvcc": NVCC_FLAGS + system + [gencode(*a) for a in archs]},
        extra_link_args=["-Wl,--strip-all"],
        language="c++",
        py_limited_api=True,  # holds no Python code at all: one file for every interpreter
    )


def core(archs: list[tuple[str, bool]]) -> Extension:
    built_for = [name for arch, ptx in archs for name in ([f"sm_{arch}", f"compute_{arch}"] if ptx else [f"sm_{arch}"])]
    macros: list[tuple[str, str | None]] = [("SPARSE_MARLIN_ARCHITECTURES", ",".join(built_for))]
    macros.append(("SPARSE_MARLIN_CUDA_VERSION", (torch.version.cuda or "") if archs else ""))
    return Extension(
        "sparse_marlin._core",
        sources("plan/*.cpp", "python/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=macros,
        extra_compile_args={"cxx": HOST_FLAGS},
        extra_link_args=["-Wl,--strip-all"],
        language="c++",
    )


class Build(BuildExtension):
    """One object folder per extension: both compile csrc/plan, with different flags."""

    def finalize_options(self) -> None:
        # A fixed folder, so that `setup.py build_ext --inplace` and pip share their objects: an editable install would
        # use a temporary one and compile everything again.
        self.build_temp = self.build_temp or "build/objects"
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        base = self.build_temp
        self.build_temp = os.path.join(base, ext.name)
        os.makedirs(self.build_temp, exist_ok=True)
        super().build_extension(ext)
        self.build_temp = base


def main() -> None:
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < MIN_TORCH:
        raise SystemExit(
            f"torch: expected 2.10 or newer (its stable ABI), got {torch.__version__}; pip install 'torch>=2.10'"
        )
    reason = why_cpu_only()
    archs: list[tuple[str, bool]] = []
    if reason:
        say(f"CPU-only, because {reason}: the operators will refuse CUDA tensors")
    else:
        archs = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
        say(f"CUDA {torch.version.cuda}, {' '.join(gencode(*a) for a in archs)}")
    setup(
        ext_modules=[operators(archs), core(archs)],
        cmdclass={"build_ext": Build},
    )


main()
