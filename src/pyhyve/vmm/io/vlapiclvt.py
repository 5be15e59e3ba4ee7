"""The local vector table: what a local APIC's own sources (timer, errors, sensors, the LINT pins) raise.

Intel SDM vol 3, "Local Vector Table". The entries are words of the local APIC's register file, so that reading one
needs nothing from here.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from pyhyve.vmm.io.apicbus import EXTINT, FIXED
from pyhyve.vmm.io.apicregs import (
    LVT_DELIVERY_STATUS,
    LVT_LEVEL,
    LVT_LINT0,
    LVT_MASKED,
    LVT_REMOTE_IRR,
    LVT_WRITABLE,
    LVTS,
    SVR,
    SVR_ENABLED,
)

INTR: Final = 0
"""LINT0, wired to the 8259 pair."""


class Receiver(Protocol):
    """The local APIC, as its own sources see it."""

    def post(self, vector: int, level: bool = False) -> bool: ...

    def receive(self, mode: int, vector: int, level: bool) -> bool: ...


class LocalVectorTable:
    """`regs`: the register file. `pins`: what others drive LINT0 and LINT1 to; they keep that over a reset."""

    __slots__ = ("_apic", "_notify", "_regs", "pins")

    def __init__(self, regs: list[int], apic: Receiver, notify: Callable[[], None]) -> None:
        self._regs = regs
        self._apic = apic
        self._notify = notify
        self.pins = [False, False]

    def mask_all(self) -> None:
        """What a reset and switching off by software do."""
        for lvt in LVTS:
            self._regs[lvt] |= LVT_MASKED

    def write(self, index: int, value: int) -> None:
        """Write an entry; while the APIC is switched off by software it stays masked."""
        value &= LVT_WRITABLE[index]
        if not self._regs[SVR] & SVR_ENABLED:
            value |= LVT_MASKED
        pin = index - LVT_LINT0
        if pin not in (0, 1):
            self._regs[index] = value
            return
        remote_irr = self._regs[index] & LVT_REMOTE_IRR if value & LVT_LEVEL else 0
        self._regs[index] = value | remote_irr
        if self.pins[pin] and (value & LVT_LEVEL or value >> 8 & 7 == EXTINT):
            self.lint_asserted(pin)

    def takes_extint(self) -> bool:
        """LINT0 lets the 8259's INTR through to the processor."""
        return self._regs[LVT_LINT0] & (LVT_MASKED | 0x700) == EXTINT << 8

    def raise_fixed(self, index: int) -> None:
        """The source of an entry that knows no delivery mode (timer, errors) wants its interrupt."""
        lvt = self._regs[index]
        if not lvt & LVT_MASKED:
            self._apic.post(lvt & 0xFF)

    def lint_asserted(self, pin: int) -> None:
        """The pin has become asserted, or its entry was written while it is."""
        index = LVT_LINT0 + pin
        lvt = self._regs[index]
        if lvt & LVT_MASKED:
            return
        mode = lvt >> 8 & 7
        if mode == EXTINT:
            self._notify()
        elif mode != FIXED:
            self._apic.receive(mode, lvt & 0xFF, False)
        elif not lvt & LVT_LEVEL:
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
                if self.pins[pin]:
                    self.lint_asserted(pin)

    def restore_pins(self, levels: Sequence[bool]) -> None:
        """Set what drives the pins, telling nobody."""
        self.pins[:] = levels


LVT_X2APIC_WRITABLE: Final = {
    index: writable | LVT_DELIVERY_STATUS | (LVT_REMOTE_IRR if writable & LVT_LEVEL else 0)
    for index, writable in LVT_WRITABLE.items()
}
"""In x2APIC mode the read-only bits may be written, the reserved ones not."""
