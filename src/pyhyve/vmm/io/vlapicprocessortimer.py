"""The local APIC's timer where the processor keeps it (ApicTimer): what is left to the monitor.

Intel SDM vol 3, "APIC Timer". The processor counts in cycles of the guest's time-stamp counter: nothing is to be done
when the VM has been paused, and what a guest writes to its counter has to be told.
"""

from collections.abc import Callable
from typing import Final

from pyhyve.cpu.processor import ApicTimer
from pyhyve.vmm.io.apicregs import LVT_MASKED
from pyhyve.vmm.io.deadline import MIN_PERIOD_NS
from pyhyve.vmm.io.vlapictimer import APIC_BUS_HZ, ONE_SHOT, PERIODIC, RESERVED, TSC_DEADLINE, VlapicTimerV1, divisor

_NS: Final = 1_000_000_000
_MASK64: Final = (1 << 64) - 1


class ProcessorTimer:
    """As VlapicTimer, on the vCPU's thread; nobody is called at the deadline: the processor posts the interrupt."""

    __slots__ = ("_divisor", "_timer", "_tsc", "_tsc_hz", "divide")

    def __init__(self, timer: ApicTimer, tsc: Callable[[], int], tsc_hz: int) -> None:
        self._timer = timer
        self._tsc = tsc
        self._tsc_hz = tsc_hz
        timer.set_clock(tsc_hz, APIC_BUS_HZ, MIN_PERIOD_NS)
        self.reset()

    @property
    def mode(self) -> int:
        return self._timer.lvt >> 17 & 3

    @property
    def initial(self) -> int:
        return self._timer.initial

    @property
    def tsc_deadline(self) -> int:
        return self._timer.deadline if self.mode == TSC_DEADLINE else 0

    def reset(self) -> None:
        self._timer.lvt = LVT_MASKED | ONE_SHOT << 17
        self._timer.start(0)
        self._set_divide(0)

    def set_lvt(self, lvt: int) -> None:
        """The LVT entry. Going into or out of TSC-deadline mode disarms."""
        self._settle()
        mode = lvt >> 17 & 3
        if (mode == TSC_DEADLINE) != (self.mode == TSC_DEADLINE):
            self._timer.start(0)
        elif mode == RESERVED:
            self._timer.deadline = 0
        self._timer.lvt = lvt

    def set_initial(self, count: int) -> None:
        """Start from `count` (32 bits), or stop with 0; ignored in TSC-deadline mode."""
        self._settle()
        if self.mode != TSC_DEADLINE:
            self._timer.start(count)
        if self.mode == RESERVED:
            self._timer.deadline = 0

    def current(self) -> int:
        """The current count: 0 in TSC-deadline mode and once a one-shot is over."""
        self._settle()
        deadline, mode = self._timer.deadline, self.mode
        if not deadline or mode == TSC_DEADLINE:
            return 0
        left = deadline - self._tsc()
        if left <= 0:
            if mode != PERIODIC:
                return 0
            period = self._cycles(self.initial)
            left = left % period or period
        return -(-left * APIC_BUS_HZ // (self._tsc_hz * self._divisor))

    def set_divide(self, value: int) -> None:
        """See "Divide Configuration Register": a running count goes on with the new divisor."""
        left = self.current()
        self._set_divide(value)
        if left:
            self._timer.deadline = self._tsc() + self._cycles(left)

    def set_tsc_deadline(self, value: int) -> None:
        """See "TSC-Deadline Mode": an absolute time of the guest's TSC; 0 disarms; ignored in the other modes."""
        self._settle()
        if self.mode == TSC_DEADLINE:
            self._timer.deadline = value

    def read_tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: 0 while nothing is armed."""
        self._settle()
        return self.tsc_deadline

    def tsc_written(self, delta: int) -> None:
        """The guest has moved its TSC: counts go on as they were, deadlines are for the TSC as it is."""
        deadline = self._timer.deadline
        if self.mode != TSC_DEADLINE and deadline:
            self._timer.deadline = deadline + delta & _MASK64 or 1

    def take_error(self) -> bool:
        """True, once, if the interrupt was due and its vector below 16."""
        return self._timer.take_error()

    def save(self) -> VlapicTimerV1:
        deadline = self._timer.deadline
        left = (deadline - self._tsc()) * _NS // self._tsc_hz if deadline else None
        return VlapicTimerV1(self.mode, self.initial, self.divide, self.tsc_deadline, left)

    def restore(self, state: VlapicTimerV1, lvt: int) -> None:
        """The guest's TSC must have been restored before."""
        self._timer.lvt = lvt
        self._set_divide(state.divide)
        self._timer.start(state.initial)
        deadline = state.tsc_deadline
        if not deadline and state.left is not None:
            deadline = max(1, self._tsc() + state.left * self._tsc_hz // _NS)
        self._timer.deadline = deadline

    def _settle(self) -> None:
        """What has fallen due comes before what is asked or changed now, also where the alarm is late."""
        deadline = self._timer.deadline
        if deadline and deadline <= self._tsc():
            self._timer.look()

    def _set_divide(self, value: int) -> None:
        self.divide = value & 0xB
        self._divisor = divisor(value)
        self._timer.set_divisor(self._divisor)

    def _cycles(self, ticks: int) -> int:
        return ticks * self._divisor * self._tsc_hz // APIC_BUS_HZ
