"""The guest's time-stamp counter, and the paravirtual clock that tells its frequency.

A guest's TSC is the host's plus an offset, which the engine adds; here are the offset, IA32_TSC_ADJUST, and the two
structures of the paravirtual clock (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW and
MSR_KVM_WALL_CLOCK_NEW). They are static: the TSC is invariant and never scaled, so what is written once stays true.
"""

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from pyhyve.base.protocols import Clock, GuestMemory
from pyhyve.cpu.processor import VcpuBackend

_MASK64: Final = (1 << 64) - 1
_PV_TSC_STABLE: Final = 1
_SYSTEM_TIME: Final = struct.Struct("<IIQQIbBxx")
_WALL_CLOCK: Final = struct.Struct("<III")


def pv_scale(tsc_khz: int) -> tuple[int, int]:
    """Return (multiplier, shift) with ns = (ticks shifted left by `shift`) * multiplier >> 32; multiplier < 2**32."""
    shift = 0
    scaled = (1_000_000 << 32) / tsc_khz
    while scaled >= 1 << 32:
        scaled /= 2
        shift += 1
    while scaled < 1 << 31:
        scaled *= 2
        shift -= 1
    return int(scaled), shift


class GuestTsc:
    """One vCPU's counter. `rdtsc` reads the host's; `khz` is its frequency."""

    def __init__(self, backend: VcpuBackend, rdtsc: Callable[[], int], khz: int) -> None:
        self._backend = backend
        self._rdtsc = rdtsc
        self.khz = khz
        self.hz = khz * 1000
        self.offset = 0
        self.adjust = 0
        self.on_write: Callable[[int], None] = lambda delta: None
        """Told by how much the guest has moved its counter."""

    def now(self) -> int:
        """The guest's counter, 0 <= n < 2**64."""
        return (self._rdtsc() + self.offset) & _MASK64

    def set_offset(self, offset: int) -> None:
        self.offset = offset & _MASK64
        self._backend.set("tsc_offset", self.offset)

    def rebase(self, unwritten: int) -> None:
        """Go on, after a pause, from what the counter would show had the guest never written it."""
        self.set_offset(unwritten + self.adjust - self._rdtsc() & _MASK64)

    def write(self, value: int) -> None:
        """The guest writes IA32_TIME_STAMP_COUNTER: IA32_TSC_ADJUST moves along (Intel SDM vol 3, "Time-Stamp Counter
        Adjustment")."""
        delta = (value - self.now()) & _MASK64
        self.adjust = (self.adjust + delta) & _MASK64
        self.set_offset(self.offset + delta & _MASK64)
        self.on_write(delta)

    def write_adjust(self, value: int) -> None:
        delta = value - self.adjust
        self.adjust = value
        self.set_offset(self.offset + delta & _MASK64)
        self.on_write(delta)


class PvClock:
    """The paravirtual clock's two MSRs, for one vCPU."""

    def __init__(self, tsc: GuestTsc, clock: Clock, memory: GuestMemory) -> None:
        self._tsc = tsc
        self._clock = clock
        self._memory = memory
        self.system_time = 0
        self.wall_clock = 0

    def reset(self) -> None:
        self.system_time = self.wall_clock = 0

    def write_system_time(self, value: int) -> None:
        """Bit 0 enables; the rest is where the structure goes."""
        self.system_time = value
        if not value & 1:
            return
        multiplier, shift = pv_scale(self._tsc.khz)
        self._write(
            value & ~1,
            _SYSTEM_TIME.pack(2, 0, self._tsc.now(), self._clock.now(), multiplier, shift, _PV_TSC_STABLE),
        )

    def write_wall_clock(self, value: int) -> None:
        """Write the time of day at which the system time was zero."""
        self.wall_clock = value
        seconds, nanoseconds = divmod(time.time_ns() - self._clock.now(), 1_000_000_000)
        self._write(value, _WALL_CLOCK.pack(2, seconds & 0xFFFF_FFFF, nanoseconds))

    def _write(self, gpa: int, data: bytes) -> None:
        with suppress(IndexError):  # the guest may name an address that is no memory: nothing is stored
            self._memory.write(gpa, data)
