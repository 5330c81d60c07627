"""Writes csrc/device/ptx/wgmma_sp.cuh: one wrapper for each type and number of tokens of wgmma.mma_async.sp.

    python tools/gen_wgmma_sp.py

The instruction names every accumulator register, and inline assembly has no loops, so the operand lists are generated.
"""

from pathlib import Path

TOKENS = (16, 32, 48, 64, 96, 128, 160, 176, 192)
TYPES = {"__half": "f16", "__nv_bfloat16": "bf16"}
TARGET = Path(__file__).parent.parent / "csrc" / "device" / "ptx" / "wgmma_sp.cuh"
WIDTH = 120

HEADER = """\
// Written by tools/gen_wgmma_sp.py.
// wgmma.mma_async.sp m64nNk32 (PTX ISA, "Asynchronous warpgroup-level matrix instructions"): d += a * b with float32
// sums, a = 64 rows x 32 columns of 2:4-sparse weights, 16 kept values a row, in the registers of a warpgroup; b = 32
// columns x kTokens activations in shared memory, K-major, by descriptor; e = metadata. kSelector says which lanes'
// metadata belong to this step (0: lanes c = 0, 1; 1: c = 2, 3).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse_marlin::ptx {

template <typename Act, int kTokens>
struct WgmmaSp;

// clang-format off
"""
FOOTER = """\
// clang-format on

}  // namespace sparse_marlin::ptx
"""


def wrapped(items: list[str], indent: str) -> str:
    lines, line = [], ""
    for item in items:
        if len(indent) + len(line) + len(item) + 2 > WIDTH:
            lines.append(line)
            line = ""
        line += (" " if line else "") + item + ","
    lines.append(line)
    return ("\n" + indent).join(lines).rstrip(",")


def wrapper(act: str, tokens: int) -> str:
    sums = tokens // 2
    names = [f"%{i}" for i in range(sums)]
    weights = ", ".join(f"%{sums + i}" for i in range(4))
    desc, meta, selector = (f"%{sums + 4 + i}" for i in range(3))
    rows = [", ".join(names[i : i + 16]) for i in range(0, sums, 16)]
    text = f"""\
template <>
struct WgmmaSp<{act}, {tokens}> {{
  template <int kSelector>
  static __device__ __forceinline__ void run(float (&d)[{sums}], const uint32_t (&a)[4], uint64_t b, uint32_t e) {{
    asm volatile(
        "wgmma.mma_async.sp.sync.aligned.m64n{tokens}k32.f32.{TYPES[act]}.{TYPES[act]} {{"
"""
    for i, row in enumerate(rows):
        text += f'        "{row}{", " if i + 1 < len(rows) else ""}"\n'
    text += f"""\
        "}}, {{{weights}}}, {desc}, {meta}, {selector}, 1, 1, 1, 0;"
        : {wrapped([f'"+f"(d[{i}])' for i in range(sums)], "          ")}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e), "n"(kSelector));
  }}
}};
"""
    return text


def source() -> str:
    return HEADER + "\n".join(wrapper(act, tokens) for act in TYPES for tokens in TOKENS) + FOOTER


if __name__ == "__main__":
    TARGET.write_text(source())
