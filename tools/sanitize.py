"""Runs every kernel under the tools of compute-sanitizer and records the outcome in benchmarks/results/sanitize.json.

    python tools/sanitize.py                          # all four tools at once
    python tools/sanitize.py racecheck                # one of them
    compute-sanitizer python tools/sanitize.py --launch   # what they run

Fails without a GPU. COMPUTE_SANITIZER names the program where it is not on the path.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
from test_gpu import ROOT, commit

import sparse_marlin
from sparse_marlin import _core, testing
from sparse_marlin.info import planner_device

RECORD = ROOT / "benchmarks" / "results" / "sanitize.json"
# Only our kernels are watched: torch's would take most of the time. initcheck must see what those write, too; what a
# tensor copy (TMA) stores it does not see, so it must not look when the output is copied to the host.
OURS = ["--kernel-name", "kns=sparse_marlin"]
TOOLS = {
    "memcheck": OURS,
    "racecheck": [*OURS, "--racecheck-report", "all"],
    "synccheck": [*OURS, "--num-cuda-barriers", "65536"],  # the default is fewer than these kernels have
    "initcheck": ["--check-api-memory-access", "no"],
}
# With stream-K a block that waits for another's sums reads a flag before it is written: not for initcheck.
WITHOUT_STREAM_K = "--without-stream-k"
TIME_LIMIT = 300  # seconds, for one tool
SUMMARY = re.compile(r"=+ (?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")


def pack_kernels() -> int:
    """Every weight type and code width, whole slices and ragged edges, with and without faults."""
    launches = 0
    for n, k in ((72, 260), (64, 136)):
        for num_bits in _core.NUM_BITS:
            codes = testing.random_codes(n, k, num_bits)
            scales = testing.group_scales(n, k, 64)
            wanted = sparse_marlin.pack_24_weights(codes, scales, 64, num_bits)
            dense = testing.dequantized(codes, scales, 64)
            for weight in (codes, *(dense.to(t) for t in (torch.float32, torch.float16, torch.bfloat16))):
                packed = sparse_marlin.pack_24_weights(weight.cuda(), scales.cuda(), 64, num_bits)
                testing.assert_same_bits(packed.cpu(), wanted, f"packed from {weight.dtype}")
                codes_again = sparse_marlin.unpack_24_weights(packed, n, k, num_bits)
                testing.assert_same_bits(codes_again.cpu(), codes, "codes")
                launches += 3
                try:
                    sparse_marlin.pack_24_weights(torch.ones_like(weight).cuda(), scales.cuda(), 64, num_bits)
                except RuntimeError:
                    continue
                raise AssertionError("a dense weight was packed")
    return launches


def legacy_kernels() -> int:
    """marlin-24 bytes to packed ones and back, with and without a fault in the metadata."""
    launches = 0
    for (n, k), num_bits in product(((64, 32), (192, 288)), _core.NUM_BITS):
        packed = sparse_marlin.pack_24_weights(
            testing.random_codes(n, k, num_bits), testing.group_scales(n, k, 32), 32, num_bits
        )
        wanted = torch.ops.sparse_marlin.export_marlin_24(packed, n, k, num_bits)
        exported = torch.ops.sparse_marlin.export_marlin_24(packed.cuda(), n, k, num_bits)
        for got, expected in zip(exported, wanted, strict=True):
            testing.assert_same_bits(got.cpu(), expected, "marlin-24 bytes")
        again = torch.ops.sparse_marlin.import_marlin_24(*exported, num_bits)
        testing.assert_same_bits(again.cpu(), packed, "packed bytes")
        launches += 3
        codes, meta = exported
        try:
            torch.ops.sparse_marlin.import_marlin_24(codes, torch.zeros_like(meta), num_bits)
        except RuntimeError:
            continue
        raise AssertionError("metadata of zeros was imported")
    return launches


Kind = tuple[torch.dtype, int, int]  # activation type, code width, group size
Way = tuple[int, int]  # tile, splits


def accepted(size: tuple[int, int, int], kind: Kind, ways: list[Way]) -> list[Way]:
    """Those of the ways that the planner takes for the problem."""
    dtype, num_bits, group_size = kind
    problem = _core.Problem(*size, group_size, num_bits, str(dtype).removeprefix("torch."), True)
    found = []
    for tile, splits in ways:
        try:
            _core.plan_with_tile(problem, planner_device(), tile, splits)
        except ValueError:
            continue
        found.append((tile, splits))
    return found


def multiply(size: tuple[int, int, int], kind: Kind, ways: list[Way]) -> None:
    (m, n, k), (dtype, num_bits, group_size) = size, kind
    codes = testing.random_codes(n, k, num_bits)
    scales = testing.random_scales(n, k, group_size, dtype)
    packed = sparse_marlin.pack_24_weights(codes, scales, group_size, num_bits).cuda()
    a, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    on_gpu = [t.cuda() for t in (a, scales, bias)]
    for tile, splits in ways:
        out = torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
            on_gpu[0], packed, on_gpu[1], group_size, num_bits, on_gpu[2], tile, splits
        )
        testing.assert_accepted(out.cpu(), a, codes, scales, group_size, bias, f"tile {tile}, splits {splits}")


def other_cluster(way: Way) -> bool:
    """Whether it is the kernel of a tile for Hopper once more, in a larger cluster or with stream-K."""
    tile = _core.TILES[way[0]]
    return tile.kernel != "sm80" and tile.share * way[1] != 1


def gemm_kernels(stream_k: bool) -> int:
    """Every tile, activation type, code width and scale mode, with and without a split, on ragged edges; of a kernel in
    larger clusters only one for each activation type."""
    ran = set()
    all_ways = list(product(range(len(_core.TILES)), (1, 2, -1) if stream_k else (1, 2)))
    clusters_with = ((torch.float16, 4, 128), (torch.bfloat16, 8, 32))
    for size in ((19, 72, 260), (11, 72, 320), (136, 200, 648)):
        for kind in product((torch.float16, torch.bfloat16), _core.NUM_BITS, (-1, 128, 32)):
            ways = [way for way in all_ways if kind in clusters_with or not other_cluster(way)]
            ways = [way for way in ways if (kind, way) not in ran]  # the first problem that a kernel takes is enough
            ways = accepted(size, kind, ways)
            if ways:
                multiply(size, kind, ways)
            ran |= {(kind, way) for way in ways}
    never = set(range(len(_core.TILES))) - {tile for _, (tile, _) in ran}
    assert not never, f"no problem fits tiles {sorted(never)}"
    # More output tiles than blocks at once: a block walks on to a second one, its stages and staging bytes in use.
    kind = (torch.float16, 4, 32)
    walked = 0
    for kernel, size in (("sm90", (17, 280 * 128 + 8, 132)), ("decode", (17, 280 * 128 + 8, 192))):
        walks = [(i, s) for i, tile in enumerate(_core.TILES) if tile.kernel == kernel for s in (1, -1)[: 1 + stream_k]]
        walks = accepted(size, kind, walks)
        if walks:
            multiply(size, kind, walks)
        walked += len(walks)
    return len(ran) + walked


def low_rank_kernels() -> int:
    """The decode kernel with a low-rank correction: every tile, with and without a split, ragged ranks and edges, more
    output tiles than blocks. The workspace, which it reads to see whether something has come, is filled before."""
    device = planner_device()
    launches = 0
    sizes = ((3, 200, 320, 24), (11, 72, 640, 72), (9, 280 * 128 + 8, 192, 16))
    for (m, n, k, rank), dtype in product(sizes, (torch.float16, torch.bfloat16)):
        codes, scales = testing.random_codes(n, k), testing.random_scales(n, k, 64, dtype)
        packed = sparse_marlin.pack_24_weights(codes, scales, 64)
        a, up, down = (torch.randn(*shape).to(dtype) for shape in ((m, k), (n, rank), (rank, k)))
        on_gpu = [t.cuda() for t in (a, packed, scales, down, up)]
        problem = _core.Problem(m, n, k, 64, 4, str(dtype).removeprefix("torch."))
        for tile, splits in product(range(len(_core.TILES)), (1, 2)):
            try:
                _core.plan_low_rank_with_tile(problem, device, rank, tile, splits)
            except ValueError:
                continue
            with testing.poisoned_allocations("cuda", megabytes=1):
                out = torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by(*on_gpu, 64, 4, None, tile, splits)
            what = f"{m} {n} {k}, rank {rank}, tile {tile}, splits {splits}"
            testing.assert_accepted(out.cpu(), a, codes, scales, 64, None, what, (up, down))
            launches += 1
    return launches


def check(sanitizer: str, tool: str) -> dict[str, Any]:
    options = [*TOOLS[tool], "--print-limit", "20", "--error-exitcode", "9"]
    start = time.monotonic()
    command = [sanitizer, "--tool", tool, *options, sys.executable, __file__, "--launch"]
    command += [WITHOUT_STREAM_K] if tool == "initcheck" else []
    # Every tensor an allocation of its own: what lies between two of them is then nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as late:
        run = subprocess.CompletedProcess(command, 1, (late.stdout or b"").decode(), (late.stderr or b"").decode())
    output = run.stdout + run.stderr
    summary = SUMMARY.findall(output)
    if run.returncode != 0 or not summary:
        print(f"--- {tool}\n{output[:20000]}", file=sys.stderr)
    launched = re.search(r"\{\"multiplications[^}]*\}", run.stdout)  # reports of faults hold braces, too
    return {
        "tool": tool,
        "options": options,
        "exit_status": run.returncode,
        "summary": summary[-1] if summary else "none",
        "launches": json.loads(launched.group()) if launched else {},
        "seconds": round(time.monotonic() - start, 1),
    }


def shown(done: dict[str, Any]) -> dict[str, Any]:
    print(f"{done['tool']}: {done['summary']} ({done['launches']}, {done['seconds']} s)", flush=True)
    return done


def version(sanitizer: str) -> str:
    run = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Version (.*)", run.stdout)
    return found.group(1) if found else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", help=f"{', '.join(TOOLS)}; all where none is named")
    parser.add_argument("--launch", action="store_true", help="launch the kernels, nothing else")
    parser.add_argument(WITHOUT_STREAM_K, action="store_true", help="with --launch: all but these")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make sanitize: expected a CUDA device, found none", file=sys.stderr)
        return 1
    if args.launch:
        counts = {"multiplications": gemm_kernels(not args.without_stream_k), "packings and unpackings": pack_kernels()}
        counts["corrections"] = low_rank_kernels()
        print(json.dumps({**counts, "imports and exports": legacy_kernels()}))
        return 0
    sanitizer = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("make sanitize: compute-sanitizer: not found; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    tools = args.tools or list(TOOLS)
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"expected tools of {', '.join(TOOLS)}, got {', '.join(unknown)}")
    with ThreadPoolExecutor(len(tools)) as pool:
        checks = list(pool.map(lambda tool: shown(check(sanitizer, tool)), tools))
    record = {
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "compute_sanitizer": version(sanitizer),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "code": sparse_marlin.info().gpus[0].code,
        "checks": checks,
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return max(abs(c["exit_status"]) for c in checks)


if __name__ == "__main__":
    sys.exit(main())
