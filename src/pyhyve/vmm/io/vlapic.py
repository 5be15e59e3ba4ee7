"""The local APIC of one vCPU, in xAPIC and x2APIC mode; its timer is in vlapictimer.

Intel SDM vol 3, chapter "Advanced Programmable Interrupt Controller (APIC)". Registers go by `offset >> 4` of the
xAPIC page, which is also `msr - 0x800` in x2APIC mode. IRR, ISR and TMR are ints of 256 bits.

Threads: `post` and `receive` from any, everything else from the vCPU's own; `pending_vector` takes no lock, and
`notify`, `on_*` and the bus are called with no lock held, so that they may take the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from pyhyve.base.errors import GuestFault
from pyhyve.base.protocols import Clock, Timers
from pyhyve.cpu.processor import ApicState
from pyhyve.vmm.io.apicbus import EXTINT, FIXED, INIT, LOWEST_PRIORITY, NMI, STARTUP, ApicBus
from pyhyve.vmm.io.apicregs import (
    APIC_DEFAULT_BASE,
    APR,
    BASE_BSP,
    BASE_ENABLED,
    BASE_MODE,
    DFR,
    EOI,
    ESR,
    ESR_ILLEGAL_REGISTER,
    ESR_RECEIVE_ILLEGAL,
    ICR_HIGH,
    ICR_LOW,
    ID,
    IRR0,
    ISR0,
    LDR,
    LVT_CMCI,
    LVT_ERROR,
    LVT_LINT0,
    LVT_LINT1,
    LVT_MASKED,
    LVT_TIMER,
    LVTS,
    MSR_APIC_BASE,
    MSR_TSC_DEADLINE,
    MSR_X2APIC_FIRST,
    MSR_X2APIC_LAST,
    PPR,
    RRD,
    SELF_IPI,
    SVR,
    SVR_ENABLED,
    SVR_EOI_SUPPRESSED,
    SVR_NO_FOCUS,
    TIMER_CURRENT,
    TIMER_DIVIDE,
    TIMER_INITIAL,
    TMR0,
    TPR,
    VERSION,
    ApicFeatures,
    x2apic_reserved,
)
from pyhyve.vmm.io.vlapicicr import InterruptCommands
from pyhyve.vmm.io.vlapiclvt import INTR, LocalVectorTable
from pyhyve.vmm.io.vlapicpriority import Priorities
from pyhyve.vmm.io.vlapicprocessortimer import ProcessorTimer
from pyhyve.vmm.io.vlapictimer import APIC_BUS_HZ as APIC_BUS_HZ
from pyhyve.vmm.io.vlapictimer import VlapicTimer, VlapicTimerV1


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


class Vlapic(Priorities):
    """One local APIC. `tsc()` is the guest's time-stamp counter, `tsc_hz` its rate.

    state: where the processor keeps the interrupts' state, if it does. notify: called when something new may be
    deliverable, and the processor does not know. on_init: an INIT arrived (the owner calls `init()` from the
    vCPU's thread). on_sipi(vector), on_nmi: likewise for the vCPU to handle. on_base: IA32_APIC_BASE has changed.

    page: the number of the page (gpa >> 12) that this APIC decodes for its processor; -1 while it decodes none.
    """

    __slots__ = (
        "_base", "_bus", "_errors", "_extint_latched", "_features", "_icr", "_lvt", "_on_base", "_on_init", "_on_nmi",
        "_on_sipi", "_regs", "_timer", "_x2apic", "_x2apic_reserved", "apic_id", "page", "physical_id",
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
        on_base: Callable[[], None] = _nothing,
        state: ApicState | None = None,
        features: ApicFeatures | None = None,
    ) -> None:
        super().__init__(notify, state)
        self.apic_id = apic_id
        self._bus = bus
        self._on_init = on_init
        self._on_sipi = on_sipi
        self._on_nmi = on_nmi
        self._on_base = on_base
        self._features = features = features or ApicFeatures()
        self._x2apic_reserved = x2apic_reserved(features)
        timer = self.state.timer
        self._timer: VlapicTimer | ProcessorTimer
        if timer is None:
            self._timer = VlapicTimer(clock, timers, self._lock, tsc, tsc_hz, self._timer_expired)
        else:
            self._timer = ProcessorTimer(timer, tsc, tsc_hz)
        self._regs = [0] * 64
        self._lvt: LocalVectorTable = LocalVectorTable(self._regs, self, notify, features)
        self._icr: InterruptCommands = InterruptCommands(self.state, self, bus)
        self._base = 0
        self.page = -1
        self.physical_id = apic_id
        self._x2apic = False
        self._errors = 0
        self._extint_latched = False
        self._power_up()

    # -- state that others look at ------------------------------------------------------------------------------------

    @property
    def base_msr(self) -> int:
        """IA32_APIC_BASE: bit 11 is clear while the APIC is off, bit 10 is set in x2APIC mode."""
        return self._base

    @property
    def x2apic(self) -> bool:
        return self._x2apic

    def reset(self) -> None:
        """Power-up state; the LINT pins keep the levels that others drive."""
        with self._lock:
            self._power_up()
        self._on_base()

    def _power_up(self) -> None:
        self._set_base(APIC_DEFAULT_BASE | BASE_ENABLED | (BASE_BSP if self.apic_id == 0 else 0))
        self.init()

    def init(self) -> None:
        """What an INIT leaves: registers as at power-up, but IA32_APIC_BASE and the ID stay.

        "Local APIC State After It Receives an INIT-Deassert IPI", "x2APIC States".
        """
        with self._lock:
            regs = self._regs
            regs[:] = [0] * 64
            regs[VERSION] = self._features.version
            regs[DFR] = 0xFFFFFFFF
            regs[SVR] = 0xFF
            self._lvt.mask_all()
            self._timer.reset()
            self.state.clear()
            self._spurious = 0xFF
            self._errors = 0
            self._extint_latched = False
            self.state.accepting = False
            self._set_ids()

    def virtual_wire(self) -> None:
        """What firmware leaves to a boot processor: enabled, the 8259's INTR on LINT0, NMI on LINT1.

        MultiProcessor Specification, "Virtual Wire Mode". For machines that start a kernel without firmware.
        """
        self._write_svr(SVR_ENABLED | 0xFF)
        self._lvt.write(LVT_LINT0, EXTINT << 8)
        self._lvt.write(LVT_LINT1, NMI << 8)

    # -- interrupts in and out ----------------------------------------------------------------------------------------

    def post(self, vector: int, level: bool = False) -> bool:
        """Accept a fixed interrupt into IRR (any thread); return whether it was accepted."""
        if not self.state.accepting:
            return False
        if vector < 16:
            self.error(ESR_RECEIVE_ILLEGAL)
            return False
        self.accept(vector, level)
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

    def extint_enabled(self) -> bool:
        """True if the 8259's INTR reaches the vCPU: LINT0 in ExtINT mode, the APIC off, or an ExtINT message."""
        if not self._base & BASE_ENABLED or self._extint_latched:
            return True
        return self._lvt.takes_extint()

    def acknowledge_extint(self) -> int | None:
        """The INTA cycle for an external interrupt: the vector from `ApicBus.extint`, None where there is no 8259."""
        self._extint_latched = False
        extint = self._bus.extint
        return None if extint is None else extint()

    def lint(self, pin: int, asserted: bool) -> None:
        """Drive LINT0 (INTR) or LINT1 (NMI); repeating a level does nothing. "Local Vector Table"."""
        pins = self._lvt.pins
        if pins[pin] == asserted:
            return
        pins[pin] = asserted
        if self._base & BASE_ENABLED:
            if self._lvt.active(pin):
                self._lvt.lint_active(pin)
        elif asserted:
            # "Local APIC Status and Location": with the APIC off the pins are the processor's INTR and NMI.
            (self._notify if pin == INTR else self._on_nmi)()

    def local_interrupt(self, index: int) -> None:
        """A source on the processor itself wants the interrupt of its entry: LVT_THERMAL, LVT_PMC or LVT_CMCI."""
        self._lvt.raise_moded(index)

    def is_focus(self, vector: int) -> bool:
        """Whether a lowest-priority interrupt belongs here: it is in hand, and focus checking is not switched off."""
        return self.in_hand(vector) and not self._regs[SVR] & SVR_NO_FOCUS

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
        if self.page < 0:
            return (1 << (8 * size)) - 1
        index = offset >> 4
        if offset & 0xC or not _XAPIC_READABLE >> index & 1 or self._is_absent(index):
            self.error(ESR_ILLEGAL_REGISTER)
            return 0
        handler = _READ[index]
        value = self._regs[index] if handler is None else handler(self)
        if size == 4 and not offset & 3:
            return value
        return value >> (8 * (offset & 3)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register of the xAPIC page: 32 bits at a multiple of 16 (narrower writes are zero-extended)."""
        if self.page < 0:
            return
        index = offset >> 4
        handler = None if offset & 0xF else _XAPIC_WRITE[index]
        if handler is None or self._is_absent(index):
            self.error(ESR_ILLEGAL_REGISTER)
        else:
            handler(self, value & 0xFFFFFFFF)

    # -- MSRs ---------------------------------------------------------------------------------------------------------

    def rdmsr(self, msr: int) -> int:
        """IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register; GuestFault(13, 0) where hardware gives #GP."""
        if self._x2apic and MSR_X2APIC_FIRST <= msr <= MSR_X2APIC_LAST:
            index = msr - MSR_X2APIC_FIRST
            if _X2APIC_READABLE >> index & 1 and not self._is_absent(index):
                handler = _READ[index]
                value = self._regs[index] if handler is None else handler(self)
                return value if index != ICR_LOW else value | self.state.icr_high << 32
        elif msr == MSR_TSC_DEADLINE and self._features.tsc_deadline:
            return self._timer.read_tsc_deadline()
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
            if handler is None or value & self._x2apic_reserved[index] or self._is_absent(index):
                raise GuestFault(13, 0)
            handler(self, value)
        elif msr == MSR_TSC_DEADLINE and self._features.tsc_deadline:
            self._timer.set_tsc_deadline(value)
        elif msr == MSR_APIC_BASE:
            self._write_base(value)
        else:
            raise GuestFault(13, 0)

    def _is_absent(self, index: int) -> bool:
        """A register that only some local APICs have."""
        return index == LVT_CMCI and not self._features.cmci

    def _write_base(self, value: int) -> None:
        """Change the mode, or move the page. "x2APIC State Transitions".

        Switching off resets the registers. The way to x2APIC mode keeps them, but for the high half of ICR, ID and LDR.
        """
        old, new = self._base & BASE_MODE, value & BASE_MODE
        if value & self._features.base_reserved or new not in _NEXT_MODES[old]:
            raise GuestFault(13, 0)
        with self._lock:
            self._set_base(value)
            if new == 0:
                self.init()
            elif old != new:
                self.state.icr_high = 0
                self._set_ids()
            self._update_accepting()
        self._on_base()

    def _set_base(self, value: int) -> None:
        self._base = value
        self._x2apic = value & BASE_MODE == BASE_MODE
        self.page = value >> 12 if value & BASE_MODE == BASE_ENABLED else -1

    def _set_ids(self) -> None:
        """The ID is again the vCPU's; in x2APIC mode LDR derives from it. "Logical Destination Mode in x2APIC Mode"."""
        apic_id = self.apic_id
        if self._x2apic:
            self._regs[ID] = apic_id
            self._regs[LDR] = apic_id >> 4 << 16 | 1 << (apic_id & 15)
        else:
            self._regs[ID] = (apic_id & 0xFF) << 24
            self._regs[LDR] = 0
        self._answer_to_id()

    def _answer_to_id(self) -> None:
        """Let IPIs find this APIC by what its ID register holds; an id that has no room there stays."""
        apic_id = self._regs[ID] if self._x2apic else self._regs[ID] >> 24
        self.physical_id = self.apic_id if self.apic_id > 0xFF else apic_id
        self._bus.renumber()
        self._configure()

    def _configure(self) -> None:
        regs = self._regs
        self.state.configure(self.physical_id, bool(self._base & BASE_ENABLED), self._x2apic, regs[LDR], regs[DFR])

    # -- registers ----------------------------------------------------------------------------------------------------

    def _update_accepting(self) -> None:
        self.state.accepting = bool(self._base & BASE_ENABLED and self._regs[SVR] & SVR_ENABLED)

    def _write_eoi(self, value: int) -> None:
        """End the interrupt of the highest priority in service. "Signaling Interrupt Servicing Completion"."""
        level = self.state.complete()
        if level >= 0:
            self._lvt.eoi(level)
            # Suppressed, the guest writes the EOI register of the I/O APIC itself. "EOI-Broadcast Suppression".
            if not self._regs[SVR] & SVR_EOI_SUPPRESSED:
                self._bus.eoi(level)
        self._notify_if_pending()

    def _write_id(self, value: int) -> None:
        """In xAPIC mode software may give an APIC another id, until the next reset or change of mode."""
        self._regs[ID] = value & 0xFF000000
        self._answer_to_id()

    def _write_ldr(self, value: int) -> None:
        self._regs[LDR] = value & 0xFF000000
        self._configure()

    def _write_dfr(self, value: int) -> None:
        self._regs[DFR] = value | 0x0FFFFFFF
        self._configure()

    def _write_svr(self, value: int) -> None:
        """See "Spurious-Interrupt Vector Register (SVR)"; while software-disabled every LVT entry stays masked."""
        with self._lock:
            self._regs[SVR] = value & self._features.writable(SVR)
            self._spurious = value & 0xFF
            self._update_accepting()
            if not value & SVR_ENABLED:
                self._lvt.mask_all()
        if not value & SVR_ENABLED:
            self._timer.set_lvt(self._regs[LVT_TIMER])

    def _write_esr(self, value: int) -> None:
        """A write latches what has happened since the last one; reads give the latched bits."""
        with self._lock:
            if self._timer.take_error():
                self._errors |= ESR_RECEIVE_ILLEGAL
            self._regs[ESR] = self._errors
            self._errors = 0

    def error(self, bits: int) -> None:
        """Note an error for ESR, and raise the error entry's interrupt."""
        with self._lock:
            news = bits & ~self._errors
            self._errors |= bits
        lvt = self._regs[LVT_ERROR]
        # An illegal vector in the error entry itself would be reported through that entry again, for ever.
        if news and not lvt & LVT_MASKED and lvt & 0xF0:
            self.post(lvt & 0xFF)

    # -- the timer ----------------------------------------------------------------------------------------------------

    def _write_lvt_timer(self, value: int) -> None:
        self._lvt.write(LVT_TIMER, value)
        self._timer.set_lvt(self._regs[LVT_TIMER])

    def tsc_written(self, delta: int) -> None:
        """The guest has moved its TSC by so much."""
        self._timer.tsc_written(delta)

    def _timer_expired(self) -> None:
        self._lvt.raise_fixed(LVT_TIMER)

    # -- saved state --------------------------------------------------------------------------------------------------

    def save(self) -> VlapicV1:
        with self._lock:
            regs = list(self._regs)
            state = self.state
            regs[TPR], regs[ICR_LOW], regs[ICR_HIGH] = state.tpr, state.icr_low, state.icr_high
            return VlapicV1(
                apic_id=self.apic_id,
                base=self._base,
                regs=tuple(regs),
                irr=state.irr,
                isr=state.isr,
                tmr=state.tmr,
                errors=self._errors,
                lint=(self._lvt.pins[0], self._lvt.pins[1]),
                extint_latched=self._extint_latched,
                timer=self._timer.save(),
            )

    def restore(self, saved: VlapicV1) -> None:
        """Take over a saved state (of the same id: ValueError); the guest's TSC must have been restored before."""
        if saved.apic_id != self.apic_id:
            raise ValueError(f"state of local APIC {saved.apic_id} given to local APIC {self.apic_id}")
        with self._lock:
            self._set_base(saved.base)
            self._regs[:] = saved.regs
            self._regs[VERSION] = self._features.version
            self._spurious = saved.regs[SVR] & 0xFF
            state = self.state
            state.irr, state.isr, state.tmr = saved.irr, saved.isr, saved.tmr
            state.tpr, state.icr_low, state.icr_high = (saved.regs[index] for index in (TPR, ICR_LOW, ICR_HIGH))
            self._errors = saved.errors
            self._lvt.restore_pins(saved.lint)
            self._extint_latched = saved.extint_latched
            self._timer.restore(saved.timer, saved.regs[LVT_TIMER])
            self._update_accepting()
            self._answer_to_id()
        self._on_base()
        self._notify_if_pending()


_NEXT_MODES: Final = {
    0: (0, BASE_ENABLED),
    BASE_ENABLED: (0, BASE_ENABLED, BASE_MODE),
    BASE_MODE: (0, BASE_MODE),
}
"""IA32_APIC_BASE bits 11:10, and what they may become without #GP."""

_Read = Callable[[Vlapic], int]
_Write = Callable[[Vlapic, int], None]


def _part(kind: str, shift: int) -> _Read:
    """Read 32 bits of a 256-bit register."""
    if kind == "isr":
        return lambda vlapic: vlapic.state.isr >> shift & 0xFFFFFFFF
    if kind == "tmr":
        return lambda vlapic: vlapic.state.tmr >> shift & 0xFFFFFFFF
    return lambda vlapic: vlapic.state.irr >> shift & 0xFFFFFFFF


def _lvt(index: int) -> _Write:
    return lambda vlapic, value: vlapic._lvt.write(index, value)


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
        TPR: lambda vlapic: vlapic.state.tpr,
        PPR: lambda vlapic: vlapic.state.ppr,
        ICR_LOW: lambda vlapic: vlapic.state.icr_low,
        ICR_HIGH: lambda vlapic: vlapic.state.icr_high,
        TIMER_INITIAL: lambda vlapic: vlapic._timer.initial,
        TIMER_CURRENT: lambda vlapic: vlapic._timer.current(),
        TIMER_DIVIDE: lambda vlapic: vlapic._timer.divide,
        **_WIDE,
    }.get(index)
    for index in range(256)
)
_WRITE: Final[dict[int, _Write]] = {
    **{index: _lvt(index) for index in LVTS},
    TPR: Vlapic._write_tpr,
    EOI: Vlapic._write_eoi,
    SVR: Vlapic._write_svr,
    ESR: Vlapic._write_esr,
    LVT_TIMER: Vlapic._write_lvt_timer,
    TIMER_INITIAL: lambda vlapic, value: vlapic._timer.set_initial(value),
    TIMER_DIVIDE: lambda vlapic, value: vlapic._timer.set_divide(value),
}
_READ_ONLY: Final = (VERSION, APR, PPR, RRD, TIMER_CURRENT, *_WIDE)
_XAPIC_WRITE: Final = _table(
    {
        **_WRITE,
        **dict.fromkeys(_READ_ONLY, _ignore),
        ID: Vlapic._write_id,
        LDR: Vlapic._write_ldr,
        DFR: Vlapic._write_dfr,
        ICR_LOW: lambda vlapic, value: vlapic._icr.write_low(value),
        ICR_HIGH: lambda vlapic, value: vlapic._icr.write_high(value),
    }
)
_X2APIC_WRITE: Final = _table(
    {
        **_WRITE,
        ICR_LOW: lambda vlapic, value: vlapic._icr.write(value),
        SELF_IPI: lambda vlapic, value: vlapic._icr.write_self_ipi(value),
    }
)
_BOTH_READABLE: Final = (ID, VERSION, TPR, PPR, LDR, SVR, ESR, ICR_LOW, TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE,
                         *LVTS, *_WIDE)  # fmt: skip
_X2APIC_READABLE: Final = sum(1 << index for index in _BOTH_READABLE)
_XAPIC_READABLE: Final = sum(1 << index for index in (*_BOTH_READABLE, APR, EOI, RRD, DFR, ICR_HIGH))
