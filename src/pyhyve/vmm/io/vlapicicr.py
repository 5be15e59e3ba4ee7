"""The interrupt command register: how a processor interrupts others, or itself.

Intel SDM vol 3, "Issuing Interprocessor Interrupts". Both halves are where the processor keeps them, which may send
fixed interrupts by itself.
"""

from typing import Protocol

from pyhyve.cpu.processor import ApicState
from pyhyve.vmm.io.apicbus import FIXED, INIT, LOWEST_PRIORITY, NMI, STARTUP, ApicBus, LocalApic
from pyhyve.vmm.io.apicregs import (
    ESR_REDIRECTABLE,
    ESR_SEND_ILLEGAL,
    ICR_ASSERT,
    ICR_LEVEL,
    ICR_LOGICAL,
    ICR_LOW_WRITABLE,
)

_SELF, _ALL_BUT_SELF = 1, 3


class Sender(LocalApic, Protocol):
    """The local APIC whose register this is."""

    @property
    def x2apic(self) -> bool: ...

    def error(self, bits: int) -> None: ...


class InterruptCommands:
    """`state`: where both halves are."""

    __slots__ = ("_apic", "_bus", "_state")

    def __init__(self, state: ApicState, apic: Sender, bus: ApicBus) -> None:
        self._state = state
        self._apic = apic
        self._bus = bus

    def write_low(self, value: int) -> None:
        """The low half in xAPIC mode: sends."""
        self._state.icr_low = value & ICR_LOW_WRITABLE
        self._send(value, self._state.icr_high >> 24)

    def write_high(self, value: int) -> None:
        """The high half in xAPIC mode: a destination of 8 bits."""
        self._state.icr_high = value & 0xFF000000

    def write(self, value: int) -> None:
        """The ICR in x2APIC mode: one write of 64 bits, the high half all destination."""
        self._state.icr_low = value & ICR_LOW_WRITABLE
        self._state.icr_high = dest = value >> 32
        self._send(value, dest)

    def write_self_ipi(self, value: int) -> None:
        """See "SELF IPI Register"."""
        self._send(_SELF << 18 | value & 0xFF, 0)

    def _send(self, low: int, dest: int) -> None:
        mode = low >> 8 & 7
        vector = low & 0xFF
        shorthand = low >> 18 & 3
        if mode == LOWEST_PRIORITY and self._apic.x2apic:
            self._apic.error(ESR_REDIRECTABLE)  # whatever the vector
            return
        if mode in (FIXED, LOWEST_PRIORITY):
            if vector < 16:
                self._apic.error(ESR_SEND_ILLEGAL)
                return
        elif mode == INIT:
            if low & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL:
                return  # INIT level de-assert only synchronized arbitration ids, on processors long gone
        elif mode not in (NMI, STARTUP):
            return
        if shorthand == 0:
            self._bus.deliver(dest, bool(low & ICR_LOGICAL), mode, vector, False, self._apic.x2apic)
        elif shorthand == _SELF:
            self._apic.receive(mode, vector, False)
        else:
            self._bus.deliver_all(mode, vector, self._apic if shorthand == _ALL_BUT_SELF else None)
