"""Emulation against the host: the same bytes with the same registers and memory, executed and emulated."""

import ctypes
import mmap
import random
import struct

import pytest
from fake_processor import FakeVcpu

from pyhyve.cpu.processor import GPR_NAMES, Segment
from pyhyve.vmm.instruction import InstructionEmulator

# The host's registers and flags are loaded from a context (RDI at entry), the instruction runs, and they go back.
# R11 and the stack are the stub's own.
ENTER = bytes.fromhex("53 57 4989fb 41ff7340 9d 498b03 498b4b08 498b5310 498b5b18 498b7320 498b7b28")
LEAVE = bytes.fromhex("4c8b1c24 498903 49894b08 49895310 49895b18 49897320 49897b28 9c 418f4340 fc 5f 5b c3")
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsi", "rdi")
CF, PF, AF, ZF, SF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x400, 0x800
ALL = CF | PF | AF | ZF | SF | OF
SIZE = 4096


class Native:
    """Runs one instruction of the host's; also the memory that both sides use."""

    def __init__(self):
        self._code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.data = mmap.mmap(-1, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(self._code)))

    def run(self, code, registers, flags):
        context = (ctypes.c_uint64 * 9)(*registers, 0, 0, flags)
        raw = ENTER + code + LEAVE
        self._code[: len(raw)] = raw
        self._call(ctypes.addressof(context))
        return list(context[:6]), context[8]


class Memory:
    def __init__(self, native):
        self.native = native
        self.code = b""

    def read(self, gpa, length):
        if gpa < 0x10000:
            return self.code[gpa - 0x1000 :][:length]
        start = gpa - self.native.address
        return bytes(self.native.data[start : start + length])

    def write(self, gpa, data):
        start = gpa - self.native.address
        self.native.data[start : start + len(data)] = bytes(data)


class AllMemory:
    def is_device(self, gpa):
        return False


class _OneVcpu:
    def __init__(self, backend):
        self.backend = backend


def emulate(native, code, registers, flags):
    cpu = FakeVcpu(0, None)
    cpu.set("efer", 1 << 10)
    cpu.set_segment("cs", Segment(8, 0, 0xFFFFFFFF, 0xA09B))
    cpu.set("rip", 0x1000)
    cpu.set("rflags", flags)
    for name, value in zip(REGISTERS, registers, strict=True):
        cpu.set(name, value)
    memory = Memory(native)
    memory.code = code + bytes(16)
    emulator = InstructionEmulator(_OneVcpu(cpu), memory, AllMemory())
    for _ in range(100):
        emulator.emulate()
        if cpu.get("rip") != 0x1000:
            break
    assert cpu.get("rip") == 0x1000 + len(code)
    return [cpu.get(name) for name in REGISTERS], cpu.get("rflags")


def modrm(rng, reg):
    """A memory operand at RDI, in one of several forms, all within the data."""
    choice = rng.randrange(4)
    if choice == 0:
        return bytes((reg << 3 | 7,))
    if choice == 1:
        return bytes((0x40 | reg << 3 | 7, rng.randrange(256)))
    if choice == 2:
        return bytes((0x80 | reg << 3 | 7,)) + struct.pack("<i", rng.randrange(-512, 512))
    return bytes((0x44 | reg << 3, 0x8F, rng.randrange(128)))  # [rdi + rcx*4 + disp8]


def register_field(rng, width):
    """A register that the stub loads: any of the first four, AH to BH for bytes, RSI and RDI for words."""
    return rng.choice((0, 1, 2, 3, 4, 5, 6, 7) if width == 1 else (0, 1, 2, 3, 6, 7))


def prefix(width):
    return {1: b"", 2: b"\x66", 4: b"", 8: b"\x48"}[width]


def alu(rng, width):
    operation = rng.randrange(8)
    form = rng.choice((0, 2, "i8", "i"))
    logic = operation in (1, 4, 6)
    known = ALL & ~AF if logic else ALL
    if form in (0, 2):
        opcode = operation << 3 | form | (width != 1)
        return prefix(width) + bytes((opcode,)) + modrm(rng, register_field(rng, width)), known
    if form == "i8" and width != 1:
        return prefix(width) + b"\x83" + modrm(rng, operation) + rng.randbytes(1), known
    opcode = b"\x80" if width == 1 else b"\x81"
    return prefix(width) + opcode + modrm(rng, operation) + rng.randbytes(min(width, 4)), known


