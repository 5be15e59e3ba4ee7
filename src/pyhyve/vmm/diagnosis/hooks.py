"""How a trace gets to see interrupts: the chips' own classes are exchanged for ones that report, and put back.

While nothing is traced, the chips run the code that they would run without this module: there is nothing to test for,
and nothing to pay. An object may change its class because the new one adds methods only.
"""

from collections.abc import Callable

from pyhyve.vmm.diagnosis.trace import EXTERNAL, NMI_VECTOR, InterruptTrace
from pyhyve.vmm.io.apicbus import ApicBus, LocalApic
from pyhyve.vmm.io.apicregs import EOI, LVT_TIMER, MSR_X2APIC_FIRST
from pyhyve.vmm.io.vioapic import RTE_MASKED, RTE_REMOTE_IRR, RTE_VECTOR, Vioapic
from pyhyve.vmm.io.vlapic import Vlapic
from pyhyve.vmm.io.vlapicprocessortimer import ProcessorTimer
from pyhyve.vmm.io.vlapictimer import VlapicTimer
from pyhyve.vmm.vcpu import Vcpu
from pyhyve.vmm.vm import Vm

_EOI_MSR = MSR_X2APIC_FIRST + EOI
_EOI_OFFSET = EOI << 4


def attach(trace: InterruptTrace, vm: Vm, vioapic: Vioapic) -> Callable[[], None]:
    """Let `trace` see what happens from now on; return how to end that. The VM stands still at both."""
    undo = [_swap(vm.apic_bus, _traced_bus(trace)), _swap(vioapic, _traced_vioapic(trace))]
    for vcpu in vm.vcpus:
        assert isinstance(vcpu.vlapic, Vlapic)
        undo.append(_swap(vcpu.vlapic, _traced_vlapic(trace, vcpu.index)))
        undo.append(_watch_eoi_msr(trace, vcpu))
        undo.append(_watch_nmis(trace, vcpu))
        undo.append(_hand_over(vm, vcpu, vcpu.vlapic))

    def detach() -> None:
        for each in reversed(undo):
            each()

    return detach


def _swap(chip: object, traced: type) -> Callable[[], None]:
    plain = type(chip)
    chip.__class__ = traced

    def put_back() -> None:
        chip.__class__ = plain

    return put_back


def _hand_over(vm: Vm, vcpu: Vcpu, vlapic: Vlapic) -> Callable[[], None]:
    """A processor that keeps timers and delivers interrupts itself leaves that to the monitor while it is watched."""
    state, own = vlapic.state, vlapic._timer
    if not isinstance(own, ProcessorTimer):
        return _nothing
    monitors = VlapicTimer(vm.clock, vm.timers, vlapic._lock, vcpu.tsc.now, vcpu.tsc.hz, vlapic._timer_expired)
    direct, state.direct = state.direct, False
    _move_timer(vlapic, own, monitors)

    def take_back() -> None:
        _move_timer(vlapic, monitors, own)
        state.direct = direct

    return take_back


def _move_timer(vlapic: Vlapic, source: VlapicTimer | ProcessorTimer, target: VlapicTimer | ProcessorTimer) -> None:
    saved = source.save()
    source.reset()
    target.restore(saved, vlapic._regs[LVT_TIMER])
    vlapic._timer = target


def _nothing() -> None:
    pass


def _highest(bits: int) -> int:
    return bits.bit_length() - 1


def _traced_vlapic(trace: InterruptTrace, index: int) -> type:
    class TracedVlapic(Vlapic):
        __slots__ = ()

        def accept(self, vector: int, level: bool) -> None:
            local = "timer" if self._regs[LVT_TIMER] & 0xFF == vector else "local"
            trace.accepted(index, vector, bool(self.irr >> vector & 1), local)
            super().accept(vector, level)

        def acknowledge(self, vector: int) -> int:
            taken = super().acknowledge(vector)
            trace.delivered(index, taken)
            return taken

        def acknowledge_extint(self) -> int | None:
            vector = super().acknowledge_extint()
            if vector is not None:
                trace.accepted(index, vector, False, EXTERNAL)
                trace.delivered(index, vector)
            return vector

        def write(self, offset: int, size: int, value: int) -> None:
            if offset == _EOI_OFFSET:
                before = self.isr
                if before:
                    trace.ended(index, _highest(before))
            super().write(offset, size, value)

    return TracedVlapic


def _watch_eoi_msr(trace: InterruptTrace, vcpu: Vcpu) -> Callable[[], None]:
    """In x2APIC mode an EOI comes by the table of MSRs, which has the plain chip's method."""
    writers = vcpu.msrs.writers
    plain = writers[_EOI_MSR]
    vlapic = vcpu.vlapic
    assert isinstance(vlapic, Vlapic)

    def traced(msr: int, value: int) -> None:
        if vlapic.x2apic and vlapic.isr and not value:
            trace.ended(vcpu.index, _highest(vlapic.isr))
        plain(msr, value)

    writers[_EOI_MSR] = traced

    def put_back() -> None:
        writers[_EOI_MSR] = plain

    return put_back


def _watch_nmis(trace: InterruptTrace, vcpu: Vcpu) -> Callable[[], None]:
    """NMIs pass the vCPU itself: an attribute of its own hides its class's method."""
    plain = vcpu._take_nmi

    def traced() -> None:
        before = vcpu.nmis_delivered
        plain()
        if vcpu.nmis_delivered != before:
            trace.accepted(vcpu.index, NMI_VECTOR, False, "NMI")
            trace.delivered(vcpu.index, NMI_VECTOR)

    vcpu.__dict__["_take_nmi"] = traced

    def put_back() -> None:
        vcpu.__dict__.pop("_take_nmi", None)

    return put_back


def _traced_bus(trace: InterruptTrace) -> type:
    class TracedApicBus(ApicBus):
        __slots__ = ()

        def send_msi(self, addr: int, data: int) -> None:
            before = trace.raised("MSI", data & 0xFF)
            try:
                super().send_msi(addr, data)
            finally:
                trace.settled(before)

        def deliver(
            self, dest: int, logical: bool, mode: int, vector: int, level_trigger: bool, x2apic: bool = False
        ) -> int:
            before = trace.raised("IPI", vector)
            try:
                return super().deliver(dest, logical, mode, vector, level_trigger, x2apic)
            finally:
                trace.settled(before)

        def deliver_all(self, mode: int, vector: int, exclude: LocalApic | None) -> None:
            before = trace.raised("IPI", vector)
            try:
                super().deliver_all(mode, vector, exclude)
            finally:
                trace.settled(before)

    return TracedApicBus


def _traced_vioapic(trace: InterruptTrace) -> type:
    class TracedVioapic(Vioapic):
        __slots__ = ()

        def _send(self, pin: int) -> None:
            entry = self._entries[pin]
            if entry & (RTE_MASKED | RTE_REMOTE_IRR):
                super()._send(pin)
                return
            before = trace.raised(f"pin {pin}", entry & RTE_VECTOR)
            try:
                super()._send(pin)
            finally:
                trace.settled(before)

    return TracedVioapic
