"""Reads machine code of NVIDIA GPUs as ``cuobjdump -sass`` prints it: instructions, basic blocks, loops, and counts.

A loop is a natural loop: a branch back to a block that every way to the branch passes. Code that only diverged warps
reach (``BRA.DIV``) is no part of one, and a called subroutine is one instruction: what runs in it depends on data.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT])\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?")
BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
# Pipe -> opcodes. What starts with U works on the uniform registers of a warp and takes an issue slot alone, as do
# branches, barriers and constants; an opcode that stands nowhere is of the ALU.
PIPES = {
    "fma": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2",
    "imad": "IMAD IDP",
    "special": "MUFU F2I I2F F2F FRND POPC FLO BREV REDUX",
    "shuffle": "SHFL",
    "global": "LDG STG LDGSTS LD ST ATOM ATOMG RED LDL STL",
    "shared": "LDS STS LDSM STSM ATOMS",
    "matrix": "HGMMA IGMMA QGMMA HMMA IMMA QMMA",
    "barrier": "BAR",
    "": "NOP BRA EXIT DEPBAR LDGDEPBAR WARPGROUP WARPSYNC BSSY BSYNC BREAK CALL RET MEMBAR FENCE ERRBAR CCTL LDC S2R "
    "SYNCS R2UR S2UR ELECT YIELD NANOSLEEP ENDCOLLECTIVE",
}
PIPE = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}
ASYNCHRONOUS = ("HGMMA", "IGMMA", "QGMMA")  # of a warp group, which waits for them when it wants the result


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate, "!P0", or "" where it always runs
    name: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        """Where it runs, or "" for an issue slot alone."""
        nothing = self.opcode.startswith("U") or self.guard in ("!PT", "!UPT")
        return "" if nothing else PIPE.get(self.opcode, "alu")

    @property
    def bytes(self) -> int:
        """Of a memory access, per lane."""
        return next((BYTES[part] for part in self.name.split(".") if part in BYTES), 4)

    @property
    def target(self) -> int | None:
        """The address that a branch, or the barrier of a divergent region, names."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K) of a matrix instruction: of a warp group for the asynchronous ones, else of a warp."""
        if found := re.search(r"\.(\d+)x(\d+)x(\d+)", self.name):
            return int(found[1]), int(found[2]), int(found[3])
        digits = re.search(r"\.(\d{3,})", self.name)[1]  # 16816, 1688, 16832, 884
        m = 16 if digits.startswith("16") else 8
        return m, 8, int(digits[len(str(m)) + 1 :])

    @property
    def kind(self) -> str:
        """What a matrix instruction multiplies: "16", "tf32" or "8"."""
        return "tf32" if "TF32" in self.name else "16" if self.opcode in ("HGMMA", "HMMA") else "8"