def unary(rng, width):
    opcode, reg, known = rng.choice(((0xFE, 0, ALL), (0xFE, 1, ALL), (0xF6, 2, ALL), (0xF6, 3, ALL)))
    return prefix(width) + bytes((opcode | (width != 1),)) + modrm(rng, reg), known


def test_op(rng, width):
    if rng.random() < 0.5:
        code = bytes((0x84 | (width != 1),)) + modrm(rng, register_field(rng, width))
    else:
        code = bytes((0xF6 | (width != 1),)) + modrm(rng, 0) + rng.randbytes(min(width, 4))
    return prefix(width) + code, ALL & ~AF


test_op.__test__ = False


def move(rng, width):
    opcode = rng.choice((0x88, 0x8A, 0xC6))
    if opcode == 0xC6:
        code = bytes((0xC6 | (width != 1),)) + modrm(rng, 0) + rng.randbytes(min(width, 4))
    else:
        code = bytes((opcode | (width != 1),)) + modrm(rng, register_field(rng, width))
    return prefix(width) + code, ALL


def extend(rng, width):
    width = max(width, 2)
    if width == 8 and rng.random() < 0.3:
        return b"\x48\x63" + modrm(rng, register_field(rng, 8)), ALL
    opcodes = (0xB6, 0xBE) if width == 2 else (0xB6, 0xB7, 0xBE, 0xBF)
    return prefix(width) + bytes((0x0F, rng.choice(opcodes))) + modrm(rng, register_field(rng, width)), ALL


def exchange(rng, width):
    opcode = rng.choice((b"\x86", b"\x0f\xb0", b"\x0f\xc0"))
    raw = bytes((*opcode[:-1], opcode[-1] | (width != 1)))
    lock = b"\xf0" if rng.random() < 0.5 else b""
    return lock + prefix(width) + raw + modrm(rng, register_field(rng, width)), ALL


def bit(rng, width):
    width = max(width, 2)
    if rng.random() < 0.5:
        code = b"\x0f\xba" + modrm(rng, rng.randrange(4, 8)) + rng.randbytes(1)
    else:
        code = bytes((0x0F, rng.choice((0xA3, 0xAB, 0xB3, 0xBB)))) + modrm(rng, 3)  # RBX holds a small number
    return prefix(width) + code, CF | ZF


def string(rng, width):
    opcode = rng.choice((0xA4, 0xAA, 0xAC, 0xA6, 0xAE)) | (width != 1)
    repeats = (b"", b"\xf3", b"\xf2") if opcode & 0xFE in (0xA6, 0xAE) else (b"", b"\xf3")
    return rng.choice(repeats) + prefix(width) + bytes((opcode,)), ALL


GENERATORS = (alu, unary, test_op, move, extend, exchange, bit, string)


@pytest.fixture(scope="module")
def native():
    return Native()


@pytest.mark.seed("S25")
@pytest.mark.parametrize("generator", GENERATORS, ids=lambda generator: generator.__name__)
def test_emulation_does_what_the_host_does(native, generator):
    rng = random.Random(generator.__name__)
    middle = native.address + SIZE // 2
    for _ in range(1500):
        width = rng.choice((1, 2, 4, 8))
        code, known = generator(rng, width)
        registers = [rng.getrandbits(64) for _ in REGISTERS]
        registers[1] = rng.randrange(12)  # RCX: an index and a count
        registers[3] = rng.randrange(-600, 600) & (1 << 64) - 1 if generator is bit else registers[3]
        registers[4] = middle + rng.randrange(-500, 500)
        registers[5] = middle + rng.randrange(-500, 500)
        if rng.random() < 0.3:
            registers[0] = rng.choice((0, 1, 0x7F, 0x80, 0xFFFF, 0x7FFFFFFF, (1 << 64) - 1))
        flags = 0x202 | rng.getrandbits(16) & (ALL | DF)
        before = rng.randbytes(SIZE) if rng.random() < 0.5 else bytes(rng.choices((0, 1, 0x7F, 0x80, 0xFF), k=SIZE))
        native.data[:] = before
        expected, expected_flags = native.run(code, registers, flags)
        expected_data = bytes(native.data)
        native.data[:] = before
        got, got_flags = emulate(native, code, registers, flags)
        what = f"{code.hex()} with {dict(zip(GPR_NAMES, map(hex, registers), strict=False))} flags {flags:#x}"
        assert list(map(hex, got)) == list(map(hex, expected)), what
        assert got_flags & known == expected_flags & known, what
        assert bytes(native.data) == expected_data, what
