"""Reading machine code: NVIDIA's SASS with its control codes, AMD's assembler, and the way of a warp through either.

Since Volta an instruction is 128 bits, of which the upper word says when it may start: bits 41-44 the cycles until the warp's
next instruction, 45 the hint to yield, 46-48 and 49-51 the scoreboards (7: none) that are released when its result is there
and when its operands have been read, 52-57 the scoreboards that it waits for.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ENCODED = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*\n\s*/\* 0x([0-9a-f]{16}) \*/", re.MULTILINE
)
OPERATION = re.compile(r"(?:(@!?U?P\w+) )?(\S+)\s*(.*)")
JUMPS = ("BRA", "CALL", "JMP")
MATRIX = re.compile(r"[A-Z]G?MMA|UTC\w*MMA|v_s?mfmac?_\w+")
GLOBAL_LOADS = ("LDG", "LDGSTS", "global_load", "buffer_load")
GLOBAL_STORES = ("STG", "global_store", "buffer_store")
BARRIERS = ("BAR", "s_barrier")
DEVICE = ("SM80", "SM90a", "SM100a")


class Instruction(NamedTuple):
    """``target``: the number of the instruction that it may jump to, or -1."""

    name: str  # with its suffixes
    operands: str
    guarded: bool  # executed under a condition
    target: int
    control: int  # the bits of the upper word from 41 on

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def stall(self) -> int:
        return self.control & 15

    @property
    def write_barrier(self) -> int:
        return self.control >> 5 & 7

    @property
    def read_barrier(self) -> int:
        return self.control >> 8 & 7

    @property
    def waits(self) -> int:
        return self.control >> 11 & 63


def sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an ELF file's sections."""
    (offset,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + i * size) for i in range(count)]
    for name, kind, _, _, start, length in headers:
        start_of_name = headers[names][4] + name
        end = cubin.index(b"\0", start_of_name)
        yield cubin[start_of_name:end].decode(), b"" if kind == 8 else cubin[start : start + length]


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """What ptxas wrote down of the only kernel: registers of a thread, bytes that it spills."""
    info = dict(sections(cubin))[".nv.info"]
    values = {}
    while len(info) >= 4:
        form, attribute, length = struct.unpack_from("<BBH", info)
        if form == 4:  # followed by as many bytes: of these attributes the symbol and its value
            values[attribute] = struct.unpack_from("<I", info, 8)[0] if length == 8 else 0
        info = info[4 + (length if form == 4 else 0) :]
    return values[0x2F], values[0x12]


