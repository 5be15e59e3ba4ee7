"""The host's own processor as an oracle for 32-bit user code with segments of its own.

The program runs in a child with the segments in its LDT, sees the 8 MiB of native.window(), and is traced: it ends with
the first signal, which the host gave for an exception.
"""

import ctypes
import os
import signal
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final

from harness import ALIAS, STATUS
from native import window

PTRACE_TRACEME, PTRACE_CONT, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_GETSIGINFO = 0, 7, 12, 13, 0x4202
SYS_MODIFY_LDT: Final = 154
USER_CODE32, USER_DATA32 = 0x23, 0x2B
SI_KERNEL, BUS_ADRALN, SEGV_MAPERR, SEGV_ACCERR = 0x80, 1, 1, 2

REGS: Final = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
# where they are in user_regs_struct
PLACES: Final = (10, 11, 12, 5, 19, 4, 13, 14)
RIP, CS, EFLAGS, SS, DS, ES, FS, GS = 16, 17, 18, 20, 23, 24, 25, 26


@dataclass(frozen=True)
class Descriptor:
    """A segment of user privilege: type 0 data, 1 data that expands down, 2 code, 3 conforming code."""

    base: int
    limit: int
    kind: int = 0
    big: bool = True
    pages: bool = False
    plain: bool = False
    """Data that is read-only; code that cannot be read."""

    def user_desc(self, index: int) -> bytes:
        flags = self.big | self.kind << 1 | self.plain << 3 | self.pages << 4 | 1 << 6
        return struct.pack("<4I", index, self.base, self.limit, flags)

    def descriptor(self) -> bytes:
        access = 0xF1 | self.kind << 2 | (not self.plain) << 1
        flags = self.pages << 3 | self.big << 2 | 1
        low = self.limit & 0xFFFF | (self.base & 0xFFFFFF) << 16
        return struct.pack("<Q", low | access << 40 | (self.limit >> 16) << 48 | flags << 52 | self.base >> 24 << 56)


@dataclass
class Native32:
    vector: int
    regs: dict[str, int]
    flags: int


def selector(index: int) -> int:
    return index << 3 | 7


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return libc


def _child(descriptors: Sequence[Descriptor]) -> None:
    libc = _libc()
    for index, descriptor in enumerate(descriptors):
        if libc.syscall(SYS_MODIFY_LDT, 0x11, descriptor.user_desc(index), 16):
            os._exit(2)
    libc.ptrace(PTRACE_TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)


@cache
def missing() -> str | None:
    """Why there is no oracle here, or None."""
    if not window():
        return f"{ALIAS:#x} is not free in this process"
    try:
        run_native32(ALIAS, b"\x0f\x0b", {}, 0, [Descriptor(0, 0xFFF)])
    except OSError as error:
        return str(error)
    return None


def run_native32(
    eip: int, code: bytes, regs: Mapping[str, int], eflags: int, descriptors: Sequence[Descriptor]
) -> Native32:
    """Run code at `eip` (in the window) until it raises an exception: UD2 is how to end."""
    ctypes.memmove(eip, code, len(code))
    libc = _libc()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            _child(descriptors)
        os._exit(1)
    try:
        return _trace(libc, pid, eip, regs, eflags)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _trace(libc: ctypes.CDLL, pid: int, eip: int, regs: Mapping[str, int], eflags: int) -> Native32:
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSTOPPED(status):
        raise OSError("this host has no modify_ldt")
    state = (ctypes.c_ulonglong * 27)()
    if libc.ptrace(PTRACE_GETREGS, pid, None, state):
        raise OSError("this host does not let a process trace its child")
    for name, place in zip(REGS, PLACES, strict=True):
        state[place] = regs.get(name, 0)
    state[15] = (1 << 64) - 1  # no system call to restart
    state[RIP], state[CS], state[EFLAGS] = eip, USER_CODE32, eflags | 0x202
    for place in (SS, DS, ES):
        state[place] = USER_DATA32
    state[FS] = state[GS] = 0
    if libc.ptrace(PTRACE_SETREGS, pid, None, state):
        raise OSError("this host runs no 32-bit code")
    libc.ptrace(PTRACE_CONT, pid, None, None)
    status = os.waitpid(pid, 0)[1]
    if not os.WIFSTOPPED(status):
        raise OSError(f"the program ended with {status:#x}")
    info = (ctypes.c_int * 32)()
    libc.ptrace(PTRACE_GETSIGINFO, pid, None, info)
    libc.ptrace(PTRACE_GETREGS, pid, None, state)
    found = {name: state[place] & 0xFFFF_FFFF for name, place in zip(REGS, PLACES, strict=True)}
    found["eip"] = state[RIP]
    return Native32(_vector(info[0], info[2]), found, state[EFLAGS] & STATUS)


def _vector(number: int, code: int) -> int:
    if number == signal.SIGSEGV:
        return 13 if code == SI_KERNEL else 14
    if number == signal.SIGBUS:
        return 17 if code == BUS_ADRALN else 12
    return {signal.SIGILL: 6, signal.SIGTRAP: 3, signal.SIGFPE: 0}.get(signal.Signals(number), -number)