def functions(text: str) -> dict[str, list[Instruction]]:
    """Name -> instructions of every function that ``cuobjdump -sass`` lists."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if (name := line.strip()).startswith("Function :"):
            code = found.setdefault(name.removeprefix("Function :").strip(), [])
        elif match := LINE.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return found


@dataclass(frozen=True)
class Loop:
    """Blocks of a natural loop by their number; ``inner``: loops right inside it.

    sometimes: those of its own blocks that an iteration may leave out.
    """

    blocks: frozenset[int]
    inner: tuple[Loop, ...]
    sometimes: frozenset[int]

    @property
    def own(self) -> frozenset[int]:
        return self.blocks.difference(*(loop.blocks for loop in self.inner))


class Program:
    """Basic blocks of one function, in the order of addresses, and its loops from the innermost outwards."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.blocks = _blocks(code)
        first = {block[0].address: i for i, block in enumerate(self.blocks)}
        self.following = [_following(block, i, first, code) for i, block in enumerate(self.blocks)]
        self.reached, self._dominators = self._dominate()
        self.loops = self._loops()

    def _dominate(self) -> tuple[frozenset[int], list[int]]:
        """Blocks that are reached, and for each those on every way to it, as bits."""
        before: dict[int, list[int]] = {0: []}
        order = [0]
        for i in order:
            for j in self.following[i]:
                if j not in before:
                    before[j] = []
                    order.append(j)
                before[j].append(i)
        above = [(1 << len(self.blocks)) - 1] * len(self.blocks)
        above[0], changed = 1, True
        while changed:
            changed = False
            for i in order[1:]:
                now = functools.reduce(int.__and__, (above[j] for j in before[i])) | 1 << i
                above[i], changed = now, changed or now != above[i]
        return frozenset(order), above

    def _loops(self) -> list[Loop]:
        bodies: dict[int, set[int]] = {}
        latches: dict[int, list[int]] = {}
        before = [[j for j in self.reached if i in self.following[j]] for i in range(len(self.blocks))]
        for latch in self.reached:
            for head in self.following[latch]:
                if self._dominators[latch] >> head & 1:
                    body, open_ = bodies.setdefault(head, {head}), [latch]
                    latches.setdefault(head, []).append(latch)
                    while open_:
                        if (block := open_.pop()) not in body:
                            body.add(block)
                            open_ += before[block]
        found: list[Loop] = []
        for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
            within = [loop for loop in found if loop.blocks < body]
            inner = tuple(one for one in within if not any(one.blocks < other.blocks for other in within))
            always = functools.reduce(int.__and__, (self._dominators[latch] for latch in latches[head]))
            own = body.difference(*(loop.blocks for loop in inner))
            found.append(Loop(frozenset(body), inner, frozenset(i for i in own if not always >> i & 1)))
        return found

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        return [one for i in sorted(blocks) for one in self.blocks[i]]

    def iteration(self, loop: Loop, steps: int, others: int) -> list[Instruction]:
        """What one iteration of ``loop`` runs if every branch is taken.

        A loop inside it runs ``steps`` times where it has products of its own, and else ``others`` times.
        """
        code: list[Instruction] = []
        inner = {min(one.blocks): one for one in loop.inner}
        for i in sorted(loop.own | inner.keys()):
            if i in inner:
                products = count(self.code(inner[i].own)).multiply_adds
                code += self.iteration(inner[i], steps, others) * (steps if products else others)
            else:
                code += self.blocks[i]
        return code

    @functools.cached_property
    def hot(self) -> Loop | None:
        """The loop with the most multiply-adds on the matrix unit, or else instructions, outside the loops in it."""

        def weight(loop: Loop) -> tuple[int, int]:
            work = count(self.code(loop.own))
            return work.multiply_adds, work.slots

        return max(self.loops, key=weight, default=None)


def _blocks(code: Sequence[Instruction]) -> list[list[Instruction]]:
    starts = {one.target for one in code if one.opcode in ("BRA", "BSSY")} | {code[0].address}
    blocks: list[list[Instruction]] = []
    ended = True
    for one in code:
        if ended or one.address in starts:
            blocks.append([])
        blocks[-1].append(one)
        ended = one.opcode in ("BRA", "BSYNC", *ENDS)
    return blocks


def _following(block: list[Instruction], i: int, first: Mapping[int, int], code: Sequence[Instruction]) -> list[int]:
    """The blocks that may come after ``block``, which is the ``i``-th."""
    last, after = block[-1], [i + 1] if i + 1 < len(first) else []
    if last.opcode in ENDS:
        return after if last.guard else []
    if last.opcode == "BSYNC":  # threads meet, and go on at the place that the region's BSSY named
        register = last.operands.split(",")[0]
        regions = [o for o in code if o.opcode == "BSSY" and o.operands.startswith(f"{register},")]
        place = max((o for o in regions if o.address < last.address), key=lambda o: o.address, default=None)
        return after if place is None else [first[place.target]]
    if last.opcode != "BRA" or last.name == "BRA.DIV":
        return after
    always = not last.guard and "," not in last.operands
    there = [first[last.target]] if last.target in first else []
    return there if always else [*there, *after]


@dataclass
class Work:
    """The work of instructions on the pipes of an SM, of one warp.

    pipes: pipe -> instructions. fused: those that are float32 multiply-adds. products: kind and whether asynchronous ->
    multiply-adds (a warp's share). shared: bytes through shared memory, where each lane has a place of its own;
    operands: those that asynchronous products read there (a warp's share). loaded, stored: bytes of global memory, as
    if every lane had its own; loads: bytes per lane of a global load -> their number.
    """

    slots: int = 0
    pipes: Counter[str] = field(default_factory=Counter)
    products: Counter[tuple[str, bool]] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    fused: int = 0
    shared: int = 0
    operands: int = 0
    loaded: int = 0
    stored: int = 0
    loads: Counter[int] = field(default_factory=Counter)

    @property
    def multiply_adds(self) -> int:
        return sum(self.products.values())


