"""What the built extension contains: the stated architectures, sparse MMA instructions, no library but torch's."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

import sparse_marlin
from sparse_marlin import _core
from sparse_marlin._extension import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = [name for name in _core.BUILT_ARCHITECTURES.split(",") if name]
needs_cuda_build = pytest.mark.skipif(not ARCHITECTURES, reason="built without CUDA")


def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one that triton carries."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if not found:
        triton = pytest.importorskip("triton", reason="no cuobjdump: neither a CUDA toolkit nor triton is installed")
        inside = sorted(Path(triton.__file__).parent.rglob("cuobjdump"))
        if not inside:
            pytest.skip("no cuobjdump: neither a CUDA toolkit nor triton's")
        found = str(inside[0])
    return found


def dump(*arguments: str) -> str:
    return subprocess.run([cuobjdump(), *arguments, LIBRARY], capture_output=True, text=True, check=True).stdout


@needs_cuda_build
def test_the_stated_architectures_are_there():
    entries = re.findall(r"Fatbin (elf|ptx) code:\n=+\narch = sm_(\w+)", dump())
    found = {("sm_" if kind == "elf" else "compute_") + number for kind, number in entries}
    assert found == set(ARCHITECTURES)


def seen_in_dump(wanted: set[str], *arguments: str) -> set[str]:
    """Which of the texts the dump contains. It is long: read as it comes and left as soon as all were seen."""
    seen: set[str] = set()
    with subprocess.Popen([cuobjdump(), *arguments, LIBRARY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            seen |= {text for text in wanted - seen if text in line}
            if seen == wanted:
                process.kill()
                break
    return seen


@needs_cuda_build
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith("sm_")])
def test_native_code_multiplies_on_sparse_tensor_cores(architecture):
    """Sparse m16n8k32 with float32 accumulators, in both dtypes."""
    wanted = {"HMMA.SP.16832.F32 ", "HMMA.SP.16832.F32.BF16 "}
    assert seen_in_dump(wanted, "--dump-sass", "--gpu-architecture", architecture) == wanted


@needs_cuda_build
@pytest.mark.skipif(not any(name.startswith("compute_") for name in ARCHITECTURES), reason="no PTX was asked for")
def test_ptx_multiplies_on_sparse_tensor_cores():
    wanted = {f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{t}.{t}.f32" for t in ("f16", "bf16")}
    assert seen_in_dump(wanted, "--dump-ptx") == wanted


@pytest.mark.parametrize("library", [LIBRARY, _core.__file__])
def test_no_library_of_cuda_or_python_is_needed(library):
    needed = re.findall(
        r"NEEDED.*\[(.*?)\]",
        subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout,
    )
    assert needed
    allowed = re.compile(
        r"^(libtorch(_cpu|_cuda)?|libc10|libstdc\+\+|libgcc_s|libgomp|libm|libc|libdl|librt|libpthread|ld-linux.*)\.so"
    )
    assert not [name for name in needed if not allowed.match(name)]
    if library != LIBRARY:
        assert not [name for name in needed if "torch" in name or "c10" in name], "_core is torch-free"


def test_the_operators_use_the_stable_abi_only():
    """No C++ symbol of torch or c10 is imported: what is, is the C interface that torch keeps stable."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert not [name for name in symbols if re.match(r"_ZNK?\d*(St)?\d*(2at|3c10|5torch)", name)]


@pytest.mark.skipif(
    os.environ.get("SPARSE_MARLIN_LINE_INFO", "0") not in ("", "0"), reason="line numbers are two thirds of the library"
)
def test_the_library_is_small():
    assert Path(LIBRARY).stat().st_size < 10e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"SPARSE_MARLIN_CPU_ONLY": "1"}, "CPU-only, because SPARSE_MARLIN_CPU_ONLY is set"),
        ({"CUDA_HOME": "/nowhere"}, "CPU-only, because (no nvcc found|the installed torch .* has no CUDA)"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 10.0;12.0+PTX"}, "leaving out 7.5: .* begin with compute capability 8.0"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 10.0;12.0+PTX"}, r"sm_100 .*code=\[sm_120,compute_120\]"),
        ({"TORCH_CUDA_ARCH_LIST": "sm_90"}, "expected entries such as 8.0, 9.0a or 12.0.PTX, got 'sm_90'"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, "expected at least one of 8.0 and up, got '7.5'"),
    ],
)
def test_the_build_says_what_it_builds(environment, told):
    pytest.importorskip("pybind11", reason="setup.py needs pybind11")
    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    if "TORCH_CUDA_ARCH_LIST" in environment and not (nvcc and torch.version.cuda):
        pytest.skip("nothing to compile CUDA code with")
    clean = {name: value for name, value in os.environ.items() if name not in {"SPARSE_MARLIN_CPU_ONLY"}}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--version"],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(told, done.stderr), done.stderr
    assert (done.returncode == 0) == ("expected" not in told)


@pytest.mark.slow
def test_a_source_distribution_has_every_source(tmp_path):
    pytest.importorskip("pybind11", reason="setup.py needs pybind11")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "SPARSE_MARLIN_CPU_ONLY": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    wanted += (ROOT / "python").rglob("*.py*")
    wanted = [str(path.relative_to(ROOT)) for path in wanted if path.suffix != ".pyc"]
    assert not [name for name in [*wanted, "setup.py", "pyproject.toml", "LICENSE", "README.md"] if name not in found]


def test_version_is_stated_once():
    assert re.search(r'^dynamic = \["version"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"## {sparse_marlin.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
