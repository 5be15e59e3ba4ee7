"""What the host's processor says of itself: CPUID, its time-stamp counter, and that counter's frequency.

Python has no CPUID and no RDTSC. A page of hand-assembled code has both; it is written once, then made executable and
never writable again.
"""

import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Final

from pyhyve.base.errors import HostError

CpuidFunction = Callable[[int, int], tuple[int, int, int, int]]

# push rbx; mov eax,edi; mov ecx,esi; mov r8,rdx; cpuid; mov [r8],eax; mov [r8+4],ebx; mov [r8+8],ecx;
# mov [r8+12],edx; pop rbx; ret
_CPUID_CODE: Final = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")
# rdtsc; shl rdx,32; or rax,rdx; ret
_RDTSC_CODE: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_RDTSC_OFFSET: Final = 64

_MEASURE_NS: Final = 20_000_000
_PLAUSIBLE_KHZ: Final = range(100_000, 20_000_000)


class _HostCode:
    """The code page and its two entry points."""

    def __init__(self) -> None:
        machine = os.uname().machine
        if machine != "x86_64":
            raise HostError(f"this host's processor is {machine}; pyhyve's processors need an x86-64 host")
        self.page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.page[: len(_CPUID_CODE)] = _CPUID_CODE
        self.page[_RDTSC_OFFSET : _RDTSC_OFFSET + len(_RDTSC_CODE)] = _RDTSC_CODE
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC):
            reason = os.strerror(ctypes.get_errno())
            raise HostError(f"this host lets no process make code at run time ({reason}); pyhyve's processors do")
        # PYFUNCTYPE keeps the GIL: both are shorter than giving it up.
        self.cpuid = ctypes.PYFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(base)
        self.rdtsc: Callable[[], int] = ctypes.PYFUNCTYPE(ctypes.c_uint64)(base + _RDTSC_OFFSET)


@cache
def _code() -> _HostCode:
    return _HostCode()


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """Return (EAX, EBX, ECX, EDX) of the host's CPUID instruction."""
    out = (ctypes.c_uint32 * 4)()
    _code().cpuid(leaf, subleaf, ctypes.addressof(out))
    return out[0], out[1], out[2], out[3]


def rdtsc_function() -> Callable[[], int]:
    """Return a function that returns the host's time-stamp counter (about 0.1 µs a call)."""
    return _code().rdtsc


def signature(*registers: int) -> str:
    """Return the text that CPUID packs into registers."""
    return b"".join(value.to_bytes(4, "little") for value in registers).decode("latin-1")


def _sample() -> tuple[int, int]:
    """Return (ns, tsc) of one moment: the tightest of a few brackets."""
    rdtsc = _code().rdtsc
    raw = time.CLOCK_MONOTONIC_RAW
    best = (1 << 63, 0, 0)
    for _ in range(16):
        before = rdtsc()
        now = time.clock_gettime_ns(raw)
        after = rdtsc()
        best = min(best, (after - before, now, (before + after) // 2))
    return best[1], best[2]


_first: list[tuple[int, int]] = []


def start_measuring() -> None:
    """Take the first sample of the counter early, so that `tsc_khz()` need not wait for its second."""
    if not _first:
        _first.append(_sample())


def _measured_khz() -> int:
    start_measuring()
    ns0, tsc0 = _first[0]
    rest = ns0 + _MEASURE_NS - time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    if rest > 0:
        time.sleep(rest / 1e9)
    ns1, tsc1 = _sample()
    return round((tsc1 - tsc0) * 1_000_000 / (ns1 - ns0))


def _stated_khz(cpuid: CpuidFunction) -> int | None:
    """Return the frequency that the host's CPUID states, in kHz, or None.

    Leaf 15H on Intel (SDM vol 2, CPUID, "Time Stamp Counter and Nominal Core Crystal Clock Information Leaf"), else the
    timing leaf that VMware began and that others took up (40000010H: EAX is kHz).
    """
    highest, ebx, ecx, edx = cpuid(0, 0)
    if signature(ebx, edx, ecx) == "GenuineIntel" and highest >= 0x15:
        denominator, numerator, crystal, _ = cpuid(0x15, 0)
        if denominator and numerator and crystal:
            return crystal * numerator // denominator // 1000
    if cpuid(1, 0)[2] >> 31 & 1:
        highest, ebx, ecx, edx = cpuid(0x4000_0000, 0)
        vendor = signature(ebx, ecx, edx)
        if vendor.startswith(("VMwareVMware", "KVMKVMKVM", "bhyve")) and 0x4000_0010 <= highest < 0x4001_0000:
            return cpuid(0x4000_0010, 0)[0] or None
    return None


@cache
def tsc_khz() -> int:
    """Return the frequency of the host's time-stamp counter in kHz.

    What CPUID states is believed if a measurement against CLOCK_MONOTONIC_RAW agrees within 1 %; the measurement
    (some 10 parts in a million) serves otherwise.
    """
    measured = _measured_khz()
    stated = _stated_khz(cpuid)
    khz = stated if stated is not None and math.isclose(stated, measured, rel_tol=0.01) else measured
    if khz not in _PLAUSIBLE_KHZ:
        raise HostError(f"the host's time-stamp counter runs at {khz} kHz, which cannot be; is its clock stable?")
    return khz
