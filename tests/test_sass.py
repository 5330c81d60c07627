"""The machine code of the Hopper kernels, read without a GPU: rules that ptxas does not keep for us. Where one is
broken only time would show it, or a rare wrong result.

* No register-to-uniform moves in a main loop. A descriptor that lives in ordinary registers costs such moves before
  every multiplication, and 9 to 20 % of the kernel's speed.
* No spills.
* Nothing writes the registers that an unfinished multiplication still reads or adds to, and nothing reads its sums.
  ptxas tracks the sums and the weights of wgmma.sp, not its metadata, and gives that register away while the
  multiplication runs; and where two ways with different sums meet, it copies them before the wait that ends them.

The checks are functions over a list of instructions (tests/machine_code.py); the first tests give them short listings
with one fault each.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from machine_code import WAIT, Code, instruction, loop_faults, main_loops, multiplications, overwritten
from test_build import ARCHITECTURES, cuobjdump

from sparse_marlin import _core
from sparse_marlin._extension import LIBRARY

ARCHITECTURE = "sm_90a"

# A made-up kernel: two multiplications a turn, one of which stays in flight; a loop over tiles around it; a wait out of
# line.
LISTING = """
            S2R R0, SR_TID.X
tiles:      R2UR UR4, R20
            STL [R1], R0
            CALL.REL.NOINC tiles
loop:       WARPGROUP.ARRIVE
            HGMMA.SP.64x16x32.F32 R24, R64, gdesc[UR16], R24, R73, 0x0, gsb0
first:      NOP
            WARPGROUP.DEPBAR.LE gsb0, 0x1
second:     NOP
            WARPGROUP.ARRIVE
            HGMMA.SP.64x16x32.F32 R24, R68, gdesc[UR16], R24, R74, 0x1, gsb0
            WARPGROUP.DEPBAR.LE gsb0, 0x1
third:      NOP
            SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x34000], R10
            @!P0 BRA wait
again:      UIADD3 UR8, UR8, 0x4, URZ
            @P1 BRA loop
            WARPGROUP.DEPBAR.LE gsb0, 0x0
after:      NOP
            LDL R0, [R1]
            @P2 BRA tiles
            EXIT
wait:       SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x34000], R10
aside:      NOP
            @!P0 BRA wait
            BRA again
