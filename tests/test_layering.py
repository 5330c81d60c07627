"""The one-way data flow of the sources, read from their includes, and the only home of the packed format's numbers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

# A folder may include itself and these. device/ reads the leaf headers of plan/ and params.h is what launch/ hands it.
MAY_INCLUDE = {
    "format": set(),
    "device": {"format", "plan"},
    "plan": {"format"},
    "cpu": {"format", "device"},
    "pack": {"format", "cpu"},
    "legacy": {"format", "cpu", "pack"},
    "launch": {"format", "plan", "device"},
    "instantiations": {"format", "plan", "device", "launch"},
    "torch": {"format", "plan", "device", "cpu", "pack", "legacy", "launch"},
    "python": {"format", "legacy", "plan"},
}
PLAN_LEAVES = {
    f"plan/{name}.h"
    for name in (
        "tiles",
        "smem",
        "registers",
        "scale_mode",
        "tiles_sm90",
        "smem_sm90",
        "tiles_decode",
        "smem_decode",
        "stream_k",
        "low_rank",
        "project",
    )
}
TORCH = re.compile(r"^(torch|ATen|c10)/")
CUDA = re.compile(r"^(cuda|cublas|cooperative_groups|nv/|cub/)")


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text(encoding="utf-8"))


def folder(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_sources_in_every_folder():
    assert {folder(p) for p in SOURCES} == set(MAY_INCLUDE)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_includes_go_one_way(path):
    here = folder(path)
    for name in includes(path):
        target = name.split("/")[0]
        ours = (CSRC / name).exists()
        if ours and target != here:
            assert target in MAY_INCLUDE[here], f"{named(path)} includes {name}: {here} may not include {target}"
            if here == "device" and target == "plan":
                assert name in PLAN_LEAVES, f"{named(path)} includes {name}: device reads only {sorted(PLAN_LEAVES)}"
            if here == "cpu" and target == "device":
                assert name == "device/params.h", f"{named(path)} includes {name}"
        if TORCH.match(name) and not ours:
            assert here == "torch", f"{named(path)} includes {name}: torch headers belong to csrc/torch"
        if CUDA.match(name):
            allowed = path.suffix in {".cu", ".cuh"} or here == "launch"
            assert allowed, f"{named(path)} includes {name}: CUDA headers belong to .cu and .cuh files and csrc/launch"
        if "pybind11" in name:
            assert here == "python", f"{named(path)} includes {name}: pybind11 belongs to csrc/python"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_header_is_included_once_and_includes_are_found(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".h", ".cuh"}:
        assert "#pragma once" in text, named(path)
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
        assert (CSRC / name).exists(), f"{named(path)}: include paths start at csrc: {name}"


def test_the_format_is_stated_once():
    """The numbers that only the format could bring into Python do not stand in any Python file of the package."""
    header = (CSRC / "format" / "packed_24.h").read_text(encoding="utf-8")
    assert "inline constexpr int kVersion" in header
    from sparse_marlin import _core

    numbers = {_core.tile_words(bits) for bits in _core.NUM_BITS} | {_core.slice_words(bits) for bits in _core.NUM_BITS}
    numbers |= {4 * number for number in numbers}
    pattern = re.compile(r"(?<![\w.])(" + "|".join(str(n) for n in sorted(numbers)) + r")(?![\w.])")
    for path in sorted((ROOT / "python").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{named(path)}:{number}: a number of the packed format: {line.strip()}"
    for path in sorted((ROOT / "python").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert _core.FORMAT_NAME not in text, f"{named(path)}: the format's name comes from _core.FORMAT_NAME"


def test_schemas_have_one_home():
    """Operators' schemas stand in csrc/torch/ops.cpp, Python's view of the core in csrc/python/core.cpp."""
    for path in SOURCES:
        if "m.def(" in path.read_text(encoding="utf-8"):
            assert named(path) in {"csrc/torch/ops.cpp", "csrc/python/core.cpp"}, named(path)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_user_errors_do_not_end_the_process(path):
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    found = re.search(r"(?<![\w:])(printf|exit|abort|assert)\s*\(", text)
    assert not found, f"{named(path)}: {found.group(0)}"
