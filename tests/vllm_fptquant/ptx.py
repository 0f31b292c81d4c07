"""A small interpreter of PTX, the virtual instruction set of NVIDIA GPUs, in numpy.

Executes one kernel on a grid of thread blocks, all threads of a block at a time, with just the instructions that the
integer kernels under test consist of; any other raises. Semantics: NVIDIA's PTX ISA, sections named in brackets.
Not shown by it: what the assembler makes of PTX, and a copy that was not waited for (copies take no time here).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.vllm_fptquant.ptx_arithmetic import Array, compute, signed_fields

STATEMENT = re.compile(r"\s*(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
WIDTH = re.compile(r"\.[usbf](8|16|32|64)$")


@dataclass(frozen=True)
class Instruction:
    """One statement: the predicate that guards it, its name and operands."""

    negated: bool
    guard: str | None
    name: str
    operands: tuple[Any, ...]


def operands_of(text: str) -> tuple[Any, ...]:
    """Splits at commas outside of braces; `{a, b}` becomes a tuple, `[a+4]` a pair (a, 4)."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    result: list[Any] = []
    for part in (part.strip() for part in parts):
        if part[0] == "{":
            result.append(tuple(item.strip() for item in part[1:-1].split(",")))
        elif part[0] == "[":
            base, _, offset = part[1:-1].strip().partition("+")
            result.append((base, int(offset or 0)))
        else:
            result.append(part)
    return tuple(result)


class Program:
    """A parsed kernel."""

    def __init__(self, text: str, threads: int = 0) -> None:
        """Parses the one `.entry` of a PTX module; `threads` of a block where it does not say itself."""
        text = re.sub(r"//[^\n]*", "", text)
        entry = text[text.index(".entry") :]
        header, body = entry.split("{", 1)
        self.parameters = re.findall(r"\.param[^,)]*?(\w+)(?:\[\d+\])?\s*(?=[,)])", header)
        self.threads = threads or int(re.search(r"\.maxntid\s+(\d+)", header)[1])  # type: ignore[index]
        shared = re.findall(r"\.shared [^;]*?(\w+)(?:\[\d+\])?;", body)
        assert len(shared) <= 1  # one variable, at address 0; another name for what the launch adds
        # A parameter's address is its place among them.
        self.symbols = {name: place for place, name in enumerate(self.parameters)}
        self.symbols |= dict.fromkeys(("shared_memory", *shared), 0)
        constants = re.findall(r"\.const \S+ \S+ \.u32 (\w+)(?: = (\d+))?;", text)
        self.constants = {name: int(value or 0) for name, value in constants}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        body = re.sub(r"(\$?\w+):(?!:)", r"\1 LABEL;", body)
        body = re.sub(r"\{(?=[^{}]*;)|(?<=;)\s*\}", " ", body)  # scopes; the braces of operands hold no semicolon
        for statement in map(str.strip, body.split(";")):
            if statement.endswith(" LABEL"):
                self.labels[statement.removesuffix(" LABEL")] = len(self.instructions)
            elif statement and statement[0] != ".":
                negated, guard, name, rest = STATEMENT.fullmatch(statement).groups()  # type: ignore[union-attr]
                self.instructions.append(Instruction(bool(negated), guard, name, operands_of(rest)))


