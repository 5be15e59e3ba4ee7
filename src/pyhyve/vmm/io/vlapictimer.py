"""The local APIC's timer: one-shot, periodic and TSC-deadline.

Intel SDM vol 3, "APIC Timer". The local APIC hands it its lock and the mode from the LVT timer entry, and is called
when the count or the deadline is reached.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Final

from pyhyve.base.protocols import Clock, Timers
from pyhyve.vmm.io.deadline import Deadline, next_period

APIC_BUS_HZ: Final = 1_000_000_000
"""What the timer counts before its divider; CPUID 0x15 (crystal) and 0x40000010 report it."""

ONE_SHOT, PERIODIC, TSC_DEADLINE, RESERVED = 0, 1, 2, 3

_NS: Final = 1_000_000_000
_MAX_SLEEP_NS: Final = 1 << 50
"""A TSC deadline further away than this (13 days) is approached in steps."""


def divisor(divide: int) -> int:
    """What the Divide Configuration Register says: 1 to 128."""
    code = divide & 3 | divide >> 1 & 4
    return 1 if code == 7 else 2 << code


@dataclass(frozen=True, slots=True)
class VlapicTimerV1:
    """`left`: nanoseconds to the deadline (negative if it is overdue), None if the timer does not run."""

    mode: int
    initial: int
    divide: int
    tsc_deadline: int
    left: int | None


class VlapicTimer:
    """`expired()` is called without the lock. `mode`, `initial`, `divide` and `tsc_deadline` are for reading."""

    __slots__ = (
        "_clock", "_deadline", "_divisor", "_expired", "_lock", "_tsc", "_tsc_hz", "divide", "initial", "mode",
        "tsc_deadline",
    )  # fmt: skip

    def __init__(
        self,
        clock: Clock,
        timers: Timers,
        lock: "RLock",
        tsc: Callable[[], int],
        tsc_hz: int,
        expired: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._lock = lock
        self._tsc = tsc
        self._tsc_hz = tsc_hz
        self._expired = expired
        self._deadline = Deadline(clock, timers, self._wake)
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._deadline.clear()
            self.mode = ONE_SHOT
            self.initial = 0
            self.tsc_deadline = 0
            self._set_divide(0)

    def set_lvt(self, lvt: int) -> None:
        """The LVT entry."""
        self.set_mode(lvt >> 17 & 3)

    def tsc_written(self, delta: int) -> None:
        """The guest has moved its TSC, for which a TSC deadline is."""
        self.set_tsc_deadline(self.tsc_deadline)

    def take_error(self) -> bool:
        """Never: errors are the caller's to find, at `expired`."""
        return False

    def set_mode(self, mode: int) -> None:
        """LVT bits 18:17. Going into or out of TSC-deadline mode disarms; the reserved mode does not count."""
        self._settle()
        with self._lock:
            if (mode == TSC_DEADLINE) != (self.mode == TSC_DEADLINE):
                self._deadline.clear()
                self.tsc_deadline = 0
                self.initial = 0
            elif mode == RESERVED:
                self._deadline.clear()
            self.mode = mode

    def set_initial(self, count: int) -> None:
        """Start from `count` (32 bits), or stop with 0; ignored in TSC-deadline mode."""
        self._settle()
        with self._lock:
            if self.mode == TSC_DEADLINE:
                return
            self.initial = count
            if count and self.mode != RESERVED:
                self._deadline.set(self._clock.now() + self._ticks_ns(count))
            else:
                self._deadline.clear()

    def current(self) -> int:
        """The current count: 0 in TSC-deadline mode and once a one-shot is over."""
        self._settle()
        with self._lock:
            at = self._deadline.at
            if at is None or not self.initial or self.mode == TSC_DEADLINE:
                return 0
            left = at - self._clock.now()
            if self.mode == PERIODIC:
                left = left % self._ticks_ns(self.initial) or self._ticks_ns(self.initial)
            elif left <= 0:
                return 0
            return -(-left * APIC_BUS_HZ // (_NS * self._divisor))

    def read_tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: 0 while nothing is armed."""
        self._settle()
        return self.tsc_deadline

    def set_divide(self, value: int) -> None:
        """See "Divide Configuration Register": bits 0, 1 and 3; a running count goes on with the new divisor."""
        with self._lock:
            left = self.current()
            self._set_divide(value)
            if left:
                self._deadline.set(self._clock.now() + self._ticks_ns(left))

    def set_tsc_deadline(self, value: int) -> None:
        """See "TSC-Deadline Mode": an absolute time of the guest's TSC; 0 disarms; ignored in the other modes."""
        if self.mode != TSC_DEADLINE:
            return
        self._settle()
        with self._lock:
            self.tsc_deadline = value
            if not value:
                self._deadline.clear()
                return
            if self._arm_tsc():
                return
            self.tsc_deadline = 0
            self._deadline.clear()
        self._expired()

    def _set_divide(self, value: int) -> None:
        self.divide = value & 0xB
        self._divisor = divisor(value)

    def _ticks_ns(self, ticks: int) -> int:
        return ticks * self._divisor * _NS // APIC_BUS_HZ

    def _arm_tsc(self) -> bool:
        """Book the TSC deadline; False if the guest's TSC has already reached it."""
        left = self.tsc_deadline - self._tsc()
        if left <= 0:
            return False
        self._deadline.set(self._clock.now() + min(left * _NS // self._tsc_hz + 1, _MAX_SLEEP_NS))
        return True

    def _wake(self) -> None:
        with self._lock:
            at = self._deadline.at
            if not self._deadline.due() or at is None or not self._reached(at):
                return
        self._expired()

    def _settle(self) -> None:
        """What has fallen due comes before what is asked or changed now, also where the event thread is late."""
        at = self._deadline.at
        if at is None or at > self._clock.now():
            return
        with self._lock:
            at = self._deadline.at
            if at is None or at > self._clock.now():
                return
            self._deadline.clear()
            if not self._reached(at):
                return
        self._expired()

    def _reached(self, at: int) -> bool:
        """The deadline `at`, which is cleared, has come: book the next one; False if the guest's TSC is not there."""
        if self.mode == TSC_DEADLINE:
            if self._arm_tsc():
                return False
            self.tsc_deadline = 0
        elif self.mode == PERIODIC and self.initial:
            self._deadline.set(next_period(at, self._ticks_ns(self.initial), self._clock.now()))
        return True

    def save(self) -> VlapicTimerV1:
        with self._lock:
            at = self._deadline.at
            left = None if at is None else at - self._clock.now()
            return VlapicTimerV1(self.mode, self.initial, self.divide, self.tsc_deadline, left)

    def restore(self, state: VlapicTimerV1, lvt: int) -> None:
        """The guest's TSC must have been restored before; the mode is that of the LVT entry."""
        with self._lock:
            self._deadline.clear()
            self.mode = state.mode
            self.initial = state.initial
            self._set_divide(state.divide)
            self.tsc_deadline = state.tsc_deadline
            now = self._clock.now()
            if state.tsc_deadline:
                if not self._arm_tsc():
                    self._deadline.set(now)
            elif state.left is not None:
                self._deadline.set(now + state.left)
