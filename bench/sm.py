"""A cycle model of one Hopper multiprocessor: how fast programs of a kernel pass through it, with and without a memory limit.

An estimate that no card has calibrated. What it takes for granted stands in the constants below; besides: all programs take the
same way through the code, a warp issues in order as its control codes say, the oldest ready warp of a scheduler first; the
instruction cache never misses, banks never conflict. A kernel moves the bytes that it must move at least, each tensor once:
its loads are taken in turn to come from memory, as many as hold these bytes, and from a cache.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .sass import GLOBAL_LOADS, GLOBAL_STORES, Instruction, width

CLOCK = 1.748e9  # cycles per second
MULTIPROCESSORS = 132
SCHEDULERS = 4
MEMORY = 13.0  # bytes per cycle and multiprocessor: 3.0 TB/s, what a copy reaches
LEVEL_2 = 24.0  # the same of the second-level cache, 5.5 TB/s: what passes the first by (LDGSTS)
LATENCY = 950  # cycles from a load's turn in the queue of memory to its result
CACHED = {"load": 40, "copy": 260}  # the same of what a cache holds already: the first level's, the second's for LDGSTS
NEAR = {"LDS": 30, "LDSM": 33, "SHFL": 24, "MUFU": 22, "LDC": 40, "S2R": 30, "S2UR": 30, "R2UR": 12}  # cycles to a result
OTHER = 20  # cycles to the result of any other that has no fixed latency (conversions), and until operands have been read
BARRIER = 20  # cycles from the last warp's arrival to the next instruction
START = 100  # cycles from the end of a program to the first instruction of the one that takes its place
FIRST_LEVEL = 128  # bytes per cycle that loads, stores and exchanges of a multiprocessor move, shared memory included
# cycles that an instruction holds its unit, one unit of each kind for each scheduler
ARITHMETIC = {"FFMA": 1, "FADD": 1, "FMUL": 1, "HFMA2": 1, "HADD2": 1, "HMUL2": 1, "IMAD": 2}  # the units of products
CONVERSIONS = ("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO")
SLOW = 8  # of 4 lanes
INTEGER = 2  # all others: of 16 lanes
NONE = ("BAR", "BRA", "BSSY", "BSYNC", "CALL", "DEPBAR", "EXIT", "LDC", "LDGDEPBAR", "NOP", "RET", "S2R", "WARPSYNC")
PRODUCTS = {"HMMA": 256, "HGMMA": 512}  # multiply-adds in 16 bits per cycle; warps' own matrix instructions reach half the rate
MATRIX_LATENCY = 32
GROUP = 6  # the place of HGMMA's own scoreboard behind the six
EVENTS = 150_000  # instructions that a run issues at least, if its programs are many


class Step(NamedTuple):
    """What the model knows of an instruction."""

    kind: str  # load, store, shared, group, wait, sync or ""
    unit: str
    holds: int  # cycles
    latency: int
    stall: int
    write: int
    read: int
    waits: tuple[int, ...]
    keeps: int  # of a wait on a scoreboard: how many may be under way still
    bytes: int  # of a warp
    far: float = 0.0  # bytes of memory; 0: a load that a cache answers


def step_of(instruction: Instruction) -> Step:
    base, kind, unit, holds, keeps, size = instruction.base, "", "integer", INTEGER, 0, 0
    waits = tuple(b for b in range(6) if instruction.waits >> b & 1)
    write, latency = instruction.write_barrier, NEAR.get(base, OTHER)
    if base in GLOBAL_LOADS or base in GLOBAL_STORES:
        kind, unit, size = ("load" if base in GLOBAL_LOADS else "store"), "first level", 32 * width(instruction)
        holds, latency = -(-size // FIRST_LEVEL), LATENCY
        if base == "LDGSTS":
            kind = "copy"
    elif base in ("LDS", "STS", "LDSM", "STSM", "SHFL", "ATOMS"):
        size = 512 if base.endswith("M") and ".4" in instruction.name else 32 * width(instruction)
        kind, unit, holds = "shared", "first level", max(size // FIRST_LEVEL, 1)
    elif base in PRODUCTS:
        kind, unit, holds = "", "matrix", -(-multiply_adds(instruction) // PRODUCTS[base])
        latency = holds + MATRIX_LATENCY
        if base == "HGMMA":
            write = GROUP
    elif base == "LDGDEPBAR":
        kind = "group"
    elif base in ("DEPBAR", "WARPGROUP") and "DEPBAR" in instruction.name:
        found = re.match(r"(SB|gsb)(\d), 0x([0-9a-f]+)", instruction.operands)
        if found:
            kind, keeps = "wait", int(found.group(3), 16)
            waits = (*waits, GROUP if found.group(1) == "gsb" else int(found.group(2)))
    elif base == "BAR" and "ARV" not in instruction.name:
        kind = "sync"
    elif base in CONVERSIONS:
        unit, holds = "conversions", SLOW
    elif base in ARITHMETIC:
        unit, holds = "products", ARITHMETIC[base]
    elif re.fullmatch(r"U[A-Z]\w+", base):
        unit = "uniform"
    if base in NONE:
        unit, holds = "", 1
    return Step(kind, unit, holds, latency, max(instruction.stall, 1), write, instruction.read_barrier, waits, keeps, size)


def multiply_adds(instruction: Instruction) -> int:
    """Of a warp, counted in 16 bits: TF32 takes twice as long."""
    shape = instruction.name.split(".")[1]
    if "x" in shape:
        m, n, k = map(int, shape.split("x"))
        m //= 4  # a group of four warps does it
    else:
        m, n, k = int(shape[:2]), int(shape[2]), int(shape[3:])
    return m * n * k * (2 if "TF32" in instruction.name else 1)


@dataclass
class Passage:
    """``cycles``: until the last program had ended; ``steady``: cycles per program while the multiprocessor is full."""

    cycles: float
    steady: float


def moved(code: Sequence[Instruction], path: Sequence[int]) -> int:
    """Bytes that a warp's loads and stores of global memory name, those under a condition too."""
    return sum(32 * width(code[i]) for i in path if code[i].base in GLOBAL_LOADS + GLOBAL_STORES)