class Memory:
    """Global memory: one array of bytes that buffers are placed in; address 0 is never valid."""

    def __init__(self, size: int = 1 << 22) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.used = 256

    def place(self, array: Array) -> int:
        """Copies an array in, aligned to 256 bytes, and returns its address."""
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        address = self.used
        self.bytes[address : address + data.size] = data
        self.used = -(-(address + data.size) // 256) * 256 + 256
        return address

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        """Copies an array out."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[address : address + size].copy().view(dtype).reshape(shape)


def run(program: Program, memory: Memory, arguments: list[int], grid: tuple[int, ...], shared_bytes: int) -> None:
    """Executes every block of the grid, one after the other."""
    for index in np.ndindex(*grid):
        Block(program, memory, arguments, index, grid, shared_bytes).run()


def gather(data: Array, addresses: Array, size: int) -> Array:
    """`size` bytes at each address, little endian, as uint64."""
    if addresses.size and (int(addresses.max()) + size > data.size or bool((addresses % size).any())):
        raise IndexError("access out of bounds or misaligned")
    window = data[addresses[:, None].astype(np.int64) + np.arange(size)].astype(np.uint64)
    return (window << (np.arange(size, dtype=np.uint64) * np.uint64(8))).sum(1, dtype=np.uint64)


def scatter(data: Array, addresses: Array, values: Array, size: int) -> None:
    """Inverse of `gather`."""
    if addresses.size and (int(addresses.max()) + size > data.size or bool((addresses % size).any())):
        raise IndexError("access out of bounds or misaligned")
    window = (values[:, None] >> (np.arange(size, dtype=np.uint64) * np.uint64(8))) & np.uint64(255)
    data[addresses[:, None].astype(np.int64) + np.arange(size)] = window.astype(np.uint8)


class Block:
    """One thread block: registers (uint64 for each thread), shared memory and program counters."""

    def __init__(
        self,
        program: Program,
        memory: Memory,
        arguments: list[int],
        index: tuple[int, ...],
        grid: tuple[int, ...],
        shared: int,
    ) -> None:
        self.program, self.memory = program, memory
        self.shared = np.full(shared, 0xA5, np.uint8)  # not zero: what is read must have been written
        self.threads = np.arange(program.threads)
        one = np.ones(program.threads, np.uint64)
        self.registers: dict[str, Array] = {"%tid.x": self.threads.astype(np.uint64), "%ntid.x": one * program.threads}
        for dimension, axis in enumerate("xyz"):
            self.registers[f"%ctaid.{axis}"] = one * (index[dimension] if dimension < len(index) else 0)
            self.registers[f"%nctaid.{axis}"] = one * (grid[dimension] if dimension < len(grid) else 1)
        self.arguments = np.array(arguments, np.uint64)

    def run(self) -> None:
        """Threads diverge at branches; those furthest behind go first, until all wait at a barrier or are done."""
        size = len(self.program.instructions)
        counter = np.zeros(self.threads.size, np.int64)
        waiting = np.zeros(self.threads.size, bool)
        while True:
            runnable = (counter < size) & ~waiting
            if not runnable.any():
                if not waiting.any():
                    return
                waiting[:] = False
                continue
            pc = int(counter[runnable].min())
            active = runnable & (counter == pc)
            instruction = self.program.instructions[pc]
            counter[active] = pc + 1
            if instruction.guard is not None:
                guard = self.registers[instruction.guard].astype(bool)
                active = active & (~guard if instruction.negated else guard)
            name = instruction.name
            if name.startswith("bra"):
                counter[active] = self.program.labels[instruction.operands[0]]
            elif name == "ret":
                counter[active] = size
            elif name == "bar.sync":
                waiting |= active
            elif active.any():
                self.execute(instruction, active)

    def value(self, operand: str, active: Array) -> Array:
        """The operand for the active threads: a register, a constant or an address."""
        if operand in self.registers:
            return self.registers[operand][active]
        symbols = self.program.symbols
        number = symbols[operand] if operand in symbols else int(operand, 0)
        return np.full(int(active.sum()), number & (2**64 - 1), np.uint64)

    def store(self, register: str, values: Array, active: Array) -> None:
        """Writes the active threads' part of a register."""
        self.registers.setdefault(register, np.zeros(self.threads.size, np.uint64))[active] = values

    def address(self, operand: tuple[str, int], active: Array) -> Array:
        """Byte addresses of `[register+offset]`."""
        return (self.value(operand[0], active).astype(np.int64) + operand[1]).astype(np.int64)

    def execute(self, instruction: Instruction, active: Array) -> None:
        """Dispatches on the instruction's first words."""
        name, operands = instruction.name, instruction.operands
        family = name.split(".")[0]
        if family in ("ld", "st", "cp", "ldmatrix", "mma"):
            getattr(self, family)(name, operands, active)
        elif name.startswith(("bar.warp", "griddepcontrol")):
            return  # all threads of a block advance together, and no grid runs before this one
        elif name.startswith("mov") and isinstance(operands[1], tuple):  # pack two halves
            low, high = (self.value(item, active) for item in operands[1])
            self.store(operands[0], low | high << np.uint64(16), active)
        else:
            inputs = [self.value(operand, active) for operand in operands[1:]]
            self.store(operands[0], compute(name, inputs), active)

    def ld(self, name: str, operands: tuple[Any, ...], active: Array) -> None:
        """Loads from parameters, global or shared memory [9.7.9.8]."""
        target, source = operands
        if ".param" in name:
            self.store(target, self.arguments[self.address(source, active)], active)
            return
        size = int(WIDTH.search(name)[1]) // 8  # type: ignore[index]
        data = self.shared if ".shared" in name else self.memory.bytes
        addresses = self.address(source, active)
        for index, register in enumerate(target if isinstance(target, tuple) else (target,)):
            self.store(register, gather(data, addresses + index * size, size), active)

    def st(self, name: str, operands: tuple[Any, ...], active: Array) -> None:
        """Stores to global or shared memory [9.7.9.11]."""
        target, source = operands
        size = int(WIDTH.search(name)[1]) // 8  # type: ignore[index]
        data = self.shared if ".shared" in name else self.memory.bytes
        addresses = self.address(target, active)
        for index, register in enumerate(source if isinstance(source, tuple) else (source,)):
            scatter(data, addresses + index * size, self.value(register, active), size)

    def cp(self, name: str, operands: tuple[Any, ...], active: Array) -> None:
        """Copies to shared memory at once, and fills with zeros beyond the source size [9.7.9.25.3]."""
        if not name.startswith("cp.async.c") or name == "cp.async.commit_group":
            return  # commit and wait: the copy is done already
        size = int(operands[2])
        targets, sources = self.address(operands[0], active), self.address(operands[1], active)
        valid = self.value(operands[3], active) if len(operands) > 3 else np.full(targets.size, size, np.uint64)
        for target, source, length in zip(targets, sources, valid.astype(int), strict=True):
            self.shared[target : target + size] = 0
            self.shared[target : target + length] = self.memory.bytes[source : source + length]

    def ldmatrix(self, name: str, operands: tuple[Any, ...], active: Array) -> None:
        """Loads 8x8 matrices of 16 bits, a row per thread's address [9.7.14.5.15].

        Or 8x16 matrices of 4-bit integers, widened to 8 bits (.s8.s4). Humming writes the transposed load in its place
        where the assembler does not know that one, and patches the machine code; no kernel under test transposes.
        """
        lanes = whole_warps(active)
        rows = self.address(operands[1], active).reshape(-1, 32)
        for index, register in enumerate(operands[0]):
            addresses = rows[:, index * 8 : index * 8 + 8, None]  # thread t gets the t % 4th word of row t / 4
            if ".trans." in name or name.endswith(".s8.s4"):
                halves = gather(self.shared, (addresses + np.arange(4) * 2).ravel(), 2)
                codes = signed_fields(halves, 4)[:, :4].astype(np.uint64) & np.uint64(255)
                words = (codes << (np.arange(4, dtype=np.uint64) * np.uint64(8))).sum(1, dtype=np.uint64)
            else:
                words = gather(self.shared, (addresses + np.arange(4) * 4).ravel(), 4)
            self.store(register, words.reshape(lanes), active)

    def mma(self, name: str, operands: tuple[Any, ...], active: Array) -> None:
        """D = A B + C for a warp, in integers, clamped to int32 [9.7.14.5.8 to 9.7.14.5.12]."""
        lanes = whole_warps(active)
        bits = 4 if ".s4.s4." in name else 8
        per_register, warps = 32 // bits, lanes // 32
        group, thread = np.arange(32) // 4, np.arange(32) % 4
        a, b, c = (
            np.stack([self.value(register, active) for register in operand]).reshape(-1, warps, 32)
            for operand in operands[1:4]
        )
        k = int(re.search(r"k(\d+)", name)[1])  # type: ignore[index]
        left = np.zeros((warps, 8 * max(1, len(c) // 2), k), np.int64)
        right = np.zeros((warps, 8, k), np.int64)
        columns = thread[:, None] * per_register + np.arange(per_register)
        for index, register in enumerate(a):
            row, offset = (index % 2) * 8 if len(a) == 4 else 0, (index // 2) * 4 * per_register if len(a) == 4 else 0
            left[:, group[:, None] + row, columns + offset] = signed_fields(register, bits)
        for index, register in enumerate(b):
            right[:, group[:, None], columns + index * 4 * per_register] = signed_fields(register, bits)
        product = left @ right.transpose(0, 2, 1)  # (warps, m, 8)
        for index, register in enumerate(operands[0]):
            total = product[:, group + index // 2 * 8, thread * 2 + index % 2]
            clamped = np.clip(total + c[index].astype(np.uint32).view(np.int32), -(2**31), 2**31 - 1)
            self.store(register, (clamped.astype(np.int64) & 0xFFFFFFFF).astype(np.uint64).reshape(lanes), active)


def whole_warps(active: Array) -> int:
    """Number of active threads; raises unless every warp is wholly active or not at all."""
    warps = active.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise RuntimeError("a warp-wide instruction in a diverged warp")
    return int(active.sum())
