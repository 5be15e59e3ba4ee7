"""Running instructions on the host itself, as the oracle of the software processor.

A fixed window of low addresses is mapped in this process; the same addresses are mapped for the guest. So the same
bytes, with the same pointers, run on both. The native side runs in a forked child: what faults there is skipped.
"""

import ctypes
import faulthandler
import mmap
import os
import random
import struct
from dataclasses import dataclass
from typing import Any, Final

from asm import assemble
from harness import host_flags

from pyhyve.vmm.hostcpu import cpuid as host_cpuid

BASE: Final = 0x3000_0000
CONTEXT: Final = BASE
RUNNER: Final = BASE + 0x1000
BACK: Final = BASE + 0x2000
DATA: Final = BASE + 0x10_0000
DATA_SIZE: Final = 0x4000
CODE: Final = BASE + 0x20_0000
SLOT: Final = 256
SIZE: Final = 0x40_0000

MAP_FIXED_NOREPLACE: Final = 0x100000
REGS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
AVX512: Final = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= host_flags()
XSAVE: Final = 2696 if AVX512 else 832
STATE: Final = 0xE7 if AVX512 else 7
"""XSAVE components that are compared; the standard format's places of AVX-512's are the host's."""
AVX512_PLACES: Final = {n: host_cpuid(0xD, n)[:2] for n in (5, 6, 7)} if AVX512 else {}
"""Opmask, ZMM_Hi256, Hi16_ZMM: (bytes, offset) in the standard format."""
FLAGS: Final = 0x8D5
C_COPY: Final = 1
A_MEM, A_MOFFS, A_NO_ACCESS, A_BITOFF, A_REG_GPR = 2, 256, 512, 1024, 4
P_SEG: Final = 32


def _runner() -> tuple[bytes, bytes]:
    load = "\n".join(f"mov {reg}, [{CONTEXT + 8 * n}]" for n, reg in enumerate(REGS))
    save = "\n".join(f"mov [{CONTEXT + 8 * n}], {reg}" for n, reg in enumerate(REGS))
    enter = f"""
        push rbx; push rbp; push r12; push r13; push r14; push r15
        mov [{CONTEXT + 0x88}], rsp
        mov [{CONTEXT + 0x90}], rdi
        mov eax, {STATE}; xor edx, edx; xrstor64 [{CONTEXT + 0x100}]
        push qword ptr [{CONTEXT + 0x80}]; popfq
        {load}
        jmp qword ptr [{CONTEXT + 0x90}]"""
    back = f"""
        {save}
        mov rsp, [{CONTEXT + 0x88}]
        pushfq; pop qword ptr [{CONTEXT + 0x80}]
        mov eax, {STATE}; xor edx, edx; xsave64 [{CONTEXT + 0x100}]
        cld; vzeroupper; fninit
        pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx; ret"""
    return assemble(enter, RUNNER), assemble(back, BACK)


