"""IRR, ISR and TMR, the priorities that decide between them, and what becomes of an interrupt at its EOI.

Intel SDM vol 3, "Handling Interrupts" and "Task and Processor Priorities". The three are ints of 256 bits.
"""

import threading
from collections.abc import Callable
from typing import Final

BIT: Final = tuple(1 << n for n in range(256))


class Priorities:
    """The part of a local APIC that every interrupt passes: accepted, delivered, completed.

    Threads: `accept` from any, everything else from the vCPU's own; `pending_vector` takes no lock, and `_notify` is
    called with no lock held.
    """

    __slots__ = ("_accepting", "_irr", "_isr", "_lock", "_notify", "_ppr", "_tmr", "_tpr")

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._lock = threading.RLock()
        self._accepting = False
        self._irr = self._isr = self._tmr = 0
        self._tpr = self._ppr = 0

    @property
    def enabled(self) -> bool:
        """Hardware- and software-enabled: fixed interrupts are accepted."""
        return self._accepting

    @property
    def irr(self) -> int:
        """Interrupts accepted and not yet delivered, a bit for each vector."""
        return self._irr

    @property
    def isr(self) -> int:
        """Interrupts delivered and not yet completed."""
        return self._isr

    @property
    def tmr(self) -> int:
        """Which of them are level-triggered."""
        return self._tmr

    @property
    def tpr(self) -> int:
        return self._tpr

    @property
    def ppr(self) -> int:
        return self._ppr

    @property
    def cr8(self) -> int:
        """The task priority class: TPR bits 7:4."""
        return self._tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        if value != self._tpr >> 4:
            self._write_tpr(value << 4 & 0xF0)

    def accept(self, vector: int, level: bool) -> None:
        """Put a fixed interrupt (16 to 255) into IRR. "Interrupt Acceptance for Fixed Interrupts": TMR tells the EOI
        later whether it was level-triggered."""
        bit = BIT[vector]
        with self._lock:
            irr = self._irr
            self._irr = irr | bit
            if level:
                self._tmr |= bit
            elif self._tmr & bit:
                self._tmr ^= bit
        if not irr & bit:
            self._notify()

    def pending_vector(self) -> int | None:
        """The vector that the vCPU would take now by IRR, ISR and TPR, or None. "Task and Processor Priorities"."""
        irr = self._irr
        if not irr or not self._accepting:
            return None
        vector = irr.bit_length() - 1
        return vector if vector & 0xF0 > self._ppr & 0xF0 else None

    def acknowledge(self, vector: int) -> None:
        """The vCPU took `vector`: IRR to ISR."""
        bit = BIT[vector]
        with self._lock:
            self._irr &= ~bit
            self._isr |= bit
            self._update_ppr()

    def _complete(self) -> int | None:
        """End the interrupt of the highest priority in service; return its vector if it was level-triggered."""
        with self._lock:
            isr = self._isr
            if not isr:
                return None
            vector = isr.bit_length() - 1
            bit = BIT[vector]
            self._isr = isr ^ bit
            self._update_ppr()
            return vector if self._tmr & bit else None

    def _clear(self) -> None:
        with self._lock:
            self._irr = self._isr = self._tmr = 0
            self._tpr = self._ppr = 0

    def _update_ppr(self) -> None:
        isr = self._isr
        isrv = isr.bit_length() - 1 if isr else 0
        tpr = self._tpr
        self._ppr = tpr if tpr >> 4 >= isrv >> 4 else isrv & 0xF0

    def _notify_if_pending(self) -> None:
        if self.pending_vector() is not None:
            self._notify()

    def _write_tpr(self, value: int) -> None:
        with self._lock:
            lowered = value & 0xFF < self._tpr
            self._tpr = value & 0xFF
            self._update_ppr()
        if lowered:
            self._notify_if_pending()
