"""The local APIC of one vCPU, in xAPIC and x2APIC mode; its timer is in vlapictimer.

Intel SDM vol 3, chapter "Advanced Programmable Interrupt Controller (APIC)". Registers go by `offset >> 4` of the
xAPIC page, which is also `msr - 0x800` in x2APIC mode. IRR, ISR and TMR are ints of 256 bits.

Threads: `post` and `receive` from any, everything else from the vCPU's own; `pending_vector` takes no lock, and
`notify`, `on_*` and the bus are called with no lock held, so that they may take the caller's.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.errors import GuestFault
from pyhyve.base.protocols import Clock, Timers
from pyhyve.vmm.io.apicbus import EXTINT, FIXED, INIT, LOWEST_PRIORITY, NMI, STARTUP, ApicBus
from pyhyve.vmm.io.vlapictimer import APIC_BUS_HZ as APIC_BUS_HZ
from pyhyve.vmm.io.vlapictimer import VlapicTimer, VlapicTimerV1

APIC_DEFAULT_BASE: Final = 0xFEE00000
APIC_VERSION: Final = 0x00060014
"""Integrated local APIC, LVT entries 0-6 (CMCI among them), no EOI-broadcast suppression."""

MSR_APIC_BASE: Final = 0x1B
MSR_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC_FIRST: Final = 0x800
MSR_X2APIC_LAST: Final = 0x8FF

# IA32_APIC_BASE, "Local APIC Status and Location".
BASE_BSP: Final = 1 << 8
BASE_X2APIC: Final = 1 << 10
BASE_ENABLED: Final = 1 << 11
_BASE_MODE: Final = BASE_ENABLED | BASE_X2APIC

# Registers, "Local APIC Register Address Map".
ID, VERSION, TPR, APR, PPR, EOI, RRD, LDR, DFR, SVR = 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F
ISR0, TMR0, IRR0, ESR = 0x10, 0x18, 0x20, 0x28
LVT_CMCI, ICR_LOW, ICR_HIGH = 0x2F, 0x30, 0x31
LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x32, 0x33, 0x34, 0x35, 0x36, 0x37
TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F

_LVTS: Final = (LVT_CMCI, LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR)
LVT_MASKED: Final = 1 << 16
_LVT_DELIVERY_STATUS: Final = 1 << 12
_LVT_REMOTE_IRR: Final = 1 << 14
_LVT_LEVEL: Final = 1 << 15
_LVT_WRITABLE: Final = {
    LVT_CMCI: 0x107FF,
    LVT_TIMER: 0x700FF,
    LVT_THERMAL: 0x107FF,
    LVT_PMC: 0x107FF,
    LVT_LINT0: 0x1A7FF,
    LVT_LINT1: 0x1A7FF,
    LVT_ERROR: 0x100FF,
}

SVR_ENABLED: Final = 1 << 8
_SVR_WRITABLE: Final = 0x3FF

# Error Status Register, "Error Handling".
ESR_SEND_ILLEGAL: Final = 1 << 5
ESR_RECEIVE_ILLEGAL: Final = 1 << 6
ESR_ILLEGAL_REGISTER: Final = 1 << 7

# "Interrupt Command Register (ICR)".
_ICR_LOGICAL: Final = 1 << 11
_ICR_ASSERT: Final = 1 << 14
_ICR_LEVEL: Final = 1 << 15
_ICR_LOW_WRITABLE: Final = 0xCCFFF
_ICR_LOW_RESERVED_X2APIC: Final = 0xFFFFFFFF & ~(_ICR_LOW_WRITABLE | 1 << 12)

_BIT: Final = tuple(1 << n for n in range(256))


def _nothing() -> None:
    pass


def _no_sipi(vector: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class VlapicV1:
    SCHEMA: ClassVar[tuple[str, int]] = ("vlapic", 1)
    apic_id: int
    base: int
    regs: tuple[int, ...]
    irr: int
    isr: int
    tmr: int
    errors: int
    lint: tuple[bool, bool]
    extint_latched: bool
    timer: VlapicTimerV1


class Vlapic:
    """One local APIC. `tsc()` is the guest's time-stamp counter, `tsc_hz` its rate.

    notify: called when something new may be deliverable. on_init: an INIT arrived (the owner calls `init()` from the
    vCPU's thread). on_sipi(vector), on_nmi: likewise for the vCPU to handle.
    """

    __slots__ = (
        "_accepting", "_base", "_bus", "_errors", "_extint_latched", "_irr", "_isr", "_lint", "_lock", "_notify",
        "_on_init", "_on_nmi", "_on_sipi", "_ppr", "_regs", "_timer", "_tmr", "_tpr", "_x2apic", "apic_id",
    )  # fmt: skip

    def __init__(
        self,
        apic_id: int,
        bus: ApicBus,
        clock: Clock,
        timers: Timers,
        notify: Callable[[], None],
        tsc: Callable[[], int],
        tsc_hz: int,
        on_init: Callable[[], None] = _nothing,
        on_sipi: Callable[[int], None] = _no_sipi,
        on_nmi: Callable[[], None] = _nothing,
    ) -> None:
        self.apic_id = apic_id
        self._bus = bus
        self._notify = notify
        self._on_init = on_init
        self._on_sipi = on_sipi
        self._on_nmi = on_nmi
        self._lock = threading.RLock()
        self._timer = VlapicTimer(clock, timers, self._lock, tsc, tsc_hz, self._timer_expired)
        self._lint = [False, False]
        self._regs = [0] * 64
        self._base = 0
        self._x2apic = False
        self._accepting = False
        self._irr = self._isr = self._tmr = 0
        self._tpr = self._ppr = 0
        self._errors = 0
        self._extint_latched = False
        self.reset()

    # -- state that others look at ------------------------------------------------------------------------------------

    @property
    def base_msr(self) -> int:
        """IA32_APIC_BASE. The xAPIC page is decoded only while bit 11 is set and bit 10 is clear."""
        return self._base

    @property
    def x2apic(self) -> bool:
        return self._x2apic

    @property
    def enabled(self) -> bool:
        return self._accepting

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

    def reset(self) -> None:
        """Power-up state; the LINT pins keep the levels that others drive."""
        with self._lock:
            self._base = APIC_DEFAULT_BASE | BASE_ENABLED | (BASE_BSP if self.apic_id == 0 else 0)
            self._x2apic = False
            self.init()

    def init(self) -> None:
        """What an INIT leaves: registers as at power-up, but IA32_APIC_BASE and the ID stay.

        "Local APIC State After It Receives an INIT-Deassert IPI", "x2APIC States".
        """
        with self._lock:
            regs = [0] * 64
            regs[VERSION] = APIC_VERSION
            regs[DFR] = 0xFFFFFFFF
            regs[SVR] = 0xFF
            for lvt in _LVTS:
                regs[lvt] = LVT_MASKED
            self._regs = regs
            self._timer.reset()
            self._irr = self._isr = self._tmr = 0
            self._tpr = self._ppr = 0
            self._errors = 0
            self._extint_latched = False
            self._accepting = False
            self._set_ids()

    def virtual_wire(self) -> None:
        """What firmware leaves to a boot processor: enabled, the 8259's INTR on LINT0, NMI on LINT1.

        MultiProcessor Specification, "Virtual Wire Mode". For machines that start a kernel without firmware.
        """
        self._write_svr(SVR_ENABLED | 0xFF)
        self._write_lvt_lint(0, EXTINT << 8)
        self._write_lvt_lint(1, NMI << 8)

    # -- interrupts in and out ----------------------------------------------------------------------------------------

    def post(self, vector: int, level: bool = False) -> bool:
        """Accept a fixed interrupt into IRR (any thread); return whether it was accepted.

        "Interrupt Acceptance for Fixed Interrupts": TMR tells the EOI later whether it was level-triggered.
        """
        if not self._accepting:
            return False
        if vector < 16:
            self._error(ESR_RECEIVE_ILLEGAL)
            return False
        bit = _BIT[vector]
        with self._lock:
            irr = self._irr
            self._irr = irr | bit
            if level:
                self._tmr |= bit
            elif self._tmr & bit:
                self._tmr ^= bit
        if not irr & bit:
            self._notify()
        return True

    def receive(self, mode: int, vector: int, level: bool) -> bool:
        """Take a message of any delivery mode from the bus (any thread); return whether it was accepted."""
        if mode in (FIXED, LOWEST_PRIORITY):
            return self.post(vector, level)
        if not self._base & BASE_ENABLED:
            return False
        if mode == NMI:
            self._on_nmi()
        elif mode == INIT:
            self._on_init()
        elif mode == STARTUP:
            self._on_sipi(vector)
        elif mode == EXTINT:
            self._extint_latched = True
            self._notify()
        else:
            return False
        return True

    def pending_vector(self) -> int | None:
        """The vector that the vCPU would take now by IRR, ISR and TPR, or None. "Task and Processor Priorities"."""
        irr = self._irr
        if not irr or not self._accepting:
            return None
        vector = irr.bit_length() - 1
        return vector if vector & 0xF0 > self._ppr & 0xF0 else None

    def acknowledge(self, vector: int) -> None:
        """The vCPU took `vector`: IRR to ISR."""
        bit = _BIT[vector]
        with self._lock:
            self._irr &= ~bit
            self._isr |= bit
            self._update_ppr()

    def extint_enabled(self) -> bool:
        """True if the 8259's INTR reaches the vCPU: LINT0 in ExtINT mode, the APIC off, or an ExtINT message."""
        if not self._base & BASE_ENABLED or self._extint_latched:
            return True
        return self._regs[LVT_LINT0] & (LVT_MASKED | 0x700) == EXTINT << 8

    def acknowledge_extint(self) -> int | None:
        """The INTA cycle for an external interrupt: the vector from `ApicBus.extint`, None where there is no 8259."""
        self._extint_latched = False
        extint = self._bus.extint
        return None if extint is None else extint()

    def lint(self, pin: int, asserted: bool) -> None:
        """Drive LINT0 (INTR) or LINT1 (NMI); repeating a level does nothing. "Local Vector Table"."""
        if self._lint[pin] == asserted:
            return
        self._lint[pin] = asserted
        if asserted:
            self._lint_asserted(pin)

    def accepts_logical(self, dest: int) -> bool:
        """Whether a logical destination names this APIC. "Logical Destination Mode"; "Logical Destination Mode in
        x2APIC Mode"."""
        ldr = self._regs[LDR]
        if self._x2apic:
            return dest >> 16 == ldr >> 16 and bool(dest & ldr & 0xFFFF)
        if dest > 0xFF:
            return False
        ldr >>= 24
        if self._regs[DFR] >> 28 == 0xF:
            return bool(dest & ldr)
        return dest >> 4 == ldr >> 4 and bool(dest & ldr & 0xF)

    # -- the xAPIC page -----------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read the xAPIC page; all ones where the page is not decoded (APIC off or in x2APIC mode)."""
        if self._base & _BASE_MODE != BASE_ENABLED:
            return (1 << (8 * size)) - 1
        index = offset >> 4
        if offset & 0xC or not _XAPIC_READABLE >> index & 1:
            self._error(ESR_ILLEGAL_REGISTER)
            return 0
        handler = _READ[index]
        value = self._regs[index] if handler is None else handler(self)
        if size == 4 and not offset & 3:
            return value
        return value >> (8 * (offset & 3)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register of the xAPIC page: 32 bits at a multiple of 16 (narrower writes are zero-extended)."""
        if self._base & _BASE_MODE != BASE_ENABLED:
            return
        handler = None if offset & 0xF else _XAPIC_WRITE[offset >> 4]
        if handler is None:
            self._error(ESR_ILLEGAL_REGISTER)
        else:
            handler(self, value & 0xFFFFFFFF)

    # -- MSRs ---------------------------------------------------------------------------------------------------------

    def rdmsr(self, msr: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; GuestFault(13, 0) where hardware gives #GP."""
        if self._x2apic and MSR_X2APIC_FIRST <= msr <= MSR_X2APIC_LAST:
            index = msr - MSR_X2APIC_FIRST
            if _X2APIC_READABLE >> index & 1:
                handler = _READ[index]
                value = self._regs[index] if handler is None else handler(self)
                return value if index != ICR_LOW else value | self._regs[ICR_HIGH] << 32
        elif msr == MSR_TSC_DEADLINE:
            return self._timer.tsc_deadline
        elif msr == MSR_APIC_BASE:
            return self._base
        raise GuestFault(13, 0)

    def wrmsr(self, msr: int, value: int) -> None:
        """Write what `rdmsr` reads, and the write-only EOI and SELF IPI; GuestFault(13, 0) where hardware gives #GP.

        "x2APIC Register Address Space": reserved bits must be zero.
        """
        if self._x2apic and MSR_X2APIC_FIRST <= msr <= MSR_X2APIC_LAST:
            index = msr - MSR_X2APIC_FIRST
            handler = _X2APIC_WRITE[index]
            if handler is None or value & _X2APIC_RESERVED[index]:
                raise GuestFault(13, 0)
            handler(self, value)
        elif msr == MSR_TSC_DEADLINE:
            self._timer.set_tsc_deadline(value)
        elif msr == MSR_APIC_BASE:
            self._write_base(value)
        else:
            raise GuestFault(13, 0)

    def _write_base(self, value: int) -> None:
        """Change the mode. The page cannot be moved (#GP), as under bhyve. "x2APIC State Transitions"."""
        if (value & ~(BASE_BSP | _BASE_MODE)) != APIC_DEFAULT_BASE:
            raise GuestFault(13, 0)
        old, new = self._base & _BASE_MODE, value & _BASE_MODE
        if new == BASE_X2APIC or (old == 0 and new == _BASE_MODE) or (old == _BASE_MODE and new == BASE_ENABLED):
            raise GuestFault(13, 0)
        with self._lock:
            self._base = value
            self._x2apic = new == _BASE_MODE
            if new == 0:
                self.init()
            elif old != new:
                self._regs[ICR_HIGH] = 0
                self._set_ids()
            self._update_accepting()

    def _set_ids(self) -> None:
        """The ID is the vCPU's in both modes; in x2APIC mode LDR derives from it. "Logical Destination Mode in x2APIC
        Mode"."""
        apic_id = self.apic_id
        if self._x2apic:
            self._regs[ID] = apic_id
            self._regs[LDR] = apic_id >> 4 << 16 | 1 << (apic_id & 15)
        else:
            self._regs[ID] = (apic_id & 0xFF) << 24
            self._regs[LDR] = 0

    # -- registers ----------------------------------------------------------------------------------------------------

    def _update_ppr(self) -> None:
        isr = self._isr
        isrv = isr.bit_length() - 1 if isr else 0
        tpr = self._tpr
        self._ppr = tpr if tpr >> 4 >= isrv >> 4 else isrv & 0xF0

    def _update_accepting(self) -> None:
        self._accepting = bool(self._base & BASE_ENABLED and self._regs[SVR] & SVR_ENABLED)

    def _notify_if_pending(self) -> None:
        if self.pending_vector() is not None:
            self._notify()

    def _read_tpr(self) -> int:
        return self._tpr

    def _write_tpr(self, value: int) -> None:
        with self._lock:
            lowered = value & 0xFF < self._tpr
            self._tpr = value & 0xFF
            self._update_ppr()
        if lowered:
            self._notify_if_pending()

    def _read_ppr(self) -> int:
        return self._ppr

    def _write_eoi(self, value: int) -> None:
        """End the interrupt of the highest priority in service. "Signaling Interrupt Servicing Completion"."""
        with self._lock:
            isr = self._isr
            if not isr:
                return
            vector = isr.bit_length() - 1
            bit = _BIT[vector]
            self._isr = isr ^ bit
            self._update_ppr()
            level = self._tmr & bit
        if level:
            self._lint_eoi(vector)
            self._bus.eoi(vector)
        if self._irr:
            self._notify_if_pending()

    def _write_ldr(self, value: int) -> None:
        self._regs[LDR] = value & 0xFF000000

    def _write_dfr(self, value: int) -> None:
        self._regs[DFR] = value | 0x0FFFFFFF

    def _write_svr(self, value: int) -> None:
        """See "Spurious-Interrupt Vector Register (SVR)"; while software-disabled every LVT entry stays masked."""
        with self._lock:
            self._regs[SVR] = value & _SVR_WRITABLE
            self._update_accepting()
            if not value & SVR_ENABLED:
                for lvt in _LVTS:
                    self._regs[lvt] |= LVT_MASKED
        self._notify_if_pending()

    def _write_esr(self, value: int) -> None:
        """A write latches what has happened since the last one; reads give the latched bits."""
        with self._lock:
            self._regs[ESR] = self._errors
            self._errors = 0

    def _error(self, bits: int) -> None:
        with self._lock:
            news = bits & ~self._errors
            self._errors |= bits
        lvt = self._regs[LVT_ERROR]
        # An illegal vector in the error entry itself would be reported through that entry again, for ever.
        if news and not lvt & LVT_MASKED and lvt & 0xF0:
            self.post(lvt & 0xFF)

    # -- interrupt commands -------------------------------------------------------------------------------------------

    def _write_icr(self, value: int) -> None:
        """The ICR in x2APIC mode: one write of 64 bits, the high half all destination."""
        self._regs[ICR_LOW] = value & _ICR_LOW_WRITABLE
        self._regs[ICR_HIGH] = dest = value >> 32
        self._send(value, dest)

    def _write_icr_low(self, value: int) -> None:
        self._regs[ICR_LOW] = value & _ICR_LOW_WRITABLE
        self._send(value, self._regs[ICR_HIGH] >> 24)

    def _write_icr_high(self, value: int) -> None:
        self._regs[ICR_HIGH] = value & 0xFF000000

    def _write_self_ipi(self, value: int) -> None:
        self._send(1 << 18 | value & 0xFF, 0)

    def _send(self, low: int, dest: int) -> None:
        mode = low >> 8 & 7
        vector = low & 0xFF
        shorthand = low >> 18 & 3
        if mode in (FIXED, LOWEST_PRIORITY):
            if vector < 16:
                self._error(ESR_SEND_ILLEGAL)
                return
        elif mode == INIT:
            if low & (_ICR_LEVEL | _ICR_ASSERT) == _ICR_LEVEL:
                return  # INIT level de-assert only synchronized arbitration ids, on processors long gone
        elif mode != NMI and mode != STARTUP:
            return
        if shorthand == 0:
            self._bus.deliver(dest, bool(low & _ICR_LOGICAL), mode, vector, False, self._x2apic)
        elif shorthand == 1:
            self.receive(mode, vector, False)
        else:
            self._bus.deliver_all(mode, vector, self if shorthand == 3 else None)

    # -- local vector table -------------------------------------------------------------------------------------------

    def _write_lvt(self, index: int, value: int) -> None:
        value &= _LVT_WRITABLE[index]
        if not self._regs[SVR] & SVR_ENABLED:
            value |= LVT_MASKED
        self._regs[index] = value

    def _write_lvt_cmci(self, value: int) -> None:
        self._write_lvt(LVT_CMCI, value)

    def _write_lvt_thermal(self, value: int) -> None:
        self._write_lvt(LVT_THERMAL, value)

    def _write_lvt_pmc(self, value: int) -> None:
        self._write_lvt(LVT_PMC, value)

    def _write_lvt_error(self, value: int) -> None:
        self._write_lvt(LVT_ERROR, value)

    def _write_lvt_lint0(self, value: int) -> None:
        self._write_lvt_lint(0, value)

    def _write_lvt_lint1(self, value: int) -> None:
        self._write_lvt_lint(1, value)

    def _write_lvt_lint(self, pin: int, value: int) -> None:
        index = LVT_LINT0 + pin
        remote_irr = self._regs[index] & _LVT_REMOTE_IRR if value & _LVT_LEVEL else 0
        self._write_lvt(index, value)
        self._regs[index] |= remote_irr
        if self._lint[pin] and (value & _LVT_LEVEL or value >> 8 & 7 == EXTINT):
            self._lint_asserted(pin)

    def _lint_asserted(self, pin: int) -> None:
        if not self._base & BASE_ENABLED:
            # "Local APIC Status and Location": with the APIC off the pins are the processor's INTR and NMI.
            (self._notify if pin == 0 else self._on_nmi)()
            return
        index = LVT_LINT0 + pin
        lvt = self._regs[index]
        if lvt & LVT_MASKED:
            return
        mode = lvt >> 8 & 7
        if mode == EXTINT:
            self._notify()
        elif mode != FIXED:
            self.receive(mode, lvt & 0xFF, False)
        elif not lvt & _LVT_LEVEL:
            self.post(lvt & 0xFF)
        elif not lvt & _LVT_REMOTE_IRR and self.post(lvt & 0xFF, True):
            self._regs[index] |= _LVT_REMOTE_IRR

    def _lint_eoi(self, vector: int) -> None:
        for pin in (0, 1):
            index = LVT_LINT0 + pin
            lvt = self._regs[index]
            if lvt & _LVT_REMOTE_IRR and lvt & 0xFF == vector:
                self._regs[index] = lvt & ~_LVT_REMOTE_IRR
                if self._lint[pin]:
                    self._lint_asserted(pin)

    # -- the timer ----------------------------------------------------------------------------------------------------

    def _write_lvt_timer(self, value: int) -> None:
        self._write_lvt(LVT_TIMER, value)
        self._timer.set_mode(value >> 17 & 3)

    def _timer_expired(self) -> None:
        lvt = self._regs[LVT_TIMER]
        if not lvt & LVT_MASKED:
            self.post(lvt & 0xFF)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VlapicV1:
        with self._lock:
            regs = list(self._regs)
            regs[TPR] = self._tpr
            return VlapicV1(
                apic_id=self.apic_id,
                base=self._base,
                regs=tuple(regs),
                irr=self._irr,
                isr=self._isr,
                tmr=self._tmr,
                errors=self._errors,
                lint=(self._lint[0], self._lint[1]),
                extint_latched=self._extint_latched,
                timer=self._timer.save(),
            )

    def restore(self, state: VlapicV1) -> None:
        """Take over a saved state (of the same id: ValueError); the guest's TSC must have been restored before."""
        if state.apic_id != self.apic_id:
            raise ValueError(f"state of local APIC {state.apic_id} given to local APIC {self.apic_id}")
        with self._lock:
            self._base = state.base
            self._x2apic = state.base & _BASE_MODE == _BASE_MODE
            self._regs = list(state.regs)
            self._tpr = state.regs[TPR]
            self._irr, self._isr, self._tmr = state.irr, state.isr, state.tmr
            self._errors = state.errors
            self._lint = list(state.lint)
            self._extint_latched = state.extint_latched
            self._timer.restore(state.timer)
            self._update_accepting()
            self._update_ppr()
        self._notify_if_pending()


_Read = Callable[[Vlapic], int]
_Write = Callable[[Vlapic, int], None]


def _part(kind: str, shift: int) -> _Read:
    """Read 32 bits of a 256-bit register."""
    if kind == "isr":
        return lambda vlapic: vlapic._isr >> shift & 0xFFFFFFFF
    if kind == "tmr":
        return lambda vlapic: vlapic._tmr >> shift & 0xFFFFFFFF
    return lambda vlapic: vlapic._irr >> shift & 0xFFFFFFFF


def _ignore(vlapic: Vlapic, value: int) -> None:
    """A write to a read-only register of the xAPIC page."""


def _table(entries: dict[int, _Write]) -> tuple[_Write | None, ...]:
    return tuple(entries.get(index) for index in range(256))


_WIDE: Final = {
    first + n: _part(kind, 32 * n) for kind, first in (("isr", ISR0), ("tmr", TMR0), ("irr", IRR0)) for n in range(8)
}
# None: the register is what `_regs` holds.
_READ: Final[tuple[_Read | None, ...]] = tuple(
    {
        TPR: Vlapic._read_tpr,
        PPR: Vlapic._read_ppr,
        TIMER_INITIAL: lambda vlapic: vlapic._timer.initial,
        TIMER_CURRENT: lambda vlapic: vlapic._timer.current(),
        TIMER_DIVIDE: lambda vlapic: vlapic._timer.divide,
        **_WIDE,
    }.get(index)
    for index in range(256)
)
_WRITE: Final[dict[int, _Write]] = {
    TPR: Vlapic._write_tpr,
    EOI: Vlapic._write_eoi,
    SVR: Vlapic._write_svr,
    ESR: Vlapic._write_esr,
    LVT_CMCI: Vlapic._write_lvt_cmci,
    LVT_TIMER: Vlapic._write_lvt_timer,
    LVT_THERMAL: Vlapic._write_lvt_thermal,
    LVT_PMC: Vlapic._write_lvt_pmc,
    LVT_LINT0: Vlapic._write_lvt_lint0,
    LVT_LINT1: Vlapic._write_lvt_lint1,
    LVT_ERROR: Vlapic._write_lvt_error,
    TIMER_INITIAL: lambda vlapic, value: vlapic._timer.set_initial(value),
    TIMER_DIVIDE: lambda vlapic, value: vlapic._timer.set_divide(value),
}
_READ_ONLY: Final = (ID, VERSION, APR, PPR, RRD, TIMER_CURRENT, *_WIDE)
_XAPIC_WRITE: Final = _table(
    {
        **_WRITE,
        **dict.fromkeys(_READ_ONLY, _ignore),
        LDR: Vlapic._write_ldr,
        DFR: Vlapic._write_dfr,
        ICR_LOW: Vlapic._write_icr_low,
        ICR_HIGH: Vlapic._write_icr_high,
    }
)
_X2APIC_WRITE: Final = _table({**_WRITE, ICR_LOW: Vlapic._write_icr, SELF_IPI: Vlapic._write_self_ipi})
_X2APIC_WRITABLE: Final = {
    TPR: 0xFF,
    SVR: _SVR_WRITABLE,
    ICR_LOW: ~_ICR_LOW_RESERVED_X2APIC,
    TIMER_INITIAL: 0xFFFFFFFF,
    TIMER_DIVIDE: 0xB,
    SELF_IPI: 0xFF,
    **{lvt: writable | _LVT_DELIVERY_STATUS for lvt, writable in _LVT_WRITABLE.items()},
    LVT_LINT0: _LVT_WRITABLE[LVT_LINT0] | _LVT_DELIVERY_STATUS | _LVT_REMOTE_IRR,
    LVT_LINT1: _LVT_WRITABLE[LVT_LINT1] | _LVT_DELIVERY_STATUS | _LVT_REMOTE_IRR,
}
_X2APIC_RESERVED: Final = tuple(~_X2APIC_WRITABLE.get(index, 0) for index in range(256))

_BOTH_READABLE: Final = (ID, VERSION, TPR, PPR, LDR, SVR, ESR, ICR_LOW, TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE,
                         *_LVTS, *_WIDE)  # fmt: skip
_X2APIC_READABLE: Final = sum(1 << index for index in _BOTH_READABLE)
_XAPIC_READABLE: Final = sum(1 << index for index in (*_BOTH_READABLE, APR, EOI, RRD, DFR, ICR_HIGH))