def count(code: Iterable[Instruction]) -> Work:
    work = Work()
    for one in code:
        work.slots += 1
        if not one.pipe:
            continue
        work.pipes[one.pipe] += 1
        work.fused += one.opcode == "FFMA"
        if one.pipe == "matrix":
            m, n, k = one.shape
            group = one.opcode in ASYNCHRONOUS
            work.products[one.kind, group] += m * n * k // (4 if group else 1)
            work.shapes[".".join(one.name.split(".")[:2])] += 1
            if group:  # a row of K numbers has 32 bytes, whatever they are; A may come from registers
                work.operands += 32 * (n + (0 if re.match(r"R\d+, R\d+", one.operands) else m)) // 4
        elif one.pipe == "shared":
            work.shared += 32 * _shared_bytes(one)
        elif one.pipe == "global":  # LDGSTS too: what it copies goes past the registers
            if one.opcode.startswith("LD"):
                work.loaded += 32 * one.bytes
                work.loads[one.bytes] += 1
            else:
                work.stored += 32 * one.bytes
    return work


def _shared_bytes(one: Instruction) -> int:
    """Bytes per lane: a matrix of 8 by 8 numbers of 16 bits is 4 bytes of each."""
    if one.opcode in ("LDSM", "STSM"):
        return 4 * int(one.name[-1] if one.name[-2:] in (".2", ".4") else 1)
    return one.bytes


def duration(code: Sequence[Instruction], latency: Mapping[str, float], rate: Mapping[str, float]) -> float:
    """Mean cycles of an iteration of a loop for a warp that has the SM to itself.

    Instructions issue in order, one a cycle, each when what it reads is there. Copies to shared memory and products of
    a warp group are waited for where the code does. latency: pipe -> cycles until a result can be read. rate: kind ->
    multiply-adds of asynchronous products per cycle.
    """
    now, ready, ends = 0.0, {}, []
    copies, groups, unit = [0.0], [0.0], 0.0
    steps = [(one, *_registers(one)) for one in code]
    for _ in range(8):  # pipelines of two or three stages may take turns: a mean over six, when they are filled
        for one, written, read in steps:
            now = max([now + 1, *(ready.get(name, 0.0) for name in read)])
            if one.opcode in ASYNCHRONOUS and one.pipe:
                unit = max(unit, now) + math.prod(one.shape) / rate[one.kind]
                groups.append(unit + latency["matrix"])
            elif one.opcode == "LDGSTS":
                copies[-1] = max(copies[-1], now + latency["global"])
            elif one.opcode == "LDGDEPBAR":
                copies.append(0.0)
            elif one.name == "DEPBAR.LE" or one.name == "WARPGROUP.DEPBAR.LE":
                pending = copies[:-1] if one.name == "DEPBAR.LE" else groups
                left = int(one.operands.split(",")[1], 16)
                now = max([now, *pending[: len(pending) - left]])
            elif one.pipe == "barrier":
                now += latency["barrier"]
            ready.update((name, now + latency.get(one.pipe, latency["alu"])) for name in written)
        ends.append(now)
    return (ends[7] - ends[1]) / 6


def waited_for(code: Iterable[Instruction]) -> bool:
    """Whether each of several asynchronous products is waited for before the next is issued."""
    products, waits, open_ = 0, 0, False
    for one in code:
        if one.opcode in ASYNCHRONOUS:
            products, open_ = products + 1, True
        elif one.name == "WARPGROUP.DEPBAR.LE" and one.operands.endswith(" 0x0") and open_:
            waits, open_ = waits + 1, False
    return products == waits > 1


@functools.lru_cache(maxsize=1 << 14)
def _registers(one: Instruction) -> tuple[set[str], set[str]]:
    """Names of the registers that an instruction writes, and of those that it reads."""
    operands = [part.strip() for part in one.operands.split(",")] if one.operands else []
    store = one.opcode in ("STG", "STS", "STSM", "STL", "RED", "LDGSTS", "BAR") or one.opcode in ASYNCHRONOUS
    wide = max(1, one.bytes // 4) if one.pipe in ("global", "shared") else 1
    wide = 2 if ".WIDE" in one.name or one.name == "CS2R" or one.opcode.startswith("D") else wide
    wide = _shared_bytes(one) // 4 if one.opcode in ("LDSM", "STSM") else 4 if one.opcode == "HMMA" else wide
    written, read = set(), {one.guard.lstrip("!")} if one.guard else set()
    for place, operand in enumerate(operands):
        beside = place == 1 and (one.pipe == "shuffle" or re.fullmatch(r"U?P[\dT]", operand) is not None)
        result = not store and (place == 0 or beside)
        for kind, number, double in REGISTER.findall(operand):
            if one.opcode == "HMMA":
                many = 2 if place == 2 else 4
            else:
                many = 2 if double else wide if (result or (store and "[" not in operand)) and kind != "P" else 1
            names = {f"{kind}{int(number) + i}" for i in range(many)}
            (written if result else read).update(names)
    return written, read
