"""IRR, ISR and TMR, the priorities that decide between them, and what becomes of an interrupt at its EOI.

Intel SDM vol 3, "Handling Interrupts" and "Task and Processor Priorities". The three are ints of 256 bits. They are
where the processor keeps them, if it does (ApicState): then it may deliver and complete interrupts by itself.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Final

from pyhyve.cpu.processor import ApicState

BIT: Final = tuple(1 << n for n in range(256))


class PlainApicState:
    """The ApicState for processors that have none of their own: everything goes through the monitor."""

    __slots__ = ("_isr", "_lock", "_tpr", "accepting", "direct", "icr_high", "icr_low", "irr", "ppr", "resting", "tmr")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.accepting = False
        self.direct = self.resting = False
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self.irr = self._isr = self.tmr = 0
            self._tpr = self.ppr = 0
            self.icr_low = self.icr_high = 0

    @property
    def isr(self) -> int:
        return self._isr

    @isr.setter
    def isr(self, value: int) -> None:
        self._isr = value
        self._update_ppr()

    @property
    def tpr(self) -> int:
        return self._tpr

    @tpr.setter
    def tpr(self, value: int) -> None:
        self._tpr = value
        self._update_ppr()

    @property
    def timer(self) -> None:
        return None

    @property
    def halted(self) -> bool:
        return False

    @property
    def halted_cycles(self) -> int:
        return 0

    @property
    def activity(self) -> int:
        return 0

    def configure(self, apic_id: int, enabled: bool, x2apic: bool, ldr: int, dfr: int) -> None:
        """Nothing: the monitor finds the destinations."""

    def accept(self, vector: int, level: bool) -> bool:
        """ "Interrupt Acceptance for Fixed Interrupts": TMR tells the EOI later whether it was level-triggered."""
        bit = BIT[vector]
        with self._lock:
            irr = self.irr
            self.irr = irr | bit
            if level:
                self.tmr |= bit
            elif self.tmr & bit:
                self.tmr ^= bit
        return not irr & bit

    def pending(self) -> int:
        irr = self.irr
        if not irr:
            return -1
        vector = irr.bit_length() - 1
        return vector if vector & 0xF0 > self.ppr & 0xF0 else -1

    def acknowledge(self, vector: int) -> None:
        bit = BIT[vector]
        with self._lock:
            self.irr &= ~bit
            self._isr |= bit
        self._update_ppr()

    def complete(self) -> int:
        isr = self._isr
        if not isr:
            return -1
        vector = isr.bit_length() - 1
        bit = BIT[vector]
        self._isr = isr ^ bit
        self._update_ppr()
        return vector if self.tmr & bit else -1

    def delivered(self) -> Sequence[int]:
        return ()

    def _update_ppr(self) -> None:
        isr, tpr = self._isr, self._tpr
        isrv = isr.bit_length() - 1 if isr else 0
        self.ppr = tpr if tpr >> 4 >= isrv >> 4 else isrv & 0xF0


class Priorities:
    """The part of a local APIC that every interrupt passes: accepted, delivered, completed.

    Threads: `accept` from any, everything else from the vCPU's own; `pending_vector` takes no lock, and `_notify` is
    called with no lock held.
    """

    __slots__ = ("_lock", "_notify", "_spurious", "state")

    def __init__(self, notify: Callable[[], None], state: ApicState | None = None) -> None:
        self._notify = notify
        self._lock = threading.RLock()
        self._spurious = 0xFF
        self.state: Final[ApicState] = PlainApicState() if state is None else state

    @property
    def enabled(self) -> bool:
        """Hardware- and software-enabled: fixed interrupts are accepted."""
        return self.state.accepting

    @property
    def irr(self) -> int:
        """Interrupts accepted and not yet delivered, a bit for each vector."""
        return self.state.irr

    @property
    def isr(self) -> int:
        """Interrupts delivered and not yet completed."""
        return self.state.isr

    @property
    def tmr(self) -> int:
        """Which of them are level-triggered."""
        return self.state.tmr

    @property
    def tpr(self) -> int:
        return self.state.tpr

    @property
    def ppr(self) -> int:
        return self.state.ppr

    @property
    def cr8(self) -> int:
        """The task priority class: TPR bits 7:4."""
        return self.state.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        if value != self.state.tpr >> 4:
            self._write_tpr(value << 4 & 0xF0)

    def accept(self, vector: int, level: bool) -> None:
        """Put a fixed interrupt (16 to 255) into IRR."""
        if self.state.accept(vector, level):
            self._notify()

    def pending_vector(self) -> int | None:
        """The vector that the vCPU would take now by IRR, ISR and TPR, or None. "Task and Processor Priorities"."""
        vector = self.state.pending()
        return None if vector < 0 else vector

    def acknowledge(self, vector: int) -> int:
        """The vCPU takes `vector`: IRR to ISR. Return the vector to deliver: `vector` itself, or the spurious one,
        which has no place in ISR, if it is not pending any more. "Spurious Interrupt"."""
        if not self.state.irr & BIT[vector]:
            return self._spurious
        self.state.acknowledge(vector)
        return vector

    def in_hand(self, vector: int) -> bool:
        """Whether the vector is pending or in service here."""
        return bool((self.state.irr | self.state.isr) & BIT[vector])

    def _notify_if_pending(self) -> None:
        if self.state.pending() >= 0:
            self._notify()

    def _write_tpr(self, value: int) -> None:
        state = self.state
        lowered = value & 0xFF < state.tpr
        state.tpr = value & 0xFF
        if lowered:
            self._notify_if_pending()