def disassemble(cubins: Sequence[bytes], device: str) -> list[list[Instruction]]:
    """The code of each cubin's only kernel. nvdisasm takes longer to start than to read, so it starts once for all."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    texts = [next(data for name, data in sections(cubin) if name.startswith(".text.")) for cubin in cubins]
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "code"
        image.write_bytes(b"".join(texts))
        command = [tool, "-hex", "-ndf", "-b", device, image]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    everything, codes, start = parse_sass(listing), [], 0
    for text in texts:
        stop = start + len(text) // 16
        part = everything[start:stop]
        codes.append([i._replace(target=i.target - start) if i.target >= 0 else i for i in part])
        start = stop
    if start != len(everything):
        raise ValueError(f"nvdisasm printed {len(everything)} instructions of {start}")
    return codes


def parse_sass(listing: str) -> list[Instruction]:
    """What ``nvdisasm -hex -b`` prints."""
    code = []
    for _, text, upper in ENCODED.findall(listing):
        guard, name, operands = OPERATION.fullmatch(text).groups()
        target = -1
        if name.split(".")[0] in JUMPS and (place := re.search(r"(?<!\[)\b0x([0-9a-f]+)$", operands)):
            target = int(place.group(1), 16) // 16
            guard = guard or ("" if "," not in operands else operands.split(",")[0])  # BRA.U UP0, 0x10
        code.append(Instruction(name, operands, bool(guard), target, int(upper, 16) >> 41))
    return code


def parse_gcn(listing: str) -> list[Instruction]:
    """The instructions of LLVM's assembler for AMD."""
    labels, rows = {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(rows)
        elif found := re.match(r"\t([a-z]\w+)(?:[ \t]+([^;]*))?", line):
            rows.append((found.group(1), (found.group(2) or "").strip()))
    return [
        Instruction(name, text, name.startswith("s_cbranch"), labels.get(text, -1) if "branch" in name else -1, 0)
        for name, text in rows
    ]


def width(instruction: Instruction) -> int:
    """Bytes that a thread moves by a load or store."""
    if "_" in instruction.base:  # AMD: dwordx4, dwordx2, dword, ushort, short_d16_hi, ubyte
        size = re.search(r"dword(?:x(\d))?|short|byte", instruction.name)
        if size is None:
            return 0
        return {"short": 2, "byte": 1}.get(size.group(), 4 * int(size.group(1) or 1))
    for suffix, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in instruction.name.split("."):
            return size
    return 4


def accesses(code: Sequence[Instruction], kinds: tuple[str, ...]) -> dict[int, int]:
    """Bytes a thread -> how many accesses to global memory move so many."""
    found: dict[int, int] = {}
    for instruction in code:
        if instruction.base in kinds or ("_" in instruction.base and instruction.base.startswith(kinds)):
            found[width(instruction)] = found.get(width(instruction), 0) + 1
    return dict(sorted(found.items()))


def ends(code: Sequence[Instruction]) -> int:
    """The number of instructions without the padding behind them: a branch to itself, and nothing at all."""
    count = len(code)
    while count and (code[count - 1].base in ("NOP", "s_nop", "s_code_end") or code[count - 1].target == count - 1):
        count -= 1
    return count


def loops(code: Sequence[Instruction]) -> list[int]:
    """The branches back, in order."""
    return [i for i, x in enumerate(code) if 0 <= x.target < i and x.base not in ("CALL",)]


def walk(code: Sequence[Instruction], counts: Sequence[int]) -> list[int]:
    """The instructions that a warp executes, in order, if it goes ``counts`` times through the loops (zeros: through none).

    A branch forward under a condition is taken unless it passes over a loop that runs: what it leaves out is for rare cases.
    An end under a condition is not, unless there was a store before it and there is a load behind it: copies of a few rows.
    """
    found = loops(code)
    if counts and not any(counts):
        counts = [0] * len(found)
    if len(found) != len(counts):
        raise ValueError(f"{len(counts)} counts for {len(found)} loops")
    left, back = {}, dict(zip(found, counts))
    path, i = [], 0
    while i < len(code):
        instruction = code[i]
        path.append(i)
        if instruction.base in ("EXIT", "s_endpgm"):
            last_time = i + 1 in back and left.get(i + 1, back[i + 1]) <= 1  # a loop that the program ends in
            if not instruction.guarded or last_time or _rest_is_rare(code, i):
                break
        if i in back:
            left[i] = left.get(i, back[i]) - 1
            if left[i] > 0:
                i = instruction.target
                continue
            del left[i]
        elif instruction.target > i and instruction.base != "CALL":
            runs = any(back[j] > 0 for j in range(i, instruction.target) if j in back)
            if not instruction.guarded or not runs:
                i = instruction.target
                continue
        i += 1
    return path


def _rest_is_rare(code: Sequence[Instruction], i: int) -> bool:
    return bool(accesses(code[:i], GLOBAL_STORES)) and bool(accesses(code[i:], GLOBAL_LOADS))


def facts(code: Sequence[Instruction]) -> dict[str, int]:
    """What is counted of a kernel: instructions as they stand in the code, not as often as they run."""
    code = code[: ends(code)]
    loads, stores = accesses(code, GLOBAL_LOADS), accesses(code, GLOBAL_STORES)
    return {
        "instructions": len(code),
        "barriers": sum(x.base in BARRIERS for x in code),
        "vector loads": sum(n for size, n in loads.items() if size >= 16),
        "narrow loads": sum(n for size, n in loads.items() if size < 16),
        "vector stores": sum(n for size, n in stores.items() if size >= 16),
        "narrow stores": sum(n for size, n in stores.items() if size < 16),
        "matrix instructions": sum(MATRIX.fullmatch(x.base) is not None for x in code),
        "loops": len(loops(code)),
    }