"""


def listing(place: str = "", inserted: str = "") -> Code:
    """LISTING with the instruction at the label `place` replaced, as cuobjdump would print it, read."""
    lines = LISTING.strip("\n").splitlines()
    addresses = {line.partition(":")[0]: 16 * i for i, line in enumerate(lines) if line[0] != " "}
    code = []
    for i, line in enumerate(lines):
        text = inserted if place and line.startswith(f"{place}:") else line[12:]
        text = re.sub(r"\b[a-z]+$", lambda word: hex(addresses.get(word[0], 0)), text)
        each = instruction(f"        /*{16 * i:04x}*/                   {text} ;            /* 0x000fe20003800000 */")
        assert each, text
        code.append(each)
    return code


def test_a_listing_without_a_fault():
    assert [each.address for each in listing()] == list(range(0, 16 * len(listing()), 16))
    assert loop_faults(listing()) == []
    assert overwritten(listing()) == []


@pytest.mark.parametrize(
    ("place", "inserted"),
    [
        ("first", "R2UR UR16, R20"),
        ("third", "@P1 R2UR.OR P0, UR8, R14"),
        ("aside", "R2UR UR8, R12"),
        ("second", "LDL.LU R14, [R1]"),
        ("third", "@!P3 STL.64 [R1+0x8], R14"),
        ("first", "CALL.REL.NOINC tiles"),
        ("after", "HGMMA.SP.64x16x32.F32 R24, R64, gdesc[UR16], R24, R73, 0x0, gsb0"),
    ],
)
def test_what_may_not_stand_in_a_main_loop_is_found(place, inserted):
    (fault,) = loop_faults(listing(place, inserted))
    assert inserted.split()[-1] in fault or "0x10" in fault


@pytest.mark.parametrize(
    ("place", "inserted", "kind"),
    [
        ("second", "LOP3.LUT R73, R73, UR15, R118, 0xea, !PT", "metadata"),
        ("first", "LOP3.LUT R74, R74, UR15, R118, 0xea, !PT", "metadata"),  # of the turn before
        ("third", "@!P0 MOV R74, R5", "metadata"),
        ("aside", "MOV R74, R5", "metadata"),
        ("second", "CS2R R72, SRZ", "metadata"),
        ("second", "IMAD.WIDE.U32 R72, P6, R87, R84, R86", "metadata"),
        ("second", "LDS.64 R72, [R3+UR8+0x28200]", "metadata"),
        ("second", "LDS.128 R72, [R3+UR8+0x28200]", "metadata"),
        ("second", "F2I.U64.TRUNC R72, R86", "metadata"),
        ("second", "SHFL.IDX PT, R73, R5, RZ, 0x1f", "metadata"),
        ("second", "LDS.128 R60, [R2+UR8]", ""),
        ("second", "LDS.128 R61, [R2+UR8]", "weights"),
        ("second", "HMUL2 R67, R12, R10.H0_H0", "weights"),
        ("first", "HMUL2 R68, R12, R10.H0_H0", "weights"),
        ("third", "HMUL2 R71, R12, R10.H0_H0", "weights"),
        ("second", "HGMMA.SP.64x16x32.F32 R72, R68, gdesc[UR16], R72, R80, 0x0, gsb0", "metadata"),
        ("third", "FADD R31, R31, R2", "sums"),
        ("third", "FADD R32, R32, R2", ""),
        ("third", "IMAD.MOV.U32 R90, RZ, RZ, R25", "sums"),
        ("third", "IADD3 R90, R80, R81, R24", "sums"),
        ("third", "STS.128 [R2+UR8], R22", "sums"),
        ("third", "STS.64 [R2+UR8], R22", ""),
        ("third", "LDS.128 R4, [R23+UR7+0xe000]", ""),
        ("third", "STG.E.U16 desc[UR12][R23.64], R73", "sums"),
        ("after", "IMAD.MOV.U32 R90, RZ, RZ, R25", ""),
        ("second", "MOV R74, R5", ""),
        ("third", "MOV R73, R5", ""),
        ("third", "LDS.128 R64, [R2+UR8]", ""),
        ("after", "LDS.128 R72, [R2+UR8]", ""),
        ("after", "FADD R24, R24, R2", ""),
        ("second", "STS.128 [R73+UR8], R64", ""),
        ("second", "STG.E.U16 desc[UR12][R72.64], R73", ""),
        ("second", "BAR.SYNC.DEFER_BLOCKING R73, 0x80", ""),
        ("second", "ISETP.GE.OR P6, PT, R73, UR6, P1", ""),
        ("second", "SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R73+URZ], RZ", ""),
    ],
)
def test_faults_around_unfinished_multiplications_are_found(place, inserted, kind):
    faults = overwritten(listing(place, inserted))
    assert bool(faults) == bool(kind), faults
    assert all(inserted.split()[1].rstrip(",") in fault for fault in faults)
    assert not kind or faults[0].startswith(kind)


def test_a_wait_that_waits_for_too_few_is_found():
    """With two pending groups allowed, the first multiplication may still run where it was finished."""
    patched = [
        each._replace(operands="gsb0, 0x2") if each.opcode == WAIT else each for each in listing("third", "MOV R73, R5")
    ]
    assert [fault.partition(" ")[0] for fault in overwritten(patched)] == ["metadata"]


def test_an_indirect_jump_after_a_multiplication_is_refused():
    with pytest.raises(AssertionError, match="cannot follow"):
        overwritten(listing("third", "BRX R2 -0x7570"))


def test_a_group_of_two_is_committed_by_its_last():
    code = listing("third", "MOV R73, R5")
    first = multiplications(code)[0]
    code[first] = code[first]._replace(operands=code[first].operands.removesuffix(", gsb0"))
    assert [fault.partition(" ")[0] for fault in overwritten(code)] == ["metadata"]


class Kernel(NamedTuple):
    act: str
    num_bits: int
    shape: int
    scale_mode: int

    def __str__(self) -> str:
        tile = SHAPES[self.shape]
        mode = ("one scale a row", "scales a tile", "scales a step")[self.scale_mode]
        return f"{tile.block_m} tokens x {tile.block_n} features, {self.act}, {self.num_bits} bits, {mode}"


ACTS = ("6__half", "13__nv_bfloat16")
SHAPES = [tile for tile in _core.TILES if tile.kernel == "sm90" and tile.share == 1]  # sharing does not change the code
SCALE_MODES = 3
KERNELS = {Kernel(*each) for each in product(ACTS, _core.NUM_BITS, range(len(SHAPES)), range(SCALE_MODES))}


def kernel_name(text: str) -> Kernel | None:
    found = re.search(r"gemm_sm90I(\w+?)Li(\d+)ELi(\d+)ELNS_9ScaleModeE(\d)E", text)
    return Kernel(found[1], int(found[2]), int(found[3]), int(found[4])) if found else None


def lines(*command: str, folder: Path) -> Iterator[str]:
    # the disassembler of another release warns of the file's format, once a file
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"{command}: exit status {process.returncode}"


@pytest.fixture(scope="module")
def all_cubins(tmp_path_factory) -> list[Path]:
    """The files of device code, as they are in the extension."""
    if ARCHITECTURE not in ARCHITECTURES:
        pytest.skip(f"built without native code for {ARCHITECTURE}")
    folder = tmp_path_factory.mktemp("cubins")
    for _ in lines(cuobjdump(), "-arch", ARCHITECTURE, "-xelf", "all", LIBRARY, folder=folder):
        pass
    return list(folder.iterdir())


@pytest.fixture(scope="module")
def cubins(all_cubins) -> list[Path]:
    """Those that hold kernels with wgmma.sp."""
    return [path for path in all_cubins if b"gemm_sm90" in path.read_bytes()]


@pytest.fixture(scope="module")
def kernels(cubins) -> dict[Kernel, Code]:
    def disassemble(cubin: Path) -> dict[Kernel, Code]:
        found: dict[Kernel, Code] = {}
        kernel = None
        for line in lines(cuobjdump(), "-sass", str(cubin), folder=cubin.parent):
            if "Function : " in line:
                kernel = kernel_name(line)
            elif kernel and (each := instruction(line)):
                found.setdefault(kernel, []).append(each)
        return found

    with ThreadPoolExecutor(2) as pool:
        return {kernel: code for found in pool.map(disassemble, cubins) for kernel, code in found.items()}


def expect_none(kernels: dict[Kernel, Code], check: Callable[[Code], list[str]]) -> None:
    faults = [f"{kernel}: {fault}" for kernel, code in sorted(kernels.items()) for fault in check(code)]
    assert not faults, f"{len(faults)} faults, first\n" + "\n".join(faults[:20])


def test_every_hopper_kernel_is_read(kernels):
    assert set(kernels) == KERNELS
    for kernel, code in kernels.items():
        assert [each.address for each in code] == list(range(0, 16 * len(code), 16)), f"{kernel}: gaps"
        loops = main_loops(code)
        assert len(loops) == SHAPES[kernel.shape].teams, kernel
        assert set(multiplications(code)) <= {i for loop in loops for i in loop}, kernel
        assert all(any(code[i].opcode == WAIT for i in loop) for loop in loops), kernel


def test_main_loops_have_no_moves_to_uniform_registers_and_no_spills(kernels):
    expect_none(kernels, loop_faults)


def test_registers_of_unfinished_multiplications_are_left_alone(kernels):
    expect_none(kernels, overwritten)


def test_the_check_finds_faults_in_real_code(kernels):
    """With waits that hardly wait, registers are written too early."""
    for shape in range(len(SHAPES)):
        kernel = Kernel(ACTS[0], 4, shape, 1)
        patched = [each._replace(operands="gsb0, 0x7") if each.opcode == WAIT else each for each in kernels[kernel]]
        kinds = {fault.partition(" ")[0] for fault in overwritten(patched)}
        assert {"metadata", "weights"} <= kinds, kernel


Name = TypeVar("Name")


def stacks_of(cubins: list[Path], name: Callable[[str], Name | None]) -> dict[Name, int]:
    """Bytes of stack and local memory of every function that has a name."""
    stacks: dict[Name, int] = {}
    function = None
    for cubin in cubins:
        for line in lines(cuobjdump(), "-res-usage", str(cubin), folder=cubin.parent):
            if "Function " in line:
                function = name(line)
            elif function and (found := re.search(r"STACK:(\d+) .*LOCAL:(\d+)", line)):
                stacks[function] = int(found[1]) + int(found[2])
    return stacks


def test_no_kernel_spills(cubins):
    stacks = stacks_of(cubins, kernel_name)
    assert set(stacks) == KERNELS
    faults = [f"{kernel}: {stack} bytes of stack" for kernel, stack in stacks.items() if stack > 0]
    assert not faults, "\n".join(faults)


def test_no_decode_kernel_spills(all_cubins):
    def name(line: str) -> str | None:
        found = re.search(r"gemm_decodeI\w+", line)
        return found[0] if found else None

    stacks = stacks_of([path for path in all_cubins if b"gemm_decode" in path.read_bytes()], name)
    tiles = sum(tile.kernel == "decode" for tile in _core.TILES)
    assert len(stacks) == len(ACTS) * len(_core.NUM_BITS) * tiles * SCALE_MODES * 2, "with a correction and without"
    faults = [f"{kernel}: {stack} bytes of stack" for kernel, stack in stacks.items() if stack > 0]
    assert not faults, "\n".join(faults)