class Window:
    """The window in this process: memory, and a way to run code in it."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        at = libc.mmap(BASE, SIZE, 7, flags, -1, 0)
        if at != BASE:
            raise OSError(ctypes.get_errno(), "cannot map the window")
        self.view = memoryview((ctypes.c_ubyte * SIZE).from_address(BASE)).cast("B")
        enter, back = _runner()
        self.write(RUNNER, enter)
        self.write(BACK, back)
        # what lies over an end of the data window faults
        for page in (DATA - 0x1000, DATA + DATA_SIZE):
            if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(0x1000), 0):
                raise OSError(ctypes.get_errno(), "cannot protect a page")
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(RUNNER)

    def write(self, address: int, data: bytes) -> None:
        self.view[address - BASE : address - BASE + len(data)] = data

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.view[address - BASE : address - BASE + length])

    def run(self, address: int, state: "State") -> "State":
        self.write(CONTEXT, struct.pack("<17Q", *state.regs, state.flags))
        self.write(CONTEXT + 0x100, state.xsave)
        self.write(DATA, state.data)
        self._call(address)
        values = struct.unpack("<17Q", self.read(CONTEXT, 136))
        return State(list(values[:16]), values[16], self.read(CONTEXT + 0x100, XSAVE), self.read(DATA, DATA_SIZE))


@dataclass(slots=True)
class State:
    """What an instruction can change: general registers, RFLAGS, XSAVE area, the data window."""

    regs: list[int]
    flags: int
    xsave: bytes
    data: bytes


@dataclass(slots=True)
class Case:
    """A few instructions and the state they start from."""

    code: bytes
    state: State
    undefined: int
    """RFLAGS bits that the last writer leaves undefined."""
    address: int
    """Where the code stands, here and in the guest."""


def _mov_imm(reg: int, value: int) -> bytes:
    return bytes([0x48 | reg >> 3, 0xB8 | reg & 7]) + struct.pack("<Q", value % (1 << 64))


def _excluded(insn: dict[str, Any]) -> bool:
    """Instructions that need not agree, or that may fault whatever they are given."""
    op, reg = insn["opcode"], insn["reg"] & 7
    if insn["map"] == 0:
        if op in (0xF6, 0xF7) and reg in (6, 7):
            return True  # DIV, IDIV
        return op == 0xD9 and insn["mod"] != 3 and reg == 5  # FLDCW
    if insn["map"] == 1:
        # LDMXCSR, STMXCSR are tested apart; RDRAND, RDSEED; MMX/x87 mixtures are fine
        return (op == 0xAE and insn["mod"] != 3 and reg == 2) or (op == 0xC7 and insn["mod"] == 3)
    return False


def random_insn(rng: random.Random, decode: Any) -> tuple[bytes, dict[str, Any]]:
    """A random instruction that the translator copies."""
    while True:
        shape = rng.random()
        prefix = b""
        if rng.random() < 0.15:
            prefix += bytes([0x66])
        if rng.random() < 0.08:
            prefix += bytes([rng.choice((0xF2, 0xF3))])
        if rng.random() < 0.03:
            prefix += bytes([0xF0])
        if rng.random() < 0.03:
            prefix += bytes([0x67])
        rex = bytes([0x40 | rng.randrange(16)]) if rng.random() < 0.7 else b""
        tail = rng.randbytes(12)
        if shape < 0.4:
            code = prefix + rex + tail
        elif shape < 0.7:
            code = prefix + rex + b"\x0f" + tail
        elif shape < 0.8:
            code = prefix + rex + b"\x0f" + bytes([rng.choice((0x38, 0x3A))]) + tail
        elif shape < 0.85:
            code = b"\xc5" + tail
        elif shape < 0.92 and AVX512:
            p0 = rng.randrange(16) << 4 | rng.choice((1, 2, 3))
            p1 = rng.choice((0x7C, 0x04)) ^ rng.randrange(4) ^ rng.randrange(2) << 7
            p2 = rng.choice((8, rng.randrange(256)))
            code = bytes([0x62, p0, p1 if rng.random() < 0.5 else rng.randrange(256) | 4, p2]) + tail
        else:
            code = b"\xc4" + bytes([rng.randrange(8) << 5 | rng.choice((1, 2, 3))]) + tail
        insn = decode(code[:15], 64)
        if insn is None or insn["length"] <= 0 or insn["cls"] != C_COPY or insn["prefixes"] & P_SEG:
            continue
        if insn["attr"] & A_MOFFS or _excluded(insn):
            continue
        return code[: insn["length"]], insn


def _rflags(decoded: int) -> int:
    """The decoder's flag bits (CF PF AF ZF SF OF) in their RFLAGS places."""
    return sum(flag for n, flag in enumerate((1, 4, 0x10, 0x40, 0x80, 0x800)) if decoded >> n & 1)


