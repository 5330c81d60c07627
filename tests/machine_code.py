"""Reads the machine code of a kernel with wgmma.sp, as cuobjdump prints it, and finds what ptxas does not keep for us
(tests/test_sass.py says what, and why). Every check is a function over a list of instructions.
"""

import re
from typing import NamedTuple

MULTIPLY, WAIT = "HGMMA", "WARPGROUP.DEPBAR.LE"
# What may not stand in a main loop. A call would also hide what it writes.
KEPT_OUT = {"R2UR": "register-to-uniform move", "LDL": "spill", "STL": "spill", "CALL": "call"}
INDIRECT = ("BRX", "JMX", "JMP")


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.predicate} {self.opcode} {self.operands}"


Code = list[Instruction]
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def instruction(line: str) -> Instruction | None:
    found = INSTRUCTION.match(line)
    return Instruction(int(found[1], 16), found[2] or "", found[3], found[4]) if found else None


def successors(code: Code) -> list[list[int]]:
    """Of every instruction, where those that may run next stand in `code`.

    A call comes back. BSYNC, where threads that went different ways meet, stands right before the place it leads to.
    Where an indirect jump leads is not known: it may not come after a multiplication, which unfinished() checks.
    """
    at = {each.address: i for i, each in enumerate(code)}
    following = []
    for i, each in enumerate(code):
        always = not each.predicate
        after = []
        if each.name == "BRA":
            after.append(at[int(each.operands.split(", ")[-1], 16)])
            always = always and ", " not in each.operands  # BRA.U UP0, 0x100: by a uniform predicate
        if not (always and each.name in ("BRA", "EXIT", "RET", *INDIRECT)) and i + 1 < len(code):
            after.append(i + 1)
        following.append(after)
    return following


def multiplications(code: Code) -> list[int]:
    return [i for i, each in enumerate(code) if each.name == MULTIPLY]


def main_loops(code: Code) -> list[list[int]]:
    """The instructions of the innermost loops with a multiplication, wherever they stand: ptxas moves waits aside.
    A loop is what reaches a branch back without passing through the branch's target. Each team of consumers has one."""
    before: list[list[int]] = [[] for _ in code]
    for i, after in enumerate(successors(code)):
        for j in after:
            before[j].append(i)
    at = {each.address: i for i, each in enumerate(code)}
    all_multiplications = multiplications(code)
    loops = []
    for latch, each in enumerate(code):
        if each.name != "BRA":
            continue
        head = at[int(each.operands.split(", ")[-1], 16)]
        if not any(head <= i <= latch for i in all_multiplications):
            continue
        body, left = {head}, [latch]
        while left:
            i = left.pop()
            if i not in body:
                body.add(i)
                left += before[i]
        loops.append(body)
    # a loop around another one, as that over output tiles, is no main loop
    innermost = [sorted(body) for body in loops if not any(other < body for other in loops)]
    assert innermost, "no loop contains a multiplication"
    return innermost


def loop_faults(code: Code) -> list[str]:
    loop = sorted({i for body in main_loops(code) for i in body})
    outside = set(multiplications(code)) - set(loop)
    faults = [f"multiplication outside the main loop: {code[i]}" for i in sorted(outside)]
    return faults + [f"{KEPT_OUT[code[i].name]}: {code[i]}" for i in loop if code[i].name in KEPT_OUT]


def written(each: Instruction) -> range:
    """The registers that an instruction writes; where the width is in doubt too many, which can raise a false alarm and
    hide nothing."""
    if each.name == MULTIPLY:
        return operands_of(each).sums
    if each.name in ("BAR", "RET", "WARPSYNC", "NANOSLEEP"):  # these read their first register
        return range(0)
    operands = each.operands.split(", ")
    if re.fullmatch(r"U?P[\dT]", operands[0]):  # SHFL and others: a predicate first
        operands = operands[1:]
    first = re.fullmatch(r"R(\d+)", operands[0]) if operands else None
    if first is None:  # a store's address, predicates, uniform registers, nothing
        return range(0)
    parts = each.opcode.split(".")
    width = 1
    if each.name in ("CS2R", "DADD", "DMUL", "DFMA") or {"64", "WIDE"} & set(parts) or parts[1:2] in (["U64"], ["S64"]):
        width = 2
    if "128" in parts or each.name in ("LDSM", "HMMA", "IMMA"):
        width = 4
    return range(int(first[1]), int(first[1]) + width)