def steps(code: Sequence[Instruction], path: Sequence[int], needed: float) -> list[Step]:
    """What a warp does on its way, moving ``needed`` bytes of memory.

    From memory comes what an instruction loads when it is met first, and if that is not enough every n-th time later.
    """
    known = {i: step_of(code[i]) for i in set(path)}
    stored = sum(known[i].bytes for i in path if known[i].kind == "store")
    share_stores = min(needed / max(stored, 1), 1.0)
    needed -= stored * share_stores
    loads = [i for i in path if known[i].kind in ("load", "copy")]
    first = sum(known[i].bytes for i in set(loads))
    again = sum(known[i].bytes for i in loads) - first
    share_first, share_again = min(needed / max(first, 1), 1.0), max(min((needed - first) / max(again, 1), 1.0), 0.0)
    found, met, due = [], set(), 0.0
    for i in path:
        step, far = known[i], 0.0
        if step.kind == "store":
            far = step.bytes * share_stores
        elif step.kind in ("load", "copy"):
            if i not in met:
                far = step.bytes * share_first
            else:
                due += share_again
                if due > 1 - 1e-6:
                    due, far = due - 1, step.bytes
            met.add(i)
        found.append(step._replace(far=far))
    return found


def run(path: Sequence[Step], warps: int, resident: int, programs: int, memory: float | None = MEMORY) -> Passage:
    """``programs`` of so many ``warps`` pass through, ``resident`` at a time; ``memory``: bytes per cycle, None: no limit."""
    model = _Multiprocessor(path, warps, memory)
    resident = min(resident, programs)
    for slot in range(resident):
        model.begin(slot, 0.0)
    ended: list[float] = []
    started = resident
    while len(ended) < programs:
        slot, time = model.advance()
        ended.append(time)
        if started < programs:
            model.begin(slot, time + START)
            started += 1
    # programs that start together end together: the first ones tell little, the last ones have the place to themselves
    first, last = min(2 * resident, programs // 3), programs - resident
    steady = (ended[last] - ended[first]) / (last - first) if last > first else ended[-1] / programs
    return Passage(ended[-1], steady)


class _Multiprocessor:
    def __init__(self, path: Sequence[Step], warps: int, memory: float | None) -> None:
        self.path, self.warps, self.memory = path, warps, memory
        self.ready: list[tuple[float, float, int]] = []  # when, since when, which warp
        self.place: dict[int, int] = {}  # warp -> the instruction that is next
        self.boards: dict[int, list[list[float]]] = {}  # warp -> scoreboard -> when each on it is released
        self.copies: dict[int, float] = {}  # warp -> when its last LDGSTS has arrived
        self.arrived: dict[int, list[int]] = {}  # slot -> the warps that wait at the barrier
        self.running: dict[int, int] = {}  # slot -> warps that have not ended
        self.issued = [0.0] * SCHEDULERS  # when each may issue again
        self.units: dict[tuple[str, int], float] = {}
        self.first_level = self.second_level = self.queue = 0.0  # when each is free

    def begin(self, slot: int, time: float) -> None:
        self.running[slot], self.arrived[slot] = self.warps, []
        for warp in range(slot * self.warps, (slot + 1) * self.warps):
            self.place[warp], self.boards[warp], self.copies[warp] = 0, [[] for _ in range(GROUP + 1)], 0.0
            heapq.heappush(self.ready, (time, time, warp))

    def advance(self) -> tuple[int, float]:
        """Go on until a program ends: its slot and when."""
        path, ready, issued, units = self.path, self.ready, self.issued, self.units
        while True:
            time, since, warp = heapq.heappop(ready)
            scheduler = warp % SCHEDULERS
            place = self.place[warp]
            step = path[place]
            unit = (step.unit, scheduler)
            free = issued[scheduler]
            if step.unit != "first level":  # these wait in a queue, not in the warp
                free = max(free, units.get(unit, 0.0))
            if free > time:
                heapq.heappush(ready, (free, since, warp))
                continue
            issued[scheduler] = time + 1
            units[unit] = time + step.holds
            self._result(step, warp, time)
            place += 1
            if place == len(path):
                slot = warp // self.warps
                self.running[slot] -= 1
                if self.running[slot] == 0:
                    return slot, time
                self._release(slot, time)
                continue
            self.place[warp] = place
            if step.kind == "sync":
                slot = warp // self.warps
                self.arrived[slot].append(warp)
                self._release(slot, time)
            else:
                self._wake(warp, time + step.stall)

    def _release(self, slot: int, time: float) -> None:
        waiting = self.arrived[slot]
        if waiting and len(waiting) == self.running[slot]:
            self.arrived[slot] = []
            for warp in waiting:
                self._wake(warp, time + BARRIER)

    def _wake(self, warp: int, time: float) -> None:
        """The warp's next instruction may start when what it waits for is there."""
        step, boards = self.path[self.place[warp]], self.boards[warp]
        for board in step.waits:
            times = boards[board]
            keeps = step.keeps if board == step.waits[-1] else 0
            if len(times) > keeps:
                times.sort()
                time = max(time, times[len(times) - keeps - 1])
                del times[: len(times) - keeps]
        heapq.heappush(self.ready, (time, time, warp))

    def _result(self, step: Step, warp: int, time: float) -> None:
        """When scoreboards are released."""
        done = time + step.latency
        if step.unit == "first level":
            begin = max(time, self.first_level)
            self.first_level = begin + step.holds
            done = self.first_level + step.latency
            if step.kind in ("load", "store", "copy"):
                done = self._arrival(step, self.first_level)
        if step.kind == "copy":
            self.copies[warp] = max(self.copies[warp], done)
        elif step.kind == "group":
            done = max(done, self.copies[warp])
        if step.write != 7:
            self.boards[warp][step.write].append(done)
        if step.read != 7:
            self.boards[warp][step.read].append(max(time, self.first_level if step.unit == "first level" else 0) + OTHER)

    def _arrival(self, step: Step, time: float) -> float:
        """When the bytes of a load are there: it queues at the second-level cache and at memory."""
        if step.kind == "copy":
            self.second_level = time = max(self.second_level, time) + step.bytes / LEVEL_2
        if not step.far:
            return time + CACHED[step.kind]
        if self.memory is not None:
            self.queue = time = max(self.queue, time) + step.far / self.memory
        return time + LATENCY