def make_state(rng: random.Random) -> State:
    """Random registers, flags, vector registers and data."""
    xsave = bytearray(XSAVE)
    xsave[0:2] = b"\x7f\x03"
    xsave[24:28] = struct.pack("<I", 0x1F80)
    xsave[32:416] = rng.randbytes(384)
    xsave[512] = STATE
    xsave[576:XSAVE] = rng.randbytes(XSAVE - 576)
    for n in range(8):
        xsave[32 + 16 * n + 10 : 48 + 16 * n] = bytes(6)
    regs = [
        rng.choice((rng.getrandbits(64), rng.getrandbits(8), (1 << 64) - 1 - rng.getrandbits(4))) for _ in range(16)
    ]
    flags = 0x202 | rng.getrandbits(12) & FLAGS
    return State(regs, flags, bytes(xsave), rng.randbytes(DATA_SIZE))


def make_case(rng: random.Random, decode: Any, undefined_of: Any) -> Case:
    """One to six random instructions; each memory operand points into the data window."""
    code = b""
    undefined = 0
    for _ in range(rng.randint(1, 6)):
        while True:
            bytes_, insn = random_insn(rng, decode)
            setup = b""
            if insn["attr"] & A_MEM and not insn["attr"] & A_NO_ACCESS:
                base, index = insn["base"], insn["index"]
                if base > 15 or base == index:
                    continue
                offset = rng.randrange(0x40, DATA_SIZE // 64 - 0x40) * 64
                vector = insn["enc"] or insn["map"] >= 1
                if not vector and rng.random() < 0.4:
                    # anywhere, page ends too
                    offset = rng.choice((0x1000, 0x2000, 0x3000)) - rng.randrange(16)
                target = DATA + offset - insn["disp"]
                if index <= 15:
                    value = rng.getrandbits(rng.choice((4, 8, 31, 64)))
                    setup += _mov_imm(index, value)
                    target -= value * insn["scale"]
                if insn["addrsize"] == 4:
                    target %= 1 << 32
                setup += _mov_imm(base, target)
                if insn["attr"] & A_BITOFF:
                    if insn["reg"] in (base, index):
                        continue
                    setup += _mov_imm(insn["reg"], rng.randrange(-4096, 4096))
            killed, unknown, read = undefined_of(bytes_)
            # a shift by CL may leave all flags as they were: only what is overwritten for sure is known again
            killed &= _rflags(insn["flags_killed"])
            if not read & undefined:
                break
        code += setup + bytes_
        undefined = undefined & ~killed | unknown
    address = CODE + rng.randrange(4096) * SLOT
    return Case(code, make_state(rng), undefined, address)


def make_frame_case(rng: random.Random, decode: Any, undefined_of: Any) -> Case:
    """Up to twelve instructions with operands off a few pointers that stay as they are, stack accesses among them: what
    the translator checks once for several accesses."""
    code = b""
    undefined = 0
    pointers = {n: DATA + rng.choice((0x800, 0x1000, 0x2000, 0x3000)) + 64 * rng.randrange(-4, 4) for n in (3, 5, 6, 7)}
    depth = 0
    for _ in range(rng.randint(3, 12)):
        kind = rng.random()
        if kind < 0.2:
            reg = rng.choice((0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15))
            push = depth == 0 or rng.random() < 0.5
            code += bytes([0x40 | reg >> 3, (0x50 if push else 0x58) | reg & 7])
            depth += 1 if push else -1
            continue
        if kind < 0.25:
            by = 8 * rng.randrange(1, 4)
            code += bytes([0x48, 0x8D, 0x64, 0x24, 256 - by])  # lea rsp, [rsp - by]
            depth += by // 8
            continue
        while True:
            some, insn = random_insn(rng, decode)
            if not insn["attr"] & A_MEM or insn["attr"] & (A_NO_ACCESS | A_BITOFF) or not insn["mem_width"]:
                continue
            wide = insn["enc"] or insn["map"] >= 1
            disp = 16 * rng.randrange(-8, 8) if wide else rng.randrange(-128, 128)
            base = rng.choice((3, 5, 6, 7, 4))
            modrm = bytes([0x40 | insn["modrm"] & 0x38 | base]) + (b"\x24" if base == 4 else b"") + bytes([disp & 0xFF])
            some = some[: insn["modrm_off"]] + modrm + rng.randbytes(insn["imm_size"])
            insn = decode(some + bytes(15), 64)
            if insn is None or insn["cls"] != C_COPY or insn["length"] != len(some) or insn["prefixes"] & P_SEG:
                continue
            if insn["base"] != base or insn["index"] != 255 or insn["addrsize"] != 8 or _excluded(insn):
                continue
            if insn["attr"] & A_REG_GPR and (insn["reg"] in (3, 4, 5, 6, 7) or insn["reg"] & 3 == 3):
                continue
            killed, unknown, read = undefined_of(some)
            if read & undefined:
                continue
            killed &= _rflags(insn["flags_killed"])
            break
        code += some
        undefined = undefined & ~killed | unknown
    case = make_case(rng, decode, undefined_of)
    for reg, value in pointers.items():
        case.state.regs[reg] = value
    case.state.regs[4] = DATA + rng.choice((0x1000, 0x2000, 0x3000)) + 16 * rng.randrange(-8, 8)
    return Case(code, case.state, undefined, case.address)


def make_evex_gather_case(rng: random.Random, decode: Any) -> Case:
    """One gather or scatter of AVX-512, its elements anywhere in the data window, some of them at the same place."""
    data, index = rng.sample(range(32), 2)
    opcode = rng.choice((rng.randrange(0x90, 0x94), rng.randrange(0xA0, 0xA4)))
    wide, scale, mask, length = rng.randrange(2), rng.randrange(4), rng.randrange(1, 8), rng.randrange(3)
    base = rng.randrange(16)
    p0 = (~data >> 3 & 1) << 7 | (~index >> 3 & 1) << 6 | (~base >> 3 & 1) << 5 | (~data >> 4 & 1) << 4 | 2
    p2 = length << 5 | (~index >> 4 & 1) << 3 | mask
    modrm = 0x44 | (data & 7) << 3
    sib = scale << 6 | (index & 7) << 3 | base & 7
    code = bytes([0x62, p0, wide << 7 | 0x7D, p2, opcode, modrm, sib, rng.randrange(256)])
    state = make_state(rng)
    state.regs[base] = DATA + DATA_SIZE // 2
    xsave = bytearray(state.xsave)
    form = "<q" if opcode & 1 else "<i"
    for k in range(16):
        value = struct.pack(form, rng.randrange(-400, 400))
        at = k * len(value)
        if at < 64:
            place = _vector_byte(index, at)
            xsave[place : place + len(value)] = value
    state.xsave = bytes(xsave)
    return Case(code, state, 0, CODE + rng.randrange(4096) * SLOT)


def _vector_byte(register: int, byte: int) -> int:
    """Where a byte of a ZMM register is in the XSAVE area."""
    if register >= 16:
        return AVX512_PLACES[7][1] + (register - 16) * 64 + byte
    if byte >= 32:
        return AVX512_PLACES[6][1] + register * 32 + byte - 32
    if byte >= 16:
        return 576 + register * 16 + byte - 16
    return 160 + register * 16 + byte


def make_masked_case(rng: random.Random, decode: Any) -> Case:
    """One instruction with a masked memory operand that lies over an end of the data window: behind that are pages that
    neither the host nor the guest has, and the mask leaves them out, or not."""
    while True:
        code, insn = random_insn(rng, decode)
        if insn["enc"] == 0 or not insn["masked"] or insn["base"] > 15 or insn["index"] <= 15 or insn["addrsize"] != 8:
            continue
        state = make_state(rng)
        width = insn["mem_width"]
        if rng.random() < 0.5:
            at = DATA + DATA_SIZE - rng.randrange(width + 1)
        else:
            at = DATA - rng.randrange(width + 1)
        if rng.random() < 0.3:
            at &= -width
        state.regs[insn["base"]] = at - insn["disp"] & (1 << 64) - 1
        xsave = bytearray(state.xsave)
        keep = rng.randrange(width + 1)
        mask = (1 << keep) - 1 if rng.random() < 0.5 else ~((1 << keep) - 1)
        mask &= rng.choice((rng.getrandbits(64), -1, 0))
        xsave[AVX512_PLACES[5][1] : AVX512_PLACES[5][1] + 64] = struct.pack("<Q", mask & (1 << 64) - 1) * 8
        if insn["enc"] == 1:
            for byte in range(32):
                xsave[_vector_byte(insn["vvvv"], byte)] = 0x80 if mask >> byte // 4 & 1 else 0
        state.xsave = bytes(xsave)
        return Case(code, state, 0, CODE + rng.randrange(4096) * SLOT)


def make_gather_case(rng: random.Random) -> Case:
    """One gather of AVX2, its elements anywhere in the data window."""
    dest, mask, index = rng.sample(range(16), 3)
    opcode, wide, scale = rng.randrange(0x90, 0x94), rng.randrange(2), rng.randrange(4)
    base = rng.randrange(16)
    by_32_bits = rng.random() < 0.2
    disp = rng.randrange(-128, 128)
    p0 = (~dest >> 3 & 1) << 7 | (~index >> 3 & 1) << 6 | (~base >> 3 & 1) << 5 | 2
    p1 = wide << 7 | (~mask & 15) << 3 | rng.randrange(2) << 2 | 1
    sib = scale << 6 | (index & 7) << 3 | base & 7
    code = bytes([0xC4, p0, p1, opcode, 0x44 | (dest & 7) << 3, sib, disp & 0xFF])
    if by_32_bits:
        code = b"\x67" + code
    state = make_state(rng)
    state.regs[base] = DATA + DATA_SIZE // 2
    if by_32_bits:
        state.regs[base] |= rng.getrandbits(32) << 32
    reach = DATA_SIZE // 2 - 0x100 >> scale
    kind = "<4q" if opcode & 1 else "<8i"
    indices = struct.pack(kind, *(rng.randrange(-reach, reach) for _ in range(int(kind[1]))))
    masks = rng.choice((rng.randbytes(32), b"\xff" * 32, bytes(32)))
    xsave = bytearray(state.xsave)
    for register, value in ((index, indices), (mask, masks)):
        xsave[160 + 16 * register : 176 + 16 * register] = value[:16]
        xsave[576 + 16 * register : 592 + 16 * register] = value[16:]
    state.xsave = bytes(xsave)
    return Case(code, state, 0, CODE + rng.randrange(4096) * SLOT)


def run_native(cases: list[Case]) -> list[State | None]:
    """The cases' results on this host, None where one faults there. All run in forked children."""
    window = window_of_process()
    results: list[State | None] = [None] * len(cases)
    start = 0
    while start < len(cases):
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            os.close(read_fd)
            with os.fdopen(write_fd, "wb") as out:
                for case in cases[start:]:
                    back = struct.pack("<i", BACK - case.address - len(case.code) - 5)
                    window.write(case.address, case.code + b"\xe9" + back)
                    state = window.run(case.address, case.state)
                    out.write(struct.pack("<17Q", *state.regs, state.flags) + state.xsave + state.data)
                    out.flush()
            os._exit(0)
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as source:
            blob = source.read()
        os.waitpid(pid, 0)
        size = 136 + XSAVE + DATA_SIZE
        done = len(blob) // size
        for n in range(done):
            piece = blob[n * size : (n + 1) * size]
            values = struct.unpack("<17Q", piece[:136])
            results[start + n] = State(list(values[:16]), values[16], piece[136 : 136 + XSAVE], piece[136 + XSAVE :])
        start += done + 1
    return results


_window: list[Window] = []


def window_of_process() -> Window:
    if not _window:
        _window.append(Window())
    return _window[0]