def read(each: Instruction) -> set[int]:
    """The registers that an instruction reads; where the width is in doubt too many, as in written()."""
    operands = each.operands.split(", ")
    parts = set(each.opcode.split("."))
    width = 4 if "128" in parts else 2 if {"64", "WIDE"} & parts or each.name in ("DADD", "DMUL", "DFMA") else 1
    found = set()
    for operand in operands[1:] if written(each) else operands:
        of_operand = width if "[" not in operand else 2 if ".64" in operand else 1  # an address is one register or two
        for number in re.findall(r"\bR(\d+)", operand):
            found |= set(range(int(number), int(number) + of_operand))
    return found


class Operands(NamedTuple):
    """Registers of a multiplication."""

    sums: range
    weights: range
    metadata: range


def operands_of(each: Instruction) -> Operands:
    # HGMMA.SP.64x128x32.F32 R24, R64, gdesc[UR16], R24, R73, 0x0, gsb0: sums, weights, activations, sums, metadata
    tokens = re.search(r"\.SP\.64x(\d+)x32\.F32", each.opcode)
    found = re.match(r"R(\d+), R(\d+), gdesc\[UR\d+\], (?:R\1|RZ), R(\d+),", each.operands)
    assert tokens is not None, f"a multiplication this test cannot read: {each}"
    assert found is not None, f"operands this test cannot read: {each}"
    sums, weights, metadata = (int(r) for r in found.groups())
    return Operands(range(sums, sums + int(tokens[1]) // 2), range(weights, weights + 4), range(metadata, metadata + 1))


def unfinished(code: Code) -> dict[int, dict[int, int]]:
    """Before each instruction, the multiplications that may be unfinished, each with how many groups were surely
    committed after its own. "gsb0" commits a group; a wait for all groups but the newest N ends those with N newer ones
    or more."""
    following = successors(code)
    starts = multiplications(code)
    state: dict[int, dict[int, int]] = {i: {} for i in starts}
    left = list(starts)
    while left:
        i = left.pop()
        now, each = dict(state[i]), code[i]
        assert each.name not in INDIRECT, f"a jump this test cannot follow: {each}"
        if each.name == MULTIPLY:
            commits = "gsb0" in each.operands
            now = {m: newer + commits for m, newer in now.items()}
            now[i] = 0 if commits else -1
        elif each.opcode == WAIT and not each.predicate:
            pending = int(each.operands.removeprefix("gsb0, "), 16)
            now = {m: newer for m, newer in now.items() if newer < pending}
        for j in following[i]:
            known = state.get(j)
            merged = dict(known or {})
            for m, newer in now.items():  # of two ways to the same place the one on which less was committed
                merged[m] = min(newer, merged.get(m, newer))
            if merged != (known or {}):
                state[j] = merged
                left.append(j)
    return state


def overwritten(code: Code) -> list[str]:
    """Writes to registers of unfinished multiplications, and reads of their sums. Two multiplications may share sums,
    since they run in order."""
    faults = []
    for i, pending in sorted(unfinished(code).items()):
        target, source = set(written(code[i])), read(code[i])
        for m in sorted(pending):
            for kind, registers in operands_of(code[m])._asdict().items():
                if kind == "sums" and code[i].name == MULTIPLY:
                    continue
                if target & set(registers):
                    faults.append(f"{kind} of an unfinished multiplication: {code[i]}, of {code[m]}")
                elif kind == "sums" and source & set(registers):
                    faults.append(f"sums read of an unfinished multiplication: {code[i]}, of {code[m]}")
    return faults
