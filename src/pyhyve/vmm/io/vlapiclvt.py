"""The local vector table: what a local APIC's own sources (timer, errors, sensors, the LINT pins) raise.

Intel SDM vol 3, "Local Vector Table". The entries are words of the local APIC's register file, so that reading one
needs nothing from here.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from pyhyve.vmm.io.apicbus import EXTINT, FIXED, INIT, NMI
from pyhyve.vmm.io.apicregs import (
    LVT_ACTIVE_LOW,
    LVT_LEVEL,
    LVT_LINT0,
    LVT_LINT1,
    LVT_MASKED,
    LVT_PMC,
    LVT_REMOTE_IRR,
    SVR,
    SVR_ENABLED,
    ApicFeatures,
)

INTR: Final = 0
"""LINT0, wired to the 8259 pair."""


class Receiver(Protocol):
    """The local APIC, as its own sources see it."""

    def post(self, vector: int, level: bool = False) -> bool: ...

    def receive(self, mode: int, vector: int, level: bool) -> bool: ...


class LocalVectorTable:
    """`regs`: the register file. `pins`: what others drive LINT0 and LINT1 to; they keep that over a reset."""

    __slots__ = ("_apic", "_lvts", "_notify", "_regs", "_writable", "pins")

    def __init__(self, regs: list[int], apic: Receiver, notify: Callable[[], None], features: ApicFeatures) -> None:
        self._lvts = features.lvts
        self._writable = {index: features.writable(index) for index in self._lvts}
        self._regs = regs
        self._apic = apic
        self._notify = notify
        self.pins = [False, False]

    def mask_all(self) -> None:
        """What a reset and switching off by software do."""
        for lvt in self._lvts:
            self._regs[lvt] |= LVT_MASKED

    def write(self, index: int, value: int) -> None:
        """Write an entry; while the APIC is switched off by software it stays masked."""
        value &= self._writable[index]
        if not self._regs[SVR] & SVR_ENABLED:
            value |= LVT_MASKED
        pin = index - LVT_LINT0
        if pin not in (0, 1):
            self._regs[index] = value
            return
        remote_irr = self._regs[index] & LVT_REMOTE_IRR if value & LVT_LEVEL else 0
        self._regs[index] = value | remote_irr
        if self.active(pin) and (_is_level(index, value) or value >> 8 & 7 == EXTINT):
            self.lint_active(pin)

    def takes_extint(self) -> bool:
        """LINT0 lets the 8259's INTR through to the processor."""
        return self._regs[LVT_LINT0] & (LVT_MASKED | 0x700) == EXTINT << 8

    def raise_fixed(self, index: int) -> None:
        """The source of an entry that knows no delivery mode (timer, errors) wants its interrupt."""
        lvt = self._regs[index]
        if not lvt & LVT_MASKED:
            self._apic.post(lvt & 0xFF)

    def raise_moded(self, index: int) -> None:
        """The source of an entry with a delivery mode (thermal, performance counters, CMCI) wants its interrupt.

        SMI, ExtINT and what is reserved do nothing. Performance counters mask their entry as they interrupt.
        """
        lvt = self._regs[index]
        if lvt & LVT_MASKED:
            return
        if index == LVT_PMC:
            self._regs[index] = lvt | LVT_MASKED
        mode = lvt >> 8 & 7
        if mode in (FIXED, NMI, INIT):
            self._apic.receive(mode, lvt & 0xFF, False)

    def active(self, pin: int) -> bool:
        """Whether the pin is as its entry's polarity wants it; INTR and NMI themselves are always active high."""
        lvt = self._regs[LVT_LINT0 + pin]
        low = lvt & LVT_ACTIVE_LOW and lvt >> 8 & 7 != EXTINT
        return self.pins[pin] != bool(low)

    def lint_active(self, pin: int) -> None:
        """The pin has become active, or its entry was written while it is."""
        index = LVT_LINT0 + pin
        lvt = self._regs[index]
        if lvt & LVT_MASKED:
            return
        mode = lvt >> 8 & 7
        if mode == EXTINT:
            self._notify()
        elif mode != FIXED:
            self._apic.receive(mode, lvt & 0xFF, False)
        elif not _is_level(index, lvt):
            self._apic.post(lvt & 0xFF)
        elif not lvt & LVT_REMOTE_IRR and self._apic.post(lvt & 0xFF, True):
            self._regs[index] |= LVT_REMOTE_IRR

    def eoi(self, vector: int) -> None:
        """A level-triggered vector was completed: a pin that sent it and is still asserted sends again."""
        for pin in (0, 1):
            index = LVT_LINT0 + pin
            lvt = self._regs[index]
            if lvt & LVT_REMOTE_IRR and lvt & 0xFF == vector:
                self._regs[index] = lvt & ~LVT_REMOTE_IRR
                if self.active(pin):
                    self.lint_active(pin)

    def restore_pins(self, levels: Sequence[bool]) -> None:
        """Set what drives the pins, telling nobody."""
        self.pins[:] = levels


def _is_level(index: int, lvt: int) -> bool:
    """Level-triggered: fixed interrupts of LINT0; LINT1 knows edges only."""
    return bool(lvt & LVT_LEVEL) and index != LVT_LINT1 and lvt >> 8 & 7 == FIXED
