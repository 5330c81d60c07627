"""Every kernel once, in small problems: what tools/sanitize.py runs under the tools of compute-sanitizer.

    compute-sanitizer python tools/sanitize_launches.py               # all of it
    compute-sanitizer python tools/sanitize_launches.py --part 0/4    # a quarter of it
    compute-sanitizer python tools/sanitize_launches.py --only corrections

Prints the number of launches as JSON, and on stderr what it is at, so that a slow launch or one that hangs has a name.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

import sparse_marlin
from sparse_marlin import _core, testing
from sparse_marlin.info import planner_device
from sparse_marlin.low_rank import gather, quantize_up

# With stream-K a block that waits for another's sums reads a flag before it is written: not for initcheck.
WITHOUT_STREAM_K = "--without-stream-k"
# For racecheck, under which launches of many threads that wait for each other take minutes. It looks at shared memory
# alone, of which few blocks show as much. And under it a cluster of blocks with idle warps (csrc/launch/spread.h) never
# ends; without dependent launch there are none.
FEW_BLOCKS = "--few-blocks"
ONLY = "--only"
WAYS_AT_ONCE = 4  # of one problem, so that parts are of about the same size

Job = tuple[str, str, Callable[[], int]]  # kind of launch, what it is, returns the number of launches


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


def portions(ways: list[Way]) -> list[list[Way]]:
    return [ways[at : at + WAYS_AT_ONCE] for at in range(0, len(ways), WAYS_AT_ONCE)]


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


def multiply(size: tuple[int, int, int], kind: Kind, ways: list[Way], few_blocks: bool) -> int:
    (m, n, k), (dtype, num_bits, group_size) = size, kind
    codes = testing.random_codes(n, k, num_bits)
    scales = testing.random_scales(n, k, group_size, dtype)
    packed = sparse_marlin.pack_24_weights(codes, scales, group_size, num_bits).cuda()
    a, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    on_gpu = [t.cuda() for t in (a, scales, bias)]
    for tile, splits in ways:
        dependent = not (few_blocks and splits > 1 and _core.TILES[tile].kernel == "decode")
        out = torch.ops.sparse_marlin._sparse_marlin_gemm_tile(
            on_gpu[0], packed, on_gpu[1], group_size, num_bits, on_gpu[2], tile, splits, dependent=dependent
        )
        testing.assert_accepted(out.cpu(), a, codes, scales, group_size, bias, f"tile {tile}, splits {splits}")
    return len(ways)


def multiplication_jobs(size: tuple[int, int, int], kind: Kind, ways: list[Way], few_blocks: bool) -> Iterator[Job]:
    for some in portions(ways):
        yield "multiplications", f"{size} {kind} {some}", functools.partial(multiply, size, kind, some, few_blocks)


def other_cluster(way: Way) -> bool:
    """Whether it is the kernel of a tile for Hopper once more, in a larger cluster or with stream-K."""
    tile = _core.TILES[way[0]]
    return tile.kernel != "sm80" and tile.share * way[1] != 1


def multiplications(stream_k: bool, few_blocks: bool) -> Iterator[Job]:
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
            ran |= {(kind, way) for way in ways}
            yield from multiplication_jobs(size, kind, ways, few_blocks)
    never = set(range(len(_core.TILES))) - {tile for _, (tile, _) in ran}
    assert not never, f"no problem fits tiles {sorted(never)}"
    # More output tiles than blocks at once: a block walks on to a second one, its stages and staging bytes in use.
    kind, tokens = (torch.float16, 4, 32), 17
    for i, tile in enumerate(_core.TILES):
        if tile.kernel == "sm80":
            continue
        rows = -(-2 * planner_device().num_sms // -(-tokens // tile.block_m)) + 4  # of tiles, two blocks an SM
        size = (tokens, rows * tile.block_n * tile.share + 8, 192)
        walks = [(i, s) for s in (1, -1)[: 1 + stream_k]]
        if not few_blocks or tile.kernel != "decode" or _core.TILES[i - 1].kernel != "decode":  # the first of them
            yield from multiplication_jobs(size, kind, accepted(size, kind, walks), few_blocks)
    # So many columns that rings are refilled several times.
    size, decode = (11, 72, 8256), [i for i, tile in enumerate(_core.TILES) if tile.kernel == "decode"]
    ways = accepted(size, kind, [(i, s) for i in decode for s in (1, 2)])
    yield from multiplication_jobs(size, kind, ways, few_blocks)


def correct(size: tuple[int, int, int, int], dtype: torch.dtype, packed_up: bool, ways: list[Way]) -> int:
    m, n, k, rank = size
    codes, scales = testing.random_codes(n, k), testing.random_scales(n, k, 64, dtype)
    packed = sparse_marlin.pack_24_weights(codes, scales, 64)
    a, up, down = (torch.randn(*shape).to(dtype) for shape in ((m, k), (n, rank), (rank, k)))
    up_scales, factor = None, up
    if packed_up:
        rounded = quantize_up(up, 64, 4)
        up_scales, factor = rounded.scales.cuda(), sparse_marlin.pack_24_weights(rounded.codes, rounded.scales, 64)
        up = gather(rounded.dequantize(), rank)
    on_gpu = [t.cuda() for t in (a, packed, scales, down, factor)]
    for tile, splits in ways:
        with testing.poisoned_allocations("cuda", megabytes=1):
            out = torch.ops.sparse_marlin._sparse_marlin_gemm_low_rank_by(
                *on_gpu, 64, 4, None, tile, splits, up_scales=up_scales
            )
        testing.assert_accepted(out.cpu(), a, codes, scales, 64, None, f"tile {tile}, splits {splits}", (up, down))
    return len(ways)


def corrections(few_blocks: bool) -> Iterator[Job]:
    """Low-rank corrections: every tile that adds one, with and without a split, ragged ranks and edges, more output
    tiles than blocks, k projected in shares, a dense factor and a packed one, every kernel that projects. The
    workspace, which the decode kernel reads to see whether something has come, is filled before."""
    dense = ((3, 200, 320, 24), (11, 72, 640, 72), (9, 140 * 128 + 8, 192, 16))
    packed = ((5, 200, 320, 24, torch.float16), (20, 72, 640, 72, torch.float16), (70, 136, 520, 16, torch.bfloat16))
    jobs = [(size, dtype, False) for size in dense[: 2 if few_blocks else 3] for dtype in (torch.half, torch.bfloat16)]
    # shares of k, by few blocks; blocks that project in front of the others and behind them
    jobs += [((11, 72, k, 8), torch.half, False) for k in (4672, 8256)]
    jobs += [(size, dtype, True) for *size, dtype in packed]
    for size, dtype, packed_up in jobs:
        m, n, k, rank = size
        problem = _core.Problem(m, n, k, 64, 4, str(dtype).removeprefix("torch."))
        ways = []
        for way in product(range(len(_core.TILES)), (1, 2)):
            try:
                _core.plan_low_rank_with_tile(problem, planner_device(), rank, *way, packed_up)
            except ValueError:
                continue
            ways.append(way)
        for some in portions(ways):
            yield "corrections", f"{size} {dtype} {some}", functools.partial(correct, size, dtype, packed_up, some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(WITHOUT_STREAM_K, action="store_true", help="all but these")
    parser.add_argument(FEW_BLOCKS, action="store_true", help="no stream-K, and few of the larger launches")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every Nth of the launches, from number I on")
    parser.add_argument(ONLY, metavar="KIND", help="launches of this kind alone")
    args = parser.parse_args()
    part, parts = (int(number) for number in args.part.split("/"))
    jobs: list[Job] = [
        *multiplications(not (args.without_stream_k or args.few_blocks), args.few_blocks),
        *corrections(args.few_blocks),
        ("packings and unpackings", "", pack_kernels),
        ("imports and exports", "", legacy_kernels),
    ]
    kinds = list(dict.fromkeys(kind for kind, _, _ in jobs))
    if args.only is not None and args.only not in kinds:
        parser.error(f"{ONLY}: expected one of {', '.join(kinds)}, got {args.only}")
    jobs = [job for job in jobs if args.only in (None, job[0])]
    counts = dict.fromkeys((kind for kind, _, _ in jobs), 0)
    for kind, what, run in jobs[part::parts]:
        print(f"{kind} {what}", end=" ", file=sys.stderr, flush=True)
        start = time.monotonic()
        counts[kind] += run()
        print(f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
