"""Reads a compiled kernel's machine code for what its PTX does not tell: the final width of its stores, the cost of an
exponential, and how many programs a multiprocessor holds. Uses triton's nvdisasm and needs no GPU.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)\s*([^;]*);")
LABEL = re.compile(r"^\.L\w+:")
JUMPS = ("BRA", "EXIT", "RET", "BRX", "JMP")
SQUARED = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+@!?P\w+\s+FMUL(?:\.FTZ)?\s+(R\d+), \1(?:\.reuse)?, \1\b")
"""The multiplication after an exponential whose argument was halved to keep denormal results from becoming 0."""


@dataclass(frozen=True)
class Sass:
    """Facts about the machine code of one kernel. Loads and stores are those of global memory. Instructions are counted
    as they appear in the code, those of a loop once."""

    widest_load: int  # bits per thread
    widest_store: int
    wide_stores: int  # of 128 bits
    exponentials: int
    scaled_exponentials: int  # exponentials that keep denormal results, at two products each: not .ftz
    product_columns: int  # n of the widest warp-group product (sm_90)
    slots_per_exponential: float
    """Instructions that a warp issues per exponential, in basic blocks with exponentials. Their unit takes 8 cycles for
    a warp, so up to 8 instructions are free."""


@dataclass(frozen=True)
class Multiprocessor:
    """Resources of a multiprocessor, which its programs share."""

    warps: int
    programs: int
    shared_memory: int  # bytes
    registers: int = 65_536


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 2**10),
    "sm_86": Multiprocessor(48, 16, 100 * 2**10),
    "sm_90": Multiprocessor(64, 32, 228 * 2**10),
    "sm_100": Multiprocessor(64, 32, 228 * 2**10),
    "sm_120": Multiprocessor(48, 24, 100 * 2**10),
}


def programs_per_multiprocessor(architecture: str, warps: int, registers: int, shared: int) -> int:
    """Number of programs, with `registers` per thread and `shared` bytes each, that run on a multiprocessor at once."""
    has = MULTIPROCESSORS[architecture]
    of_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256, by one of four schedulers
    warps_by_registers = has.registers // 4 // max(of_warp, 256) * 4
    of_program = -(-(shared + 1024) // 128) * 128  # the driver reserves 1 KiB per program
    return min(has.programs, min(has.warps, warps_by_registers) // warps, has.shared_memory // of_program)


def disassembled(cubin: str | Path) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    command = [str(tool), "--print-code", "--no-dataflow", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(text: str) -> Sass:
    """Parse the text that `disassembled` returns."""
    lines = text.splitlines()
    operations = [match[1] for line in lines if (match := INSTRUCTION.match(line))]
    loads = [_bits(o) for o in operations if re.match(r"LDG(STS)?\.", o)]
    stores = [_bits(o) for o in operations if o.startswith("STG.")]
    stores += [128 for o in operations if o.startswith("UTMASTG")]
    exponentials = operations.count("MUFU.EX2")
    products = [int(n) for n in re.findall(r"\b[HIQ]GMMA\.\d+x(\d+)x\d+", text)]
    with_exponentials = [block for block in _blocks(lines) if "MUFU.EX2" in block]
    return Sass(
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        wide_stores=stores.count(128),
        exponentials=exponentials,
        scaled_exponentials=sum(bool(SQUARED.match(line)) for line in lines),
        product_columns=max(products, default=0),
        slots_per_exponential=round(sum(map(len, with_exponentials)) / exponentials, 2) if exponentials else 0.0,
    )


def _bits(operation: str) -> int:
    """Width of a load or store: LDG.E.128 has 128, LDG.E.U16 16, LDG.E 32."""
    sizes = [int(size) for size in re.findall(r"\.[US]?(\d+)\b", operation)]
    return max(sizes, default=32)


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Basic blocks: the instructions between labels and jumps."""
    block: list[str] = []
    for line in lines:
        if LABEL.match(line) and block:
            yield block
            block = []
        if match := INSTRUCTION.match(line):
            block.append(match[1])
            if match[1].split(".")[0] in JUMPS:
                yield block
                block = []
    if block:
        yield block
