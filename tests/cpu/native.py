"""The host's own processor as an oracle: run the bytes of a small user-mode program on it.

The program sees the same linear addresses as in a guest of the harness (8 MiB at ALIAS), so registers, flags, memory
and vector state can be compared whole. It runs in a child process, so that a fault is no more than an error.
"""

import ctypes
import faulthandler
import mmap
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final

from asm import assemble
from harness import ALIAS, CODE, DF, MEMORY_SIZE, STATUS

from pyhyve.cpu.processor import GPR_NAMES

MAP_FIXED_NOREPLACE: Final = 0x100000

# Where the trampoline lives, behind what programs use.
TRAMPOLINE: Final = ALIAS + 0x70_0000
REGS: Final = ALIAS + 0x70_1000
FLAGS: Final = REGS + 16 * 8
ENTRY: Final = FLAGS + 8
EXIT: Final = ENTRY + 8
HOST_STACK: Final = EXIT + 8
FX_AREA: Final = ALIAS + 0x70_2000
HOST_FX_AREA: Final = ALIAS + 0x70_2400

NATIVE_END: Final = b"\xff\x24\x25" + struct.pack("<I", EXIT)
"""JMP [EXIT]: how a program ends here; harness.USER_END is how it ends in a guest."""

TRAMPOLINE_SOURCE: Final = f"""
    push rbx; push rbp; push r12; push r13; push r14; push r15
    fxsave64 [{HOST_FX_AREA:#x}]
    mov [{HOST_STACK:#x}], rsp
    fxrstor64 [{FX_AREA:#x}]
    push qword ptr [{FLAGS:#x}]
    popfq
    {"; ".join(f"mov {name}, [{REGS + 8 * index:#x}]" for index, name in enumerate(GPR_NAMES))}
    jmp qword ptr [{ENTRY:#x}]
back:
    {"; ".join(f"mov [{REGS + 8 * index:#x}], {name}" for index, name in enumerate(GPR_NAMES))}
    mov rsp, [{HOST_STACK:#x}]
    pushfq
    pop qword ptr [{FLAGS:#x}]
    cld
    fxsave64 [{FX_AREA:#x}]
    fxrstor64 [{HOST_FX_AREA:#x}]
    pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx
    ret
.balign 8
    .quad back
"""

VECTOR_RESET: Final = struct.pack("<HHBBHQQII", 0x37F, 0, 0, 0, 0, 0, 0, 0x1F80, 0xFFFF) + bytes(512 - 32)
"""An FXSAVE image of the reset state: FCW 037FH, MXCSR 1F80H."""


@dataclass
class NativeResult:
    regs: dict[str, int]
    rflags: int
    memory: dict[int, bytes]


@cache
def window() -> int:
    """The 8 MiB at ALIAS, writable and executable; 0 if something of this process is there already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    got = libc.mmap(ALIAS, MEMORY_SIZE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, flags, -1, 0)
    if got != ALIAS:
        return 0
    ctypes.memmove(ALIAS, bytes(MEMORY_SIZE), MEMORY_SIZE)
    code = assemble(TRAMPOLINE_SOURCE, TRAMPOLINE)
    ctypes.memmove(TRAMPOLINE, code, len(code))
    ctypes.memmove(EXIT, code[-8:], 8)
    return ALIAS


def missing() -> str | None:
    """Why there is no oracle here, or None."""
    return None if window() else f"{ALIAS:#x} is not free in this process"


def run_native(code: bytes, regs: Mapping[str, int], rflags: int, memory: Mapping[int, bytes]) -> NativeResult:
    """Run code, linked for ALIAS + CODE, with all registers, status flags and memory (by offsets in the window) given.

    The same ranges of memory come back.
    """
    assert window()
    for at, data in ((CODE, code + NATIVE_END), *memory.items()):
        ctypes.memmove(ALIAS + at, data, len(data))
    words = struct.pack("<18Q", *(regs[name] for name in GPR_NAMES), rflags | 0x202, ALIAS + CODE)
    ctypes.memmove(REGS, words, len(words))
    ctypes.memmove(FX_AREA, VECTOR_RESET, 512)
    child = os.fork()
    if not child:
        with suppress(BaseException):
            faulthandler.disable()
            ctypes.CFUNCTYPE(None)(TRAMPOLINE)()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    if status:
        raise RuntimeError(f"the program does not end on the host: signal {status & 0x7F}")
    out = struct.unpack("<17Q", ctypes.string_at(REGS, 17 * 8))
    return NativeResult(
        dict(zip(GPR_NAMES, out, strict=False)),
        out[16] & (STATUS | DF),
        {at: ctypes.string_at(ALIAS + at, len(data)) for at, data in memory.items()},
    )
